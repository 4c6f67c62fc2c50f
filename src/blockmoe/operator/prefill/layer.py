"""The prefill kernel: both GEMMs in one launch, and its roles one after the other."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from blockmoe.geometry import BLOCK
from blockmoe.operator.launch import Descriptor, Launch, Slot, descriptor
from blockmoe.operator.persistent import unit_queue
from blockmoe.operator.plan import PrefillTile
from blockmoe.operator.prefill.down import add_rows, down_consumer
from blockmoe.operator.prefill.gate_up import gate_up_consumer, gather, store_codes
from blockmoe.operator.prefill.parts import (
    CODES,
    ROWS,
    barriers_made,
    drain,
    load_down,
    load_gate_up,
    load_scales,
    meet,
    stage_barriers,
    stage_buffers,
)
from blockmoe.operator.prefill.turns import begin_turns, end_turns
from blockmoe.operator.prefill.units import WORDS, K, draw, rows_there
from blockmoe.operator.prefill.zeros import COLUMNS, PAGE, page_runs, write_zeros
from blockmoe.operator.workspace import MOST_PROGRAMS, Round

REGISTERS = (208, 40, 56)  # a thread of consumers, of loaders, of the four warps beside; with (216, 24, 56) 1 % slower
# Bytes that the L2 reads at once of what TMA loads. T = 2048: 534 us, with 128 555; 4096: 617, 627; 11948: 991, 1000; 14107: 1377, 1383
PROMOTION = 256


@gluon.jit
def finished_rows(x_buffers, w_buffers, codes, STAGES: gl.constexpr):
    """Where GEMM2's rows wait for their addition, [64, 128] bfloat16 each: in the last stage of GEMM1, which GEMM2 has no use for, and
    where GEMM1's codes waited to be stored. No unit of GEMM2 ends before these are free: `load` asks for nothing of GEMM2 until all
    consumers have freed GEMM1's stages (`drain`), and `serve` has stored all codes before it fills GEMM2's scales."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    x = x_buffers._reinterpret(gl.bfloat16, [STAGES, ROWS, K], LAYOUT)
    w = w_buffers._reinterpret(gl.bfloat16, [2 * STAGES, ROWS, K], LAYOUT)
    c = codes._reinterpret(gl.bfloat16, [1, ROWS, K], LAYOUT)
    return x.index(STAGES - 1), w.index(2 * STAGES - 2), w.index(2 * STAGES - 1), c.index(0)


@gluon.jit
def consume(
    GROUP: gl.constexpr, codes, coded, sent, left_rows, right_rows, x_buffers, w_buffers, s_buffers, w_s_buffers,
    full_1, empty_1, full_2, empty_2, done, taken, queue, told, heard, pair_weight, middle_scale, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 pairs of each tile."""
    begin_turns(GROUP)
    n, unit = gate_up_consumer(
        GROUP, codes, coded, sent, x_buffers, w_buffers, s_buffers, w_s_buffers, full_1, empty_1, queue, told, heard, pair_weight,
        middle_scale, pitch, HIDDEN, STAGES, CLUSTER,
    )  # fmt: skip
    down_consumer(
        GROUP, left_rows, right_rows, x_buffers, w_buffers, s_buffers, w_s_buffers, full_2, empty_2, done, taken, queue, told, heard,
        n, unit, INTER, STAGES - 1, CLUSTER,
    )  # fmt: skip
    end_turns(GROUP)


@gluon.jit
def tiles_under_way(tile_count, tokens, HIDDEN: gl.constexpr, TILES_APART: gl.constexpr):
    """Up to how many tiles before a unit's own may be under way with it, of the same columns; 0 where no row is told apart: tiles are more
    than TILES_APART, and end far enough from each other, or so many for the tokens that most rows would be late."""
    tiles = gl.load(tile_count)
    return gl.where((tiles <= TILES_APART) & (tokens >= 32 * tiles), gl.num_programs(0) // (HIDDEN // (2 * K)) + 2, 0)


@gluon.jit
def carry(
    x, x_scale, w1_scale, out, rows_0, rows_1, rows_2, rows_3, x_buffers, s_buffers, w_s_buffers, full_1, empty_1, done, taken,
    queue, told, heard, tile_count, pair_token, before, added, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, FLIGHT: gl.constexpr, MANY: gl.constexpr, TILES_APART: gl.constexpr,
):  # fmt: skip
    """Four warps: hidden states to the stages of GEMM1, then finished rows of GEMM2 to the output."""
    if MANY > 0 and gl.load(tile_count) > MANY:
        n, unit = gather(
            x, x_scale, w1_scale, x_buffers, s_buffers, w_s_buffers, full_1, empty_1, queue, told, heard, pair_token, tokens,
            HIDDEN, INTER, STAGES, 2,
        )  # fmt: skip
    else:
        n, unit = gather(
            x, x_scale, w1_scale, x_buffers, s_buffers, w_s_buffers, full_1, empty_1, queue, told, heard, pair_token, tokens,
            HIDDEN, INTER, STAGES, FLIGHT,
        )  # fmt: skip
    near = tiles_under_way(tile_count, tokens, HIDDEN, TILES_APART) if TILES_APART > 0 else gl.to_tensor(0)
    if TILES_APART > 0 and near > 0:
        add_rows(
            out, rows_0, rows_1, rows_2, rows_3, done, taken, queue, told, heard, n, unit, pair_token, before, added, near, HIDDEN, True
        )
    else:
        add_rows(
            out, rows_0, rows_1, rows_2, rows_3, done, taken, queue, told, heard, n, unit, pair_token, before, added, near, HIDDEN, False
        )


@gluon.jit
def load(
    w1, middle, w2, x_buffers, w_buffers, full_1, empty_1, full_2, empty_2, queue, told, heard, wanted, there, ready,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: what TMA loads."""
    meet(ready, CLUSTER)
    step, n, unit = load_gate_up(
        w1, w_buffers, full_1, empty_1, queue, told, heard, wanted, HIDDEN, INTER, STAGES, CLUSTER
    )
    drain(empty_1, step, STAGES)
    boxes = x_buffers._reinterpret(gl.float8e4nv, [2 * CLUSTER * STAGES, ROWS // CLUSTER, K], CODES)
    step = load_down(
        middle, w2, boxes, w_buffers, full_2, empty_2, queue, told, heard, wanted, n, unit, there,
        HIDDEN, INTER, STAGES - 1, CLUSTER,
    )  # fmt: skip
    drain(empty_2, step, STAGES - 1)


@gluon.jit
def serve(
    middle, codes, coded, sent, finished, middle_scale, w2_scale, s_buffers, w_s_buffers, full_2, empty_2,
    queue, told, heard, there, pitch, HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: codes of GEMM1 to the intermediate; then, since consumers have read all stages of GEMM1, scales of GEMM2 to its stages."""
    n, unit = store_codes(middle, codes, coded, sent, queue, told, heard, finished)
    load_scales(
        middle_scale, w2_scale, s_buffers, w_s_buffers, full_2, empty_2, queue, told, heard, n, unit, there, pitch,
        HIDDEN, INTER, STAGES - 1,
    )  # fmt: skip


@gluon.jit
def meeting_places(STAGES: gl.constexpr, CLUSTER: gl.constexpr):
    """Where a program's roles meet: barriers of both GEMMs' stages, of codes, of finished rows and of a unit that is wanted, units, and
    whose rows are there."""
    first = stage_barriers(STAGES, CLUSTER)
    second = stage_barriers(STAGES - 1, CLUSTER)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    coded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    sent = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    wanted = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    units = unit_queue(6, WORDS)
    there = rows_there()
    mbarrier.init(wanted.index(0), count=1)
    for i in gl.static_range(2):
        mbarrier.init(coded.index(i), count=1)
        mbarrier.init(sent.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    return first, second, (coded, sent), (done, taken), wanted, units, there


@gluon.jit
def prefill(
    places, boxes, x, x_scale, w1_scale, w2_scale, out, middle_scale, token_pairs, pair_token, pair_weight, before, added, ready, ticket,
    mail, finished, tiles, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr, FLIGHT: gl.constexpr, MANY: gl.constexpr,
    TILES_APART: gl.constexpr, CONSUMERS: gl.constexpr, LOADERS: gl.constexpr, CARRIERS: gl.constexpr,
):  # fmt: skip
    """The layer after routing, by all roles: `prefill_kernel`."""
    w1, middle, middle_boxes, w2, runs = boxes
    tile_count, tile_expert, tile_group, tile_begin, tile_end = tiles
    first, second, codes_there, rows_done, wanted, units, there = places
    full_1, empty_1 = first
    full_2, empty_2 = second
    coded, sent = codes_there
    done, taken = rows_done
    queue, told, heard = units
    x_buffers, w_buffers, s_buffers, w_s_buffers = stage_buffers(STAGES)
    codes = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, K], CODES)
    rows_0, rows_1, rows_2, rows_3 = finished_rows(x_buffers, w_buffers, codes, STAGES)
    page = gl.allocate_shared_memory(gl.bfloat16, runs.block_type.shape, PAGE)
    barriers_made(CLUSTER)
    gl.warp_specialize(
        [
            (consume, (
                0, codes, coded, sent, rows_0, rows_1, x_buffers, w_buffers, s_buffers, w_s_buffers, full_1, empty_1, full_2, empty_2,
                done, taken, queue, told, heard, pair_weight, middle_scale, pitch, HIDDEN, INTER, STAGES, CLUSTER,
            )),
            (consume, (
                1, codes, coded, sent, rows_2, rows_3, x_buffers, w_buffers, s_buffers, w_s_buffers, full_1, empty_1, full_2, empty_2,
                done, taken, queue, told, heard, pair_weight, middle_scale, pitch, HIDDEN, INTER, STAGES, CLUSTER,
            )),
            (carry, (
                x, x_scale, w1_scale, out, rows_0, rows_1, rows_2, rows_3, x_buffers, s_buffers, w_s_buffers, full_1, empty_1, done, taken,
                queue, told, heard, tile_count, pair_token, before, added, tokens, HIDDEN, INTER, STAGES, FLIGHT, MANY, TILES_APART,
            )),
            (load, (
                w1, middle_boxes, w2, x_buffers, w_buffers, full_1, empty_1, full_2, empty_2, queue, told, heard, wanted, there, ready,
                HIDDEN, INTER, STAGES, CLUSTER,
            )),
            (serve, (
                middle, codes, coded, sent, finished, middle_scale, w2_scale, s_buffers, w_s_buffers, full_2, empty_2,
                queue, told, heard, there, pitch, HIDDEN, INTER, STAGES,
            )),
            (draw, (
                ticket, mail, queue, told, heard, wanted, there, finished, tile_count, tile_expert, tile_group, tile_begin, tile_end,
                HIDDEN, INTER, CLUSTER,
            )),
            (write_zeros, (runs, page, token_pairs, queue, told, heard, tile_count, tokens, HIDDEN, INTER)),
        ],
        [4, 4, 1, 1, 1, 1],
        [CONSUMERS, CARRIERS, LOADERS, LOADERS, LOADERS, LOADERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "pitch"])
def prefill_kernel(
    w1, middle, middle_boxes, w2, runs, x, x_scale, w1_scale, w2_scale, out, middle_scale, token_pairs, pair_token, pair_weight, before,
    added, ready, ticket, mail, finished, tile_count, tile_expert, tile_group, tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr, FLIGHT: gl.constexpr, MANY: gl.constexpr,
    TILES_APART: gl.constexpr, CONSUMERS: gl.constexpr, LOADERS: gl.constexpr, CARRIERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The layer after routing.

    GEMM1: middle[p, i] = silu(gate) * up as e4m3, middle_scale[i / 128, p] its scale times the pair's routing weight. GEMM2: out[t, h]
    in bfloat16, the sum over the token's pairs (`token_pairs`: how many), in the order of their experts, rounded after each; 0 where it has
    none. GEMM1 has STAGES stages, of which FLIGHT may have their hidden states on their way, or 2 if there are more than MANY tiles (0:
    never); GEMM2 one less.

    Descriptors: w1 [L * 2 I, H], middle [pitch, I] to store to and in boxes to load, w2 [L * H, I], runs: `out` [T * H / 256, 256] in
    bfloat16. x [T, H]; x_scale [H / 128, T]; out [T, H] in 64-bit words; middle_scale [I / 128, pitch], pitch being the most rows that
    tiles can have. before [pitch]: the row of the pair of the same token before, or -1. added [tiles, H / 256], ready [programs], ticket,
    mail [clusters, MAIL] and finished [tiles] begin at 0. added ends at 1; where rows are told apart (TILES_APART, `tiles_under_way`), it
    is 1 without those that are late, and ends at 2.
    """
    places = meeting_places(STAGES, CLUSTER)
    if PDL:
        gdc_wait()
    boxes = (w1, middle, middle_boxes, w2, runs)
    tiles = (tile_count, tile_expert, tile_group, tile_begin, tile_end)
    prefill(
        places, boxes, x, x_scale, w1_scale, w2_scale, out, middle_scale, token_pairs, pair_token, pair_weight, before, added, ready,
        ticket, mail, finished, tiles, tokens, pitch, HIDDEN, INTER, STAGES, CLUSTER, FLIGHT, MANY, TILES_APART, CONSUMERS, LOADERS,
        CARRIERS,
    )  # fmt: skip


def boxes_of(w1: Slot, w2: Slot, out: Slot, tile: PrefillTile, round: Round) -> tuple[Descriptor, ...]:
    """What TMA loads and stores: w1, the intermediate as stored and as loaded, w2, the output."""
    g, middle = round.geometry, (round.sizes.rows, round.geometry.intermediate_size)
    weights = (g.num_local_experts * 2 * g.intermediate_size, g.hidden_size), (g.num_local_experts * g.hidden_size, g.intermediate_size)
    runs = (round.sizes.tokens * g.hidden_size // COLUMNS.value, COLUMNS.value)
    return (
        descriptor(w1, weights[0], (BLOCK, BLOCK), CODES.value, PROMOTION),
        descriptor(round.memory["middle"], middle, (64, BLOCK), CODES.value),
        descriptor(round.memory["middle"], middle, (64 // tile.cluster, BLOCK), CODES.value, PROMOTION),
        descriptor(w2, weights[1], (BLOCK, BLOCK), CODES.value, PROMOTION),
        descriptor(out, runs, (page_runs(g.hidden_size), COLUMNS.value), PAGE.value),
    )


def constants_of(tile: PrefillTile, round: Round) -> tuple:
    """The kernel's but the last."""
    g = round.geometry
    assert g.intermediate_size >= tile.stages * BLOCK, "with fewer K blocks than stages it was never tried"
    assert g.hidden_size >= (tile.flight - 1) * BLOCK, "a unit's last stages are said to be full behind all of its K blocks"
    assert g.intermediate_size // BLOCK % tile.cluster == 0 == g.hidden_size % (2 * BLOCK * tile.cluster), "a cluster's columns"
    return g.hidden_size, g.intermediate_size, tile.stages, tile.cluster, tile.flight, tile.many, tile.apart, *REGISTERS


def layer(x: Slot, x_scale: Slot, w1: Slot, w1_scale: Slot, w2: Slot, w2_scale: Slot, out: Slot, round: Round) -> list[Launch]:
    """Both GEMMs, SwiGLU and the output's last sum."""
    assert round.sm_count <= MOST_PROGRAMS, "counters are of so many"
    tile, b = round.plan.gate_up, round.memory
    lists = ("token_pairs", "pair_token", "pair_weight", "before", "added", "ready", "ticket", "mail", "finished")
    lists = tuple(b[n] for n in (*lists, "tile_count", "tile_expert", "tile_group", "tile_begin", "tile_end"))
    inputs = (x, x_scale, w1_scale, w2_scale, Slot(out.tensor, torch.int64), b["middle_scale"])
    arguments = (*boxes_of(w1, w2, out, tile, round), *inputs, *lists, round.sizes.tokens, round.sizes.rows)
    constants = (*constants_of(tile, round), round.plan.pdl)
    return [round.launch(prefill_kernel, round.sm_count, arguments, constants, 4, cluster=tile.cluster)]
