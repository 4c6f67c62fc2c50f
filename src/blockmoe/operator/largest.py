"""The experts that a token chooses, found by one warp: PTX, because only there a warp can skip what others need, and pop from lists.

Each thread has `each` of the token's keys. It sorts them once; a round is then one reduction over the warp, of the largest that each thread
has left, and those whose it is move their lists up, until as many have moved as are wanted. What was found last is the least key of those
chosen. Where more have it than are wanted, the lowest numbers are chosen. Looking through all keys twice a round instead, for the largest
and the lowest number that has it, took 52 instructions a round and thread of 256 experts; this takes 17, and 38 for the sorting. Nothing at
all is done for a token whose groups with experts here were dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = -(2**31)  # no key is lower
EVERY = 2**31 - 1  # no key and no number is higher
ALL = "0xffffffff"  # threads
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
def _assembly(each: int) -> str:
    """For `each` keys a thread. Operands are tiles, `each` registers of every one: what sums to the values of those chosen; the least key
    that is chosen; the last number that is with it; given keys, their numbers and values; how many are wanted, and whether any is needed,
    the same everywhere."""
    every = range(each)
    total, least, last, given, number, value = ([f"${group * each + i}" for i in every] for group in range(6))
    wanted, needed = f"${6 * each}", f"${7 * each}"
    key, head = [f"k{i}" for i in every], [f"h{i}" for i in range(each + 1)]
    # t: the least key chosen so far; l: the last number with it; left: still wanted, ties: when t was found; h: the thread's list
    lines = [".reg .pred p, q;", f".reg .b32 t, l, x, left, ties, k<{each}>, h<{each + 1}>;", ".reg .f32 sum;", "mov.f32 sum, 0f00000000;"]
    lines += [f"mov.b32 t, {EVERY};", f"mov.b32 l, {EVERY};", f"setp.eq.s32 p, {needed}, 0;", "@p bra.uni known;"]
    lines += [f"mov.b32 {k}, {g};" for k, g in zip(key, given, strict=True)]
    lines += [f"mov.b32 {h}, {g};" for h, g in zip(head, [*given, str(NONE)], strict=True)]
    for a, b in _sorting(each):
        lines += [f"max.s32 x, h{a}, h{b};", f"min.s32 h{b}, h{a}, h{b};", f"mov.b32 h{a}, x;"]
    lines += [f"mov.b32 left, {wanted};", f"mov.b32 ties, {wanted};", "pop:", f"redux.sync.max.s32 x, h0, {ALL};"]
    lines += ["setp.ne.s32 q, x, t;", "@q mov.b32 ties, left;", "mov.b32 t, x;"]
    lines += ["setp.eq.s32 p, h0, t;", *(f"@p mov.b32 h{i}, h{i + 1};" for i in every)]
    lines += [f"vote.sync.ballot.b32 x, p, {ALL};", "popc.b32 x, x;", "sub.s32 left, left, x;"]
    lines += ["setp.gt.s32 q, left, 0;", "@q bra.uni pop;", "mov.b32 x, 0;"]
    for k in key:
        lines += [f"setp.ge.s32 q, {k}, t;", "@q add.s32 x, x, 1;"]
    lines += [f"redux.sync.add.s32 x, x, {ALL};", f"setp.eq.s32 p, x, {wanted};", "@p bra.uni sums;", "mov.b32 l, -1;"]
    lines += ["next:", f"mov.b32 x, {EVERY};"]  # the lowest number above l of those with t, `ties` times
    for k, n in zip(key, number, strict=True):
        lines += [f"setp.eq.s32 q, {k}, t;", f"setp.gt.and.s32 q, {n}, l, q;", f"@q min.s32 x, x, {n};"]
    lines += [f"redux.sync.min.s32 l, x, {ALL};", "sub.s32 ties, ties, 1;", "setp.gt.s32 q, ties, 0;", "@q bra.uni next;"]
    for k, n in zip(key, number, strict=True):
        lines += [f"setp.eq.s32 q, {k}, t;", f"setp.gt.and.s32 q, {n}, l, q;", f"@q mov.b32 {k}, {NONE};"]
    lines += ["sums:"]
    for k, v in zip(key, value, strict=True):
        lines += [f"setp.ge.s32 q, {k}, t;", f"@q add.f32 sum, sum, {v};"]
    lines += ["known:"]
    lines += [f"mov.f32 {total[0]}, sum;", *(f"mov.f32 {zero}, 0f00000000;" for zero in total[1:])]
    for one, other in zip(least, last, strict=True):
        lines += [f"mov.b32 {one}, t;", f"mov.b32 {other}, l;"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _operands(each: int) -> str:
    return ",".join(kind for kind in ("=&f", "=&r", "=&r", "r", "r", "f", "r", "r") for _ in range(each))


@triton.jit
def choose_largest(key, number, value, wanted, needed, EACH: tl.constexpr):
    """Of every token the `wanted` largest keys, of equal ones those of the lowest numbers; none where not `needed`.

    key, number, value: [tokens, ...], every token's in one warp, EACH a thread; at least `wanted` keys are above NONE. Returns tiles of the
    same shape: what sums to the values of those chosen; in every place the least key that is chosen; the last number that is with it (where
    none is, EVERY and EVERY: a NaN's key is that too).
    """
    return tl.inline_asm_elementwise(
        _assembly(EACH), _operands(EACH), [key, number, value, wanted, needed], (tl.float32, tl.int32, tl.int32), is_pure=False, pack=EACH
    )
