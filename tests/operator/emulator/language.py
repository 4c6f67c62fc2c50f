"""What kernels find in the place of Gluon: `gl`, its modules for Hopper, and the inline assembly that this project writes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gluon_language

from blockmoe.operator.launch import ALIGNMENT
from emulator import shared
from emulator.machine import Barrier, Machine, Role
from emulator.memory import Fault, Pointer, Values, kind_of, values


def scalar(value: Any) -> Any:
    """Numbers of the host's kind for integers; float32 else."""
    return int(value) if np.issubdtype(np.asarray(value).dtype, np.integer) else np.float32(value)


def result(array: Any) -> Any:
    return values(array) if np.ndim(array) else scalar(array)


# --- values ---------------------------------------------------------------------------------------------------------


def arange(start: int, end: int, layout: Any = None) -> Values:
    return values(np.arange(start, end, dtype=np.int32))


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Values:
    return values(np.full(tuple(shape), value, np.float32 if kind_of(dtype).size < 4 else kind_of(dtype).storage))


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Values:
    return full(shape, 0, dtype)


def full_like(like: Any, value: Any) -> Any:
    return values(np.full_like(like, value)) if np.ndim(like) else value


def where(condition: Any, yes: Any, no: Any) -> Any:
    if not any(isinstance(given, np.ndarray) for given in (condition, yes, no)):
        return yes if condition else no
    yes, no = (np.int32(given) if type(given) is int else given for given in (yes, no))
    return values(np.where(condition, yes, no))


def pick(function: Any, of_scalars: Any) -> Any:
    def both(a: Any, b: Any) -> Any:
        return values(function(a, b)) if np.ndim(a) or np.ndim(b) else of_scalars(a, b)

    return both


def reduce(function: Any) -> Any:
    return lambda given, axis=None: result(function(given, axis=axis))


# --- memory ---------------------------------------------------------------------------------------------------------


def load(at: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "", eviction_policy: str = "") -> Any:
    elements, there = at.places(mask)
    found = np.zeros(there.shape, np.asarray(at.kind.decode(np.zeros(1, at.kind.storage))).dtype)
    found[...] = 0x5A5A if other is None else other  # what is masked and has no other value is undefined
    found[there] = at.read(elements, there, Machine.current.access("a load"))
    return result(found)


def store(at: Pointer, given: Any, mask: Any = None, eviction_policy: str = "") -> None:
    elements, there = at.places(mask)
    at.write(elements, there, given, Machine.current.access("a store"))


def atomic(change: Any) -> Any:
    def act(at: Pointer, given: int, sem: str = "acq_rel") -> int:
        role = Machine.current
        role.pause()
        elements, there = at.places(None)
        counter, where = at._elements(), int(elements)
        old = int(counter[where])
        counter[where] = change(old, given)
        if sem in ("release", "acq_rel"):
            counter_view(role, at, where).learn(role.behind_barrier)
        if sem in ("acquire", "acq_rel"):
            role.view.learn(counter_view(role, at, where))
        role.pause()
        return old

    return act


def counter_view(role: Role, at: Pointer, element: int) -> Any:
    at.read(np.array(element), np.array(True), role.access("a counter"))  # may be: what the kernel before wrote there is known
    machine, key = role.program.machine, (at.buffer.name, at.kind.size * element)
    return machine.counters.setdefault(key, machine.view())


# --- inline assembly ------------------------------------------------------------------------------------------------


def exponential(function: Any) -> Any:
    def act(x: Any) -> Any:
        with np.errstate(over="ignore"):  # infinity, as on a GPU
            return result(function(x))

    return act


def inline_asm_elementwise(asm: str, constraints: str, arguments: list, dtype: Any, is_pure: bool, pack: int) -> Any:
    for pattern, act in ASSEMBLY.items():
        if re.search(pattern, asm, re.DOTALL):
            return act(asm, *arguments)
    raise Fault(f"{Machine.current.name}: unknown assembly: {asm}")


def wait_for_counter(asm: str, at: Pointer, least: Any, pause: Any) -> Any:
    role = Machine.current
    elements, there = at.places(None)
    counter = at._elements()
    role.wait(lambda: bool((counter[elements] >= least).all()), f"counters of {at.buffer.name}, {np.unique(elements)}")
    acquire(role, at, elements)
    fence(asm)
    return result(counter[elements])


def look(asm: str, at: Pointer) -> Any:
    role = Machine.current
    elements, _ = at.places(None)
    role.spin(f"counters of {at.buffer.name}, {np.unique(elements)}")
    acquire(role, at, elements)
    return result(at._elements()[elements])


def acquire(role: Role, at: Pointer, elements: np.ndarray) -> None:
    """Each thread for its own; where all look at one counter, that is for all."""
    different = np.unique(elements)
    for element in different:
        (role.view if different.size == 1 else role.acquired).learn(counter_view(role, at, int(element)))


def put(asm: str, at: Pointer, words: Any, how: Any) -> Any:
    """prefill.down's: stores or adds four bfloat16 a word."""
    role = Machine.current
    elements, _ = at.places(how > 0)
    pairs = elements.reshape(-1, 2)
    if (pairs[:, 1] != pairs[:, 0] + 1).any() or (pairs[:, 0] % 2).any() or (how.reshape(-1, 2)[:, 0] != how.reshape(-1, 2)[:, 1]).any():
        raise Fault(f"{role.name}: 16 bytes that do not lie side by side")
    bf16 = kind_of("bfloat16")
    new = bf16.decode(np.ascontiguousarray(words).view(np.uint16))
    old = at.read(elements, how == 2, role.access("a store or an addition"))
    old_words = np.zeros(how.shape, np.int64)
    old_words[how == 2] = old
    sums = bf16.encode(new + bf16.decode(old_words.view(np.uint16))).view(np.int64)
    at.write(elements, how > 0, np.where(how == 2, sums, words), role.access("a store or an addition"))
    return how


def say(asm: str, value: Any) -> Any:
    word = re.search(r"blockmoe: (\w+)", asm).group(1)
    if word != "apart":  # a role has no warps here
        Machine.current.said = word
    return value


def named_barrier(asm: str, here: Any) -> Any:
    """`bar.sync` of one role and `bar.arrive` of another: prefill.turns."""
    role = Machine.current
    action, number = re.search(r"bar\.(sync|arrive) (\d+), 256", asm).groups()
    if here and action == "sync":
        role.take(int(number))
    elif here:
        role.give(int(number))
    return here


def heed(word: str) -> bool:
    """Whether that was said about this."""
    role = Machine.current
    if role.said and role.said != word:
        raise Fault(f"{role.name}: {role.said} was said about something else than it")
    said, role.said = role.said, ""
    return bool(said)


def stores_done(asm: str, value: Any) -> Any:
    shared.wait_for_stores(written=True)
    fence(asm)
    return value


def wait_for_kernel_before() -> None:
    role = Machine.current
    role.view.clocks[:, role.program.machine.kernel_before] = 1


def fence(asm: str) -> None:
    if found := re.search(r"fence\.proxy\.async([\w.:]*);", asm):
        if found[1] not in ("", ".shared::cta"):
            raise Fault(f"{Machine.current.name}: unknown fence: {found[0]}")
        Machine.current.fence(shared_only=bool(found[1]))


def wait_for_reads(pending: int) -> None:
    if pending:
        raise Fault("only waits for all stores are known here")
    shared.wait_for_stores(written=False)


def let_line_go(asm: str, at: Pointer, there: Any) -> Any:
    at.places(there != 0)
    return there


def show_barriers(asm: str, value: Any) -> Any:
    program = Machine.current.program
    program.shown = set(program.barriers)
    return value


def arrive_behind_copies(bar: Any, increment_count: bool = True) -> None:
    if increment_count:
        raise Fault(f"{Machine.current.name}: an arrival that is added to those waited for: the phase does not end")
    shared.arrive_behind_copies(bar)


ASSEMBLY = {
    r"blockmoe: \w+": say,
    r"bar\.(sync|arrive)": named_barrier,
    r"ld\.acquire\.gpu.*nanosleep": wait_for_counter,
    r"ld\.acquire\.gpu": look,
    r"ld\.global\.ca": lambda asm, at: result(np.zeros(at.places(None, ALIGNMENT)[0].shape, np.int32)),  # whole lines are ours
    r"applypriority": let_line_go,
    r"rcp\.approx": lambda asm, x: values(np.float32(1.0) / x),
    r"cp\.async\.bulk\.wait_group 0": stores_done,
    r"fence\.mbarrier_init": show_barriers,
    r"^fence\.proxy\.async;": lambda asm, value: fence(asm),
    r"red\.relaxed.*bf16x2": put,
    r"^mov\.b32 \$0, \$1;$": lambda asm, x: x,
}

# --- synchronisation ------------------------------------------------------------------------------------------------


def initialise(bar: Any, count: int) -> None:
    bar.program.barriers[bar.begin] = Barrier(int(count), Machine.current)


def invalidate(bar: Any) -> None:
    if bar.begin not in bar.program.barriers:
        raise Fault(f"{Machine.current.name}: no mbarrier has been initialised at byte {bar.begin}")
    del bar.program.barriers[bar.begin]


def wait_for_phase(bar: Any, phase: Any) -> None:
    role, barrier = Machine.current, shared.barrier_of(bar)
    role.wait(lambda: barrier.phase & 1 != int(phase), f"the mbarrier at byte {bar.begin}, in phase {barrier.phase}, to end {int(phase)}")
    role.view.learn(barrier.known)
    role.behind_barrier.learn(barrier.known)  # every thread of it waits


def arrive(bar: Any, count: int = 1) -> None:
    role = Machine.current
    targets = role.program.machine.of_cluster(role.program) if heed("both") else [role.program]
    view = role.publish()
    for target in targets:
        shared.barrier_of(bar.of(target)).arrive(int(count), view, f"{role.name}, at byte {bar.begin}")
    role.pause()


def expect(bar: Any, size: int) -> None:
    role = Machine.current
    said = role.behind_barrier.copy()  # one thread's arrival, and no word about what others did since
    shared.barrier_of(bar).expect(int(size), said, f"{role.name}, at byte {bar.begin}")


def load_by_tma(tensor: Any, at: list, bar: Any, to: Any) -> None:
    shared.load_box(tensor, at, bar, to, heed("multicast"))
    Machine.current.pause()


def wait_for_products(pending: int, deps: tuple) -> Any:
    if pending:
        raise Fault("only waits for all products are known here")
    Machine.current.pause()
    found = tuple(one.value() if isinstance(one, shared.Product) else one for one in deps)
    return found if len(found) > 1 else found[0]


def warp_specialize(partitions: list, warps: list, registers: list) -> None:
    main = Machine.current
    known = main.publish()
    roles = []
    for n, ((function, arguments), count) in enumerate(zip(partitions, [main.warps, *warps], strict=True)):
        role = Role(main.program, f"{function.__name__} ({n})", count, function, arguments)
        role.view.learn(known)
        role.behind_barrier.learn(known)
        roles.append(role)
    main.wait(lambda: all(role.thread.dead for role in roles), "its roles")
    for role in roles:
        main.view.learn(role.view)


# --- as modules -----------------------------------------------------------------------------------------------------

mbarrier = SimpleNamespace(
    MBarrierLayout=lambda *given: None, init=initialise, invalidate=invalidate, wait=wait_for_phase, arrive=arrive, expect=expect
)  # fmt: skip
tma = SimpleNamespace(
    async_copy_global_to_shared=load_by_tma,
    async_copy_shared_to_global=shared.store_box,
    store_wait=wait_for_reads,
)
async_copy = SimpleNamespace(
    async_copy_global_to_shared=lambda to, source, mask=None: shared.copy(to, source, mask), commit_group=shared.commit,
    wait_group=shared.wait_for_copies, mbarrier_arrive=arrive_behind_copies,
)  # fmt: skip
KEPT = [name for name in dir(gluon_language) if name.endswith("Layout") or name.startswith(("int", "float", "bfloat"))]
gl = SimpleNamespace(
    **{name: getattr(gluon_language, name) for name in KEPT},
    abs=lambda x: values(np.abs(x)), allocate_shared_memory=shared.allocate_shared_memory, arange=arange,
    atomic_add=atomic(lambda old, given: old + given), atomic_xchg=atomic(lambda old, given: given), constexpr=lambda value: value,
    convert_layout=lambda x, layout: x, exp2=exponential(np.exp2),
    expand_dims=lambda x, axis: values(np.expand_dims(x, axis)), full=full, full_like=full_like,
    inline_asm_elementwise=inline_asm_elementwise, load=load, max=reduce(np.max), maximum=pick(np.maximum, max), min=reduce(np.min),
    minimum=pick(np.minimum, min), num_programs=lambda axis: Machine.current.program.machine.programs_count,
    permute=lambda x, order: values(np.transpose(x, order)), program_id=lambda axis: Machine.current.program.number,
    reshape=lambda x, shape: values(np.reshape(x, shape)), split=lambda x: (values(x[..., 0]), values(x[..., 1])), static_range=range,
    store=store, to_tensor=lambda value: value,
    warp_specialize=warp_specialize, where=where, zeros=zeros,
)  # fmt: skip
