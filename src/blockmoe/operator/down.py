"""GEMM2: rows of the output, W2 [H, I] of a pair's expert times its intermediate.

  y[h, p] = sum over kb of W2_scale[e, h / 128, kb] * sum over j of middle_scale[p, kb, j] * d[h, p, kb, j]
  d[h, p, kb, j] = sum over k in part j of block kb of W2[e, h, k] * middle[p, k]

The intermediate has one scale a pair and GROUP columns (32, 64 or 128), the weights one a 128 block. Where GROUP is
smaller, each pair takes 128 / GROUP columns of the dot, in column j only part j of the block, the rest zeros: one wgmma
then gives the parts apart, at no further read of the weights.

`down_dense` sums over the experts in the accumulator and writes the output (or one of SPLIT partial sums);
`down_sorted` (weights on the M side) and `down_wide` (pairs on the M side) write one bf16 row a pair, over COLUMNS of the
H columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.geometry import BLOCK, MoEGeometry
from blockmoe.operator.kernel_parts import after_previous_kernel
from blockmoe.operator.launch import launch
from blockmoe.operator.plan import Plan
from blockmoe.operator.workspace import Sizes


@triton.jit(do_not_specialize=["tokens"])
def down_dense_kernel(
    middle, middle_scale, w, w_scale, tile_count, tile_expert, out, tokens,
    H: tl.constexpr, I: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    K: tl.constexpr = 128
    PARTS: tl.constexpr = K // GROUP
    m = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    blocks = tl.load(tile_count) * (I // K)
    row = m + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N * PARTS)
    token = column // PARTS
    part = column % PARTS
    inside = token < tokens
    k = tl.arange(0, K)
    read = inside[None, :] & ((k // GROUP)[:, None] == part[None, :])
    w_at = w + row[:, None] * I + k[None, :]
    x_at = middle + token[None, :] * I + k[:, None]
    s_at = middle_scale + token * (I // GROUP) + part

    # The expert's load comes before the weights': Triton gives each of the two levels half of the stages.
    sums = tl.zeros((BLOCK_M, BLOCK_N * PARTS), tl.float32)
    for block in tl.range(blocks * split // SPLIT, blocks * (split + 1) // SPLIT, num_stages=STAGES):
        tile = block // (I // K)
        kb = block % (I // K)
        expert = tl.load(tile_expert + tile)
        b_w = tl.load(w_at + (expert.to(tl.int64) * (H * I) + kb * K))  # [BLOCK_M, K]
        b_x = tl.load(x_at + (tile * (BLOCK_N * I) + kb * K), mask=read, other=0.0)  # [K, BLOCK_N * PARTS]
        s_x = tl.load(s_at + (tile * BLOCK_N * (I // GROUP) + kb * PARTS), mask=inside, other=0.0)
        s_w = tl.load(w_scale + (expert * (H // K) + m // K) * (I // K) + kb)
        sums += tl.dot(b_w, b_x) * (s_x * s_w)[None, :]

    y = tl.sum(tl.reshape(sums, (BLOCK_M, BLOCK_N, PARTS)), 2)
    t = tl.arange(0, BLOCK_N)
    at = out + (split * tokens + t)[None, :] * H + row[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(t < tokens)[None, :])


@triton.jit(do_not_specialize=["first_column"])
def down_sorted_kernel(
    middle, middle_scale, w, w_scale, tile_count, tile_expert, tile_begin, tile_end, rows, first_column,
    H: tl.constexpr, I: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    K: tl.constexpr = 128
    PARTS: tl.constexpr = K // GROUP
    tiles = tl.load(tile_count)
    for unit in range(tl.program_id(0), tiles * (COLUMNS // BLOCK_M), tl.num_programs(0)):
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
        w_at = w + expert.to(tl.int64) * (H * I) + row[:, None] * I + k[None, :]
        x_at = middle + pair[None, :] * I + k[:, None]
        s_at = middle_scale + pair * (I // GROUP) + part
        w_scale_at = w_scale + (expert * (H // K) + (first_column + m) // K) * (I // K)

        sums = tl.zeros((BLOCK_M, BLOCK_N * PARTS), tl.float32)
        for kb in tl.range(0, I // K, num_stages=STAGES):
            b_w = tl.load(w_at + kb * K)  # [BLOCK_M, K]
            b_x = tl.load(x_at + kb * K, mask=read, other=0.0)  # [K, BLOCK_N * PARTS]
            s_x = tl.load(s_at + kb * PARTS, mask=pair < end, other=0.0)
            sums += tl.dot(b_w, b_x) * (s_x * tl.load(w_scale_at + kb))[None, :]

        y = tl.sum(tl.reshape(sums, (BLOCK_M, BLOCK_N, PARTS)), 2)
        pair = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
        at = rows + pair[None, :] * COLUMNS + (m + tl.arange(0, BLOCK_M))[:, None]
        tl.store(at, y.to(rows.dtype.element_ty), mask=(pair < end)[None, :])


@triton.jit(do_not_specialize=["first_column"])
def down_wide_kernel(
    middle, middle_scale, w, w_scale, tile_count, tile_expert, tile_begin, tile_end, rows, first_column,
    H: tl.constexpr, I: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    K: tl.constexpr = 128
    tiles = tl.load(tile_count)
    for unit in range(tl.program_id(0), tiles * (COLUMNS // K), tl.num_programs(0)):
        tile = unit // (COLUMNS // K)
        n = (unit % (COLUMNS // K)) * K
        expert = tl.load(tile_expert + tile)
        end = tl.load(tile_end + tile)
        pair = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
        read = tl.minimum(pair, end - 1).to(tl.int64)  # rows past the end repeat the last and are dropped
        k = tl.arange(0, K)
        h = first_column + n + tl.arange(0, K)
        x_at = middle + read[:, None] * I + k[None, :]
        w_at = w + expert.to(tl.int64) * (H * I) + h[None, :] * I + k[:, None]
        s_at = middle_scale + read * (I // K)
        w_scale_at = w_scale + (expert * (H // K) + (first_column + n) // K) * (I // K)

        sums = tl.zeros((BLOCK_M, K), tl.float32)
        for kb in tl.range(0, I // K, num_stages=STAGES):
            b_x = tl.load(x_at + kb * K)  # [BLOCK_M, K]
            b_w = tl.load(w_at + kb * K)  # [K, K]
            scale = tl.load(s_at + kb) * tl.load(w_scale_at + kb)
            sums += tl.dot(b_x, b_w) * scale[:, None]

        at = rows + pair.to(tl.int64)[:, None] * COLUMNS + (n + tl.arange(0, K))[None, :]
        tl.store(at, sums.to(rows.dtype.element_ty), mask=(pair < end)[:, None])


def down(w, w_scale, out, first_column: int, buffers, geometry: MoEGeometry, plan: Plan, sizes: Sizes, variant: tuple, programs: int) -> None:  # fmt: skip
    """Launch GEMM2 over columns first_column … of the output; the dense path knows only all of them."""
    g, tile, b = geometry, plan.down, buffers
    options = dict(num_warps=tile.num_warps, pdl=plan.pdl, variant=variant)
    operands = (b["middle"], b["middle_scale"], w, w_scale, b["tile_count"], b["tile_expert"])
    group = plan.gate_up.block_i
    if plan.path == "dense":
        launch(
            down_dense_kernel, (g.hidden_size // tile.block_m, tile.split),
            (*operands, b["rows"] if tile.split > 1 else out, sizes.tokens),
            (g.hidden_size, g.intermediate_size, group, tile.block_m, tile.block_n, tile.split, 2 * tile.stages, plan.pdl),
            **options,
        )  # fmt: skip
        return
    arguments = (*operands, b["tile_begin"], b["tile_end"], b["rows"], first_column)
    units = sizes.tiles * (sizes.columns // tile.block_m)
    if plan.path == "wide":
        constants = (g.hidden_size, g.intermediate_size, sizes.columns, BLOCK, tile.stages, plan.pdl)
        launch(down_wide_kernel, (min(units, programs), 1), arguments, constants, **options)
        return
    launch(
        down_sorted_kernel, (min(units, programs), 1), arguments,
        (g.hidden_size, g.intermediate_size, sizes.columns, group, tile.block_m, tile.block_n, tile.stages, plan.pdl),
        **options,
    )  # fmt: skip
