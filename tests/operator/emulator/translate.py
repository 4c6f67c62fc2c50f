"""From a launch to Python functions over the language here, and to a run of them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra.cuda import gdc_wait

from blockmoe.operator import persistent
from blockmoe.operator.launch import HIDDEN, HIDDEN_SCALE, OUT, WORKSPACE, Launch
from blockmoe.operator.launch import interpret as in_triton
from emulator import language, shared
from emulator.machine import MOST_PROGRAMS, Machine, Program
from emulator.memory import Account, Buffer, Fault, Pointer, kind_of

NAMES = ("logits", "bias", "hidden", "hidden_scale", "w1", "w1_scale", "w2", "w2_scale", "out", "workspace")
REPLACED = (
    (gl, language.gl),
    (hopper.mbarrier, language.mbarrier),
    (hopper.tma, language.tma),
    (hopper.async_copy, language.async_copy),
    (hopper.fence_async_shared, lambda: Machine.current.fence(shared_only=True)),
    (hopper.warpgroup_mma, lambda a, b, acc, use_acc=True, is_async=False: shared.Product(a, b, acc, use_acc)),
    (hopper.warpgroup_mma_wait, lambda pending, deps: language.wait_for_products(pending, deps)),
    (persistent.barrier, lambda: Machine.current.barrier()),
    (gdc_wait, language.wait_for_kernel_before),
)


class Translation:
    """Functions of kernels in module namespaces of their own. `changes`: by a function's name, text in it and what stands there instead:
    faults that are planted."""

    def __init__(self, changes: Mapping[str, tuple[str, str]]) -> None:
        self.changes = dict(changes)
        self.unmet = set(changes)
        self._spaces: dict[int, dict] = {}

    def function(self, jit: Any) -> Callable:
        given = jit.fn
        space = self._space(given.__globals__)
        code = self._changed(given) if given.__name__ in self.changes else given.__code__
        defaults = tuple(map(self._translated, given.__defaults__ or ()))
        return types.FunctionType(code, space, given.__name__, defaults, given.__closure__)

    def _changed(self, given: Callable) -> types.CodeType:
        self.unmet.discard(given.__name__)
        old, new = self.changes[given.__name__]
        lines = inspect.getsource(given).splitlines(keepends=True)
        source = "".join(lines[next(n for n, line in enumerate(lines) if line.startswith("def ")) :])
        assert old in source, f"{given.__name__} has no {old!r}"
        found: dict[str, Any] = {}
        exec(compile(source.replace(old, new), f"<{given.__name__}, changed>", "exec"), found)
        return found[given.__name__].__code__

    def _space(self, globals: dict) -> dict:
        if id(globals) not in self._spaces:
            space = self._spaces[id(globals)] = {}
            space.update({name: self._translated(value) for name, value in globals.items()})
        return self._spaces[id(globals)]

    def _translated(self, value: Any) -> Any:
        for known, new in REPLACED:
            if value is known:
                return new
        if isinstance(value, gl.constexpr):
            return value.value
        module = getattr(getattr(value, "fn", None), "__module__", "") or ""
        return self.function(value) if module.startswith("blockmoe.") else value


def emulate(
    launch: Launch, tensors: Sequence[torch.Tensor], *, programs: int, seed: int = 0, changes: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Carry a launch out, by `programs` programs. Raises Fault. `tensors`: the call's ten, on the CPU. `changes`: see Translation."""
    machine = Machine(programs, launch.cluster, seed)
    buffers = {}
    for n, tensor in enumerate(tensors):
        if tensor is not None:
            account = None
            if n in (HIDDEN, HIDDEN_SCALE, OUT, WORKSPACE):  # what kernels before may have written, as far as this launch knows
                account = Account(tensor.numel() * tensor.itemsize, NAMES[n], machine.names, shared=False)
                account.writer[:], account.written[:] = machine.kernel_before, 1
            buffers[n] = Buffer(tensor, NAMES[n], account, writable=n in (OUT, WORKSPACE))
    launch = with_constants(launch, PDL=True)
    translation = Translation(changes or {})
    kernel = translation.function(launch.kernel)

    def box(given: Any) -> shared.Tensor:
        kind, slot = given.kind, given.slot
        there = len(buffers[slot.tensor].bytes) - slot.offset if slot.count is None else slot.count * slot.dtype.itemsize
        if kind.shape[0] * kind.shape[1] * kind.dtype.itemsize > there:
            raise Fault(f"a descriptor of {kind.shape} over {there} bytes of {NAMES[slot.tensor]}")
        return shared.Tensor(buffers[given.slot.tensor], kind_of(kind.dtype), given.slot.offset, kind.shape, tuple(kind.box))

    def pointer(slot: Any) -> Pointer:
        size = slot.dtype.itemsize
        past = len(buffers[slot.tensor].bytes) if slot.count is None else slot.offset + slot.count * size
        return Pointer(buffers[slot.tensor], kind_of(slot.dtype), slot.offset // size, slot.offset, past)

    arguments = (*map(box, launch.descriptors), *map(pointer, launch.slots), *launch.numbers, *launch.constants)

    def main(program: Program) -> None:
        Machine.current.warps = launch.num_warps
        kernel(*arguments)
        program.end()

    assert programs % launch.cluster == 0 and programs <= MOST_PROGRAMS
    machine.run(main)
    assert not translation.unmet, f"{launch.kernel.fn.__name__} has no {translation.unmet}"


def interpret(launches: Sequence[Launch], tensors: Sequence[torch.Tensor], **how: Any) -> None:
    """What `blockmoe.operator.launch.interpret` does, Gluon kernels too, for it to be replaced by. `how`: see `emulate`."""
    for launch in launches:
        if isinstance(launch.kernel, GluonJITFunction):
            emulate(launch, tensors, **how)
        else:
            in_triton([launch], tensors)


def with_constants(launch: Launch, **changes: Any) -> Launch:
    """Those that the kernel has."""
    names = list(inspect.signature(launch.kernel.fn).parameters)[-len(launch.constants) :]
    constants = dict(zip(names, launch.constants, strict=True))
    return replace(launch, constants=tuple(changes.get(name, value) for name, value in constants.items()))
