"""The producers of the streaming kernel: warps that fill stages of shared memory.

A stage is two boxes of [ROWS, 128] codes of weights with a scale each, and the pairs' codes and scales that go with them: one K block
of two runs of weight rows (up and gate in GEMM1; two runs of output columns in GEMM2), or, in GEMM2 where DENSE, two K blocks of one run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from blockmoe.operator.persistent import GENERIC, barrier, hear, tell, wait_until
from blockmoe.operator.stream.units import END, WORDS, pairs_at, parts_drawn, second_unit, share_of, unit_at, unit_counts


@gluon.jit
def load_weights(
    w, w_bufs, asked, empty, ticket, it, row, begin, count, flight,
    OTHER_ROWS: gl.constexpr, OTHER_K: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    BURST: gl.constexpr, DRAW: gl.constexpr,
):  # fmt: skip
    """`count` stages, from the one numbered `begin` on, BURST at a time, boxes side by side in memory one after the other; a stage's second
    box lies OTHER_ROWS rows below the first, or OTHER_K columns right of it.

    At most `flight` stages are on their way: more would wait in the memory's queues, and everything else behind them. DRAW: also the
    program's next unit, which is drawn before the last stages and so known when they have been asked for.
    """
    drawn = gl.to_tensor(0)
    for k in range(0, count, BURST):
        if DRAW and k == gl.maximum(count - 4, 0):
            drawn = gl.atomic_add(ticket, 1, sem="relaxed")
        for j in gl.static_range(BURST):
            mbarrier.wait(empty.index((it + j) % STAGES), (((it + j) // STAGES) & 1) ^ 1)
        before = it + BURST - 1 - flight
        if before >= 0:
            mbarrier.wait(asked.index(before % STAGES), (before // STAGES) & 1)
        for j in gl.static_range(BURST):
            mbarrier.expect(asked.index((it + j) % STAGES), 2 * ROWS * 128)
        for half in gl.static_range(2):
            for j in gl.static_range(BURST):
                at = (it + j) % STAGES
                box = [row + half * OTHER_ROWS, (begin + k + j) * (128 + OTHER_K) + half * OTHER_K]
                tma.async_copy_global_to_shared(w, box, asked.index(at), w_bufs.index(2 * at + half))
        it += BURST
    return it, drawn


@gluon.jit
def share_of_flight(unit, units, FLIGHT: gl.constexpr, STAGES: gl.constexpr):
    """Stages that a program with `unit` of the first `units` may ask for ahead: more where fewer programs than all have one of the last of
    them, as the others wait for their results or have nothing left; 3.5 a program in all. (T = 7, 15: GEMM1 alone and 2.5 74.0, 66.0 us,
    GEMM2 too 72.8, 63.1, and 3.5 72.3, 62.8; 5 71.8, 64.7.) Of GEMM2 a round's units of GEMM1 count too."""
    programs = gl.num_programs(0)
    streaming = units - unit // programs * programs
    return gl.minimum(STAGES, gl.maximum(FLIGHT, 7 * programs // (2 * streaming)))


LOOK = gl.constexpr("ld.acquire.gpu.global.s32 $0, [$1];")
TOUCH = gl.constexpr("ld.global.ca.b32 $0, [$1];")


@gluon.jit
def touch(list):
    """Asks for a list's first 32 entries: a later read that depends on another finds them in the L1."""
    at = list + gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(TOUCH, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_others_draw(ticket, tile_count, HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr):
    """Where GEMM1 has fewer units than there are programs, those that get none are to be spread over the chip: where 40 neighbours in a row
    have units and others none, GEMM1's weights come up to a fifth more slowly, perhaps by a path that they share. So every so many programs
    let the others draw first, by turns, which are all different where 7 does not divide the programs: of 132 with 64 or 96 units two
    neighbours at most then have none, and four have one. (T = 2, 3, 4: 32.9, 33.0, 42.5 us; by 5 instead of 49 up to 14 and 20 neighbours,
    33.8, 33.7, 42.9.) They look 16 times at most: nobody may rely on programs that may not run yet."""
    programs = gl.num_programs(0)
    turn = gl.program_id(0) * 49 % programs
    if turn >= INTER // ROWS:  # GEMM1 has as many units at least, or none
        _, _, units_1, _ = unit_counts(tile_count, HIDDEN, INTER, ROWS, SPLIT, True)
        if turn >= units_1:
            lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
            drawn = gl.to_tensor(0)
            looks = gl.to_tensor(0)
            while (drawn < units_1) & (looks < 16):
                drawn = gl.max(gl.inline_asm_elementwise(LOOK, "=r,l", [ticket + 0 * lane], dtype=gl.int32, is_pure=False, pack=1), 0)
                looks += 1


@gluon.jit
def weights_producer(
    parameters,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    DENSE: gl.constexpr, FLIGHT: gl.constexpr, BURST: gl.constexpr,
):  # fmt: skip
    """One warp: draws units and tells the other roles, loads the weights. Units of GEMM1 come before those of GEMM2."""
    w1, w2, w_bufs, asked, empty, queue, told, heard, ticket, part, lists, slot_count, tokens = parameters
    tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight = lists
    IN: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = HIDDEN // ROWS if DENSE else HIDDEN // (2 * ROWS)  # units of GEMM2, where sorted a tile
    touch(tile_expert)
    touch(tile_group)
    if DENSE:
        let_others_draw(ticket, tile_count, HIDDEN, INTER, ROWS, SPLIT)
    else:
        touch(tile_begin)
        touch(tile_end)
    unit = gl.atomic_add(ticket, 1, sem="relaxed")
    tiles, shares, units_1, units = unit_counts(tile_count, HIDDEN, INTER, ROWS, SPLIT, DENSE)
    count = HIDDEN // 128 >> shares
    it = 0
    n = 0
    while unit < units_1:
        tile, block = unit_at(unit >> shares, tile_group, IN, DENSE)
        begin, end = pairs_at(tile, tile_begin, tile_end, tokens, N, DENSE)
        expert = gl.load(tile_expert + tile)
        tell(queue, told, heard, n, (unit, tile, block, begin, end, expert))
        n += 1
        row = expert * (2 * INTER) + block * ROWS
        flight = share_of_flight(unit, units_1, FLIGHT, STAGES) if DENSE else FLIGHT
        it, drawn = load_weights(
            w1, w_bufs, asked, empty, ticket, it, row, share_of(unit, shares) * count, count, flight, INTER, 0, ROWS, STAGES, BURST,
            not DENSE,
        )
        unit = gl.atomic_add(ticket, 1, sem="relaxed") if DENSE else drawn
    while unit < units:
        if DENSE:
            block = unit - units_1
            tell(queue, told, heard, n, (unit, 0, block, 0, tokens, 0))
            flight = share_of_flight(unit, units, FLIGHT, STAGES)
            begun = it
            for tile in range(tiles):
                row = gl.load(tile_expert + tile) * HIDDEN + block * ROWS
                it, _ = load_weights(
                    w2, w_bufs, asked, empty, ticket, it, row, 0, INTER // 256, flight, 0, 128, ROWS, STAGES, BURST, False
                )  # fmt: skip
            # Who has loaded a whole unit beforehand and can't multiply yet leaves the next to those who come from GEMM1. (One expert,
            # 1, 8 and 16 tokens: 26.2, 26.8, 27.6 to 24.7, 24.7, 25.5 us.)
            if it > begun:
                first = gl.maximum(begun, it - STAGES)
                mbarrier.wait(empty.index(first % STAGES), (first // STAGES) & 1)
            unit = gl.atomic_add(ticket, 1, sem="relaxed")
        else:
            tile, block = second_unit(unit - units_1, tiles, tile_group, OUT)
            expert = gl.load(tile_expert + tile)
            tell(queue, told, heard, n, (unit, tile, block, gl.load(tile_begin + tile), gl.load(tile_end + tile), expert))
            row = expert * HIDDEN + block * (2 * ROWS)
            it, unit = load_weights(
                w2, w_bufs, asked, empty, ticket, it, row, 0, INTER // 128, FLIGHT, ROWS, 0, ROWS, STAGES, BURST, True
            )  # fmt: skip
        n += 1
    if DENSE == 0:
        zeros, sums = parts_drawn(gl.load(slot_count), tokens, tiles, OUT, ROWS)
        draw_parts(queue, told, heard, n, units, it, empty, part, zeros + sums, STAGES)
    else:
        tell_number(queue, told, heard, n, END)


@gluon.jit
def tell_number(queue, told, heard, n, number):
    tell(queue, told, heard, n, (number, 0, 0, 0, 0, 0))


@gluon.jit
def draw_parts(queue, told, heard, n, units, it, empty, ticket, parts, STAGES: gl.constexpr):
    """Draws parts of the output, told as numbers from `units` on, when the program's own products are done: who is late is to find none
    left. (Nothing else hangs on it.)"""
    if it > 0:
        mbarrier.wait(empty.index((it - 1) % STAGES), ((it - 1) // STAGES) & 1)
    part = gl.atomic_add(ticket, 1, sem="relaxed")
    while part < parts:
        tell_number(queue, told, heard, n, units + part)
        n += 1
        part = gl.atomic_add(ticket, 1, sem="relaxed")
    tell_number(queue, told, heard, n, END)


@gluon.jit
def load_pairs(
    x_bufs, s_bufs, w_s_bufs, full, empty, it, x_at, inside, s_at, s_inside, s_step, w_s_at, w_s_other,
    count, HALVES: gl.constexpr, PARTS: gl.constexpr, X_BUFS: gl.constexpr, S_BUFS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`count` stages of HALVES K blocks each, with PARTS scales a pair and block (`s_step` apart), and two scales of weights."""
    for k in range(count):
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
def tiles_finished(finished, tile, tiles, known, enough):
    """A number of tiles, larger than `tile`, that GEMM1 is done with. It looks at 32 counters at once, where `known` is too small."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    at = finished + gl.minimum(tile + lane, tiles - 1)
    while known <= tile:
        count = gl.inline_asm_elementwise(LOOK, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
        known = tile + gl.min(gl.where(count >= enough, 32, lane), 0)
        barrier()  # what a lane has acquired all of them know
    return known


@gluon.jit
def pairs_producer(
    parameters,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    DENSE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """By cp.async the pairs' codes, gathered by token in GEMM1, and all scales."""
    (
        x, x_scale, w1_scale, middle, middle_scale, w2_scale, x_bufs, s_bufs, w_s_bufs, full, empty, queue, told, heard, finished,
        lists, tokens,
    ) = parameters
    tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight = lists
    X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    V: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    IN: gl.constexpr = INTER // ROWS
    H_BLOCKS: gl.constexpr = HIDDEN // 128
    I_BLOCKS: gl.constexpr = INTER // 128
    PARTS: gl.constexpr = 128 // ROWS
    HALVES: gl.constexpr = 2 if DENSE else 1
    X_BUFS: gl.constexpr = HALVES
    S_BUFS: gl.constexpr = HALVES * PARTS
    zeros = gl.zeros([32 * WARPS], gl.int32, V)
    k = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, X)), 0)
    tiles, shares, units_1, units = unit_counts(tile_count, HIDDEN, INTER, ROWS, SPLIT, DENSE)
    count = H_BLOCKS >> shares
    it = 0
    n = 0
    known = gl.to_tensor(0)
    unit, tile, block, begin, end, expert = hear(queue, told, heard, n, WARPS, WORDS)
    while unit < units_1:
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
        row = expert * (2 * INTER) + block * ROWS
        first = share_of(unit, shares) * count
        w_s_at = w1_scale + (row // 128) * H_BLOCKS + first + gl.arange(0, 1, layout=V)
        it = load_pairs(
            x_bufs, s_bufs, w_s_bufs, full, empty, it, x + gl.expand_dims(token * HIDDEN + first * 128, 1) + k, gl.expand_dims(inside, 1),
            x_scale + (s_token + first * tokens), s_inside, tokens, w_s_at, w_s_at + I_BLOCKS * H_BLOCKS, count, 1, 1, X_BUFS, S_BUFS,
            STAGES,
        )  # fmt: skip
        n += 1
        unit, tile, block, begin, end, expert = hear(queue, told, heard, n, WARPS, WORDS)
    while unit < units:
        for t in range(tile, tiles if DENSE else tile + 1):
            if DENSE:
                begin, end = pairs_at(t, tile_begin, tile_end, tokens, N, True)
                expert = gl.load(tile_expert + t)
            line = begin + gl.arange(0, N, layout=gl.SliceLayout(1, X))
            s_line = begin + gl.arange(0, N, layout=V)
            row = expert * HIDDEN + block * (ROWS if DENSE else 2 * ROWS)
            w_s_at = w2_scale + (row // 128) * I_BLOCKS + gl.arange(0, 1, layout=V)
            w_s_other = w_s_at + (1 if DENSE else ROWS // 128 * I_BLOCKS)
            if DENSE:
                known = tiles_finished(finished, t, tiles, known, IN)
            else:
                wait_until(finished + t + zeros, zeros + IN, zeros + 50, GENERIC)
            it = load_pairs(
                x_bufs, s_bufs, w_s_bufs, full, empty, it, middle + gl.expand_dims(line * INTER, 1) + k, gl.expand_dims(line < end, 1),
                middle_scale + s_line * IN, s_line < end, 1, w_s_at, w_s_other, I_BLOCKS // HALVES, HALVES, PARTS, X_BUFS, S_BUFS, STAGES,
            )  # fmt: skip
        n += 1
        unit, tile, block, begin, end, expert = hear(queue, told, heard, n, WARPS, WORDS)
    while unit < END:
        n += 1
        unit, tile, block, begin, end, expert = hear(queue, told, heard, n, WARPS, WORDS)
