"""C = silu(gate) * up in e4m3, one scale for each 1x128, from GEMM1's bfloat16 output.

x [R, 2I] (up, then gate) -> codes [R, I] e4m3, scales [R, I/128] float32. A program does one row and BLOCKS blocks of it.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128
BLOCKS = 16  # a whole row at I = 2048: 8 KB read by 4 warps, 16 bytes a thread and load


@triton.jit
def swiglu_quantise_kernel(x, codes, scales, I: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    up = tl.load(x + row * (2 * I) + column).to(tl.float32)
    gate = tl.load(x + row * (2 * I) + I + column).to(tl.float32)
    c = gate * tl.sigmoid(gate) * up
    scale = tl.maximum(tl.max(tl.abs(c), 1), 1e-10) / 448.0
    tl.store(codes + row * I + column, (c / scale[:, None]).to(codes.dtype.element_ty))
    tl.store(scales + row * (I // BLOCK) + block, scale)


def swiglu_quantise(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    rows, middle = codes.shape
    grid = (rows, middle // (BLOCK * BLOCKS))
    swiglu_quantise_kernel[grid](x, codes, scales, I=middle, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4)
