"""The clock of a GPU's multiprocessors, seen from kernels before and after what runs between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl


@triton.jit
def clocks(at):
    """Cycles and nanoseconds of this multiprocessor."""
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l,l", [tl.program_id(0)], dtype=tl.int64, is_pure=False, pack=1)
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,l", [tl.program_id(0)], dtype=tl.int64, is_pure=False, pack=1)
    multiprocessor = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(at + 2 * multiprocessor, cycles)
    tl.store(at + 2 * multiprocessor + 1, now)


class Clock:
    """Of `intervals` stretches of work, each enqueued in `during(n)`, or between `stamp(n, 0)` and `stamp(n, 1)`."""

    def __init__(self, intervals: int) -> None:
        self.count = torch.cuda.get_device_properties(0).multi_processor_count
        self.stamps = torch.zeros(intervals, 2, self.count, 2, dtype=torch.int64, device="cuda")

    def stamp(self, interval: int, end: int) -> None:
        clocks[(self.count,)](self.stamps[interval, end])

    @contextmanager
    def during(self, interval: int) -> Iterator[None]:
        self.stamp(interval, 0)
        yield
        self.stamp(interval, 1)

    def mhz(self) -> list[float]:
        """The median over multiprocessors, by interval; waits for the device."""
        found = []
        for begin, end in self.stamps.unbind(0):
            seen = ((begin > 0) & (end > 0)).all(1)  # multiprocessors that ran a program before and after
            cycles, ns = (end - begin)[seen].double().unbind(-1)
            found.append((1000 * cycles / ns).median().item())
        return found
