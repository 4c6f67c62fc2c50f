"""The steps around the two grouped matrix products, in Triton.

For T tokens, R = 8 T rows (pairs sorted by expert, experts elsewhere included), H hidden and I intermediate columns:

    localise          ids [T, 8] -> local ids [T, 8], clamped into 0 .. experts - 1
    gather            hidden [T, H] e4m3, scales [H/128, T] -> rows [R, H], row scales [R, H/128]
    swiglu_quantise   GEMM1 out [R, 2I] bfloat16 (up, then gate) -> codes [R, I] e4m3, scales [R, I/128]
    combine           GEMM2 out [R, H] bfloat16 -> output [T, H] bfloat16
"""

import torch
import triton
import triton.language as tl

BLOCK = 128  # one scale stands for 1x128 of an activation row
COLUMNS = 1024  # of a row, by one program of gather and combine: 7 programs a row at H = 7168


@triton.jit(do_not_specialize=["count", "offset"])
def localise_kernel(ids, local_ids, count, offset, EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    local = tl.load(ids + index, mask=index < count) - offset
    tl.store(local_ids + index, tl.minimum(tl.maximum(local, 0), EXPERTS - 1), mask=index < count)


@triton.jit(do_not_specialize=["tokens"])
def gather_kernel(
    hidden, hidden_scale, token_of_row, rows, row_scales, tokens, H: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Scales are read where they lie, block-major: nothing is transposed first."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of_row + row).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(rows + row * H + column, tl.load(hidden + token * H + column))
    block = tl.program_id(1) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
    tl.store(row_scales + row * (H // BLOCK) + block, tl.load(hidden_scale + block.to(tl.int64) * tokens + token))


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


@triton.jit(do_not_specialize=["offset"])
def combine_kernel(
    result, row_of_pair, ids, weights, output, offset,
    EXPERTS: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of experts elsewhere are not read: their weight is zero."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(TOP_K):
        local = tl.load(ids + token * TOP_K + slot) - offset
        if (local >= 0) & (local < EXPERTS):
            row = tl.load(row_of_pair + token * TOP_K + slot).to(tl.int64)
            total += tl.load(weights + token * TOP_K + slot) * tl.load(result + row * H + column).to(tl.float32)
    tl.store(output + token * H + column, total.to(tl.bfloat16))


def localise(ids: torch.Tensor, offset: int, experts: int, local_ids: torch.Tensor) -> None:
    count = ids.numel()
    localise_kernel[(triton.cdiv(count, 1024),)](ids, local_ids, count, offset, EXPERTS=experts, SIZE=1024, num_warps=4)


def gather(hidden, hidden_scale, token_of_row, rows, row_scales) -> None:
    grid = (len(rows), rows.shape[1] // COLUMNS)
    gather_kernel[grid](
        hidden, hidden_scale, token_of_row, rows, row_scales, len(hidden),
        H=rows.shape[1], COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip


def swiglu_quantise(x, codes, scales) -> None:
    rows, middle = codes.shape
    blocks = 16 if rows > 1024 else 4  # few rows: more programs than SMs
    swiglu_quantise_kernel[(rows, middle // (BLOCK * blocks))](x, codes, scales, I=middle, BLOCK=BLOCK, BLOCKS=blocks, num_warps=4)


def combine(result, row_of_pair, ids, weights, offset: int, experts: int, output) -> None:
    tokens, hidden = output.shape
    combine_kernel[(tokens, hidden // COLUMNS)](
        result, row_of_pair, ids, weights, output, offset,
        EXPERTS=experts, H=hidden, TOP_K=ids.shape[1], COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
