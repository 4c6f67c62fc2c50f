"""Which local experts a token chooses, and with which weights: `route.py` has the rule."""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.operator.largest import NONE, choose_largest

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
def keep_best_groups(
    score, key, own, inside, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, TOPK_GROUP: tl.constexpr
):
    """`key` [BLOCK_T, PARTS, LANES] with LOWEST for the experts of dropped groups; which of experts `own` are `inside` and in others."""
    GROUPS: tl.constexpr = PARTS * LANES // SIZE
    grouped = tl.reshape(score, (BLOCK_T, GROUPS, SIZE))
    best, second = tl.reduce((grouped, tl.full(grouped.shape, float("-inf"), tl.float32)), 2, two_largest)
    if SIZE > 1:
        best += second
    # as large as the experts' tile again, so that a round is two reductions over a warp, of one value a thread
    shape: tl.constexpr = (BLOCK_T, GROUPS, SIZE)
    left = tl.reshape(tl.broadcast_to(order_key(best)[:, :, None], shape), key.shape)
    group = tl.reshape(tl.broadcast_to(tl.arange(0, GROUPS)[None, :, None], shape), key.shape)
    kept = inside & (own < 0)
    for _ in range(TOPK_GROUP):
        first = over_experts_min(tl.where(left == over_experts_max(left), group, GROUPS))
        left = tl.where(group == first, TAKEN, left)
        kept = kept | (inside & (own // SIZE == first))
    return tl.where(left == TAKEN, key, LOWEST), kept


# 0 for a NaN: max gives the other operand
SHARE = tl.constexpr("rcp.approx.ftz.f32 $0, $1; max.ftz.f32 $0, $0, 0f00000000;")


@triton.jit
def sigmoids(x):
    """0 below 2 ** -126, and of NaN. Six instructions a value; by tl.exp, a division and tl.where, which mind subnormals, 14."""
    past = 1.0 + tl.exp2(x * -1.4426950408889634)
    return tl.inline_asm_elementwise(SHARE, "=f,f", [past], tl.float32, is_pure=True, pack=1)


@triton.jit
def clean(x, DEEPSEEK: tl.constexpr):
    """The share of a logit before it is divided by the sum (deepseek_v3), or the logit (renormalize), without NaN and infinities."""
    if DEEPSEEK:
        return sigmoids(x)
    else:
        return tl.where(x == x, tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX) + 0.0, -FLOAT_MAX)


@triton.jit
def choose_experts(
    logits, bias, token, tokens, offset, factor, rounds,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, CELLS: tl.constexpr,
    N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, BY_WARP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Weight [BLOCK_T, CELLS] of each of `token` [BLOCK_T, 1, 1] for each local expert, 0 where not chosen.

    Tiles are [BLOCK_T, PARTS, LANES], LANES being what a warp reads at once (`_tile`): Triton then gives a token's
    experts to one warp, and no reduction over experts leaves it. `rounds` is TOP_K as an argument: the loop must not be
    unrolled, since instructions come from a cold cache. BY_WARP: a warp may choose by itself, which takes fewer.
    """
    PARTS: tl.constexpr = EXPERTS // LANES
    CELL_LANES: tl.constexpr = min(128, CELLS)
    CELL_PARTS: tl.constexpr = CELLS // CELL_LANES
    expert = (tl.arange(0, PARTS) * LANES)[None, :, None] + tl.arange(0, LANES)[None, None, :]
    cell = (tl.arange(0, CELL_PARTS) * CELL_LANES)[None, :, None] + tl.arange(0, CELL_LANES)[None, None, :]
    real = expert < NUM_EXPERTS
    there = token < tokens
    row = logits + token * NUM_EXPERTS
    listed = there & real if NUM_EXPERTS < EXPERTS else there
    x = tl.load(row + expert, mask=listed, other=0.0).to(tl.float32)
    inside = there & (cell < LOCAL)
    own = clean(tl.load(row + (offset + cell), mask=inside, other=0.0).to(tl.float32), DEEPSEEK)
    x = clean(x, DEEPSEEK)
    score, own_score = x, own
    if DEEPSEEK:  # a tile as large as the logits', so that Triton lays both out alike
        score = x + tl.load(bias + (expert + token * 0), mask=listed, other=0.0).to(tl.float32)
        own_score = own + tl.load(bias + (offset + cell + token * 0), mask=inside, other=0.0).to(tl.float32)
    if NUM_EXPERTS < EXPERTS:
        score = tl.where(real, score, float("-inf"))
    key = order_key(score)
    left = key
    if TOPK_GROUP < N_GROUP:
        left, inside = keep_best_groups(
            score, key, offset + cell, inside, BLOCK_T, PARTS, LANES, NUM_EXPERTS // N_GROUP, TOPK_GROUP
        )  # fmt: skip
    if not DEEPSEEK:
        most = order_key(over_experts_max(key)).to(tl.float32, bitcast=True)
        x = tl.exp(x - most)
    if BY_WARP:
        asked = over_experts_max(inside.to(tl.int32))
        shares, least, last = choose_largest(left, expert, x, rounds, asked, EXPERTS // 32)
        least, last = over_experts_max(least), over_experts_max(last)
        own_key = order_key(own_score)  # by the same operations as `key`, so with the same bits
        mine = inside & ((own_key > least) | ((own_key == least) & (offset + cell <= last)))
    else:
        mine = inside & (cell < 0)
        for _ in range(rounds):
            first = over_experts_min(tl.where(left == over_experts_max(left), expert, EXPERTS))
            left = tl.where(expert == first, TAKEN, left)
            mine = mine | (inside & (cell == first - offset))
        shares = tl.where(left == TAKEN, x, 0.0)
    if not DEEPSEEK:
        own = tl.exp(own - most)
    total = over_experts_sum(shares)
    if DEEPSEEK:
        total += 1e-20
    weight = tl.where(mine, own / total * factor, 0.0)
    return tl.reshape(weight, (BLOCK_T, CELLS))
