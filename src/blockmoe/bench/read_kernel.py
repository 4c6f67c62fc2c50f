"""A plain read of a buffer in Triton: the streaming floor's kernel. One sum a program keeps the loads from being dropped."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (words a step, programs a multiprocessor, warps): small buffers want many programs, large ones long runs
CONFIGURATIONS = ((1024, 16, 4), (2048, 8, 8), (4096, 4, 8))


@triton.jit
def _read(words, sums, length, STEP: tl.constexpr):
    total = tl.zeros([STEP], tl.int64)
    for start in tl.range(tl.program_id(0) * STEP, length, tl.num_programs(0) * STEP, num_stages=4):
        offsets = start + tl.arange(0, STEP)
        total += tl.load(words + offsets, mask=offsets < length, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read(words: torch.Tensor, configuration: tuple[int, int, int]) -> None:
    """Read an int64 CUDA tensor once."""
    step, programs, warps = configuration
    grid = programs * torch.cuda.get_device_properties(words.device).multi_processor_count
    sums = torch.empty(grid, dtype=torch.int64, device=words.device)
    _read[(grid,)](words, sums, words.numel(), STEP=step, num_warps=warps)
