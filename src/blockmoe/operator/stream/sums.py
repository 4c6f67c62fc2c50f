"""Of sorted pairs: the output's last sum, and the warp that tells other programs what is stored for it.

GEMM2's columns come in two groups. Programs that have no units left add the first group's rows while others are still at the second's, by
parts that they draw, and write the zeros of tokens without pairs: at the end, where the memory has little to read. The second group's
parts, which begin when all is stored, go round all programs.

Tokens have slots, those with few pairs first, then those with more: `slots` are token_pair [T, TOP_K], the rows of the token in a slot,
token_pairs [T], how many, slot_token [T], which token it is, and slot_count [2], how many have pairs, and how many few.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockmoe.operator.persistent import GENERIC, QUEUE, barrier, hear, wait_until
from blockmoe.operator.stream.stay import let_go, may_leave
from blockmoe.operator.stream.units import END, RUN, WORDS, blocks_before, parts_drawn, runs_of, share_of, unit_counts

# Barriers by which a program's consumer says, in turn, that a unit is stored: it hears of no unit before the teller has heard of the one
# QUEUE before it, and so has waited for all that came before that.
STORED = gl.constexpr(QUEUE.value + 1)


@gluon.jit
def tell_stored(unit, tile, shares, finished, summed):
    """Of a unit of GEMM1: its rows of the intermediate, or its sums of a share of K."""
    if share_of(unit, shares) == (1 << shares) - 1:
        gl.atomic_add(finished + tile, 1, sem="release")
    else:
        gl.atomic_add(summed + (unit >> shares), 1, sem="release")


@gluon.jit
def teller(parameters, HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr):
    """One warp: tells other programs of each unit that it is stored, when the consumer has said so, which waiting for its stores to come to
    the L2 would keep from its next unit. (H200, T = 130, 500, 901: 4.5, 4.6, 4.0 us of 316, 341, 364; results/h200/operator/teller.txt)"""
    stored, queue, told, heard, finished, written, summed, tile_count = parameters
    tiles, shares, units_1, units = unit_counts(tile_count, HIDDEN, INTER, ROWS, SPLIT, False)
    first = blocks_before(tiles, HIDDEN // (2 * ROWS))
    n = 0
    unit, tile, block, _, _, _ = hear(queue, told, heard, n, 1, WORDS)
    while unit < units_1:
        mbarrier.wait(stored.index(n % STORED), (n // STORED) & 1)
        tell_stored(unit, tile, shares, finished, summed)
        n += 1
        unit, tile, block, _, _, _ = hear(queue, told, heard, n, 1, WORDS)
    while unit < units:
        mbarrier.wait(stored.index(n % STORED), (n // STORED) & 1)
        gl.atomic_add(written + gl.where(block < first, 0, 1), 1, sem="release")
        n += 1
        unit, tile, block, _, _, _ = hear(queue, told, heard, n, 1, WORDS)
    while unit < END:
        n += 1
        unit, tile, block, _, _, _ = hear(queue, told, heard, n, 1, WORDS)


@gluon.jit
def write_zeros(out, slots, first, tokens, HIDDEN: gl.constexpr, WARPS: gl.constexpr):
    """Zeros for the tokens in WARPS slots from `first` on, a warp each."""
    C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    slot = first + gl.arange(0, WARPS, layout=gl.SliceLayout(1, C))
    token = gl.load(slots[2] + slot, mask=slot < tokens, other=0)
    to = out + gl.expand_dims(token.to(gl.int64) * HIDDEN, 1) + gl.expand_dims(gl.arange(0, 256, layout=gl.SliceLayout(0, C)), 0)
    for run in range(0, HIDDEN, 256):
        gl.store(to + run, gl.zeros([WARPS, 256], gl.bfloat16, C), mask=gl.expand_dims(slot < tokens, 1))


@gluon.jit
def rows_of(slot, some, slots, TOP_K: gl.constexpr):
    """Of each `slot` its token, how many pairs that has, and TOP_K numbers of which the first so many are rows; no pairs from `some` on."""
    token_pair, token_pairs, slot_token, _ = slots
    there = slot < some
    token = gl.load(slot_token + slot, mask=there, other=0)
    count = gl.load(token_pairs + slot, mask=there, other=0)
    pairs = ()
    for n in gl.static_range(TOP_K):
        pairs = pairs + (gl.load(token_pair + slot * TOP_K + n, mask=there, other=0),)
    return token, count, pairs


@gluon.jit
def part_at(part, sums, first, BLOCKS: gl.constexpr, ROWS: gl.constexpr):
    """Column group of a part, `sums` being the first group's, which slots, WARPS at a time, and run of columns. The first of the groups has
    `first` of BLOCKS column blocks."""
    group = gl.where(part >= sums, 1, 0)
    inside = part - group * sums
    runs = runs_of(gl.where(group == 0, gl.maximum(first, 1), BLOCKS - first), ROWS)
    return group, inside // runs, inside % runs


@gluon.jit
def drawn_or_own(number, units, sums):
    """The part told as `number`; or, if there is none any more, this program's first of the second group's."""
    return gl.where(number < END, number - units, sums + gl.program_id(0))


@gluon.jit
def add_part(
    n, part, place, found, sums, first, some, units, queue, told, heard, rows, out, slots,
    MOST: gl.constexpr, HIDDEN: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A part at `place`, of tokens with MOST rows at most, `found` by `rows_of`. Meanwhile reads where the next part's rows are; what has
    been read may leave the L2 (in a workspace that begins inside a line a row's last line may stay). Returns the next's first four."""
    C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    LINES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])  # of 64 columns
    group, step, run = place
    token, count, pairs = found
    begin = group * first * (2 * ROWS) + run * RUN
    end = gl.where(group == 0, first * (2 * ROWS), HIDDEN)
    column = begin + gl.expand_dims(gl.arange(0, RUN, layout=gl.SliceLayout(0, C)), 0)
    inside = column < end
    values = ()
    for k in gl.static_range(MOST):
        at = rows + gl.expand_dims(pairs[k].to(gl.int64) * HIDDEN, 1) + column
        values = values + (gl.load(at, mask=inside & gl.expand_dims(k < count, 1), other=0.0, cache_modifier=".cg"),)
    if part < sums:
        n += 1
        number, _, _, _, _, _ = hear(queue, told, heard, n, WARPS, WORDS)
        part = drawn_or_own(number, units, sums)
    else:
        part += gl.num_programs(0)
    next_place = part_at(part, sums, first, HIDDEN // (2 * ROWS), ROWS)
    next_found = rows_of(next_place[1] * WARPS + gl.arange(0, WARPS, layout=gl.SliceLayout(1, C)), some, slots, TOP_K)
    sum = gl.zeros([WARPS, RUN], gl.float32, C)
    for k in gl.static_range(MOST):
        sum += values[k].to(gl.float32)
    to = out + gl.expand_dims(token.to(gl.int64) * HIDDEN, 1) + column
    gl.store(to, sum.to(gl.bfloat16), mask=inside & gl.expand_dims(count > 0, 1))
    line = gl.arange(0, 32, layout=gl.SliceLayout(0, LINES))
    lines = gl.expand_dims((line < RUN // 64) & (begin + 64 * line < end), 0)
    for k in gl.static_range(MOST):
        pair = gl.convert_layout(gl.where(k < count, pairs[k], -1), gl.SliceLayout(1, LINES))
        at = rows + gl.expand_dims(pair.to(gl.int64) * HIDDEN, 1) + gl.expand_dims(begin + 64 * line, 0)
        may_leave(at, lines & gl.expand_dims(pair >= 0, 1))
    return n, part, next_place, next_found


@gluon.jit
def last_sum(
    n, number, units, queue, told, heard, rows, out, middle, slots, written, tile_end, tiles, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out[t] = the sum over a token's rows, in the order of their experts, in float32; 0 where it has none.

    `number`, the nth told, is the first that is none of `units`. A part is WARPS slots, a warp each, by RUN columns of a group. The
    intermediate may leave the L2 in the end.
    """
    FEW: gl.constexpr = TOP_K // 2 if TOP_K > 1 else 1  # what routing calls few: `kinds_of`
    C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    BLOCKS: gl.constexpr = HIDDEN // (2 * ROWS)
    first = blocks_before(tiles, BLOCKS)
    some = gl.load(slots[3])
    steps_of_few = gl.load(slots[3] + 1) // WARPS
    zeros, sums = parts_drawn(some, tokens, tiles, BLOCKS, ROWS)
    while number < units + zeros:
        write_zeros(out, slots, some + (number - units) * WARPS, tokens, HIDDEN, WARPS)
        n += 1
        number, _, _, _, _, _ = hear(queue, told, heard, n, WARPS, WORDS)
    units += zeros
    parts = sums + (some + WARPS - 1) // WARPS * runs_of(BLOCKS - first, ROWS)
    once = gl.zeros([32 * WARPS], gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    known = 0  # column groups that are written
    part = drawn_or_own(number, units, sums)
    place = part_at(part, sums, first, BLOCKS, ROWS)
    found = rows_of(place[1] * WARPS + gl.arange(0, WARPS, layout=gl.SliceLayout(1, C)), some, slots, TOP_K)
    while part < parts:
        group, step, _ = place
        if known <= group:
            wait_until(written + group + once, once + tiles * gl.where(group == 0, first, BLOCKS - first), once + 50, GENERIC)
            barrier()
            known = group + 1
        if step < steps_of_few:
            n, part, place, found = add_part(
                n, part, place, found, sums, first, some, units, queue, told, heard, rows, out, slots, FEW, HIDDEN, TOP_K, ROWS, WARPS
            )  # fmt: skip
        else:
            n, part, place, found = add_part(
                n, part, place, found, sums, first, some, units, queue, told, heard, rows, out, slots, TOP_K, HIDDEN, TOP_K, ROWS, WARPS
            )  # fmt: skip
    if known < 2:  # lest some of the intermediate be stored, and kept, after it was let go
        wait_until(written + 1 + once, once + tiles * (BLOCKS - first), once + 50, GENERIC)
    size = gl.load(tile_end + tiles - 1, mask=tiles > 0, other=0) * INTER
    let_go(middle, size, gl.program_id(0), gl.num_programs(0), WARPS)  # nothing is stored there any more
