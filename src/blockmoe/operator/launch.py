"""Launches as data, and what carries them out with little host time.

A call's launches depend on sizes alone, so they are built once a size and kept: arguments are numbers, or slots, which
say which of the call's tensors and how many bytes in. Carrying them out adds addresses and calls Triton's C launcher;
a kernel's first launch goes through Triton's own path, which compiles. No key of a compiled kernel holds a token count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
class Launch:
    """`kernel` over `programs` programs: arguments (slots first, then numbers), then constants."""

    kernel: Any
    programs: int
    slots: tuple[Slot, ...]
    numbers: tuple[int | float, ...]
    constants: tuple
    num_warps: int
    pdl: bool


@dataclass(frozen=True, slots=True)
class _Address:
    """What Triton's own launcher wants of a pointer argument."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def interpreted() -> bool:
    import triton  # not with this module: sizes and the CPU path need none

    return triton.knobs.runtime.interpret


_compiled: dict[tuple, Any] = {}


class Prepared:
    """The launches of one round, ready to be carried out on one device again and again."""

    def __init__(self, launches: Sequence[Launch], device: int) -> None:
        self.launches = launches
        self.device = device
        self._ready: list[tuple] = []
        import triton

        self._stream = triton.runtime.driver.active.get_current_stream

    def run(self, addresses: Sequence[int]) -> None:
        """Launch everything on the device's current stream; `addresses` of the call's ten tensors."""
        a, b, c, d, e, f, g, h, i, j = addresses
        if not self._ready or (a | b | c | d | e | f | g | h | i | j) & 15:  # compiled for 16-byte aligned pointers
            self._run_by_triton(addresses)
            return
        stream = self._stream(self.device)
        for run, programs, function, metadata, slots, rest in self._ready:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *[addresses[t] + at for t, at in slots], *rest)

    def _run_by_triton(self, addresses: Sequence[int]) -> None:
        aligned = not any(address % 16 for address in addresses)
        ready = []
        for launch in self.launches:
            pointers = [_Address(addresses[s.tensor] + s.offset, s.dtype) for s in launch.slots]
            types = tuple(s.dtype for s in launch.slots)
            key = (launch.kernel.__name__, launch.constants, launch.num_warps, launch.pdl, types, self.device)
            compiled = launch.kernel[(launch.programs,)](
                *pointers, *launch.numbers, *launch.constants, num_warps=launch.num_warps, launch_pdl=launch.pdl
            )
            if not aligned:
                continue
            compiled = _compiled.setdefault(key, compiled)
            slots = tuple((s.tensor, s.offset) for s in launch.slots)
            rest = (*launch.numbers, *launch.constants)
            ready.append((compiled.run, launch.programs, compiled.function, compiled.packed_metadata, slots, rest))
        self._ready = ready


def compile_only(launch: Launch) -> None:
    """Compile a launch's kernel for the current device, as a first launch with aligned pointers would."""
    pointers = [_Address(0, slot.dtype) for slot in launch.slots]
    launch.kernel.warmup(
        *pointers, *launch.numbers, *launch.constants, grid=(1,), num_warps=launch.num_warps, launch_pdl=launch.pdl
    )


def interpret(launches: Sequence[Launch], tensors: Sequence[torch.Tensor]) -> None:
    """Carry launches out in Triton's interpreter."""
    for launch in launches:
        arguments = [slot.of(tensors) for slot in launch.slots]
        launch.kernel[(launch.programs,)](*arguments, *launch.numbers, *launch.constants)
