"""The experts that a token chooses, found by one warp: PTX, because only there a warp can skip what others need, and pop from lists.

Each thread has `each` of the token's keys. It sorts them once; a round is then one reduction over the warp, of the largest that each thread
has left, and those whose it is move their lists up. What the last of `wanted` rounds finds is the least key of those chosen, unless two
were equal: then more have it, or as much, than are wanted, and keys are gone through again, one value after the other, and of the last the
lowest numbers are chosen.

Before that groups of experts are ranked, if asked for, without reductions: each is compared with all others, which come from the other
threads. Nothing more is done for a token whose groups with experts here are not kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = -(2**31)  # no key is lower
EVERY = 2**31 - 1  # no key and no number is higher
ALL = "0xffffffff"  # threads
THREADS = 32
FIRST = "0f4B000000"  # 2 ** 23, as bits
FIRSTS = (THREADS * 0x4B000000 + 2**31) % 2**32 - 2**31  # the sum of all threads' bits, where nothing was counted
MOST_STEPS = 4
LOWER = tl.constexpr(NONE)
LARGEST_EACH = 16  # keys a thread, which it holds in registers, twice


@triton.constexpr_function
def _sorting(count: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort of `count` values, a power of two: places to compare and exchange."""
    pairs = []
    size = 1
    while size < count:
        step = size
        while step:
            for first in range(step % size, count - step, 2 * step):
                for at in range(first, min(first + step, count - step)):
                    if at // (2 * size) == (at + step) // (2 * size):
                        pairs.append((at, at + step))
            step //= 2
        size *= 2
    return pairs


@triton.constexpr_function
def rank_steps(lanes: int, size: int) -> int:
    """How many groups of a part each thread of a group of `size` experts compares it with, so that they look at all of the part."""
    return max(1, lanes * lanes // (size * size * THREADS))


@triton.constexpr_function
def may_rank(parts: int, lanes: int, size: int) -> bool:
    """Whether a warp can rank groups of `size` experts of a tile [parts, lanes]: each thread has those of a group a part, and compares it
    with few."""
    each = lanes // THREADS
    fits = lanes % THREADS == 0 and size % each == 0 and size <= lanes and size // each >= parts
    return fits and rank_steps(lanes, size) <= MOST_STEPS


@triton.jit
def bit_of(group, THREADS_EACH: tl.constexpr):
    """Which bit says whether a group is kept, of groups that have so many threads: of the first of them, plus the part."""
    IN_A_PART: tl.constexpr = 32 // THREADS_EACH
    return group % IN_A_PART * THREADS_EACH + group // IN_A_PART


@triton.jit
def compared_with(shape: tl.constexpr, SIZE: tl.constexpr):
    """For every thread, of each group of a part that it compares its own with, the first thread; a negative number where that group is the
    lower, of which the last five bits are the thread."""
    LANES: tl.constexpr = shape[2]
    THREADS_EACH: tl.constexpr = SIZE * 32 // LANES
    IN_A_PART: tl.constexpr = 32 // THREADS_EACH
    STEPS: tl.constexpr = rank_steps(LANES, SIZE)
    lane = tl.arange(0, LANES)[None, None, :] // (LANES // 32) + tl.zeros(shape, tl.int32)
    own = lane // THREADS_EACH
    found = ()
    for step in tl.static_range(STEPS):
        other = (own + lane % (IN_A_PART // STEPS) * STEPS + step) % IN_A_PART
        found = found + (tl.where(other < own, LOWER, 0) + other * THREADS_EACH,)
    return found


@triton.constexpr_function
def _ranking(parts: int, threads: int, wanted: int, others: list[str]) -> list[str]:
    """For keys g0 ..., above NONE, of a thread's groups, one a part, each of `threads` threads side by side: `bits` of those among the
    `wanted` best, of equal ones the lower; the thread's have their c0 ... below `wanted`. `others` are `compared_with`'s."""
    every = range(parts)
    lines = [f".reg .b32 low<{parts}>, c<{parts}>;", *(f"mov.b32 c{part}, 0;" for part in every)]
    for thread in others:
        lines += [f"shr.s32 x, {thread}, 31;", *(f"add.s32 low{part}, g{part}, x;" for part in every)]
        for other in every:
            lines += [f"shfl.sync.idx.b32 x, g{other}, {thread}, 31, {ALL};"]
            for part in every:  # one more is better: of equal ones those of lower parts are, and of this part the lower
                than = ("ge", f"g{part}") if other < part else ("gt", f"low{part}" if other == part else f"g{part}")
                lines += [f"setp.{than[0]}.s32 p, x, {than[1]};", f"@p add.s32 c{part}, c{part}, 1;"]
    distance = 1
    while distance < THREADS // threads // len(others):
        for part in every:
            lines += [f"shfl.sync.bfly.b32 x, c{part}, {distance}, 31, {ALL};", f"add.s32 c{part}, c{part}, x;"]
        distance *= 2
    firsts = sum(1 << first for first in range(0, THREADS, threads))  # a thread of each group
    for part in every:
        lines += [f"setp.lt.s32 p, c{part}, {wanted};", f"vote.sync.ballot.b32 x, p, {ALL};", f"and.b32 x, x, {firsts};"]
        lines += [f"shl.b32 x, x, {part};", "or.b32 bits, bits, x;"]
    return lines


@triton.constexpr_function
def _assembly(each: int, wanted: int, lanes: int, parts: int = 0, threads: int = 0, groups: int = 0, steps: int = 0) -> str:
    """For `each` keys a thread. Operands are tiles, `each` registers of every one: the sum of the values of those chosen; the least key
    that is chosen; the last number that is with it; bits of the `groups` groups that are kept (`parts` 0: none); given keys, their numbers
    and values, their groups' keys; and bits of the groups of which one is needed (`parts` 0: whether anything is), the same everywhere."""
    every = range(each)
    total, least, last, kept, given, value, group = ([f"${kind * each + i}" for i in every] for kind in range(7))
    run = lanes // THREADS
    number = [i // run * lanes + i % run for i in every]  # of each key, above the thread's first one's
    key, head = [f"k{i}" for i in every], [f"h{i}" for i in range(each + 1)]
    # t: the least key chosen so far; l: the last number with it; x: how many keys are chosen; h: the thread's list
    lines = [".reg .pred p, q;", f".reg .b32 t, l, x, n, own, bits, before, ties, k<{each}>, h<{each + 1}>, g<{max(1, parts)}>;"]
    lines += [".reg .f32 sum, other, c;", "mov.f32 sum, 0f00000000;", f"mov.b32 t, {EVERY};", f"mov.b32 l, {EVERY};", "mov.b32 bits, 0;"]
    lines += [f"mov.b32 {k}, {g};" for k, g in zip(key, given, strict=True)]
    if parts:
        lines += [f"mov.b32 g{part}, {group[part * (each // parts)]};" for part in range(parts)]
        lines += _ranking(parts, threads, groups, [f"${(8 + step) * each}" for step in range(steps)])
        lines += [f"and.b32 x, bits, ${7 * each};", "setp.eq.s32 p, x, 0;", "@p bra.uni known;"]
        for part in range(parts):
            lines += [f"setp.ge.s32 p, c{part}, {groups};"]
            lines += [f"@p mov.b32 {k}, {NONE};" for k in key[part * (each // parts) : (part + 1) * (each // parts)]]
    else:
        lines += [f"setp.eq.s32 p, ${7 * each}, 0;", "@p bra.uni known;"]
    lines += [f"mov.b32 {h}, {k};" for h, k in zip(head, [*key, str(NONE)], strict=True)]
    for a, b in _sorting(each):
        lines += [f"max.s32 x, h{a}, h{b};", f"min.s32 h{b}, h{a}, h{b};", f"mov.b32 h{a}, x;"]
    for left in reversed(range(wanted)):  # rounds, and so places of a list that are still read
        lines += [f"redux.sync.max.s32 t, h0, {ALL};"]
        lines += ["setp.eq.s32 p, h0, t;", *(f"@p mov.b32 h{i}, h{i + 1};" for i in range(min(each, left)))]
    # counted beside the sum, as a float: those units have time. Its bits are those of 2 ** 23, the last ones the number
    lines += ["sums:", f"mov.f32 c, {FIRST};", "mov.f32 sum, 0f00000000;"]
    for k, v in zip(key, value, strict=True):
        lines += [f"setp.ge.s32 q, {k}, t;", "@q add.f32 c, c, 0f3F800000;", f"@q add.f32 sum, sum, {v};"]
    lines += ["mov.b32 x, c;", f"redux.sync.add.s32 x, x, {ALL};", f"setp.eq.s32 p, x, {FIRSTS + wanted};", "@p bra.uni over;"]
    lines += ["again:", "mov.b32 before, 0;", f"mov.b32 x, {EVERY};"]  # some were equal: too many are as large as t
    for k in key:
        lines += [f"setp.gt.s32 q, {k}, t;", "@q add.s32 before, before, 1;", f"@q min.s32 x, x, {k};"]
    lines += [f"redux.sync.add.s32 before, before, {ALL};", f"setp.lt.s32 p, before, {wanted};", "@p bra.uni enough;"]
    lines += [f"redux.sync.min.s32 t, x, {ALL};", f"setp.gt.s32 p, before, {wanted};", "@p bra.uni again;", "bra.uni sums;"]
    lines += ["enough:", f"sub.s32 ties, {wanted}, before;", "mov.b32 l, -1;", "mov.u32 own, %laneid;", f"mul.lo.s32 own, own, {run};"]
    lines += ["next:", f"mov.b32 x, {EVERY};"]  # the lowest number above l of those with t, `ties` times
    for k, n in zip(key, number, strict=True):
        lines += [f"add.s32 n, own, {n};", f"setp.eq.s32 q, {k}, t;", "setp.gt.and.s32 q, n, l, q;", "@q min.s32 x, x, n;"]
    lines += [f"redux.sync.min.s32 l, x, {ALL};", "sub.s32 ties, ties, 1;", "setp.gt.s32 q, ties, 0;", "@q bra.uni next;"]
    for k, n in zip(key, number, strict=True):
        lines += [f"add.s32 n, own, {n};", f"setp.eq.s32 q, {k}, t;", "setp.gt.and.s32 q, n, l, q;", f"@q mov.b32 {k}, {NONE};"]
    lines += ["bra.uni sums;", "over:"]
    for distance in (16, 8, 4, 2, 1):
        lines += [f"shfl.sync.bfly.b32 other, sum, {distance}, 31, {ALL};", "add.f32 sum, sum, other;"]
    lines += ["known:"]
    for found in zip(total, least, last, kept, strict=True):
        lines += [f"mov.b32 {place}, {name};" for place, name in zip(found, ("sum", "t", "l", "bits"), strict=True)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _operands(each: int, more: int) -> str:
    return ",".join(kind for kind in (*["=&r"] * 4, "r", "f", "r", "r", *["r"] * more) for _ in range(each))


@triton.jit
def choose_largest(key, value, group_key, needed, WANTED: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Of every token the WANTED largest keys, of equal ones those of the lowest numbers; none where not `needed`.

    key, value, group_key: [tokens, parts, lanes], a key's number being its place among the token's, and every token's in one warp, as many
    side by side a thread in every part; at least WANTED keys are above NONE. Only keys of the GROUPS best groups of SIZE count (`may_rank`;
    of equal ones the lower), and `needed` has the bits (`bit_of`) of groups of which one must be among them; or all do, SIZE being 0, and
    `needed` is 0 or not.

    Returns tiles of the same shape, the same everywhere: the bits of the sum of the values of those chosen; the least key that is chosen;
    the last number that is with it (EVERY where all with it are; EVERY and EVERY where none is: a NaN's key is that too); bits of the
    groups that are kept.

    One operation for all of it: of one whose results were used in several places Triton made several, in other layouts.
    """
    LANES: tl.constexpr = key.shape[2]
    EACH: tl.constexpr = key.shape[1] * LANES // 32
    operands = (key, value, group_key, needed)
    if SIZE > 0:
        others = compared_with(key.shape, SIZE)
        ASSEMBLY: tl.constexpr = _assembly(EACH, WANTED, LANES, key.shape[1], SIZE * 32 // LANES, GROUPS, rank_steps(LANES, SIZE))
    else:
        others = ()
        ASSEMBLY: tl.constexpr = _assembly(EACH, WANTED, LANES)
    return tl.inline_asm_elementwise(
        ASSEMBLY, _operands(EACH, len(others)), operands + others, (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=EACH
    )
