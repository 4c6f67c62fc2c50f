"""GEMM2: rows of the output, W2 [H, I] of a pair's expert times its intermediate.

  y[h, p] = sum over kb of W2_scale[e, h / 128, kb] * sum over j of middle_scale[p, kb, j] * d[h, p, kb, j]
  d[h, p, kb, j] = sum over k in part j of block kb of W2[e, h, k] * middle[p, k]

The intermediate has one scale a pair and GROUP columns (32, 64 or 128), the weights one a 128 block. Where GROUP is
smaller, each pair takes 128 / GROUP columns of the dot, in column j only part j of the block, the rest zeros: one wgmma
then gives the parts apart, at no further read of the weights.

`down_dense` sums over the experts in the accumulator and writes the output (or one of SPLIT partial sums);
`down_sorted` (weights on the M side) and `down_wide` (pairs on the M side) write one bf16 row a pair, over `blocks` of the
H / 128 column blocks at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.geometry import BLOCK
from blockmoe.operator.kernel_parts import after_previous_kernel
from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.workspace import Round


@triton.jit(do_not_specialize=["tokens"])
def down_dense_kernel(
    middle, middle_scale, w, w_scale, tile_count, tile_expert, out, tokens,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 128
    PARTS: tl.constexpr = K // GROUP
    m = (tl.program_id(0) // SPLIT) * BLOCK_M
    split = tl.program_id(0) % SPLIT
    after_previous_kernel(PDL)
    blocks = tl.load(tile_count) * (INTER // K)
    row = m + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N * PARTS)
    token = column // PARTS
    part = column % PARTS
    inside = token < tokens
    k = tl.arange(0, K)
    read = inside[None, :] & ((k // GROUP)[:, None] == part[None, :])
    w_at = w + row[:, None] * INTER + k[None, :]
    x_at = middle + token[None, :] * INTER + k[:, None]
    s_at = middle_scale + token * (INTER // GROUP) + part

    # The expert's load comes before the weights': Triton gives each of the two levels half of the stages.
    sums = tl.zeros((BLOCK_M, BLOCK_N * PARTS), tl.float32)
    for block in tl.range(blocks * split // SPLIT, blocks * (split + 1) // SPLIT, num_stages=STAGES):
        tile = block // (INTER // K)
        kb = block % (INTER // K)
        expert = tl.load(tile_expert + tile)
        b_w = tl.load(w_at + (expert.to(tl.int64) * (HIDDEN * INTER) + kb * K))  # [BLOCK_M, K]
        b_x = tl.load(x_at + (tile * (BLOCK_N * INTER) + kb * K), mask=read, other=0.0)  # [K, BLOCK_N * PARTS]
        s_x = tl.load(s_at + (tile * BLOCK_N * (INTER // GROUP) + kb * PARTS), mask=inside, other=0.0)
        s_w = tl.load(w_scale + (expert * (HIDDEN // K) + m // K) * (INTER // K) + kb)
        sums += tl.dot(b_w, b_x) * (s_x * s_w)[None, :]

    y = tl.sum(tl.reshape(sums, (BLOCK_M, BLOCK_N, PARTS)), 2)
    t = tl.arange(0, BLOCK_N)
    at = out + (split * tokens + t)[None, :] * HIDDEN + row[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(t < tokens)[None, :])


@triton.jit(do_not_specialize=["first_block", "blocks"])
def down_sorted_kernel(
    middle, middle_scale, w, w_scale, tile_count, tile_expert, tile_begin, tile_end, rows, first_block, blocks,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 128
    PARTS: tl.constexpr = K // GROUP
    columns = blocks * K
    first_column = first_block * K
    after_previous_kernel(PDL)
    tiles = tl.load(tile_count)
    for unit in range(tl.program_id(0), tiles * (columns // BLOCK_M), tl.num_programs(0)):
        tile = unit % tiles  # tiles of one expert side by side: they share the weights in L2
        m = (unit // tiles) * BLOCK_M
        expert = tl.load(tile_expert + tile)
        begin = tl.load(tile_begin + tile)
        end = tl.load(tile_end + tile)
        row = first_column + m + tl.arange(0, BLOCK_M)
        column = tl.arange(0, BLOCK_N * PARTS)
        pair = (begin + column // PARTS).to(tl.int64)
        part = column % PARTS
        k = tl.arange(0, K)
        read = (pair < end)[None, :] & ((k // GROUP)[:, None] == part[None, :])
        w_at = w + expert.to(tl.int64) * (HIDDEN * INTER) + row[:, None] * INTER + k[None, :]
        x_at = middle + pair[None, :] * INTER + k[:, None]
        s_at = middle_scale + pair * (INTER // GROUP) + part
        w_scale_at = w_scale + (expert * (HIDDEN // K) + (first_column + m) // K) * (INTER // K)

        sums = tl.zeros((BLOCK_M, BLOCK_N * PARTS), tl.float32)
        for kb in tl.range(0, INTER // K, num_stages=STAGES):
            b_w = tl.load(w_at + kb * K)  # [BLOCK_M, K]
            b_x = tl.load(x_at + kb * K, mask=read, other=0.0)  # [K, BLOCK_N * PARTS]
            s_x = tl.load(s_at + kb * PARTS, mask=pair < end, other=0.0)
            sums += tl.dot(b_w, b_x) * (s_x * tl.load(w_scale_at + kb))[None, :]

        y = tl.sum(tl.reshape(sums, (BLOCK_M, BLOCK_N, PARTS)), 2)
        pair = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
        at = rows + pair[None, :] * columns + (m + tl.arange(0, BLOCK_M))[:, None]
        tl.store(at, y.to(rows.dtype.element_ty), mask=(pair < end)[None, :])


@triton.jit(do_not_specialize=["first_block", "blocks"])
def down_wide_kernel(
    middle, middle_scale, w, w_scale, tile_count, tile_expert, tile_begin, tile_end, rows, first_block, blocks,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    K: tl.constexpr = 128
    columns = blocks * K
    first_column = first_block * K
    tiles = tl.load(tile_count)
    for unit in range(tl.program_id(0), tiles * blocks, tl.num_programs(0)):
        tile = unit // blocks  # column blocks side by side: they share the pairs' rows in L2
        n = (unit % blocks) * K
        expert = tl.load(tile_expert + tile)
        end = tl.load(tile_end + tile)
        pair = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
        read = tl.minimum(pair, end - 1).to(tl.int64)  # rows past the end repeat the last and are dropped
        k = tl.arange(0, K)
        h = first_column + n + tl.arange(0, K)
        x_at = middle + read[:, None] * INTER + k[None, :]
        w_at = w + expert.to(tl.int64) * (HIDDEN * INTER) + h[None, :] * INTER + k[:, None]
        s_at = middle_scale + read * (INTER // K)
        w_scale_at = w_scale + (expert * (HIDDEN // K) + (first_column + n) // K) * (INTER // K)

        sums = tl.zeros((BLOCK_M, K), tl.float32)
        for kb in tl.range(0, INTER // K, num_stages=STAGES):
            b_x = tl.load(x_at + kb * K)  # [BLOCK_M, K]
            b_w = tl.load(w_at + kb * K)  # [K, K]
            scale = tl.load(s_at + kb) * tl.load(w_scale_at + kb)
            sums += tl.dot(b_x, b_w) * scale[:, None]

        at = rows + pair.to(tl.int64)[:, None] * columns + (n + tl.arange(0, K))[None, :]
        tl.store(at, sums.to(rows.dtype.element_ty), mask=(pair < end)[:, None])


def down(w: Slot, w_scale: Slot, out: Slot, first_block: int, round: Round) -> list[Launch]:
    """GEMM2 over 128-column blocks first_block ... of the output; the dense path knows only all of them."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    tile = plan.down
    shape = (g.hidden_size, g.intermediate_size)
    arguments = (b["middle"], b["middle_scale"], w, w_scale, b["tile_count"], b["tile_expert"])
    group = plan.gate_up.block_i
    if plan.path == "dense":
        arguments += (b["rows"] if tile.split > 1 else out, sizes.tokens)
        constants = (*shape, group, tile.block_m, tile.block_n, tile.split, 2 * tile.stages, plan.pdl)
        programs = g.hidden_size // tile.block_m * tile.split
        return [round.launch(down_dense_kernel, programs, arguments, constants, tile.num_warps)]
    arguments += (b["tile_begin"], b["tile_end"], b["rows"], first_block, sizes.blocks)
    programs = min(sizes.tiles * (sizes.blocks * BLOCK // tile.block_m), round.programs)
    if plan.path == "wide":
        constants = (*shape, tile.block_n, tile.stages, plan.pdl)
        return [round.launch(down_wide_kernel, programs, arguments, constants, tile.num_warps)]
    constants = (*shape, group, tile.block_m, tile.block_n, tile.stages, plan.pdl)
    return [round.launch(down_sorted_kernel, programs, arguments, constants, tile.num_warps)]
