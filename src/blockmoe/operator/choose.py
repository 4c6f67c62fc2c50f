"""Which local experts a token chooses, and with which weights: `route.py` has the rule."""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.operator.largest import NONE, bit_of, choose_largest, may_rank

LOWEST = tl.constexpr(NONE)  # below the key of every float
TAKEN = tl.constexpr(NONE + 1)  # also below
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def order_key(score):
    """An int32 that orders as `score` does, which is no NaN and no -0; its own inverse."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def over_experts_max(x):
    return tl.max(tl.max(x, 1), 1)[:, None, None]  # the axis inside a thread first: one warp reduction is left


@triton.jit
def over_experts_min(x):
    return tl.min(tl.min(x, 1), 1)[:, None, None]


@triton.jit
def over_experts_sum(x):
    return tl.sum(tl.sum(x, 1), 1)[:, None, None]


@triton.jit
def two_largest(first, second, other_first, other_second):
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@triton.jit
def keys_of_groups(score, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The key of its group for every expert of `score` [BLOCK_T, PARTS, LANES]."""
    if SIZE > 1:
        one, other = tl.split(tl.reshape(score, (BLOCK_T, GROUPS, SIZE // 2, 2)))
        best, second = tl.reduce((tl.maximum(one, other), tl.minimum(one, other)), 2, two_largest)
        best += second
    else:
        best = tl.reshape(score, (BLOCK_T, GROUPS))
    return tl.reshape(tl.broadcast_to(order_key(best)[:, :, None], (BLOCK_T, GROUPS, SIZE)), score.shape)


@triton.jit
def keep_best_groups(key, group_key, own, inside, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOPK_GROUP: tl.constexpr):
    """`key` [BLOCK_T, PARTS, LANES] with LOWEST for the experts of dropped groups; which of experts `own` are `inside` and in others."""
    BLOCK_T: tl.constexpr = key.shape[0]
    group = tl.reshape(tl.broadcast_to(tl.arange(0, GROUPS)[None, :, None], (BLOCK_T, GROUPS, SIZE)), key.shape)
    kept = inside & (own < 0)
    for _ in range(TOPK_GROUP):  # a round is two reductions over a warp, of one value a thread
        first = over_experts_min(tl.where(group_key == over_experts_max(group_key), group, GROUPS))
        group_key = tl.where(group == first, TAKEN, group_key)
        kept = kept | (inside & (own // SIZE == first))
    return tl.where(group_key == TAKEN, key, LOWEST), kept


@triton.jit
def bits_of_groups(first, last, GROUPS: tl.constexpr, THREADS_EACH: tl.constexpr):
    """The bits (`bit_of`) of groups `first` to `last`."""
    bits = 0
    for group in tl.static_range(GROUPS):
        bits |= tl.where((group >= first) & (group <= last), 1 << bit_of(group, THREADS_EACH), 0)
    return bits


RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
SHARE = tl.constexpr("rcp.approx.ftz.f32 $0, $1; max.ftz.f32 $0, $0, 0f00000000;")  # 0 for a NaN: max gives the other operand


@triton.jit
def sigmoids(x):
    """0 below 2 ** -126, and of NaN. Six instructions a value; by tl.exp, a division and tl.where, which mind subnormals, 14."""
    past = 1.0 + tl.exp2(x * -1.4426950408889634)
    return tl.inline_asm_elementwise(SHARE, "=f,f", [past], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocals(x):
    """1 / x within an ulp, of normal numbers with normal results; what `persistent.reciprocals` is to Gluon."""
    return tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def clean(x, DEEPSEEK: tl.constexpr):
    """The share of a logit before it is divided by the sum (deepseek_v3), or the logit (renormalize), without NaN and infinities."""
    if DEEPSEEK:
        return sigmoids(x)
    else:
        return tl.where(x == x, tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX) + 0.0, -FLOAT_MAX)


@triton.jit
def places(LANES: tl.constexpr, EXPERTS: tl.constexpr, CELLS: tl.constexpr):
    """Tiles [1, parts, lanes] of the numbers of all experts, and of the places of those here among them."""
    CELL_LANES: tl.constexpr = min(128, CELLS)
    expert = (tl.arange(0, EXPERTS // LANES) * LANES)[None, :, None] + tl.arange(0, LANES)[None, None, :]
    cell = (tl.arange(0, CELLS // CELL_LANES) * CELL_LANES)[None, :, None] + tl.arange(0, CELL_LANES)[None, None, :]
    return expert, cell


@triton.jit
def load_bias(
    bias, offset, BLOCK_T: tl.constexpr, NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr,
    CELLS: tl.constexpr, DEEPSEEK: tl.constexpr,
):  # fmt: skip
    """The bias of every expert and of those here, for BLOCK_T tokens: tiles as large as the logits', so that Triton lays both out alike."""
    expert, cell = places(LANES, EXPERTS, CELLS)
    expert += tl.zeros((BLOCK_T, 1, 1), tl.int32)
    cell += tl.zeros((BLOCK_T, 1, 1), tl.int32)
    if DEEPSEEK:
        every = tl.load(bias + expert, mask=expert < NUM_EXPERTS, other=0.0)
        return every.to(tl.float32), tl.load(bias + (offset + cell), mask=cell < LOCAL, other=0.0).to(tl.float32)
    else:
        return 0.0, 0.0


@triton.jit
def choose_experts(
    logits, biases, token, tokens, offset, factor, rounds,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, CELLS: tl.constexpr,
    N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, DEEPSEEK: tl.constexpr, BY_WARP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Weight [BLOCK_T, CELLS] of each of `token` [BLOCK_T, 1, 1] for each local expert, 0 where not chosen; `biases` are `load_bias`'s.

    Tiles are [BLOCK_T, PARTS, LANES], LANES being what a warp reads at once (`_tile`): Triton then gives a token's
    experts to one warp, and no reduction over experts leaves it. BY_WARP: a warp may choose by itself, in TOP_K rounds; else `rounds` is
    TOP_K as an argument, since the loop must not be unrolled: instructions come from a cold cache.
    """
    PARTS: tl.constexpr = EXPERTS // LANES
    expert, cell = places(LANES, EXPERTS, CELLS)
    real = expert < NUM_EXPERTS
    there = token < tokens
    row = logits + token * NUM_EXPERTS
    listed = there & real if NUM_EXPERTS < EXPERTS else there
    x = tl.load(row + expert, mask=listed, other=0.0).to(tl.float32)
    inside = there & (cell < LOCAL)
    own = clean(tl.load(row + (offset + cell), mask=inside, other=0.0).to(tl.float32), DEEPSEEK)
    x = clean(x, DEEPSEEK)
    score, own_score = x, own
    if DEEPSEEK:
        score, own_score = x + biases[0], own + biases[1]
    if NUM_EXPERTS < EXPERTS:
        score = tl.where(real, score, float("-inf"))
    key = order_key(score)
    left = key
    SIZE: tl.constexpr = NUM_EXPERTS // N_GROUP
    GROUPS: tl.constexpr = EXPERTS // SIZE
    RANKED: tl.constexpr = TOPK_GROUP < N_GROUP and BY_WARP and may_rank(PARTS, LANES, SIZE)  # with the experts
    group_key = key
    if TOPK_GROUP < N_GROUP:
        group_key = keys_of_groups(score, BLOCK_T, GROUPS, SIZE)
        if not RANKED:
            left, inside = keep_best_groups(key, group_key, offset + cell, inside, GROUPS, SIZE, TOPK_GROUP)
    if not DEEPSEEK:
        most = order_key(over_experts_max(key)).to(tl.float32, bitcast=True)
        x = tl.exp(x - most)
    if BY_WARP:
        THREADS_EACH: tl.constexpr = SIZE * 32 // LANES if RANKED else 32
        if RANKED:
            needed = tl.where(there, bits_of_groups(offset // SIZE, (offset + LOCAL - 1) // SIZE, GROUPS, THREADS_EACH), 0)
        else:
            needed = over_experts_max(inside.to(tl.int32))
        total, least, last, kept = choose_largest(
            left, expert, x, group_key, needed, TOP_K, EXPERTS // 32, PARTS if RANKED else 0, THREADS_EACH, TOPK_GROUP
        )  # fmt: skip
        total = over_experts_max(total).to(tl.float32, bitcast=True)  # the same bits everywhere
        least, last = over_experts_max(least), over_experts_max(last)
        if RANKED:
            inside = inside & (((over_experts_max(kept) >> bit_of((offset + cell) // SIZE, THREADS_EACH)) & 1) > 0)
        own_key = order_key(own_score)  # by the same operations as `key`, so with the same bits
        mine = inside & ((own_key > least) | ((own_key == least) & (offset + cell <= last)))
    else:
        mine = inside & (cell < 0)
        for _ in range(rounds):
            first = over_experts_min(tl.where(left == over_experts_max(left), expert, EXPERTS))
            left = tl.where(expert == first, TAKEN, left)
            mine = mine | (inside & (cell == first - offset))
        total = over_experts_sum(tl.where(left == TAKEN, x, 0.0))
    if not DEEPSEEK:
        own = tl.exp(own - most)
    if DEEPSEEK:
        total += 1e-20
    weight = tl.where(mine, own * (factor * reciprocals(total)), 0.0)
    return tl.reshape(weight, (BLOCK_T, CELLS))
