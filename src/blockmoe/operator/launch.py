"""Launches as data, and what carries them out with little host time.

A call's launches depend on sizes alone, so they are built once a size and kept: arguments are numbers, or slots, which
say which of the call's tensors and how many bytes in, or TMA descriptors over slots. Carrying them out adds addresses and
calls Triton's C launcher, or where addresses come again what is bound to them (`bound.py`); a kernel's first launch goes
through Triton's own path, which compiles, but for clusters, which Triton would not launch. No key of a compiled kernel holds
a token count.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from blockmoe.operator.bound import Binder, Bound, Ready, types_of
from blockmoe.operator.clusters import active_clusters
from blockmoe.operator.ptx import let_hear
from blockmoe.operator.tma import Address, Kind, c_launcher, kept

ALIGNMENT = 256  # bytes; every buffer starts at a multiple of it, so that every pointer is specialised alike

# A call's tensors: the eight inputs in the order of `fused_moe`, the output, the workspace.
LOGITS, BIAS, HIDDEN, HIDDEN_SCALE, W1, W1_SCALE, W2, W2_SCALE, OUT, WORKSPACE = range(10)


@dataclass(frozen=True, slots=True)
class Slot:
    """`count` elements of a call's tensor from byte `offset`; a count of None: all of it."""

    tensor: int
    dtype: torch.dtype
    offset: int = 0
    count: int | None = None

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = tensors[self.tensor]
        if self.count is None:
            return tensor
        return tensor[self.offset : self.offset + self.count * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A TMA descriptor over a slot."""

    slot: Slot
    kind: Kind


def descriptor(slot: Slot, shape: tuple[int, ...], box: tuple[int, ...], layout: Any, promotion: int = 128) -> Descriptor:
    """The slot's memory as a row-major tensor of `shape`, in boxes of `box` with Gluon's shared-memory `layout`."""
    return Descriptor(slot, Kind(slot.dtype, shape, box, layout, promotion))


@dataclass(frozen=True, slots=True)
class Launch:
    """`kernel` over `programs` programs: arguments (descriptors first, then slots, then numbers), then constants."""

    kernel: Any
    programs: int
    slots: tuple[Slot, ...]
    numbers: tuple[int | float, ...]
    constants: tuple
    num_warps: int
    pdl: bool
    descriptors: tuple[Descriptor, ...] = ()
    cluster: int = 1  # programs that run side by side and reach each other's shared memory

    @property
    def options(self) -> dict[str, Any]:
        """Of Triton's launch."""
        return dict(num_warps=self.num_warps, launch_pdl=self.pdl)

    @property
    def key(self) -> tuple:
        """What a compiled kernel depends on, on one device."""
        types = tuple(s.dtype for s in self.slots), tuple((d.kind.dtype, d.kind.box, d.kind.layout) for d in self.descriptors)
        return self.kernel.__name__, self.constants, self.kernel.__module__, self.num_warps, self.pdl, *types


def interpreted() -> bool:
    import triton  # not with this module: sizes and the CPU path need none

    return triton.knobs.runtime.interpret


_compiled: dict[tuple, Any] = {}
_compiling = threading.Lock()  # Triton hands out a kernel that another thread is still loading

# Sets of addresses kept, a few KB each, of all sizes together: a model's layers, and what its allocator hands out in turn.
MOST_BOUND = 16384
_bound: dict[tuple, tuple[Bound, ...] | None] = {}  # by round, addresses and stream; None: seen once
_numbers = count()


class Prepared:
    """The launches of one round, ready to be carried out on one device again and again."""

    def __init__(self, launches: Sequence[Launch], device: int) -> None:
        self.launches = launches
        self.device = device
        self._tma = any(launch.descriptors for launch in launches)
        self._ready: list[Ready] = []
        self._loaded: set[bool] = set()  # whether its kernels are, for aligned addresses and for others
        self._binders: list[Binder] = []
        self._number = next(_numbers)
        import triton

        self._stream = triton.runtime.driver.active.get_current_stream

    def run(self, addresses: tuple[int, ...]) -> bool:
        """Launch everything on the device's current stream; `addresses` of the call's ten tensors.

        False, and nothing is launched, where there are TMA descriptors and an address is no multiple of 16. Raises TypeError for a tensor
        without memory, RuntimeError where the driver can't launch.
        """
        stream = self._stream(self.device)
        if bound := _bound.get((self._number, addresses, stream)):
            for one, ready in zip(bound, self._ready, strict=True):
                if one.launch():  # Triton's launcher says what is wrong, or mends it: a thread may have no context yet
                    ready.launch(addresses, stream)
            return True
        a, b, c, d, e, f, g, h, i, j = addresses
        if not all(addresses):
            raise TypeError("expected tensors with memory of their own, got one at address 0: of a DTensor its to_local(), say")
        aligned = not (a | b | c | d | e | f | g | h | i | j) & 15
        if not self._ready or not aligned:  # compiled for 16-byte aligned pointers
            with nullcontext() if aligned in self._loaded else _compiling:
                return self._run_by_triton(addresses, aligned)
        for ready in self._ready:
            ready.launch(addresses, stream)
        self._bind(addresses, stream)
        return True

    def _bind(self, addresses: tuple[int, ...], stream: int) -> None:
        """For later calls, the second time that it sees these."""
        if not self._binders:
            return
        key = self._number, addresses, stream
        again = key in _bound
        if not again and len(_bound) >= MOST_BOUND:
            _bound.clear()
        _bound[key] = tuple(one.bind(addresses, stream) for one in self._binders) if again else None

    def _run_by_triton(self, addresses: Sequence[int], aligned: bool) -> bool:
        if self._tma and not aligned:
            return False
        arguments = [_arguments(launch, addresses) for launch in self.launches]
        ready: list[Ready | None] = []
        for launch, given in zip(self.launches, arguments, strict=True):  # before anything is launched: it may raise
            ready.append(_ready_clusters(launch, given, self.device) if launch.cluster > 1 else None)
            if launch.cluster == 1 and aligned not in self._loaded:
                _compile(launch, given)._init_handles()  # Triton does not try again what it failed to load
        self._loaded.add(aligned)
        for n, (launch, given) in enumerate(zip(self.launches, arguments, strict=True)):
            if one := ready[n]:
                one.launch(addresses, self._stream(self.device))
                continue
            compiled = launch.kernel[(launch.programs,)](*given, **launch.options)
            if aligned:
                ready[n] = _ready(launch, _compiled.setdefault((*launch.key, self.device), compiled))
        if aligned:
            known = all(one.types is not None for one in ready)  # made by Triton as known
            self._ready, self._binders = ready, [Binder(one) for one in ready] if known else []
        return True


def _arguments(launch: Launch, addresses: Sequence[int]) -> tuple:
    """Of Triton's launch."""
    described = [d.kind.argument(addresses[d.slot.tensor] + d.slot.offset) for d in launch.descriptors]
    pointers = [Address(addresses[s.tensor] + s.offset, s.dtype) for s in launch.slots]
    return (*described, *pointers, *launch.numbers, *launch.constants)


def _ready_clusters(launch: Launch, arguments: tuple, device: int) -> Ready:
    """Triton itself would launch no clusters."""
    key = (*launch.key, device)
    if key not in _compiled:
        _compiled[key] = _compile(launch, arguments)
    return _ready(launch, _compiled[key])


def _compile(launch: Launch, arguments: tuple) -> Any:
    """The kernel, not launched; for clusters with what it says carried out."""
    compiled = launch.kernel.warmup(*arguments, grid=(1,), **launch.options)
    return let_hear(compiled) if launch.cluster > 1 else compiled


def _ready(launch: Launch, compiled: Any) -> Ready:
    compiled._init_handles()  # loads it where that failed before: out of memory, say, or while a graph was being captured
    warps, _, shared = compiled.packed_metadata
    metadata = (warps, launch.cluster, shared)
    run = c_launcher(compiled)
    if run is None:
        options: tuple = (metadata, None, None, None)
    else:
        options = (compiled.run.launch_cooperative_grid, compiled.run.launch_pdl, None, None, metadata, None, None, None)
    descriptors = tuple(
        (d.slot.tensor, d.slot.offset, kept(d.kind, compiled, n, run is not None)) for n, d in enumerate(launch.descriptors)
    )
    slots = tuple((s.tensor, s.offset) for s in launch.slots)
    rest = (*launch.numbers, *launch.constants)
    programs = launch.programs
    if launch.cluster > 1:
        programs = min(programs // launch.cluster, active_clusters(compiled.function, 32 * warps, shared, launch.cluster))
    types = None if run is None else types_of(compiled)
    sizes = (warps, shared, launch.cluster)
    return Ready(run or compiled.run, programs, compiled.function, options, descriptors, slots, rest, *sizes, launch.pdl, types)


def compile_only(launch: Launch) -> None:
    """Compile and load a launch's kernel for the current device, as a first launch with aligned pointers would: no kernel can be loaded
    while a CUDA graph is being captured."""
    arguments = _arguments(launch, (0,) * (WORKSPACE + 1))
    with _compiling:
        if launch.cluster > 1:
            _ready_clusters(launch, arguments, torch.cuda.current_device())
        else:
            _compile(launch, arguments)._init_handles()


def interpret(launches: Sequence[Launch], tensors: Sequence[torch.Tensor]) -> None:
    """Carry launches out in Triton's interpreter."""
    for launch in launches:
        arguments = [slot.of(tensors) for slot in launch.slots]
        launch.kernel[(launch.programs,)](*arguments, *launch.numbers, *launch.constants)
