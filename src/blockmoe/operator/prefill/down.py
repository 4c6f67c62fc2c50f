"""GEMM2 of the prefill engine: finished tiles are added to the output, and no row is kept; zeros for tokens without a pair.

Four warps bring a unit's rows from shared memory to the output in the order of their experts, so that every bit is the same from
call to call: a token's first pair stores, the others add, each rounding the running sum to bfloat16. They wait until the tiles that
hold these tokens' pairs before (`before`, by pair) have been added (`added`, by tile and column tile). See the package for why
nobody waits for ever.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockmoe.geometry import BLOCK
from blockmoe.operator.launch import Launch, Slot, descriptor
from blockmoe.operator.prefill.parts import (
    CODES,
    REGISTERS,
    ROWS,
    K,
    barrier,
    hear,
    load_scales,
    load_tiles,
    multiply,
    skip,
    stage_buffers,
    unit_queue,
    wait_until,
)
from blockmoe.operator.workspace import Round


@gluon.jit
def put(at, values, how):
    """Store (how 1) or add (2) 16 bytes, 8 bfloat16, of every pair of 64-bit words; 0: neither."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b32 a, b, c, d;
        mov.b64 {a, b}, $3;
        mov.b64 {c, d}, $4;
        setp.eq.s32 p, $5, 1;
        setp.eq.s32 q, $5, 2;
        @p st.global.v4.b32 [$1], {a, b, c, d};
        @q red.relaxed.gpu.global.add.noftz.v4.bf16x2 [$1], {a, b, c, d};
        mov.b32 $0, 0;
        }""",
        "=r,l,l,l,l,r,r", [at, values, how], dtype=gl.int16, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def read_targets(PART: gl.constexpr, pair_token, before, begin, end, LAYOUT: gl.constexpr):
    """4 * token + how of rows 32 * PART ... of the tile at `begin`; how: 0 no pair, 1 the token's first pair, 2 another."""
    row = begin + PART * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
    there = row < end
    token = gl.load(pair_token + row, mask=there, other=0)
    earlier = gl.load(before + row, mask=there, other=-1)
    return 4 * token + gl.where(there, gl.where(earlier >= 0, 2, 1), 0)


@gluon.jit
def put_part(PART: gl.constexpr, targets, out, words, c, HIDDEN: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows 32 * PART ... of a tile into columns 256 * c ... of the output (here in words of 4 columns)."""
    WORDS: gl.constexpr = K // 4
    at = out + gl.expand_dims((targets >> 2).to(gl.int64) * (HIDDEN // 4), 1)
    at += c * (2 * WORDS) + gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    how = gl.expand_dims(targets & 3, 1) + gl.zeros([32, WORDS], gl.int32, LAYOUT)
    buffer: gl.constexpr = 2 * (PART // 2)
    put(at, words.index(buffer).slice((PART % 2) * 32, 32).load(LAYOUT), how)
    put(at + WORDS, words.index(buffer + 1).slice((PART % 2) * 32, 32).load(LAYOUT), how)


@gluon.jit
def zero_parts(tokens, HIDDEN: gl.constexpr):
    """How many parts `zero_part` knows."""
    return (tokens + 31) // 32 * ((HIDDEN + 8 * K - 1) // (8 * K))


@gluon.jit
def zero_part(part, out, token_pairs, tokens, HIDDEN: gl.constexpr, LAYOUT: gl.constexpr):
    """1024 columns of 32 tokens, where a token has no pair: zeros. Each unit is followed by its share of the parts.

    Written all at once by GEMM1's copying warps, 100 MB of zeros cost it 74 us at T = 14107 (976, without zeros 902) and 95 at 11948
    (735 and 640; both with units dealt out statically: results/h100/operator/prefill-adhoc.txt, section 5).
    """
    WORDS: gl.constexpr = K // 4
    RUNS: gl.constexpr = (HIDDEN + 8 * K - 1) // (8 * K)
    token = part // RUNS * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
    none = gl.expand_dims(gl.load(token_pairs + token, mask=token < tokens, other=1) == 0, 1)
    at = out + gl.expand_dims(token.to(gl.int64) * (HIDDEN // 4), 1)
    at += gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    zeros = gl.zeros([32, WORDS], gl.int64, LAYOUT)
    first = part % RUNS * (8 * WORDS)
    for c in range(first, gl.minimum(first + 8 * WORDS, HIDDEN // 4), WORDS):
        gl.store(at + c, zeros, mask=none, cache_modifier=".cs")


@gluon.jit
def add_rows(
    out, done_buffers, done, taken, queue, told, heard, pair_token, token_pairs, before, added, tile_count, tile_begin,
    tile_end, tokens, HIDDEN: gl.constexpr,
):  # fmt: skip
    """Four warps. All that is known beforehand is read before the wait: another tile with the same tokens may wait for this one."""
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    words = done_buffers._reinterpret(gl.int64, [4, ROWS, K // 4], gl.SwizzledSharedLayout(2, 1, 8, [1, 0]))
    one = gl.zeros([128], gl.int32, ONE_EACH) + 1
    tiles = 0
    large_tiles = 0
    units = gl.load(tile_count) * COLUMNS
    parts = zero_parts(tokens, HIDDEN)
    if units == 0:
        for part in range(gl.program_id(0), parts, gl.num_programs(0)):
            zero_part(part, out, token_pairs, tokens, HIDDEN, LAYOUT)
    each = (parts + gl.maximum(units, 1) - 1) // gl.maximum(units, 1)
    n = 0
    unit = hear(queue, told, heard, n, 4)
    while unit < units:
        tile = unit // COLUMNS
        c = unit % COLUMNS
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        row = begin + gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        earlier = gl.load(before + row, mask=row < end, other=-1)
        targets_0 = read_targets(0, pair_token, before, begin, end, LAYOUT)
        targets_1 = read_targets(1, pair_token, before, begin, end, LAYOUT)
        targets_2 = read_targets(2, pair_token, before, begin, end, LAYOUT)
        targets_3 = read_targets(3, pair_token, before, begin, end, LAYOUT)
        # tile -1 is the entry ahead of the first tile's, and always 1
        wait_until(added + ((earlier + 1) * COLUMNS + c), one, one + 40)
        barrier()
        mbarrier.wait(done.index(0), tiles & 1)
        put_part(0, targets_0, out, words, c, HIDDEN, LAYOUT)
        put_part(1, targets_1, out, words, c, HIDDEN, LAYOUT)
        barrier()
        mbarrier.arrive(taken.index(0), count=1)
        if begin + ROWS < end:
            mbarrier.wait(done.index(1), large_tiles & 1)
            put_part(2, targets_2, out, words, c, HIDDEN, LAYOUT)
            put_part(3, targets_3, out, words, c, HIDDEN, LAYOUT)
            barrier()
            mbarrier.arrive(taken.index(1), count=1)
            large_tiles += 1
        tiles += 1
        gl.atomic_xchg(added + ((tile + 1) * COLUMNS + c), 1, sem="release")
        for part in range(unit * each, gl.minimum(unit * each + each, parts)):
            zero_part(part, out, token_pairs, tokens, HIDDEN, LAYOUT)
        n += 1
        unit = hear(queue, told, heard, n, 4)


@gluon.jit
def down_consumer(
    GROUP: gl.constexpr, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, done, taken, w_scale,
    tile_count, tile_expert, tile_begin, tile_end,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: pairs GROUP * 64 ... of each tile, as bfloat16 into two of `done_buffers`, for `add_rows` to take."""
    BLOCKS: gl.constexpr = INTER // K
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    step = 0
    tiles = 0  # that this consumer had a part in
    units = gl.load(tile_count) * COLUMNS
    n = 0
    unit = hear(queue, told, heard, n, 4)
    while unit < units:
        tile = unit // COLUMNS
        begin = gl.load(tile_begin + tile) + GROUP * ROWS
        if begin < gl.load(tile_end + tile):
            scale = w_scale + (gl.load(tile_expert + tile) * (2 * COLUMNS) + 2 * (unit % COLUMNS)) * BLOCKS
            left, right, step = multiply(GROUP, x_buffers, w_buffers, s_buffers, full, empty, step, scale, scale + BLOCKS, BLOCKS, STAGES)
            mbarrier.wait(taken.index(GROUP), (tiles & 1) ^ 1)
            done_buffers.index(2 * GROUP).store(left.to(gl.bfloat16))
            done_buffers.index(2 * GROUP + 1).store(right.to(gl.bfloat16))
            barrier()
            mbarrier.arrive(done.index(GROUP), count=1)
            tiles += 1
        else:
            step = skip(full, empty, step, BLOCKS, STAGES)
        n += 1
        unit = hear(queue, told, heard, n, 4)


@gluon.jit(do_not_specialize=["tokens", "pitch"])
def down_kernel(
    middle, w, out, middle_scale, w_scale, pair_token, token_pairs, before, added, ticket, tile_count, tile_expert,
    tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    LOADERS: gl.constexpr, ADDERS: gl.constexpr,
):  # fmt: skip
    """out[t, h] in bfloat16: the sum over the token's pairs, in the order of their experts, rounded after each.

    Descriptors: middle [pitch, I], w [L * H, I]. out [T, H] in 64-bit words; middle_scale [I / 128, pitch]. before [pitch] and added
    [tiles + 1, H / 256] as GEMM1 left them; ticket begins at 0.
    """
    BLOCKS: gl.constexpr = INTER // K
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES)
    queue, told, heard = unit_queue(4)
    done_buffers = gl.allocate_shared_memory(gl.bfloat16, [4, ROWS, K], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    gl.warp_specialize(
        [
            (down_consumer, (
                0, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, done, taken, w_scale,
                tile_count, tile_expert, tile_begin, tile_end, HIDDEN, INTER, STAGES,
            )),
            (down_consumer, (
                1, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, done, taken, w_scale,
                tile_count, tile_expert, tile_begin, tile_end, HIDDEN, INTER, STAGES,
            )),
            (add_rows, (
                out, done_buffers, done, taken, queue, told, heard, pair_token, token_pairs, before, added, tile_count,
                tile_begin, tile_end, tokens, HIDDEN,
            )),
            (load_tiles, (
                middle, w, x_buffers, w_buffers, full, empty, queue, told, heard, ticket, added, tile_count, tile_expert,
                tile_begin, tile_end, HIDDEN, K, 2 * K, COLUMNS, BLOCKS, STAGES, 0,
            )),
            (load_scales, (
                middle_scale, s_buffers, full, empty, queue, told, heard, added, tile_count, tile_begin, pitch, COLUMNS,
                BLOCKS, STAGES, 0,
            )),
        ],
        [4, 4, 1, 1],
        [CONSUMERS, ADDERS, LOADERS, LOADERS],
    )  # fmt: skip


def down(w: Slot, w_scale: Slot, out: Slot, round: Round) -> list[Launch]:
    """GEMM2, the output's last sum included."""
    g, tile, b = round.geometry, round.plan.down, round.memory
    middle = descriptor(b["middle"], (round.sizes.rows, g.intermediate_size), (64, BLOCK), CODES.value)
    weights = descriptor(w, (g.num_local_experts * g.hidden_size, g.intermediate_size), (BLOCK, BLOCK), CODES.value)
    lists = tuple(b[n] for n in ("pair_token", "token_pairs", "before", "added", "down_ticket"))
    lists += tuple(b[n] for n in ("tile_count", "tile_expert", "tile_begin", "tile_end"))
    words = Slot(out.tensor, torch.int64)
    arguments = (middle, weights, words, b["middle_scale"], w_scale, *lists, round.sizes.tokens, round.sizes.rows)
    shape = (g.hidden_size, g.intermediate_size, tile.stages)
    return [round.launch(down_kernel, round.sm_count, arguments, (*shape, *REGISTERS), 4, cooperative=True)]
