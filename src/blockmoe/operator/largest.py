"""The experts that a token chooses, found by one warp: PTX, because only there a warp can skip what others need, and pop from lists.

Each thread has `each` of the token's keys. It sorts them once; a round is then one reduction over the warp, of the largest that each thread
has left, and those whose it is move their lists up. What the last of `wanted` rounds finds is the least key of those chosen, unless two
were equal: then more have it, or as much, than are wanted, and keys are gone through again, one value after the other, and of the last the
lowest numbers are chosen.

Before that groups of experts are ranked, if asked for, without reductions: each is compared with all others, which come from the other
threads. Nothing more is done for a token whose groups with experts here are not kept.
"""

from __future__ import annotations

from itertools import permutations, product

import triton
import triton.language as tl

NONE = -(2**31)  # no key is lower
EVERY = 2**31 - 1  # no key and no number is higher
ALL = "0xffffffff"  # threads
THREADS = 32
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
def may_rank(parts: int, lanes: int, size: int) -> bool:
    """Whether a warp can rank groups of `size` experts of a tile [parts, lanes]: each thread has those of a group a part."""
    each = lanes // THREADS
    return lanes % THREADS == 0 and size % each == 0 and size <= lanes and size // each >= parts


@triton.jit
def bit_of(group, THREADS_EACH: tl.constexpr):
    """Which bit says whether a group is kept, of groups that have so many threads: of the first of them, plus the part."""
    IN_A_PART: tl.constexpr = 32 // THREADS_EACH
    return group % IN_A_PART * THREADS_EACH + group // IN_A_PART


@triton.constexpr_function
def _ranking(parts: int, threads: int, wanted: int) -> list[str]:
    """For keys g0 ..., above NONE, of a thread's groups, one a part, each of `threads` threads side by side: `bits` of those among the
    `wanted` best, of equal ones the lower; the thread's have their c0 ... below `wanted`."""

    def count(one: int, key: str, other: int, than: str) -> list[str]:
        """One more is better than the thread's group `one` if `key`, of a group of part `other`, is."""
        return [f"setp.{'ge' if other < one else 'gt'}.s32 p, {key}, {than};", f"@p add.s32 c{one}, c{one}, 1;"]

    lines = [f".reg .b32 lane, low<{parts}>, c<{parts}>;", "mov.u32 lane, %laneid;", *(f"mov.b32 c{part}, 0;" for part in range(parts))]
    for one, other in permutations(range(parts), 2):
        lines += count(one, f"g{other}", other, f"g{one}")
    distance = threads
    while distance < THREADS:
        # groups of the same part that differ from this one in this bit and in lower ones: all are lower, or all higher
        lines += [f"and.b32 x, lane, {distance};", "setp.ne.s32 p, x, 0;"]
        for part in range(parts):
            lines += [f"mov.b32 low{part}, g{part};", f"@p sub.s32 low{part}, g{part}, 1;"]
        for mask, other in product(range(distance, 2 * distance, threads), range(parts)):
            lines += [f"shfl.sync.bfly.b32 x, g{other}, {mask}, 31, {ALL};"]
            for one in range(parts):
                lines += count(one, "x", other, f"low{one}" if one == other else f"g{one}")
        distance *= 2
    firsts = sum(1 << first for first in range(0, THREADS, threads))  # a thread of each group
    for part in range(parts):
        lines += [f"setp.lt.s32 p, c{part}, {wanted};", f"vote.sync.ballot.b32 x, p, {ALL};", f"and.b32 x, x, {firsts};"]
        lines += [f"shl.b32 x, x, {part};", "or.b32 bits, bits, x;"]
    return lines


@triton.constexpr_function
def _assembly(each: int, wanted: int, parts: int = 0, threads: int = 0, groups: int = 0) -> str:
    """For `each` keys a thread. Operands are tiles, `each` registers of every one: the sum of the values of those chosen; the least key
    that is chosen; the last number that is with it; bits of the `groups` groups that are kept (`parts` 0: none); given keys, their numbers
    and values, their groups' keys; and bits of the groups of which one is needed (`parts` 0: whether anything is), the same everywhere."""
    every = range(each)
    total, least, last, kept, given, number, value, group = ([f"${kind * each + i}" for i in every] for kind in range(8))
    key, head = [f"k{i}" for i in every], [f"h{i}" for i in range(each + 1)]
    # t: the least key chosen so far; l: the last number with it; x: how many keys are chosen; h: the thread's list
    lines = [".reg .pred p, q;", f".reg .b32 t, l, x, bits, top, before, ties, k<{each}>, h<{each + 1}>, g<{max(1, parts)}>;"]
    lines += [".reg .f32 sum, other;", "mov.f32 sum, 0f00000000;", f"mov.b32 t, {EVERY};", f"mov.b32 l, {EVERY};", "mov.b32 bits, 0;"]
    lines += [f"mov.b32 {k}, {g};" for k, g in zip(key, given, strict=True)]
    if parts:
        lines += [f"mov.b32 g{part}, {group[part * (each // parts)]};" for part in range(parts)]
        lines += [*_ranking(parts, threads, groups), f"and.b32 x, bits, ${8 * each};", "setp.eq.s32 p, x, 0;", "@p bra.uni known;"]
        for part in range(parts):
            lines += [f"setp.ge.s32 p, c{part}, {groups};"]
            lines += [f"@p mov.b32 {k}, {NONE};" for k in key[part * (each // parts) : (part + 1) * (each // parts)]]
    else:
        lines += [f"setp.eq.s32 p, ${8 * each}, 0;", "@p bra.uni known;"]
    lines += [f"mov.b32 {h}, {k};" for h, k in zip(head, [*key, str(NONE)], strict=True)]
    for a, b in _sorting(each):
        lines += [f"max.s32 x, h{a}, h{b};", f"min.s32 h{b}, h{a}, h{b};", f"mov.b32 h{a}, x;"]
    for left in reversed(range(wanted)):  # rounds, and so places of a list that are still read
        lines += [f"redux.sync.max.s32 t, h0, {ALL};", *(["mov.b32 top, t;"] if left == wanted - 1 else [])]
        lines += ["setp.eq.s32 p, h0, t;", *(f"@p mov.b32 h{i}, h{i + 1};" for i in range(min(each, left)))]
    lines += ["sums:", "mov.b32 x, 0;", "mov.f32 sum, 0f00000000;"]
    for k, v in zip(key, value, strict=True):
        lines += [f"setp.ge.s32 q, {k}, t;", "@q add.s32 x, x, 1;", f"@q add.f32 sum, sum, {v};"]
    lines += [f"redux.sync.add.s32 x, x, {ALL};", f"setp.eq.s32 p, x, {wanted};", "@p bra.uni over;"]
    lines += ["mov.b32 t, top;", "mov.b32 before, 0;", "again:", "mov.b32 x, 0;"]  # some were equal
    for k in key:
        lines += [f"setp.ge.s32 q, {k}, t;", "@q add.s32 x, x, 1;"]
    lines += [f"redux.sync.add.s32 x, x, {ALL};", f"setp.ge.s32 p, x, {wanted};", "@p bra.uni enough;"]
    lines += ["mov.b32 before, x;", f"mov.b32 x, {NONE};"]
    for k in key:
        lines += [f"setp.lt.s32 q, {k}, t;", f"@q max.s32 x, x, {k};"]
    lines += [f"redux.sync.max.s32 t, x, {ALL};", "bra.uni again;"]
    lines += ["enough:", f"sub.s32 ties, {wanted}, before;", "mov.b32 l, -1;"]
    lines += ["next:", f"mov.b32 x, {EVERY};"]  # the lowest number above l of those with t, `ties` times
    for k, n in zip(key, number, strict=True):
        lines += [f"setp.eq.s32 q, {k}, t;", f"setp.gt.and.s32 q, {n}, l, q;", f"@q min.s32 x, x, {n};"]
    lines += [f"redux.sync.min.s32 l, x, {ALL};", "sub.s32 ties, ties, 1;", "setp.gt.s32 q, ties, 0;", "@q bra.uni next;"]
    for k, n in zip(key, number, strict=True):
        lines += [f"setp.eq.s32 q, {k}, t;", f"setp.gt.and.s32 q, {n}, l, q;", f"@q mov.b32 {k}, {NONE};"]
    lines += ["bra.uni sums;", "over:"]
    for distance in (16, 8, 4, 2, 1):
        lines += [f"shfl.sync.bfly.b32 other, sum, {distance}, 31, {ALL};", "add.f32 sum, sum, other;"]
    lines += ["known:"]
    for found in zip(total, least, last, kept, strict=True):
        lines += [f"mov.b32 {place}, {name};" for place, name in zip(found, ("sum", "t", "l", "bits"), strict=True)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _operands(each: int) -> str:
    return ",".join(kind for kind in ("=&r", "=&r", "=&r", "=&r", "r", "r", "f", "r", "r") for _ in range(each))


@triton.jit
def choose_largest(
    key, number, value, group_key, needed, WANTED: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, THREADS_EACH: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Of every token the WANTED largest keys, of equal ones those of the lowest numbers; none where not `needed`.

    key, number, value, group_key: [tokens, parts, ...], every token's in one warp, EACH a thread; at least WANTED keys are above NONE. Only
    keys of the GROUPS best groups count (`may_rank`; of equal ones the lower), THREADS_EACH threads each, and `needed` has the bits
    (`bit_of`) of groups of which one must be among them; or all do, PARTS being 0, and `needed` is 0 or not.

    Returns tiles of the same shape, the same everywhere: the bits of the sum of the values of those chosen; the least key that is chosen;
    the last number that is with it (EVERY where all with it are; EVERY and EVERY where none is: a NaN's key is that too); bits of the
    groups that are kept.

    One operation for all of it: of one whose results were used in several places Triton made several, in other layouts.
    """
    return tl.inline_asm_elementwise(
        _assembly(EACH, WANTED, PARTS, THREADS_EACH, GROUPS), _operands(EACH), [key, number, value, group_key, needed],
        (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=EACH,
    )  # fmt: skip
