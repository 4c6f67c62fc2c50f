"""GEMM2 in the prefill kernel: finished tiles are added to the output, and no row is kept.

Four warps bring a unit's rows from shared memory to the output in the order of their experts, so that every bit is the same from
call to call: a token's first pair stores, the others add, each rounding the running sum to bfloat16. A row waits until its token's row
before (`before`, by row) has been added, which `added` tells by tile and column tile. See the package for why nobody waits for ever.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockmoe.operator.persistent import GENERIC, barrier, wait_until
from blockmoe.operator.prefill.parts import ROWS, multiply, skip
from blockmoe.operator.prefill.units import END, K, hear_unit

TILE_BITS = gl.constexpr(7)  # of a tile's rows: dividing takes registers, which are spilled
assert 1 << TILE_BITS.value == 2 * ROWS.value
AGAIN = gl.constexpr("mov.b32 $0, $1;")  # the same, which the compiler does not see


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
def is_late(row, earlier, near):
    """1 for a row whose token's row before, `earlier` (-1: none), is of one of the `near` tiles before its own."""
    return ((earlier >= 0) & ((row >> TILE_BITS) - (earlier >> TILE_BITS) <= near)).to(gl.int32)


@gluon.jit
def read_targets(PART: gl.constexpr, pair_token, before, begin, end, near, LATE: gl.constexpr, LAYOUT: gl.constexpr):
    """8 * token + how of rows 32 * PART ... of the tile at `begin`; how: 0 no pair, 1 the token's first pair, 2 another, 6 one that is
    late, if LATE, where some may be."""
    row = begin + PART * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
    there = row < end
    token = gl.load(pair_token + row, mask=there, other=0)
    earlier = gl.load(before + row, mask=there, other=-1)
    how = gl.where(there, gl.where(earlier >= 0, 2, 1), 0)
    if LATE:
        how += 4 * is_late(row, earlier, near)
    return 8 * token + how


@gluon.jit
def put_part(PART: gl.constexpr, now, targets, out, left, right, c, HIDDEN: gl.constexpr, LATE: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows 32 * PART ... of a tile, of its half in `left` and `right`, into columns 256 * c ... of the output, in words of 4 columns; if
    LATE those that are late (`now` 1), or the others."""
    WORDS: gl.constexpr = K // 4
    if LATE:  # lest all that follows from it, of all parts, be computed before the loop, and spilled
        targets = gl.inline_asm_elementwise(AGAIN, "=r,r", [targets], dtype=gl.int32, is_pure=False, pack=1)
    how = targets & 7
    if LATE:
        how = gl.where(how >> 2 == now, how & 3, 0)
    at = out + gl.expand_dims((targets >> 3).to(gl.int64) * (HIDDEN // 4), 1)
    at += c * (2 * WORDS) + gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    how = gl.expand_dims(how, 1) + gl.zeros([32, WORDS], gl.int32, LAYOUT)
    put(at, left.slice((PART % 2) * 32, 32).load(LAYOUT), how)
    put(at + WORDS, right.slice((PART % 2) * 32, 32).load(LAYOUT), how)


@gluon.jit
def put_half(
    HALF: gl.constexpr, now, last, targets, out, left, right, done, taken, uses, c, HIDDEN: gl.constexpr, LATE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Those of a consumer's rows whose turn it is `now`; the `last` free their place, which `uses` tiles had before."""
    mbarrier.wait(done.index(HALF), uses & 1)
    put_part(2 * HALF, now, targets[2 * HALF], out, left, right, c, HIDDEN, LATE, LAYOUT)
    put_part(2 * HALF + 1, now, targets[2 * HALF + 1], out, left, right, c, HIDDEN, LATE, LAYOUT)
    barrier()
    if now == last:
        mbarrier.arrive(taken.index(HALF), count=1)


@gluon.jit
def add_some(
    now, last, at, least, targets, out, rows, done, taken, tiles, large_tiles, begin, end, c, HIDDEN: gl.constexpr, LATE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Those of a tile's rows whose turn it is `now`, when the counters `at` are at least `least`."""
    left_0, right_0, left_1, right_1 = rows
    wait_until(at, least, gl.full_like(least, 40), GENERIC)
    barrier()
    put_half(0, now, last, targets, out, left_0, right_0, done, taken, tiles, c, HIDDEN, LATE, LAYOUT)
    if begin + ROWS < end:
        put_half(1, now, last, targets, out, left_1, right_1, done, taken, large_tiles, c, HIDDEN, LATE, LAYOUT)


@gluon.jit
def add_rows(
    out, rows_0, rows_1, rows_2, rows_3, done, taken, queue, told, heard, n, unit, pair_token, before, added, near,
    HIDDEN: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Four warps, from the nth unit on. All that is known beforehand is read before the wait: another tile with the same tokens may wait
    for this one. For the same reason, if LATE, rows that wait for one of the `near` tiles before come after the others, and others are
    told of as soon as they are added: `added` is then 1, and in the end 2."""
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 8, [1, 0])
    left_0 = rows_0._reinterpret(gl.int64, [ROWS, K // 4], WORDS)
    right_0 = rows_1._reinterpret(gl.int64, [ROWS, K // 4], WORDS)
    left_1 = rows_2._reinterpret(gl.int64, [ROWS, K // 4], WORDS)
    right_1 = rows_3._reinterpret(gl.int64, [ROWS, K // 4], WORDS)
    rows = (left_0, right_0, left_1, right_1)
    tiles = gl.to_tensor(0)
    large_tiles = gl.to_tensor(0)
    while unit[0] < END:
        _, tile, c, _, begin, end, _ = unit
        row = begin + gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        earlier = gl.load(before + row, mask=row < end, other=-1)
        targets = ()
        for part in gl.static_range(4):
            targets = targets + (read_targets(part, pair_token, before, begin, end, near, LATE, LAYOUT),)
        own = added + (tile * COLUMNS + c)
        at = added + ((gl.maximum(earlier, 0) >> TILE_BITS) * COLUMNS + c)
        if LATE:
            late = is_late(row, earlier, near)
            second = is_late(earlier, gl.load(before + earlier, mask=earlier >= 0, other=-1), near)
            last = gl.max(late, 0)
            least = gl.where(earlier >= 0, (1 + second) << (2 * late), 0)  # two bits for each `now`
            for now in range(0, last + 1):
                add_some(
                    now, last, at, (least >> (2 * now)) & 3, targets, out, rows, done, taken, tiles, large_tiles, begin, end, c,
                    HIDDEN, LATE, LAYOUT,
                )  # fmt: skip
                gl.atomic_xchg(own, gl.where(now == last, 2, 1), sem="release")
        else:
            least = (earlier >= 0).to(gl.int32)
            add_some(0, 0, at, least, targets, out, rows, done, taken, tiles, large_tiles, begin, end, c, HIDDEN, LATE, LAYOUT)
            gl.atomic_xchg(own, 1, sem="release")
        if begin + ROWS < end:
            large_tiles += 1
        tiles += 1
        n += 1
        unit = hear_unit(queue, told, heard, n, 4)


@gluon.jit
def down_consumer(
    GROUP: gl.constexpr, left_rows, right_rows, x_buffers, w_buffers, s_buffers, w_s_buffers, full, empty, done, taken,
    queue, told, heard, n, unit, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps, from the nth unit on: pairs GROUP * 64 ... of each tile, as bfloat16 [64, 128] into `left_rows` and `right_rows`, for
    `add_rows` to take."""
    BLOCKS: gl.constexpr = INTER // K
    step = gl.to_tensor(0)
    tiles = gl.to_tensor(0)  # that this consumer had a part in
    while unit[0] < END:
        _, _, _, _, first, end, _ = unit
        begin = first + GROUP * ROWS
        if begin < end:
            left, right, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, w_s_buffers, full, empty, step, gl.where(first + ROWS < end, 1, 0),
                BLOCKS, STAGES, CLUSTER,
            )  # fmt: skip
            mbarrier.wait(taken.index(GROUP), (tiles & 1) ^ 1)
            left_rows.store(left.to(gl.bfloat16))
            right_rows.store(right.to(gl.bfloat16))
            barrier()
            mbarrier.arrive(done.index(GROUP), count=1)
            tiles += 1
        else:
            step = skip(full, empty, step, BLOCKS, STAGES, CLUSTER)
        n += 1
        unit = hear_unit(queue, told, heard, n, 4)
