"""GEMM1 and SwiGLU: middle[p] = e4m3(silu(gate) * up), gate and up = W1 rows by token's hidden states.

  d[r, p, kb] = sum over k in block kb of W1[e, r, k] * x[token(p), k]        e4m3 operands, float32 sums (wgmma)
  g[r, p]     = sum over kb of d[r, p, kb] * W1_scale[e, r / 128, kb] * x_scale[kb, token(p)]
  c[i, p]     = silu(g[I + i, p]) * g[i, p]

`gate_up` (dense and sorted paths) holds weights on the M side, 2 * BLOCK_I rows of them: 8 up rows and their 8 gate
rows in turn, so that a thread of the accumulator holds both and SwiGLU moves nothing. It quantises c once a pair and
BLOCK_I columns; the scale is multiplied by the pair's routing weight, so GEMM2 needs no other factor.
`gate_up_wide` holds 128 pairs on the M side and makes gate, then up, in two passes over K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.operator.kernel_parts import after_previous_kernel, quantise, silu
from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.workspace import Round


@triton.jit(do_not_specialize=["tokens"])
def gate_up_kernel(
    x, x_scale, w, w_scale, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, middle,
    middle_scale, tokens,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, TILE_FIRST: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 128
    BLOCKS_I: tl.constexpr = INTER // BLOCK_I
    row = tl.arange(0, 2 * BLOCK_I)
    is_gate = (row // 8) % 2
    row_i = (row // 16) * 8 + row % 8
    after_previous_kernel(PDL)
    tiles = tl.load(tile_count)
    for unit in range(tl.program_id(0), tiles * BLOCKS_I, tl.num_programs(0)):
        if TILE_FIRST:  # tiles of one expert side by side: they share the weights in L2
            tile = unit % tiles
            i_block = unit // tiles
        else:
            tile = unit // BLOCKS_I
            i_block = unit % BLOCKS_I
        expert = tl.load(tile_expert + tile)
        end = tl.load(tile_end + tile)
        pair = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_N)
        weight = tl.load(pair_weight + pair, mask=pair < end, other=0.0)
        token = tl.load(pair_token + pair, mask=pair < end, other=0)
        chosen = weight != 0.0  # a dense tile lists every token: the others are neither read nor multiplied

        i = i_block * BLOCK_I + row_i
        k = tl.arange(0, K)
        w_at = w + expert.to(tl.int64) * (2 * INTER * HIDDEN) + (is_gate * INTER + i)[:, None] * HIDDEN + k[None, :]
        x_at = x + token.to(tl.int64)[None, :] * HIDDEN + k[:, None]
        up_scale = w_scale + (expert * (2 * INTER // K) + i_block * BLOCK_I // K) * (HIDDEN // K)
        gate_scale = up_scale + (INTER // K) * (HIDDEN // K)

        sums = tl.zeros((2 * BLOCK_I, BLOCK_N), tl.float32)
        for kb in tl.range(0, HIDDEN // K, num_stages=STAGES):
            b_w = tl.load(w_at + kb * K)  # [2 * BLOCK_I, K]
            b_x = tl.load(x_at + kb * K, mask=chosen[None, :], other=0.0)  # [K, BLOCK_N]
            s_x = tl.load(x_scale + kb * tokens + token, mask=chosen, other=0.0)
            s_w = tl.where(is_gate == 0, tl.load(up_scale + kb), tl.load(gate_scale + kb))
            sums += tl.dot(b_w, b_x) * (s_w[:, None] * s_x[None, :])

        halves = tl.permute(tl.reshape(sums, (BLOCK_I // 8, 2, 8, BLOCK_N)), (0, 2, 3, 1))
        up, gate = tl.split(halves)
        c = tl.reshape(silu(gate) * up, (BLOCK_I, BLOCK_N))
        codes, scale = quantise(c, 0)
        column = i_block * BLOCK_I + tl.arange(0, BLOCK_I)
        tl.store(middle + pair.to(tl.int64)[None, :] * INTER + column[:, None], codes, mask=(pair < end)[None, :])
        tl.store(middle_scale + pair.to(tl.int64) * BLOCKS_I + i_block, scale * weight, mask=pair < end)


@triton.jit(do_not_specialize=["tokens"])
def gate_up_wide_kernel(
    x, x_scale, w, w_scale, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, middle,
    middle_scale, tokens,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    K: tl.constexpr = 128
    BLOCKS_I: tl.constexpr = INTER // K
    tiles = tl.load(tile_count)
    for unit in range(tl.program_id(0), tiles * BLOCKS_I, tl.num_programs(0)):
        tile = unit // BLOCKS_I  # column blocks side by side: they share the hidden states in L2
        i_block = unit % BLOCKS_I
        expert = tl.load(tile_expert + tile)
        end = tl.load(tile_end + tile)
        pair = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
        token = tl.load(pair_token + pair, mask=pair < end, other=0)
        k = tl.arange(0, K)
        i = tl.arange(0, K)
        x_at = x + token.to(tl.int64)[:, None] * HIDDEN + k[None, :]

        c = tl.zeros((BLOCK_M, K), tl.float32)
        for half in tl.static_range(2):  # gate, then up
            w_at = w + (expert.to(tl.int64) * (2 * INTER) + (1 - half) * INTER + i_block * K) * HIDDEN + i[None, :] * HIDDEN + k[:, None]
            s_at = w_scale + (expert * (2 * INTER // K) + (1 - half) * (INTER // K) + i_block) * (HIDDEN // K)
            sums = tl.zeros((BLOCK_M, K), tl.float32)
            for kb in tl.range(0, HIDDEN // K, num_stages=STAGES):
                b_x = tl.load(x_at + kb * K)  # [BLOCK_M, K]; rows past the end repeat token 0 and are dropped
                b_w = tl.load(w_at + kb * K)  # [K, K]
                scale = tl.load(x_scale + kb * tokens + token) * tl.load(s_at + kb)
                sums += tl.dot(b_x, b_w) * scale[:, None]
            c = silu(sums) if half == 0 else c * sums

        codes, scale = quantise(c, 1)
        column = i_block * K + i
        tl.store(middle + pair.to(tl.int64)[:, None] * INTER + column[None, :], codes, mask=(pair < end)[:, None])
        weight = tl.load(pair_weight + pair, mask=pair < end, other=0.0)
        tl.store(middle_scale + pair.to(tl.int64) * BLOCKS_I + i_block, scale * weight, mask=pair < end)


def gate_up(x: Slot, x_scale: Slot, w: Slot, w_scale: Slot, round: Round) -> list[Launch]:
    """GEMM1."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    tile = plan.gate_up
    arguments = (
        x, x_scale, w, w_scale, b["tile_count"], b["tile_expert"], b["tile_begin"], b["tile_end"], b["pair_token"],
        b["pair_weight"], b["middle"], b["middle_scale"], sizes.tokens,
    )  # fmt: skip
    units = sizes.tiles * (g.intermediate_size // tile.block_i)
    shape = (g.hidden_size, g.intermediate_size)
    if plan.path == "wide":
        constants = (*shape, tile.block_n, tile.stages, plan.pdl)
        return [round.launch(gate_up_wide_kernel, min(units, round.programs), arguments, constants, tile.num_warps)]
    dense = plan.path == "dense"
    constants = (*shape, tile.block_i, tile.block_n, tile.stages, plan.pdl, not dense)
    programs = units if dense else min(units, round.programs)
    return [round.launch(gate_up_kernel, programs, arguments, constants, tile.num_warps)]
