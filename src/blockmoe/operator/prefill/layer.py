"""The prefill kernel: both GEMMs in one launch, and its roles one after the other."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockmoe.geometry import BLOCK
from blockmoe.operator.launch import Launch, Slot, descriptor
from blockmoe.operator.prefill.down import add_rows, down_consumer, prepare_adding
from blockmoe.operator.prefill.gate_up import copy_rows, gate_up_consumer, write_zeros
from blockmoe.operator.prefill.parts import CODES, ROWS, K, drain, load_scales, load_tiles, meet, stage_buffers
from blockmoe.operator.workspace import Round

REGISTERS = (208, 40, 56)  # a thread of consumers, of loaders, of the four warps beside; more for the consumers spill (ptxas 12.9)


@gluon.jit
def consume(
    GROUP: gl.constexpr, middle, out, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, done, taken, w1_scale, w2_scale,
    pair_weight, middle_scale, token_pair, token_pairs, before, added, prepared, used, finished, tile_count, tile_expert, tile_group,
    tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 pairs of each tile. The first consumer prepares GEMM2's order of addition while it would wait for its first stage."""
    if GROUP == 0:
        prepare_adding(token_pair, token_pairs, before, added, prepared, tile_count, tokens, TOP_K, HIDDEN // (2 * K))
    codes = done_buffers._reinterpret(gl.float8e4nv, [8, ROWS, K], CODES)
    step = gate_up_consumer(
        GROUP, middle, codes, x_buffers, w_buffers, s_buffers, full, empty, w1_scale, pair_weight, middle_scale, used, finished,
        tile_count, tile_expert, tile_group, tile_begin, tile_end, pitch, HIDDEN, INTER, STAGES, CLUSTER,
    )  # fmt: skip
    down_consumer(
        GROUP, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, step, done, taken, w2_scale, tile_count, tile_expert,
        tile_group, tile_begin, tile_end, HIDDEN, INTER, STAGES, CLUSTER,
    )  # fmt: skip


@gluon.jit
def carry(
    x, x_scale, ring_rows, ring_scale, out, done_buffers, done, taken, pair_token, token_pairs, before, added, prepared, copied, used,
    tile_count, tile_group, tile_begin, tile_end, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, RING: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps: hidden states to the ring, zeros and finished rows to the output."""
    copy_rows(
        x, x_scale, ring_rows, ring_scale, pair_token, copied, used, tile_count, tile_begin, tile_end, tokens, HIDDEN, INTER // K, RING
    )
    write_zeros(out, token_pairs, used, tile_count, tokens, HIDDEN)
    add_rows(
        out, done_buffers, done, taken, pair_token, before, added, prepared, tile_count, tile_group, tile_begin, tile_end, HIDDEN, CLUSTER
    )


@gluon.jit
def load(
    ring, w1, middle, w2, x_buffers, w_buffers, full, empty, copied, finished, tile_count, tile_expert, tile_group, tile_begin, tile_end,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: the tiles of both GEMMs."""
    IN: gl.constexpr = INTER // K
    step = load_tiles(
        ring, w1, x_buffers, w_buffers, full, empty, gl.to_tensor(0), copied, IN, tile_count, tile_expert, tile_group, tile_begin, tile_end,
        2 * INTER, INTER, K, IN, HIDDEN // K, STAGES, RING, CLUSTER,
    )  # fmt: skip
    step = load_tiles(
        middle, w2, x_buffers, w_buffers, full, empty, step, finished, 2 * IN, tile_count, tile_expert, tile_group, tile_begin, tile_end,
        HIDDEN, K, 2 * K, HIDDEN // (2 * K), IN, STAGES, 0, CLUSTER,
    )  # fmt: skip
    drain(empty, step, STAGES)


@gluon.jit
def load_all_scales(
    ring_scale, middle_scale, s_buffers, full, empty, copied, finished, tile_count, tile_group, tile_begin, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: the pairs' scales of both GEMMs."""
    IN: gl.constexpr = INTER // K
    step = load_scales(
        ring_scale, s_buffers, full, empty, gl.to_tensor(0), copied, IN, tile_count, tile_group, tile_begin, RING * 2 * ROWS,
        IN, HIDDEN // K, STAGES, RING, CLUSTER,
    )  # fmt: skip
    load_scales(
        middle_scale, s_buffers, full, empty, step, finished, 2 * IN, tile_count, tile_group, tile_begin, pitch,
        HIDDEN // (2 * K), IN, STAGES, 0, CLUSTER,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "pitch"])
def prefill_kernel(
    ring, w1, middle, middle_boxes, w2, x, x_scale, ring_rows, ring_scale, w1_scale, w2_scale, out, middle_scale, pair_token, pair_weight,
    token_pair, token_pairs, before, added, ready, prepared, copied, used, finished, tile_count, tile_expert, tile_group, tile_begin,
    tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CLUSTER: gl.constexpr,
    CONSUMERS: gl.constexpr, LOADERS: gl.constexpr, CARRIERS: gl.constexpr,
):  # fmt: skip
    """The layer after routing.

    GEMM1: middle[p, i] = silu(gate) * up as e4m3, middle_scale[i / 128, p] its scale times the pair's routing weight. GEMM2: out[t, h]
    in bfloat16, the sum over the token's pairs, in the order of their experts, rounded after each.

    Descriptors: ring [RING * 128, H] over ring_rows, w1 [L * 2 I, H], middle [pitch, I] to store to and in boxes to load, w2 [L * H, I].
    x [T, H]; x_scale [H / 128, T]; ring_scale [H / 128, RING * 128]; out [T, H] in 64-bit words; middle_scale [I / 128, pitch], pitch
    being the most rows that tiles can have. ready [programs], prepared, copied, used and finished [tiles] begin at 0.
    """
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES, CLUSTER)
    codes = gl.allocate_shared_memory(gl.float8e4nv, [8, ROWS, K], CODES)
    done_buffers = codes._reinterpret(gl.bfloat16, [4, ROWS, K], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    meet(ready, CLUSTER)
    gl.warp_specialize(
        [
            (consume, (
                0, middle, out, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, done, taken, w1_scale, w2_scale, pair_weight,
                middle_scale, token_pair, token_pairs, before, added, prepared, used, finished, tile_count, tile_expert, tile_group,
                tile_begin, tile_end, tokens, pitch, HIDDEN, INTER, TOP_K, STAGES, CLUSTER,
            )),
            (consume, (
                1, middle, out, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, done, taken, w1_scale, w2_scale, pair_weight,
                middle_scale, token_pair, token_pairs, before, added, prepared, used, finished, tile_count, tile_expert, tile_group,
                tile_begin, tile_end, tokens, pitch, HIDDEN, INTER, TOP_K, STAGES, CLUSTER,
            )),
            (carry, (
                x, x_scale, ring_rows, ring_scale, out, done_buffers, done, taken, pair_token, token_pairs, before, added, prepared,
                copied, used, tile_count, tile_group, tile_begin, tile_end, tokens, HIDDEN, INTER, RING, CLUSTER,
            )),
            (load, (
                ring, w1, middle_boxes, w2, x_buffers, w_buffers, full, empty, copied, finished, tile_count, tile_expert, tile_group,
                tile_begin, tile_end, HIDDEN, INTER, STAGES, RING, CLUSTER,
            )),
            (load_all_scales, (
                ring_scale, middle_scale, s_buffers, full, empty, copied, finished, tile_count, tile_group, tile_begin, pitch,
                HIDDEN, INTER, STAGES, RING, CLUSTER,
            )),
        ],
        [4, 4, 1, 1],
        [CONSUMERS, CARRIERS, LOADERS, LOADERS],
    )  # fmt: skip


def layer(x: Slot, x_scale: Slot, w1: Slot, w1_scale: Slot, w2: Slot, w2_scale: Slot, out: Slot, round: Round) -> list[Launch]:
    """Both GEMMs, SwiGLU and the output's last sum."""
    g, tile, b = round.geometry, round.plan.gate_up, round.memory
    boxes = (64 // tile.cluster, BLOCK)
    ring = descriptor(b["ring"], (tile.ring * BLOCK, g.hidden_size), boxes, CODES.value)
    weights = descriptor(w1, (g.num_local_experts * 2 * g.intermediate_size, g.hidden_size), (BLOCK, BLOCK), CODES.value)
    middle = descriptor(b["middle"], (round.sizes.rows, g.intermediate_size), (64, BLOCK), CODES.value)
    middle_boxes = descriptor(b["middle"], (round.sizes.rows, g.intermediate_size), boxes, CODES.value)
    others = descriptor(w2, (g.num_local_experts * g.hidden_size, g.intermediate_size), (BLOCK, BLOCK), CODES.value)
    lists = tuple(b[n] for n in ("pair_token", "pair_weight", "token_pair", "token_pairs", "before", "added"))
    lists += tuple(b[n] for n in ("ready", "prepared", "copied", "used", "finished"))
    lists += tuple(b[n] for n in ("tile_count", "tile_expert", "tile_group", "tile_begin", "tile_end"))
    arguments = (
        ring, weights, middle, middle_boxes, others, x, x_scale, b["ring"], b["ring_scale"], w1_scale, w2_scale,
        Slot(out.tensor, torch.int64), b["middle_scale"], *lists, round.sizes.tokens, round.sizes.rows,
    )  # fmt: skip
    shape = (g.hidden_size, g.intermediate_size, g.top_k, tile.stages, tile.ring, tile.cluster)
    programs = round.sm_count // tile.cluster * tile.cluster
    return [round.launch(prefill_kernel, programs, arguments, (*shape, *REGISTERS), 4, cooperative=True, cluster=tile.cluster)]
