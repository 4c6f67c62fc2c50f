"""What routing writes: tiles, pairs sorted by expert, and each token's slot. What they are stands in `route.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.operator.ballots import earlier_row, pairs_up_to_here
from blockmoe.operator.choose import two_largest

# But for what is prefill's alone.
LISTS = ("tile_count", "tile_expert", "tile_group", "tile_begin", "tile_end", "pair_token", "pair_weight")
LISTS += ("token_pair", "token_pairs", "slot_token", "slot_count")


@triton.jit
def list_tiles(
    total, step, steps, tokens, tile_count, tile_expert, tile_group, tile_begin, tile_end, block_n, aligned, DENSE: tl.constexpr
):  # fmt: skip
    """First row of each local expert, given its rows; stores the tiles whose number in their expert is step modulo steps.

    Where `aligned`, tile t begins at row t * block_n, so that rows stay unused behind an expert's last tile.
    """
    expert = tl.arange(0, total.shape[0])
    tiles = (total + block_n - 1) // block_n
    past_tile = tl.cumsum(tiles, 0)
    first_tile = past_tile - tiles
    start = tl.cumsum(total, 0) - total
    if aligned:
        start = first_tile * block_n
    tl.store(tile_count + expert * 0, past_tile, mask=(expert == total.shape[0] - 1) & (step == 0))
    for i in range(step, 1 if DENSE else tl.cdiv(tokens, block_n), steps):
        begin = start + i * block_n
        tl.store(tile_expert + first_tile + i, expert, mask=i < tiles)
        tl.store(tile_group + first_tile + i, 4096 * first_tile + tiles, mask=i < tiles)
        tl.store(tile_begin + first_tile + i, begin, mask=i < tiles)
        tl.store(tile_end + first_tile + i, tl.minimum(begin + block_n, start + total), mask=i < tiles)
    return start


@triton.jit
def other_of(one, other):
    return other


@triton.jit
def a_lane_each(x):
    """`x` as it is, by a scan that adds nothing: Triton lays out what is scanned so that each lane has one. What is made of it is then laid
    out so too, and need not be moved time and again."""
    return tl.associative_scan(x, 0, other_of)


@triton.jit
def sums_before(x):
    """Sums of `x` [..., WARPS, EACH] over the tokens before each, where warp by warp comes next, and of all tokens."""
    AXIS: tl.constexpr = len(x.shape) - 1
    inside = x if x.shape[AXIS] == 1 else tl.cumsum(x, AXIS)
    of_warp = tl.sum(x, AXIS)
    warps_before = tl.cumsum(of_warp, AXIS - 1) - of_warp
    return inside - x + tl.expand_dims(warps_before, AXIS), tl.sum(of_warp, AXIS - 1)


@triton.jit
def list_rows(
    weight, kinds, kinds_before, every, token, there, base, pair_token, pair_weight, token_pair, token_pairs, slot_token, before, prefill,
    TOP_K: tl.constexpr, BALLOTS: tl.constexpr,
):  # fmt: skip
    """Stores the pairs of `weight` [experts, WARPS, EACH], each expert's from row `base` on, and each token's rows in its slot
    (`slots_of`, of its kind, those of the tokens before these, and of every one). Returns how many pairs each expert has, and the sum of
    these tokens' kinds, [experts] too.

    For `prefill` instead of a token's rows the row of its pair of the expert before, or -1, and how many pairs it has: rows increase with
    experts, so it is the second largest row up to here.
    """
    last = (tl.arange(0, weight.shape[0]) == weight.shape[0] - 1)[:, None, None]
    mine = (weight != 0.0).to(tl.int32)
    # one scan for both: MOST_COUNTED tokens at most
    sums, total = sums_before(mine + (((kinds & 65535) << 10) + ((kinds >> 16) << 20))[None, :, :])
    row = base[:, None, None] + (sums & 1023)
    tl.store(pair_token + row, token[None, :, :] + tl.zeros_like(row), mask=mine > 0)
    tl.store(pair_weight + row, weight, mask=mine > 0)
    own_row = tl.where(mine > 0, row, -1)
    if prefill:
        if BALLOTS:
            earlier = earlier_row(own_row)
        else:
            _, earlier = tl.associative_scan((own_row, tl.full(row.shape, -1, tl.int32)), 0, two_largest)
        tl.store(before + row, earlier, mask=mine > 0)
        tl.store(token_pairs + token, tl.sum(mine, 0), mask=there)
    else:
        slot = slots_of(kinds[None, :, :], token[None, :, :], kinds_before + packed_kinds(sums), every)
        past = pairs_up_to_here(own_row) if BALLOTS else tl.cumsum(mine, 0)
        tl.store(slot_token + slot, token[None, :, :] + tl.zeros_like(slot), mask=there[None, :, :] & last)
        tl.store(token_pair + (slot * TOP_K + past - 1), row, mask=mine > 0)
        tl.store(token_pairs + slot, past, mask=there[None, :, :] & last)
    return total & 1023, packed_kinds(total)


@triton.jit
def packed_kinds(sums):
    """A sum of kinds, of `list_rows`' sums."""
    return ((sums >> 10) & 1023) + ((sums >> 20) << 16)


@triton.jit
def kinds_of(weight, top_k, AXIS: tl.constexpr):
    """Of the tokens of `weight`, whose experts are along AXIS, 1 where one has few pairs, half of top_k at most (FEW in `stream`'s last
    sum), 65,536 where it has more, 0 where none. A sum counts both kinds (of a round's tokens, TOKEN_CHUNK at most)."""
    pairs = tl.sum((weight != 0.0).to(tl.int32), AXIS)
    return tl.where(pairs > tl.maximum(top_k // 2, 1), 65536, tl.where(pairs > 0, 1, 0))


@triton.jit
def slots_of(kinds, token, past, every):
    """Slots of tokens of such kinds, given the sums of kinds of all tokens before each (`past`) and of every one: those with few pairs come
    first, then those with more, then those with none."""
    few, more = past & 65535, past >> 16
    all_few, all_more = every & 65535, every >> 16
    return tl.where(kinds == 1, few, tl.where(kinds > 0, all_few + more, all_few + all_more + token - few - more))


@triton.jit
def count_slots(slot_count, every, mask):
    """How many tokens have pairs, and how many of those few."""
    tl.store(slot_count, (every & 65535) + (every >> 16), mask=mask)
    tl.store(slot_count + 1, every & 65535, mask=mask)
