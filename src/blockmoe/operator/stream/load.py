"""The producers of the streaming kernel: warps that fill stages of shared memory.

A stage is two boxes of [ROWS, 128] codes of weights with a scale each, and the pairs' codes and scales that go with them: one K block
of two runs of weight rows (up and gate in GEMM1; two runs of output columns in GEMM2), or, in GEMM2 where DENSE, two K blocks of one run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from blockmoe.operator.persistent import GENERIC, hear, tell, wait_until


@gluon.jit
def unit_at(unit, tile_group, BLOCKS: gl.constexpr, DENSE: gl.constexpr):
    """Tile and row block of a unit: an expert's units side by side, of those the tiles that share weights. Where DENSE it has one tile."""
    if DENSE:
        return unit // BLOCKS, unit % BLOCKS
    else:
        group = gl.load(tile_group + unit // BLOCKS)  # 4096 * the expert's first tile + its tiles
        first = group >> 12
        tiles = group & 4095
        inside = unit - first * BLOCKS
        return first + inside % tiles, inside // tiles


@gluon.jit
def pairs_at(tile, tile_begin, tile_end, tokens, N: gl.constexpr, DENSE: gl.constexpr):
    """First row of a tile and that behind its last. Where DENSE tile t lists all tokens from row N * t on, which saves a read."""
    if DENSE:
        return tile * N, tile * N + tokens
    else:
        return gl.load(tile_begin + tile), gl.load(tile_end + tile)


@gluon.jit
def load_weights(
    w, w_bufs, full, empty, it, row,
    OTHER_ROWS: gl.constexpr, OTHER_K: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, BURST: gl.constexpr,
):  # fmt: skip
    """COUNT stages, BURST at a time; the second box lies OTHER_ROWS rows below the first, or OTHER_K columns right of it."""
    STEP: gl.constexpr = 128 + OTHER_K
    for k in range(0, COUNT, BURST):
        for j in gl.static_range(BURST):
            at = (it + j) % STAGES
            mbarrier.wait(empty.index(at), (((it + j) // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(at), 2 * ROWS * 128)
        for half in gl.static_range(2):
            for j in gl.static_range(BURST):
                at = (it + j) % STAGES
                box = [row + half * OTHER_ROWS, (k + j) * STEP + half * OTHER_K]
                tma.async_copy_global_to_shared(w, box, full.index(at), w_bufs.index(2 * at + half))
        it += BURST
    return it


@gluon.jit
def weights_producer(
    w1, w2, w_bufs, full, empty, queue, told, heard, ticket, tile_count, tile_expert, tile_group,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, BURST: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """One warp: draws units and tells the other roles, loads the weights. Units of GEMM1 come before those of GEMM2."""
    IN: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = HIDDEN // ROWS if DENSE else HIDDEN // (2 * ROWS)
    unit = gl.atomic_add(ticket, 1, sem="relaxed")
    tiles = gl.load(tile_count)
    units_1 = tiles * IN
    units = units_1 + (OUT if DENSE else tiles * OUT)
    it = 0
    n = 0
    tell(queue, told, heard, n, unit)
    while unit < units_1:
        tile, block = unit_at(unit, tile_group, IN, DENSE)
        row = gl.load(tile_expert + tile) * (2 * INTER) + block * ROWS
        it = load_weights(w1, w_bufs, full, empty, it, row, INTER, 0, HIDDEN // 128, ROWS, STAGES, BURST)
        unit = gl.atomic_add(ticket, 1, sem="relaxed")
        n += 1
        tell(queue, told, heard, n, unit)
    while unit < units:
        if DENSE:
            for tile in range(tiles):
                row = gl.load(tile_expert + tile) * HIDDEN + (unit - units_1) * ROWS
                it = load_weights(w2, w_bufs, full, empty, it, row, 0, 128, INTER // 256, ROWS, STAGES, 1)
        else:
            tile, block = unit_at(unit - units_1, tile_group, OUT, False)
            row = gl.load(tile_expert + tile) * HIDDEN + block * (2 * ROWS)
            it = load_weights(w2, w_bufs, full, empty, it, row, ROWS, 0, INTER // 128, ROWS, STAGES, BURST)
        unit = gl.atomic_add(ticket, 1, sem="relaxed")
        n += 1
        tell(queue, told, heard, n, unit)


@gluon.jit
def load_pairs(
    x_bufs, s_bufs, w_s_bufs, full, empty, it, x_at, inside, s_at, s_inside, s_step, w_s_at, w_s_other,
    COUNT: gl.constexpr, HALVES: gl.constexpr, PARTS: gl.constexpr, X_BUFS: gl.constexpr, S_BUFS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """COUNT stages of HALVES K blocks each, with PARTS scales a pair and block (`s_step` apart), and two scales of weights."""
    for k in range(COUNT):
        at = it % STAGES
        mbarrier.wait(empty.index(at), ((it // STAGES) & 1) ^ 1)
        for half in gl.static_range(HALVES):
            block = k * HALVES + half
            async_copy.async_copy_global_to_shared(x_bufs.index(X_BUFS * at + half), x_at + block * 128, mask=inside)
            for part in gl.static_range(PARTS):
                at_s = s_at + (block * PARTS + part) * s_step
                async_copy.async_copy_global_to_shared(s_bufs.index(S_BUFS * at + PARTS * half + part), at_s, mask=s_inside)
        async_copy.async_copy_global_to_shared(w_s_bufs.index(2 * at), w_s_at + k * HALVES)
        async_copy.async_copy_global_to_shared(w_s_bufs.index(2 * at + 1), w_s_other + k * HALVES)
        async_copy.mbarrier_arrive(full.index(at), increment_count=False)
        it += 1
    return it


@gluon.jit
def pairs_producer(
    x, x_scale, w1_scale, middle, middle_scale, w2_scale, x_bufs, s_bufs, w_s_bufs, full, empty, queue, told, heard, finished,
    tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """One warp: by cp.async the pairs' codes, gathered by token in GEMM1, and all scales."""
    X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [1, 1], [1, 0])
    V: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    IN: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = HIDDEN // ROWS if DENSE else HIDDEN // (2 * ROWS)
    H_BLOCKS: gl.constexpr = HIDDEN // 128
    I_BLOCKS: gl.constexpr = INTER // 128
    PARTS: gl.constexpr = 128 // ROWS
    HALVES: gl.constexpr = 2 if DENSE else 1
    X_BUFS: gl.constexpr = HALVES
    S_BUFS: gl.constexpr = HALVES * PARTS
    zeros = gl.zeros([32], gl.int32, V)
    k = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, X)), 0)
    tiles = gl.load(tile_count)
    units_1 = tiles * IN
    units = units_1 + (OUT if DENSE else tiles * OUT)
    it = 0
    n = 0
    unit = hear(queue, told, heard, n, 1)
    while unit < units_1:
        tile, block = unit_at(unit, tile_group, IN, DENSE)
        begin, end = pairs_at(tile, tile_begin, tile_end, tokens, N, DENSE)
        line = begin + gl.arange(0, N, layout=gl.SliceLayout(1, X))
        s_line = begin + gl.arange(0, N, layout=V)
        inside = line < end
        s_inside = s_line < end
        if DENSE:  # tokens that did not choose the expert count as zeros
            token = line - begin
            s_token = s_line - begin
            inside = inside & (gl.load(pair_weight + line, mask=inside, other=0.0) != 0.0)
        else:
            token = gl.load(pair_token + line, mask=inside, other=0)
            s_token = gl.load(pair_token + s_line, mask=s_inside, other=0)
        row = gl.load(tile_expert + tile) * (2 * INTER) + block * ROWS
        w_s_at = w1_scale + (row // 128) * H_BLOCKS + gl.arange(0, 1, layout=V)
        it = load_pairs(
            x_bufs, s_bufs, w_s_bufs, full, empty, it, x + gl.expand_dims(token * HIDDEN, 1) + k, gl.expand_dims(inside, 1),
            x_scale + s_token, s_inside, tokens, w_s_at, w_s_at + I_BLOCKS * H_BLOCKS, H_BLOCKS, 1, 1, X_BUFS, S_BUFS, STAGES,
        )  # fmt: skip
        n += 1
        unit = hear(queue, told, heard, n, 1)
    while unit < units:
        if DENSE:
            first = 0
            past = tiles
            block = unit - units_1
        else:
            first, block = unit_at(unit - units_1, tile_group, OUT, False)
            past = first + 1
        for tile in range(first, past):
            begin, end = pairs_at(tile, tile_begin, tile_end, tokens, N, DENSE)
            line = begin + gl.arange(0, N, layout=gl.SliceLayout(1, X))
            s_line = begin + gl.arange(0, N, layout=V)
            row = gl.load(tile_expert + tile) * HIDDEN + block * (ROWS if DENSE else 2 * ROWS)
            w_s_at = w2_scale + (row // 128) * I_BLOCKS + gl.arange(0, 1, layout=V)
            w_s_other = w_s_at + (1 if DENSE else ROWS // 128 * I_BLOCKS)
            wait_until(finished + tile + zeros, zeros + IN, zeros + 50, GENERIC)
            it = load_pairs(
                x_bufs, s_bufs, w_s_bufs, full, empty, it, middle + gl.expand_dims(line * INTER, 1) + k, gl.expand_dims(line < end, 1),
                middle_scale + s_line * IN, s_line < end, 1, w_s_at, w_s_other, I_BLOCKS // HALVES, HALVES, PARTS, X_BUFS, S_BUFS, STAGES,
            )  # fmt: skip
        n += 1
        unit = hear(queue, told, heard, n, 1)
