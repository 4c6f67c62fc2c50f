"""Grouped FP8 block-scale matrix product over pairs sorted by expert, and SwiGLU with quantisation.

For R = 8 T pairs (token, slot), numbered token * 8 + slot, and a tile height BLOCK_M:

    sorted_pairs [P]   pair numbers by expert, every expert's padded to BLOCK_M with R
    tile_expert  [P / BLOCK_M]   the local expert of each tile, -1 for tiles of pairs whose expert lives elsewhere
    padded_total [1]   how much of sorted_pairs is in use
    out [R, N] bfloat16 = x [R / PAIRS_PER_ROW, K] e4m3 times w [L, N, K] e4m3, a row a pair, unsorted

x scales are addressed by strides, so that block-major ones need no copy. With few rows the operands are swapped: the weights'
rows go on the M side of the tensor cores' product, where 64 is the least height, and the pairs on the N side.
"""

import triton
import triton.language as tl

BLOCK = 128  # one scale stands for 1x128 of x and 128x128 of w, and K advances by it
SCHEDULE = ["tokens_stride", "block_stride", "pairs"]


@triton.jit(do_not_specialize=SCHEDULE)
def grouped_gemm_kernel(
    x, x_scale, w, w_scale, out, sorted_pairs, tile_expert, padded_total, weights, tokens_stride, block_stride, pairs,
    N: tl.constexpr, K: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, WEIGHTED: tl.constexpr, ZERO_OTHERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    # tiles in groups of GROUP_M heights: the programs that run together share weights in the L2
    program = tl.program_id(0)
    heights = tl.cdiv(tl.load(padded_total), BLOCK_M)
    widths: tl.constexpr = N // BLOCK_N
    if program >= heights * widths:
        return
    group = program // (GROUP_M * widths)
    group_height = tl.minimum(heights - group * GROUP_M, GROUP_M)
    i_m = group * GROUP_M + program % (GROUP_M * widths) % group_height
    i_n = program % (GROUP_M * widths) // group_height

    pair = tl.load(sorted_pairs + i_m * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    valid = pair < pairs
    column = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = out + pair.to(tl.int64)[:, None] * N + column[None, :]  # [BLOCK_M, BLOCK_N]
    expert = tl.load(tile_expert + i_m).to(tl.int64)
    if expert < 0:
        if ZERO_OTHERS:
            tl.store(p_out, tl.zeros((BLOCK_M, BLOCK_N), tl.bfloat16), mask=valid[:, None])
        return

    row = (pair // PAIRS_PER_ROW).to(tl.int64)
    k = tl.arange(0, BLOCK)
    p_x = x + row[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK]
    p_w = w + expert * N * K + column.to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_N, BLOCK]
    p_x_scale = x_scale + row * tokens_stride
    # one scale stands for all columns of the tile: BLOCK_N divides BLOCK
    p_w_scale = w_scale + (expert * (N // BLOCK) + i_n * BLOCK_N // BLOCK) * (K // BLOCK)
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(K // BLOCK):
        b_x = tl.load(p_x + i_k * BLOCK, mask=valid[:, None], other=0.0)
        b_w = tl.load(p_w + i_k * BLOCK)
        scale = tl.load(p_x_scale + i_k * block_stride.to(tl.int64), mask=valid, other=0.0) * tl.load(p_w_scale + i_k)  # [BLOCK_M]
        if SWAP:
            total += tl.dot(b_w, b_x.T) * scale[None, :]
        else:
            total += tl.dot(b_x, b_w.T) * scale[:, None]
    if WEIGHTED:
        weight = tl.load(weights + pair, mask=valid, other=0.0)
        if SWAP:
            total *= weight[None, :]
        else:
            total *= weight[:, None]
    if SWAP:
        total = total.T
    tl.store(p_out, total.to(tl.bfloat16), mask=valid[:, None])


@triton.jit
def swiglu_quantise_kernel(x, codes, scales, I: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """x [R, 2I] bfloat16 (up, then gate) -> codes [R, I] e4m3, scales [R, I/128] float32; one row a program."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    up = tl.load(x + row * (2 * I) + column).to(tl.float32)
    gate = tl.load(x + row * (2 * I) + I + column).to(tl.float32)
    c = gate * tl.sigmoid(gate) * up
    scale = tl.maximum(tl.max(tl.abs(c), 1), 1e-10) / 448.0
    tl.store(codes + row * I + column, (c / scale[:, None]).to(codes.dtype.element_ty))
    tl.store(scales + row * (I // BLOCK) + block, scale)


@triton.jit(do_not_specialize=["count", "offset"])
def localise_kernel(ids, local_ids, count, offset, EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    """Local ids; -1 for experts elsewhere."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    local = tl.load(ids + index, mask=index < count) - offset
    tl.store(local_ids + index, tl.where((local >= 0) & (local < EXPERTS), local, -1), mask=index < count)


def grouped_gemm(x, x_scale, strides, w, w_scale, out, tiles, tile, weights, pairs_per_row: int, zero_others: bool) -> None:
    """strides: of x_scale, (row, block). tiles: (sorted_pairs, tile_expert, padded_total). weights: None leaves rows unweighted."""
    sorted_pairs, tile_expert, padded_total = tiles
    size, depth = w.shape[1:]
    grid = (len(tile_expert) * (size // tile.block_n),)
    grouped_gemm_kernel[grid](
        x, x_scale, w, w_scale, out, sorted_pairs, tile_expert, padded_total, x_scale if weights is None else weights,
        *strides, len(out),
        N=size, K=depth, PAIRS_PER_ROW=pairs_per_row, WEIGHTED=weights is not None, ZERO_OTHERS=zero_others,
        BLOCK=BLOCK, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP_M=tile.group_m, SWAP=tile.block_m < 64,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def swiglu_quantise(x, codes, scales) -> None:
    rows, middle = codes.shape
    blocks = 16 if rows > 1024 else 4  # few rows: more programs than SMs
    swiglu_quantise_kernel[(rows, middle // (BLOCK * blocks))](x, codes, scales, I=middle, BLOCK=BLOCK, BLOCKS=blocks, num_warps=4)


def localise(ids, offset: int, experts: int, local_ids) -> None:
    count = ids.numel()
    localise_kernel[(triton.cdiv(count, 1024),)](ids, local_ids, count, offset, EXPERTS=experts, SIZE=1024, num_warps=4)
