"""GEMM1 of the prefill engine: hidden states sorted on the way, SwiGLU and quantisation in the epilogue.

Hopper's TMA can't gather rows by token. So in every program four warps copy hidden states of tiles to come, and their scales, into a ring
of RING sorted tiles, from where they are loaded. A tile is copied in COLUMNS parts, part after part dealt out to the programs in
turn. `copied` counts a tile's parts that are done, `used` its units that are multiplied: after COLUMNS of those tile + RING may
take the place. See the package for why nobody waits for ever.

The first consumer also prepares GEMM2's order of addition (`prepare_adding`) while it would wait for the first stages.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from blockmoe.geometry import BLOCK
from blockmoe.operator.launch import Launch, Slot, descriptor
from blockmoe.operator.prefill.parts import (
    CODES,
    REGISTERS,
    ROWS,
    SUMS,
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
            wait_until(used + (tile - RING) + zeros, zeros + COLUMNS, zeros + 1000)
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
def prepare_adding(
    token_pair, token_pairs, before, added, tile_count, tokens, TOP_K: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """For GEMM2. before[pair]: the tile of the token's pair before (a lower expert's, so a lower tile), or -1. added
    [tiles + 1, COLUMNS]: zeros, but ones ahead of the first tile, for the pairs that are their token's first."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 128, layout=LAYOUT)
    flags = (gl.load(tile_count) + 1) * COLUMNS
    for i in range(gl.program_id(0) * 128, flags, gl.num_programs(0) * 128):
        gl.store(added + i + lane, (i + lane < COLUMNS).to(gl.int32), mask=i + lane < flags)
    for i in range(gl.program_id(0) * 128, tokens, gl.num_programs(0) * 128):
        token = i + lane
        count = gl.load(token_pairs + token, mask=token < tokens, other=0)
        earlier = gl.full([128], -1, gl.int32, LAYOUT)
        for n in gl.static_range(TOP_K):
            pair = gl.load(token_pair + token * TOP_K + n, mask=n < count, other=0)
            gl.store(before + pair, earlier, mask=n < count)
            earlier = pair // (2 * ROWS)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gate_up_consumer(
    GROUP: gl.constexpr, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, w_scale, pair_weight,
    middle_scale, token_pair, token_pairs, before, added, used, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: pairs GROUP * 64 ... of each tile. GROUP 0, which has a part in every tile, counts `used`."""
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    if GROUP == 0:  # while the first stages are on their way
        prepare_adding(token_pair, token_pairs, before, added, tile_count, tokens, TOP_K, HIDDEN // (2 * K))
    step = 0
    units = gl.load(tile_count) * COLUMNS
    n = 0
    unit = hear(queue, told, heard, n, 4)
    while unit < units:
        tile = unit // COLUMNS
        column = unit % COLUMNS
        begin = gl.load(tile_begin + tile) + GROUP * ROWS
        end = gl.load(tile_end + tile)
        if begin < end:
            up_scale = w_scale + (gl.load(tile_expert + tile) * (2 * COLUMNS) + column) * BLOCKS
            up, gate, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, full, empty, step, up_scale, up_scale + COLUMNS * BLOCKS,
                BLOCKS, STAGES,
            )  # fmt: skip
            row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            weight = gl.load(pair_weight + row, mask=row < end, other=0.0)
            value = gate * reciprocal(1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            scale = gl.maximum(gl.max(gl.abs(value), 1), 1e-34) * (1.0 / 448.0)
            codes = (value * gl.expand_dims(1.0 / scale, 1)).to(gl.float8e4nv)
            out = out_buffers.index(GROUP)
            tma.store_wait(0)
            barrier()
            out.store(codes)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(middle, [begin, column * K], out)
            gl.store(middle_scale + column * pitch + row, scale * weight)
        else:
            step = skip(full, empty, step, BLOCKS, STAGES)
        if GROUP == 0:
            gl.atomic_add(used + tile, 1, sem="relaxed")
        n += 1
        unit = hear(queue, told, heard, n, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "pitch"])
def gate_up_kernel(
    ring, w, middle, x, x_scale, ring_rows, ring_scale, w_scale, middle_scale, pair_token, pair_weight, token_pair,
    token_pairs, before, added, copied, used, ticket, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    CONSUMERS: gl.constexpr, LOADERS: gl.constexpr, COPIERS: gl.constexpr,
):  # fmt: skip
    """middle[p, i] = silu(gate) * up as e4m3, middle_scale[i / 128, p] its scale times the pair's routing weight.

    Descriptors: ring [RING * 128, H] over ring_rows, w [L * 2 I, H], middle [pitch, I]. x [T, H]; x_scale [H / 128, T];
    ring_scale [H / 128, RING * 128]; middle_scale [I / 128, pitch], pitch being the most rows that tiles can have. copied and used
    [tiles], and ticket, begin at 0.
    """
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES)
    queue, told, heard = unit_queue(3)
    out_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, K], CODES)
    gl.warp_specialize(
        [
            (gate_up_consumer, (
                0, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, w_scale, pair_weight,
                middle_scale, token_pair, token_pairs, before, added, used, tile_count, tile_expert, tile_begin, tile_end,
                tokens, pitch, HIDDEN, INTER, TOP_K, STAGES,
            )),
            (gate_up_consumer, (
                1, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, w_scale, pair_weight,
                middle_scale, token_pair, token_pairs, before, added, used, tile_count, tile_expert, tile_begin, tile_end,
                tokens, pitch, HIDDEN, INTER, TOP_K, STAGES,
            )),
            (copy_rows, (
                x, x_scale, ring_rows, ring_scale, pair_token, copied, used, tile_count, tile_begin, tile_end, tokens,
                HIDDEN, COLUMNS, RING,
            )),
            (load_tiles, (
                ring, w, x_buffers, w_buffers, full, empty, queue, told, heard, ticket, copied, tile_count, tile_expert,
                tile_begin, tile_end, 2 * INTER, INTER, K, COLUMNS, BLOCKS, STAGES, RING,
            )),
            (load_scales, (
                ring_scale, s_buffers, full, empty, queue, told, heard, copied, tile_count, tile_begin, RING * 2 * ROWS,
                COLUMNS, BLOCKS, STAGES, RING,
            )),
        ],
        [4, 4, 1, 1],
        [CONSUMERS, COPIERS, LOADERS, LOADERS],
    )  # fmt: skip


def gate_up(x: Slot, x_scale: Slot, w: Slot, w_scale: Slot, round: Round) -> list[Launch]:
    """GEMM1."""
    g, tile, b = round.geometry, round.plan.gate_up, round.memory
    box = (64, BLOCK)
    ring = descriptor(b["ring"], (tile.ring * BLOCK, g.hidden_size), box, CODES.value)
    weights = descriptor(w, (g.num_local_experts * 2 * g.intermediate_size, g.hidden_size), (BLOCK, BLOCK), CODES.value)
    middle = descriptor(b["middle"], (round.sizes.rows, g.intermediate_size), box, CODES.value)
    lists = tuple(b[n] for n in ("pair_token", "pair_weight", "token_pair", "token_pairs", "before", "added"))
    lists += tuple(b[n] for n in ("copied", "used", "gate_up_ticket", "tile_count", "tile_expert", "tile_begin", "tile_end"))
    arguments = (
        ring, weights, middle, x, x_scale, b["ring"], b["ring_scale"], w_scale, b["middle_scale"], *lists,
        round.sizes.tokens, round.sizes.rows,
    )  # fmt: skip
    shape = (g.hidden_size, g.intermediate_size, g.top_k, tile.stages, tile.ring)
    return [round.launch(gate_up_kernel, round.sm_count, arguments, (*shape, *REGISTERS), 4, cooperative=True)]
