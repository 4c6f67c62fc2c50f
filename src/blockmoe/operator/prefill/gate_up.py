"""GEMM1 in the prefill kernel: hidden states sorted on the way, SwiGLU and quantisation in the epilogue.

Hopper's TMA can't gather rows by token. So in every program four warps copy hidden states of tiles to come, and their scales, into a ring
of RING sorted tiles, from where they are loaded. A tile is copied in COLUMNS parts, part after part dealt out to the programs in
turn. `copied` counts a tile's parts that are done, `used` its units that are multiplied: after COLUMNS of those tile + RING may
take the place. `finished` counts consumers that are done with a unit of a tile, its rows of the intermediate stored. See the package for
why nobody waits for ever.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from blockmoe.operator.persistent import GENERIC, barrier, wait_until
from blockmoe.operator.prefill.parts import CODES, ROWS, SUMS, K, multiply, my_units, skip, unit_at


@gluon.jit
def copy_part(source, target, inside, token, count, HIDDEN: gl.constexpr):
    """Rows token[0 ... count - 1] of source to rows 0 ... of target, 16 bytes a lane, a warp a row."""
    PART: gl.constexpr = 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
    for first in range(0, 2 * ROWS, PART):
        at = row + first
        mask = gl.expand_dims(at < count, 1) & inside
        line = gl.load(token + at, mask=at < count, other=0) * HIDDEN
        data = gl.load(source + gl.expand_dims(line, 1), mask=mask, other=0.0)
        gl.store(target + gl.expand_dims(at * HIDDEN, 1), data, mask=mask)


@gluon.jit
def copy_rows(
    x, x_scale, ring, ring_scale, pair_token, copied, used, tile_count, tile_begin, tile_end, tokens,
    HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Four warps. Part j of a tile is the j-th run of columns, and the scales of K blocks j, j + COLUMNS, ..."""
    WIDTH: gl.constexpr = 16 * ((HIDDEN // 16 + COLUMNS - 1) // COLUMNS)  # bytes
    AT_ONCE: gl.constexpr = 512  # a warp a row, 16 bytes a lane
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [1, 32], [4, 1], [1, 0])
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zeros = gl.zeros([128], gl.int32, ONE_EACH)
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        part = unit % COLUMNS
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        slot = (tile % RING) * (2 * ROWS)
        if tile >= RING:
            wait_until(used + (tile - RING) + zeros, zeros + COLUMNS, zeros + 1000, GENERIC)
            barrier()
        for i in gl.static_range((WIDTH + AT_ONCE - 1) // AT_ONCE):
            byte = i * AT_ONCE + gl.expand_dims(gl.arange(0, AT_ONCE, layout=gl.SliceLayout(0, LAYOUT)), 0)
            column = part * WIDTH + byte
            inside = (byte < WIDTH) & (column < HIDDEN)
            copy_part(x + column, ring + slot * HIDDEN + column, inside, pair_token + begin, end - begin, HIDDEN)
        row = gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        there = begin + row < end
        token = gl.load(pair_token + begin + row, mask=there, other=0)
        for k in range(part, HIDDEN // K, COLUMNS):
            gl.store(ring_scale + k * (RING * 2 * ROWS) + slot + row, gl.load(x_scale + k * tokens + token, mask=there, other=0.0))
        barrier()
        gl.atomic_add(copied + tile, 1, sem="release")


@gluon.jit
def write_zeros(out, token_pairs, used, tile_count, tokens, HIDDEN: gl.constexpr):
    """Four warps, all columns of tokens without a pair, 1024 of 32 tokens at a time, spread over GEMM1: a share as each tile begins.

    Written all at once they cost it 57 to 92 us at T = 14107 and 11948; in GEMM2, by the warps that add, 30 to 39 (docs/kernel-log.md).
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])  # of 64-bit words, 4 columns each
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WORDS: gl.constexpr = K // 4
    RUNS: gl.constexpr = (HIDDEN + 8 * K - 1) // (8 * K)
    once = gl.zeros([128], gl.int32, ONE_EACH)
    tiles = gl.load(tile_count)
    parts = (tokens + 31) // 32 * RUNS
    for part in range(gl.program_id(0), parts, gl.num_programs(0)):
        if tiles > 0:
            wait_until(used + part * tiles // parts + once, once + 1, once + 2000, GENERIC)
        token = part // RUNS * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
        none = gl.expand_dims(gl.load(token_pairs + token, mask=token < tokens, other=1) == 0, 1)
        at = out + gl.expand_dims(token.to(gl.int64) * (HIDDEN // 4), 1)
        at += gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT)), 0)
        first = part % RUNS * (8 * WORDS)
        for c in range(first, gl.minimum(first + 8 * WORDS, HIDDEN // 4), WORDS):
            gl.store(at + c, gl.zeros([32, WORDS], gl.int64, LAYOUT), mask=none, cache_modifier=".cs")


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def stored(finished, pending):
    """The TMA store of this consumer's last unit, one of tile `pending` (-1: none), is complete, and said to be."""
    WAIT: gl.constexpr = "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(WAIT, "=r,r", [pending], dtype=gl.int32, is_pure=False, pack=1)
    barrier()
    if pending >= 0:
        gl.atomic_add(finished + pending, 1, sem="release")


@gluon.jit
def gate_up_consumer(
    GROUP: gl.constexpr, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, w_scale, pair_weight, middle_scale,
    used, finished, tile_count, tile_expert, tile_group, tile_begin, tile_end, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps: pairs GROUP * 64 ... of each tile. GROUP 0, which has a part in every tile, counts `used`."""
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    step = 0
    pending = -1
    first_unit, stride, units = my_units(tile_count, COLUMNS, CLUSTER)
    for unit in range(first_unit, units, stride):
        tile, column, _ = unit_at(unit, tile_group, COLUMNS, CLUSTER)
        begin = gl.load(tile_begin + tile) + GROUP * ROWS
        end = gl.load(tile_end + tile)
        if begin < end:
            up_scale = w_scale + (gl.load(tile_expert + tile) * (2 * COLUMNS) + column) * BLOCKS
            up, gate, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, full, empty, step, up_scale, up_scale + COLUMNS * BLOCKS,
                BLOCKS, STAGES, CLUSTER,
            )  # fmt: skip
            if GROUP == 0:
                gl.atomic_add(used + tile, 1, sem="relaxed")
            row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            weight = gl.load(pair_weight + row, mask=row < end, other=0.0)
            value = gate * reciprocal(1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            scale = gl.maximum(gl.max(gl.abs(value), 1), 1e-34) * (1.0 / 448.0)
            codes = (value * gl.expand_dims(1.0 / scale, 1)).to(gl.float8e4nv)
            stored(finished, pending)
            out = out_buffers.index(4 * GROUP)
            out.store(codes)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(middle, [begin, column * K], out)
            gl.store(middle_scale + column * pitch + row, scale * weight)
            pending = tile
        else:
            step = skip(full, empty, step, BLOCKS, STAGES, CLUSTER)
            gl.atomic_add(finished + tile, 1, sem="relaxed")
    stored(finished, pending)
    return step
