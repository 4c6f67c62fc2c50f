"""Shared memory as kernels name it, and what asynchronous operations do with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from emulator.machine import Machine, Operation, Program
from emulator.memory import GRANULE, Access, Buffer, Fault, Kind, Pointer, Values, View, granules, kind_of, values

# --- descriptors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Elements of a program's shared memory: the first at byte `begin`, along each axis `strides` bytes apart."""

    program: Program
    kind: Kind
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def whole(program: Program, kind: Kind, begin: int, shape: Any) -> Shared:
        shape = tuple(shape)
        strides = tuple(kind.size * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        return Shared(program, kind, begin, shape, strides)

    @property
    def size(self) -> int:
        return self.kind.size * int(np.prod(self.shape))

    def index(self, at: Any) -> Shared:
        at = int(at)
        if not 0 <= at < self.shape[0]:
            raise Fault(f"{Machine.current.name}: index {at} of {self.shape[0]} buffers")
        return Shared(self.program, self.kind, self.begin + at * self.strides[0], self.shape[1:], self.strides[1:])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        start = int(start)
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise Fault(f"{Machine.current.name}: slice {start} ... {start + length} of {self.shape[dim]}")
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return Shared(self.program, self.kind, self.begin + start * self.strides[dim], shape, self.strides)

    def permute(self, order: tuple[int, ...]) -> Shared:
        shape, strides = (tuple(of[axis] for axis in order) for of in (self.shape, self.strides))
        return Shared(self.program, self.kind, self.begin, shape, strides)

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> Shared:
        new = Shared.whole(self.program, kind_of(dtype), self.begin, shape)
        if new.size != self.size:
            raise Fault(f"{self.size} bytes of shared memory as {new.size}")
        return new

    def of(self, program: Program) -> Shared:
        """The same place of another program of the cluster."""
        if program.ended:
            raise Fault(f"{Machine.current.name} reaches for the shared memory of program {program.number}, which has ended")
        return Shared(program, self.kind, self.begin, self.shape, self.strides)

    # by roles

    def load(self, layout: Any = None) -> Values:
        return values(self.read(Machine.current.access("a load")))

    def store(self, given: Any) -> None:
        if np.shape(given) != self.shape:
            raise Fault(f"{Machine.current.name} stores {np.shape(given)} to {self.shape}")
        self.write(given, None, Machine.current.access("a store"))

    # by anyone

    def elements(self) -> np.ndarray:
        raw = self.program.shared[self.begin :]
        raw = raw[: len(raw) // self.kind.size * self.kind.size].view(self.kind.storage)
        return np.lib.stride_tricks.as_strided(raw, self.shape, self.strides)

    def touched(self) -> Any:
        return touched(self.begin, self.shape, self.strides, self.kind.size)

    def read(self, access: Access) -> np.ndarray:
        self.program.account.read(self.touched(), access)
        return self.values()

    def values(self) -> np.ndarray:
        return self.kind.decode(self.elements().copy())

    def write(self, given: Any, raw: np.ndarray | None, access: Access) -> None:
        """Values, or elements as they lie in memory."""
        self.program.account.write(self.touched(), access)
        self.elements()[...] = self.kind.encode(given) if raw is None else raw


@lru_cache(maxsize=4096)
def touched(begin: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> Any:
    """Granules: a slice where the elements lie side by side."""
    axes = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    dense = size
    for axis in reversed(axes):
        if strides[axis] != dense:
            break
        dense *= shape[axis]
    else:
        return slice(begin // GRANULE, -(-(begin + dense) // GRANULE))
    places = np.full(1, begin, np.int64)
    for axis in axes:
        places = (places[:, None] + strides[axis] * np.arange(shape[axis])).reshape(-1)
    return np.unique(granules(places, size))


def allocate_shared_memory(dtype: Any, shape: Any, layout: Any) -> Shared:
    kind, program = kind_of(dtype), Machine.current.program
    return Shared.whole(program, kind, program.allocate(kind.size * int(np.prod(shape))), shape)


# --- TMA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockType:
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A descriptor: a row-major matrix from byte `begin` of a buffer on."""

    buffer: Buffer
    kind: Kind
    begin: int
    shape: tuple[int, int]
    box: tuple[int, int]

    @property
    def block_type(self) -> BlockType:
        return BlockType(self.box)

    def part(self, at: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Elements of the box at `at`, counted from the buffer's beginning, and which lie within the tensor."""
        row, column = (int(at[axis]) + np.arange(self.box[axis], dtype=np.int64) for axis in range(2))
        inside = ((row >= 0) & (row < self.shape[0]))[:, None] & ((column >= 0) & (column < self.shape[1]))[None, :]
        return self.begin // self.kind.size + row[:, None] * self.shape[1] + column, inside

    @property
    def pointer(self) -> Pointer:
        return Pointer(self.buffer, self.kind, 0, self.begin, self.begin + self.kind.size * self.shape[0] * self.shape[1])


def over(access: Access, view: View) -> View:
    """`view` with that operation known to be over, and what it wrote to loads and stores."""
    view.plain[access.agent] = max(view.plain[access.agent], access.clock)
    return view


def load_box(tensor: Tensor, at: list[int], bar: Shared, to: Shared, multicast: bool) -> None:
    role, machine, at = Machine.current, Machine.current.program.machine, list(at)
    if tensor.box != to.shape or tensor.kind is not to.kind or to.begin % 128:
        raise Fault(f"{role.name}: a box of {tensor.box} to shared memory of {to.shape} at byte {to.begin}")
    for target in machine.of_cluster(role.program) if multicast else [role.program]:
        there, barrier = to.of(target), barrier_of(bar.of(target))
        agent = role.program.loader(role)
        access = Access(agent, machine.tick(agent), role.view.copy(), True, f"{role.name}: a box at {at} by TMA")

        def arrive(access: Access = access, there: Shared = there, barrier: Any = barrier) -> None:
            elements, inside = tensor.part(at)
            raw = np.zeros(tensor.box, tensor.kind.storage)
            raw[inside] = tensor.kind.encode(tensor.pointer.read(elements, inside, access))
            there.write(None, raw, access)
            known = over(access, machine.view())
            known.near[access.agent] = access.clock
            barrier.complete(there.size, known)

        operation = machine.begin(role.program, Operation([arrive], access.what))
        if target is not role.program:
            target.under_way.append(operation)


def store_box(tensor: Tensor, at: list[int], source: Shared) -> None:
    """One thread does it: it knows what the others did before the last barrier."""
    role, at, taken = Machine.current, list(at), []
    if tensor.box != source.shape or tensor.kind is not source.kind:
        raise Fault(f"{role.name}: shared memory of {source.shape} to a box of {tensor.box}")
    what = f"a box at {at} by TMA"
    reads = role.asynchronous("stores by TMA, reading", what, by_proxy=True, view=role.behind_barrier)
    writes = role.asynchronous("stores by TMA, writing", what, by_proxy=True, view=role.behind_barrier)

    def take() -> None:
        taken.append(source.read(reads))

    def put() -> None:
        elements, inside = tensor.part(at)
        tensor.pointer.write(elements, inside, taken[0], writes)

    role.stores.append((role.program.machine.begin(role.program, Operation([take, put], reads.what)), reads, writes))


def wait_for_stores(*, written: bool) -> None:
    """Shared memory may be written again; `written`: what was stored is there, for this role's loads and stores."""
    role = Machine.current
    steps = 2 if written else 1
    role.wait(lambda: all(operation.done >= steps for operation, _, _ in role.stores), "its stores by TMA")
    for _, reads, writes in role.stores:
        over(reads, role.view)
        if written:
            over(writes, role.view)
    if written:
        role.stores = []


# --- cp.async -------------------------------------------------------------------------------------------------------


def copy(to: Shared, source: Pointer, mask: Any) -> None:
    role = Machine.current
    at, there = source.places(np.broadcast_to(True if mask is None else mask, to.shape))
    at, there = (np.broadcast_to(of, to.shape) for of in (at, there))
    access = role.asynchronous("copies", "cp.async", by_proxy=False)

    def arrive() -> None:
        raw = np.zeros(to.shape, to.kind.storage)
        raw[there] = to.kind.encode(source.read(at, there, access))
        to.write(None, raw, access)

    role.copies.append((role.program.machine.begin(role.program, Operation([arrive], access.what)), access))


def commit() -> None:
    role = Machine.current
    role.groups.append(role.copies)
    role.copies = []


def wait_for_copies(pending: int) -> None:
    role = Machine.current
    first = role.groups[: len(role.groups) - int(pending)]
    copies = [one for group in first for one in group]
    role.wait(lambda: all(operation.done for operation, _ in copies), "its copies")
    for _, access in copies:
        over(access, role.view)
    role.groups = role.groups[len(first) :]


def arrive_behind_copies(bar: Shared) -> None:
    """Every thread, once all that it has asked for is there; that alone is then known."""
    role, barrier, machine = Machine.current, barrier_of(bar), Machine.current.program.machine
    copies = [one for group in [*role.groups, role.copies] for one in group]

    def arrive() -> None:
        known = machine.view()
        for _, access in copies:
            over(access, known)
        barrier.arrive(32 * role.warps, known, f"{role.name}, copies done")

    role.copies, role.groups = [], []
    behind = [operation for operation, _ in copies]
    machine.begin(role.program, Operation([arrive], f"{role.name}: an arrival behind copies", behind))


# --- wgmma ----------------------------------------------------------------------------------------------------------


class Product:
    """On its way: it has no values before it is waited for, and reads its operands until then."""

    def __init__(self, left: Shared, right: Shared, sum: Any, use_acc: bool) -> None:
        self.left, self.right, self.sum = left, right, sum if use_acc else None
        self.access = Machine.current.asynchronous("products", "wgmma", by_proxy=True)
        self._account()

    def value(self) -> Values:
        self._account()
        over(self.access, Machine.current.view)
        product = values(self.left.values() @ self.right.values())
        return product if self.sum is None else product + self.sum

    def _account(self) -> None:
        for side in (self.left, self.right):
            side.program.account.read(side.touched(), self.access)


# --- mbarriers ------------------------------------------------------------------------------------------------------


def barrier_of(bar: Shared) -> Any:
    if bar.begin not in bar.program.barriers:
        raise Fault(f"{Machine.current.name}: no mbarrier has been initialised at byte {bar.begin} of program {bar.program.number}")
    barrier = bar.program.barriers[bar.begin]
    role = Machine.current
    hidden = bar.program is not role.program and bar.begin not in bar.program.shown
    if hidden or role.view.plain[barrier.made_by] < barrier.made_at:
        raise Fault(f"{role.name}: the mbarrier at byte {bar.begin} of program {bar.program.number} may not be initialised yet")
    return barrier
