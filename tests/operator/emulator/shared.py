"""Shared memory as kernels name it, and what asynchronous operations do with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from emulator.machine import Machine, Operation, Program, Role
from emulator.memory import GRANULE, Access, Buffer, Fault, Kind, Pointer, Values, granules, kind_of, values

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


def engine_access(role: Role, what: str) -> Access:
    """Of an operation that a role begins now: it knows what the role knows."""
    agent, clock = role.program.engine()
    return Access(agent, clock, role.view.copy(), True, f"{role.name}: {what}")


def done(access: Access) -> Any:
    """What there is to know when an operation is done."""
    view = Machine.current.program.machine.view()
    view.plain[access.agent] = view.proxy[access.agent] = access.clock
    return view


def load_box(tensor: Tensor, at: list[int], bar: Shared, to: Shared, multicast: bool) -> None:
    role = Machine.current
    if tensor.box != to.shape or tensor.kind is not to.kind or to.begin % 128:
        raise Fault(f"{role.name}: a box of {tensor.box} to shared memory of {to.shape} at byte {to.begin}")
    targets = role.program.machine.of_cluster(role.program) if multicast else [role.program]
    at = list(at)
    for target in targets:
        there, barrier = to.of(target), barrier_of(bar.of(target))
        access = engine_access(role, f"a box at {at} by TMA")

        def arrive(access: Access = access, there: Shared = there, barrier: Any = barrier) -> None:
            elements, inside = tensor.part(at)
            raw = np.zeros(tensor.box, tensor.kind.storage)
            raw[inside] = tensor.kind.encode(tensor.pointer.read(elements, inside, access))
            if there.program.ended:
                raise Fault(f"{access.what} comes when program {there.program.number} has ended")
            there.write(None, raw, access)
            barrier.complete(there.size, done(access))

        operation = role.program.machine.begin(role.program, Operation([arrive], access.what))
        if target is not role.program:
            target.under_way.append(operation)


def store_box(tensor: Tensor, at: list[int], source: Shared) -> None:
    role = Machine.current
    if tensor.box != source.shape or tensor.kind is not source.kind:
        raise Fault(f"{role.name}: shared memory of {source.shape} to a box of {tensor.box}")
    access, at, taken = engine_access(role, f"a box at {list(at)} by TMA"), list(at), []

    def take() -> None:
        taken.append(source.read(access))

    def put() -> None:
        elements, inside = tensor.part(at)
        tensor.pointer.write(elements, inside, taken[0], access)

    operation = role.program.machine.begin(role.program, Operation([take, put], access.what))
    operation.access = access
    role.stores.append(operation)


def wait_for_stores(steps: int) -> None:
    """1: shared memory may be written again. 2: what was stored is there."""
    role = Machine.current
    role.wait(lambda: all(store.done >= steps for store in role.stores), "its stores by TMA")
    for store in role.stores:
        known = done(store.access)
        if steps == 1:
            np.maximum(role.view.plain, known.plain, out=role.view.plain)
        else:
            np.maximum(role.view.proxy, known.proxy, out=role.view.proxy)
    role.stores = [store for store in role.stores if store.done < 2]


# --- cp.async -------------------------------------------------------------------------------------------------------


def copy(to: Shared, source: Pointer, mask: Any) -> None:
    role = Machine.current
    at, there = source.places(np.broadcast_to(True if mask is None else mask, to.shape))
    at, there = (np.broadcast_to(of, to.shape) for of in (at, there))
    access = engine_access(role, "cp.async")
    access.by_proxy = False

    def arrive() -> None:
        raw = np.zeros(to.shape, to.kind.storage)
        raw[there] = to.kind.encode(source.read(at, there, access))
        to.write(None, raw, access)

    operation = role.program.machine.begin(role.program, Operation([arrive], access.what))
    operation.access = access
    role.copies.append(operation)


def commit() -> None:
    role = Machine.current
    role.groups.append(role.copies)
    role.copies = []


def wait_for_copies(pending: int) -> None:
    role = Machine.current
    first = role.groups[: len(role.groups) - int(pending)]
    operations = [operation for group in first for operation in group]
    role.wait(lambda: all(operation.done for operation in operations), "its copies")
    for operation in operations:
        np.maximum(role.view.plain, done(operation.access).plain, out=role.view.plain)
    role.groups = role.groups[len(first) :]


def arrive_behind_copies(bar: Shared) -> None:
    """Every thread, once all that it has asked for is there."""
    role, barrier = Machine.current, barrier_of(bar)
    operations = [operation for group in [*role.groups, role.copies] for operation in group]
    before = role.publish()

    def arrive() -> None:
        for operation in operations:
            np.maximum(before.plain, done(operation.access).plain, out=before.plain)
        barrier.arrive(32 * role.warps, before, f"{role.name}, copies done")

    role.copies, role.groups = [], []
    role.program.machine.begin(role.program, Operation([arrive], f"{role.name}: an arrival behind copies", operations))


# --- wgmma ----------------------------------------------------------------------------------------------------------


class Product:
    """On its way: it has no values before it is waited for."""

    def __init__(self, left: Shared, right: Shared, sum: Any, use_acc: bool) -> None:
        self.left, self.right, self.sum = left, right, sum if use_acc else None
        self.operands()

    def operands(self) -> list[np.ndarray]:
        access = Machine.current.access("wgmma", by_proxy=True)
        return [side.read(access) for side in (self.left, self.right)]

    def value(self) -> Values:
        left, right = self.operands()
        product = values(left @ right)
        return product if self.sum is None else product + self.sum


# --- mbarriers ------------------------------------------------------------------------------------------------------


def barrier_of(bar: Shared) -> Any:
    if bar.begin not in bar.program.barriers:
        raise Fault(f"{Machine.current.name}: no mbarrier has been initialised at byte {bar.begin} of program {bar.program.number}")
    return bar.program.barriers[bar.begin]
