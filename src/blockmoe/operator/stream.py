"""Both GEMMs where reading the weights is the bound: persistent, warp-specialised, one program a multiprocessor (Gluon, Hopper).

Weights stand on wgmma's M side, sorted pairs on the N side, as in `gate_up_kernel` and `down_sorted_kernel`, whose buffers
and tile lists these serve. A tile is twice ROWS weight rows by N pairs: ROWS up rows and their gate rows, or two runs of ROWS
output columns. It has two accumulators, so SwiGLU moves nothing.

  producer of weights   one warp: TMA, two boxes of [ROWS, 128] a K block, STAGES deep; runs on into the next tile
  producer of pairs     one warp: cp.async of the pairs' rows (gathered by token in GEMM1) and of all scales
  consumers             ROWS / 16 warps: wgmma, promotion by scales that lie in shared memory, epilogue

`full` takes 1 arrival of TMA and one of each thread of the pairs' warp; `empty` 1 of the consumers. In GEMM2 weights are asked
for before GEMM1 is complete: the tile list, all that their producer reads, is.
"""

from __future__ import annotations

from dataclasses import replace

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockmoe.geometry import BLOCK
from blockmoe.operator.launch import Descriptor, Launch, Slot, descriptor
from blockmoe.operator.plan import StreamTile
from blockmoe.operator.stream_load import pairs_producer, weights_producer
from blockmoe.operator.workspace import Round

WEIGHT_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def sums_of_tile(
    it, w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty,
    ROWS: gl.constexpr, N: gl.constexpr, KBLOCKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Scaled sums over K of both runs of weight rows, [ROWS, N] each."""
    S: gl.constexpr = gl.SliceLayout(0, M)
    PART: gl.constexpr = 128 // PARTS
    zero = gl.zeros([ROWS, N], gl.float32, M)
    first = gl.zeros([ROWS, N], gl.float32, M)
    second = gl.zeros([ROWS, N], gl.float32, M)
    for _ in range(KBLOCKS):
        at = it % STAGES
        mbarrier.wait(full.index(at), (it // STAGES) & 1)
        fence_async_shared()  # the pairs' rows came by cp.async, wgmma reads them by the other proxy
        for part in gl.static_range(PARTS):
            b_x = x_bufs.index(at).slice(part * PART, PART, dim=1).permute((1, 0))
            b_first = w_bufs.index(2 * at).slice(part * PART, PART, dim=1)
            b_second = w_bufs.index(2 * at + 1).slice(part * PART, PART, dim=1)
            d_first = warpgroup_mma(b_first, b_x, zero, use_acc=False, is_async=True)
            d_second = warpgroup_mma(b_second, b_x, zero, use_acc=False, is_async=True)
            s = s_bufs.index(PARTS * at + part).load(S)
            s_first = s * w_s_bufs.index(2 * at).load(S)
            s_second = s * w_s_bufs.index(2 * at + 1).load(S)
            d_first, d_second = warpgroup_mma_wait(0, deps=(d_first, d_second))
            if part == PARTS - 1:
                mbarrier.arrive(empty.index(at), count=1)
            first += d_first * gl.expand_dims(s_first, 0)
            second += d_second * gl.expand_dims(s_second, 0)
        it += 1
    return first, second, it


@gluon.jit
def store_middle(
    up, gate, weight, begin, end, block, middle, middle_scale,
    INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = gl.BlockedLayout([16, 1], [ROWS // 16, 512 // ROWS], [1, WARPS], [0, 1])
    s_pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, M))
    c = gate / (1.0 + gl.exp(-gate)) * up
    scale = gl.maximum(gl.max(gl.abs(c), 0), 1e-34) * (1.0 / 448.0)
    codes = gl.convert_layout((c / gl.expand_dims(scale, 0)).to(gl.float8e4nv), OUT)
    gl.store(middle_scale + s_pair * BLOCKS + block, scale * weight, mask=s_pair < end)
    pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    column = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    to = middle + gl.expand_dims(pair * INTER, 0) + gl.expand_dims(column, 1)
    gl.store(to, codes, mask=gl.expand_dims(pair < end, 0))


@gluon.jit
def gate_up_consumer(
    w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_begin, tile_end, pair_weight, middle, middle_scale,
    INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, KBLOCKS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = INTER // ROWS
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    tiles = gl.load(tile_count)
    it = 0
    for unit in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        tile = unit % tiles
        block = unit // tiles
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        s_pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, M))
        weight = gl.load(pair_weight + s_pair, mask=s_pair < end, other=0.0)
        up, gate, it = sums_of_tile(it, w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty, ROWS, N, KBLOCKS, 1, STAGES, M)
        store_middle(up, gate, weight, begin, end, block, middle, middle_scale, INTER, ROWS, N, WARPS, M)


@gluon.jit
def store_rows(
    first, second, begin, end, column, columns, rows, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
    pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    at = column + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    to = rows + gl.expand_dims(pair.to(gl.int64) * columns, 0) + gl.expand_dims(at, 1)
    there = gl.expand_dims(pair < end, 0)
    gl.store(to, gl.convert_layout(first.to(gl.bfloat16), OUT), mask=there)
    gl.store(to + ROWS, gl.convert_layout(second.to(gl.bfloat16), OUT), mask=there)


@gluon.jit
def down_consumer(
    w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_begin, tile_end, rows, blocks,
    ROWS: gl.constexpr, N: gl.constexpr, KBLOCKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    tiles = gl.load(tile_count)
    columns = blocks * (2 * ROWS)
    it = 0
    for unit in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile = unit % tiles
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        column = (unit // tiles) * (2 * ROWS)
        first, second, it = sums_of_tile(it, w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty, ROWS, N, KBLOCKS, PARTS, STAGES, M)
        store_rows(first, second, begin, end, column, columns, rows, ROWS, N, WARPS)


@gluon.jit
def buffers(ROWS: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, 128], CODES)
    x_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, N, 128], CODES)
    s_bufs = gl.allocate_shared_memory(gl.float32, [PARTS * STAGES, N], VECTOR)
    w_s_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1], VECTOR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32)
        mbarrier.init(empty.index(i), count=1)
    return w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty


@gluon.jit(do_not_specialize=["tokens"])
def gate_up_stream_kernel(
    w, x, x_scale, w_scale, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, middle, middle_scale, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BURST: gl.constexpr,
    REGISTERS: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    KBLOCKS: gl.constexpr = HIDDEN // 128
    BLOCKS: gl.constexpr = INTER // ROWS
    w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty = buffers(ROWS, N, 1, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (gate_up_consumer, (
                w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_begin, tile_end, pair_weight, middle, middle_scale,
                INTER, ROWS, N, KBLOCKS, STAGES, WARPS,
            )),
            (weights_producer, (
                w, w_bufs, full, empty, tile_count, tile_expert, 0, BLOCKS,
                ROWS, ROWS, INTER, 2 * INTER, KBLOCKS, STAGES, BURST,
            )),
            (pairs_producer, (
                x, x_scale, w_scale, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_expert, tile_begin, tile_end,
                pair_token, tokens, 0, BLOCKS,
                N, ROWS, INTER, 2 * INTER, KBLOCKS, 1, True, STAGES, PDL,
            )),
        ],
        [1, 1],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["first_block", "blocks"])
def down_stream_kernel(
    w, middle, middle_scale, w_scale, tile_count, tile_expert, tile_begin, tile_end, rows, first_block, blocks,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BURST: gl.constexpr, REGISTERS: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    KBLOCKS: gl.constexpr = INTER // 128
    PARTS: gl.constexpr = 128 // GROUP
    w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty = buffers(ROWS, N, PARTS, STAGES)
    first_row = first_block * 128
    tile_blocks = blocks * 128 // (2 * ROWS)
    gl.warp_specialize(
        [
            (down_consumer, (
                w_bufs, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_begin, tile_end, rows, tile_blocks,
                ROWS, N, KBLOCKS, PARTS, STAGES, WARPS,
            )),
            (weights_producer, (
                w, w_bufs, full, empty, tile_count, tile_expert, first_row, tile_blocks,
                ROWS, 2 * ROWS, ROWS, HIDDEN, KBLOCKS, STAGES, BURST,
            )),
            (pairs_producer, (
                middle, middle_scale, w_scale, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_expert, tile_begin, tile_end,
                tile_begin, 0, first_row, tile_blocks,
                N, 2 * ROWS, ROWS, HIDDEN, KBLOCKS, PARTS, False, STAGES, PDL,
            )),
        ],
        [1, 1],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


def constants(tile: StreamTile, blocks: int) -> tuple[int, ...]:
    """ROWS, N, STAGES, BURST, REGISTERS (of a producer's thread), WARPS (of consumers) for `blocks` blocks of K."""
    burst = tile.burst if blocks % tile.burst == 0 else 1
    return tile.rows, tile.block_n, tile.stages, burst, 80 if tile.block_n == 64 else 56, tile.num_warps


def weight_boxes(w: Slot, rows: int, columns: int, tile: StreamTile) -> Descriptor:
    return descriptor(w, (rows, columns), (tile.rows, BLOCK), WEIGHT_LAYOUT, tile.promotion)


def gate_up(x: Slot, x_scale: Slot, w: Slot, w_scale: Slot, round: Round) -> list[Launch]:
    """GEMM1."""
    g, tile, b = round.geometry, round.plan.gate_up, round.memory
    weights = weight_boxes(w, g.num_local_experts * 2 * g.intermediate_size, g.hidden_size, tile)
    lists = tuple(b[n] for n in ("tile_count", "tile_expert", "tile_begin", "tile_end", "pair_token", "pair_weight"))
    arguments = (weights, x, x_scale, w_scale, *lists, b["middle"], b["middle_scale"], round.sizes.tokens)
    programs = min(round.sizes.tiles * (g.intermediate_size // tile.rows), round.sm_count)
    shape = (g.hidden_size, g.intermediate_size, *constants(tile, g.hidden_blocks))
    return [round.launch(gate_up_stream_kernel, programs, arguments, (*shape, round.plan.pdl), tile.num_warps)]


def down(w: Slot, w_scale: Slot, out: Slot, first_block: int, round: Round) -> list[Launch]:
    """GEMM2 into `rows` over 128-column blocks first_block ... of the output."""
    g, tile, b, blocks = round.geometry, round.plan.down, round.memory, round.sizes.blocks
    if blocks * BLOCK % (2 * tile.rows):
        tile = replace(tile, rows=64, stages=tile.stages * (256 + tile.block_n) // (128 + tile.block_n))  # as much memory
    weights = weight_boxes(w, g.num_local_experts * g.hidden_size, g.intermediate_size, tile)
    lists = tuple(b[n] for n in ("tile_count", "tile_expert", "tile_begin", "tile_end"))
    arguments = (weights, b["middle"], b["middle_scale"], w_scale, *lists, b["rows"], first_block, blocks)
    programs = min(round.sizes.tiles * (blocks * BLOCK // (2 * tile.rows)), round.sm_count)
    shape = (g.hidden_size, g.intermediate_size, round.plan.gate_up.rows, *constants(tile, g.intermediate_size // BLOCK))
    return [round.launch(down_stream_kernel, programs, arguments, (*shape, round.plan.pdl), tile.num_warps)]
