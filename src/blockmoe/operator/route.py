"""Routing: from logits to the pairs of each local expert, without the host.

DeepSeek-V3: s = sigmoid(logits), b = s + bias; a group's score is the sum of its two largest b; the TOPK_GROUP best
groups stay, of their experts the TOP_K largest b are chosen; weight = s / (sum of the chosen s + 1e-20) * factor.
Renormalize: the TOP_K largest logits; weight = softmax over them * factor. Ties go to the lower index. A NaN logit is
the lowest there is.

Two steps. A token's experts are chosen, mostly by one warp (`choose_experts`); then the tile list (tile_count, tile_expert,
tile_begin, tile_end) is made, the pairs are sorted by expert, then token (pair_token, pair_weight), and how many each token
has is noted (token_pairs), with its rows for the combine (token_pair) or, for prefill, the row of each pair's predecessor in
its token (before). For the combine each token has a slot (slot_token), where token_pairs and token_pair stand: tokens with pairs
come first (slot_count), of those the ones with few. All these `lists.py` writes. `route_kernel` does both steps in one program and holds
all tokens' weights in registers. `choose_kernel` and `place_kernel` take a program a run ("chunk") of tokens, with each token's weight for
every local expert and each chunk's pairs an expert in memory between them.

What it costs is latency: of the launches, of a few dependent reads, and of instructions out of a cold cache. So loops stay
loops, but where a warp chooses by itself, and reads are asked for before they are needed.

Where DENSE, an active expert's tile instead lists every token, with weight 0 for those that did not choose it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockmoe.geometry import MoEGeometry
from blockmoe.operator.choose import choose_experts, load_bias
from blockmoe.operator.chunks import power_of_two_at_least
from blockmoe.operator.kernel_parts import before_next_kernel
from blockmoe.operator.largest import LARGEST_EACH
from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.lists import LISTS, a_lane_each, count_slots, kinds_of, list_rows, list_tiles
from blockmoe.operator.plan import MOST_TILES, TILES, Plan
from blockmoe.operator.versions import known
from blockmoe.operator.workspace import Round

MOST_OF_FOUR = tl.constexpr(int(4 * MOST_TILES))  # an integer, of whose sums ptxas sees that they are a warp's: redux
assert MOST_OF_FOUR.value == 4 * MOST_TILES


@triton.jit
def zero_counters(counters, program, programs, count):
    """A program's share of what the next kernel counts in."""
    for first in range(program * 128, count, programs * 128):
        at = first + tl.arange(0, 128)
        tl.store(counters + at, 0, mask=at < count)


@triton.jit(do_not_specialize=["tokens", "offset", "rounds", "counter_count"])
def route_kernel(
    logits, bias, tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight, token_pair, token_pairs, slot_token,
    slot_count, counters, tokens, offset, factor, rounds, counter_count,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, CELLS: tl.constexpr,
    N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, DEEPSEEK: tl.constexpr, BY_WARP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, DENSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    before_next_kernel(PDL)
    zero_counters(counters, 0, 1, counter_count)
    token = tl.arange(0, BLOCK_T)
    biases = load_bias(bias, offset, BLOCK_T, NUM_EXPERTS, LOCAL, EXPERTS, LANES, CELLS, DEEPSEEK)
    weight = choose_experts(
        logits, biases, token[:, None, None], tokens, offset, factor, rounds,
        NUM_EXPERTS, LOCAL, EXPERTS, LANES, CELLS, N_GROUP, TOPK_GROUP, TOP_K, DEEPSEEK, BY_WARP, BLOCK_T,
    )  # fmt: skip
    if DENSE:
        active = tl.max((weight != 0.0).to(tl.int32), 0)
        start = list_tiles(active * tokens, 0, 1, tokens, tile_count, tile_expert, tile_group, tile_begin, tile_end, BLOCK_N, True, True)
        row = start[None, :] + token[:, None]
        listed = (active[None, :] > 0) & (token < tokens)[:, None]
        tl.store(pair_token + row, token[:, None] + tl.zeros_like(row), mask=listed)
        tl.store(pair_weight + row, weight, mask=listed)
    else:
        total = tl.sum((weight != 0.0).to(tl.int32), 0)
        start = list_tiles(total, 0, 1, tokens, tile_count, tile_expert, tile_group, tile_begin, tile_end, BLOCK_N, False, False)
        weight, token = tl.trans(weight)[:, :, None], token[:, None]  # a warp each
        kinds = kinds_of(weight, TOP_K, 0)
        every = tl.sum(tl.sum(kinds, 1), 0)
        count_slots(slot_count, every, True)
        list_rows(
            weight, kinds, 0, every, token, token < tokens, start, pair_token, pair_weight, token_pair, token_pairs, slot_token, None,
            False, TOP_K, False,
        )  # fmt: skip


@triton.jit
def choose_some(
    t, past, logits, biases, token_weight, offset, factor, rounds,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, CELLS: tl.constexpr,
    N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, DEEPSEEK: tl.constexpr, BY_WARP: tl.constexpr,
    BLOCK_T: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """token_weight of BLOCK_T tokens from `t` on, before `past`. Returns where it is not 0 [BLOCK_T, CELLS], and their kinds if KINDS."""
    token = t + tl.arange(0, BLOCK_T)
    cell = tl.arange(0, CELLS)
    weight = choose_experts(
        logits, biases, token[:, None, None], past, offset, factor, rounds,
        NUM_EXPERTS, LOCAL, EXPERTS, LANES, CELLS, N_GROUP, TOPK_GROUP, TOP_K, DEEPSEEK, BY_WARP, BLOCK_T,
    )  # fmt: skip
    at = token_weight + token[:, None] * LOCAL + cell[None, :]
    tl.store(at, weight, mask=(token < past)[:, None] & (cell < LOCAL)[None, :])
    kinds = tl.zeros((BLOCK_T,), tl.int32)
    if KINDS:
        kinds = kinds_of(weight, rounds, 1)
    return (weight != 0.0).to(tl.int32), kinds


@triton.jit
def first_token(chunk, first_chunks, first_tokens, other_tokens, EQUAL: tl.constexpr):
    """Of a chunk: the first ones have so many tokens each, the others so many, unless all have as many."""
    if EQUAL:
        return chunk * first_tokens
    else:
        return tl.minimum(chunk, first_chunks) * first_tokens + tl.maximum(chunk - first_chunks, 0) * other_tokens


@triton.jit(do_not_specialize=["tokens", "offset", "rounds", "first_chunks", "first_tokens", "other_tokens"])
def choose_kernel(
    logits, bias, token_weight, chunk_count, chunk_kinds, tokens, offset, factor, rounds, first_chunks, first_tokens, other_tokens,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, CELLS: tl.constexpr,
    N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, DEEPSEEK: tl.constexpr, BY_WARP: tl.constexpr,
    BLOCK_T: tl.constexpr, KINDS: tl.constexpr, ONCE: tl.constexpr, EQUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """token_weight [T, LOCAL] (0: not chosen), and of this program's chunk each local expert's pairs, chunk_count [chunks, LOCAL], and the
    sum of its tokens' kinds, chunk_kinds [chunks], if KINDS. ONCE: no chunk has more than BLOCK_T tokens; without a loop bias and logits
    are on their way at once. Else the next kernel's programs may begin at the end only, all of them at about the same time: they would take
    multiprocessors in the order in which programs here end, four to one."""
    if ONCE:
        before_next_kernel(PDL)
    elif PDL:
        gdc_wait()
    chunk = tl.program_id(0)
    first = first_token(chunk, first_chunks, first_tokens, other_tokens, EQUAL)
    past = tl.minimum(first_token(chunk + 1, first_chunks, first_tokens, other_tokens, EQUAL), tokens)
    biases = load_bias(bias, offset, BLOCK_T, NUM_EXPERTS, LOCAL, EXPERTS, LANES, CELLS, DEEPSEEK)
    if ONCE:
        count, kinds = choose_some(
            first, past, logits, biases, token_weight, offset, factor, rounds,
            NUM_EXPERTS, LOCAL, EXPERTS, LANES, CELLS, N_GROUP, TOPK_GROUP, TOP_K, DEEPSEEK, BY_WARP, BLOCK_T, KINDS,
        )  # fmt: skip
    else:
        count = tl.zeros((BLOCK_T, CELLS), tl.int32)
        kinds = tl.zeros((BLOCK_T,), tl.int32)
        for t in range(first, past, BLOCK_T):
            some, some_kinds = choose_some(
                t, past, logits, biases, token_weight, offset, factor, rounds,
                NUM_EXPERTS, LOCAL, EXPERTS, LANES, CELLS, N_GROUP, TOPK_GROUP, TOP_K, DEEPSEEK, BY_WARP, BLOCK_T, KINDS,
            )  # fmt: skip
            count += some
            kinds += some_kinds
        if PDL:
            gdc_launch_dependents()
    if KINDS:
        tl.store(chunk_kinds + chunk, tl.sum(kinds, 0))
    cell = tl.arange(0, CELLS)
    tl.store(chunk_count + chunk * LOCAL + cell, tl.sum(count, 0), mask=cell < LOCAL)


@triton.jit(do_not_specialize=["chunks", "tokens", "first_chunks", "first_tokens", "other_tokens", "counter_count", "pitch"])
def place_kernel(
    token_weight, chunk_count, chunk_kinds, tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight, token_pair,
    token_pairs, slot_token, slot_count, counters, before, way, chunks, tokens, first_chunks, first_tokens, other_tokens,
    counter_count, pitch,
    LOCAL: tl.constexpr, CELLS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, SMALL_N: tl.constexpr, FEW: tl.constexpr,
    BLOCK_N: tl.constexpr, PREFILL_N: tl.constexpr, COUNTS: tl.constexpr, ONCE: tl.constexpr, WARPS: tl.constexpr,
    BALLOTS: tl.constexpr, EQUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows and tiles of a chunk; COUNTS is how many chunks' counts are read at once. Tiles have BLOCK_N pairs, or, where that
    is 0, PREFILL_N for prefill. Where SMALL_N, they have SMALL_N, BLOCK_N or PREFILL_N if that is not 0, as the counts decide
    (`StreamTile.way`, `EitherTile.way`); which is noted, as 0, 1 or 2 (`way`). BALLOTS: each lane is known to have an
    expert."""
    before_next_kernel(PDL)
    chunk = tl.program_id(0)
    zero_counters(counters, chunk, chunks, counter_count)
    expert = tl.arange(0, CELLS)
    real = expert < LOCAL
    first = first_token(chunk, first_chunks, first_tokens, other_tokens, EQUAL)
    past = tl.minimum(first_token(chunk + 1, first_chunks, first_tokens, other_tokens, EQUAL), tokens)
    # A lane an expert, a warp EACH tokens one after the other: sums over tokens stay in a thread, those over experts in a warp. Triton lays
    # tiles out so because experts come first, in the order of what it stores by unordered pointers, and `pitch`, which is LOCAL, is not
    # known to it: else it reads four experts at once, and all is moved to be scanned and moved to be stored.
    EACH: tl.constexpr = max(1, BLOCK_T // WARPS)
    token = first + tl.arange(0, BLOCK_T // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    at = token_weight + token[None, :, :] * pitch + expert[:, None, None]
    weight = tl.load(at, mask=(token < past)[None, :, :] & real[:, None, None], other=0.0)
    sums = tl.zeros((CELLS,), tl.int32)
    every = tl.zeros((BLOCK_T // EACH, COUNTS), tl.int32)  # in each warp, so that none waits for others
    earlier = tl.zeros((BLOCK_T // EACH, COUNTS), tl.int32)
    for c in range(0, chunks, COUNTS):
        other = c + tl.arange(0, COUNTS)
        again = other[None, :] + tl.zeros_like(every)
        kinds = tl.zeros_like(every)
        if BLOCK_N > 0:
            kinds = tl.load(chunk_kinds + again, mask=again < chunks, other=0)
        factor = tl.where(other < chunk, 65537, 1)  # of the chunks before in the upper half too
        count = tl.load(chunk_count + other[:, None] * LOCAL + expert[None, :], mask=(other < chunks)[:, None] & real[None, :], other=0)
        sums += tl.sum(count * factor[:, None], 0)
        every += kinds
        earlier += tl.where(again < chunk, kinds, 0)
    sums = a_lane_each(sums)
    base = sums >> 16
    total = sums & 65535
    in_all = tl.sum(every, 1)[None, :, None] + tl.zeros((CELLS, 1, 1), tl.int32)
    kinds_before = tl.sum(earlier, 1)[None, :, None] + tl.zeros((CELLS, 1, 1), tl.int32)
    if BLOCK_N > 0:
        count_slots(slot_count + tl.zeros_like(in_all), in_all, (expert == 0)[:, None, None] & (chunk == 0))
    prefill = BLOCK_N == 0
    block_n = PREFILL_N if BLOCK_N == 0 else BLOCK_N
    if SMALL_N > 0:
        large = (tl.sum((total + SMALL_N - 1) // SMALL_N, 0) > FEW) & (tl.max(total, 0) > SMALL_N)
        block_n = tl.where(large, BLOCK_N, SMALL_N)
        taken = large.to(tl.int32)
        if PREFILL_N > 0:
            most = MOST_OF_FOUR * tl.sum((total > 0).to(tl.int32), 0)
            prefill = large & (4 * tl.sum((total + BLOCK_N - 1) // BLOCK_N, 0) > most)
            block_n = tl.where(prefill, PREFILL_N, block_n)
            taken += prefill.to(tl.int32)
        tl.store(way, taken)
    base += list_tiles(total, chunk, chunks, tokens, tile_count, tile_expert, tile_group, tile_begin, tile_end, block_n, prefill, False)
    for _ in range(0, 1 if ONCE else past - first, BLOCK_T):
        kinds = tl.zeros_like(token)
        if BLOCK_N > 0:
            kinds = kinds_of(weight, TOP_K, 0)
        found, kinds_here = list_rows(
            weight, kinds, kinds_before, in_all, token, token < past, base, pair_token, pair_weight,
            token_pair, token_pairs, slot_token, before, prefill, TOP_K, BALLOTS,
        )  # fmt: skip
        if not ONCE:
            base += found
            kinds_before += kinds_here[:, None, None]
            token += BLOCK_T
            at += BLOCK_T * pitch
            weight = tl.load(at, mask=(token < past)[None, :, :] & real[:, None, None], other=0.0)


def _tile(g: MoEGeometry, plan: Plan, logits: Slot, bias: Slot) -> tuple[int, int, bool]:
    """Of the tile of a token's experts: how many (a power of two, at least one a thread), how many side by side, and whether a warp can
    choose by itself.

    Side by side are as many as 32 threads read at once, 16 bytes each of the narrower type, or a group where that has more. Triton gives
    every token to a warp where there are as many warps as tokens and such reads are possible: of aligned addresses, which the kernels with
    TMA want too, and of rows that are whole reads; a Triton that is not `known` may spread one over several.
    """
    experts = max(32, power_of_two_at_least(g.num_experts))
    group = g.num_experts // g.n_group if g.topk_group < g.n_group else 1
    width = 16 // min(slot.dtype.itemsize for slot in (logits, bias))
    read = min(32 * width, experts)
    lanes = max(group, read)
    whole = known() and plan.path in TILES and g.num_experts % width == 0 and lanes == read
    one_each = plan.route.block_t == plan.route.num_warps
    return experts, lanes, whole and one_each and experts <= LARGEST_EACH * 32


def _heights(plan: Plan) -> tuple[tuple[int, int], int, int]:
    """Pairs of small tiles, up to how many these are few, pairs of tiles, of prefill's; 0 for what the plan has not."""
    tile = plan.gate_up.stream if plan.path == "either" else plan.gate_up
    small = (tile.small.block_n, tile.few) if getattr(tile, "small", None) else (0, 0)  # which stream's have
    if plan.path == "prefill":
        return small, 0, tile.block_n
    return small, tile.block_n, plan.gate_up.prefill.block_n if plan.path == "either" else 0


def route(logits: Slot, bias: Slot, offset: int, factor: float, round: Round) -> list[Launch]:
    """One launch or two, as the plan says. `bias` may be anything where routing is renormalize."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    tile, local = plan.route, g.num_local_experts
    small, height, filling = _heights(plan)
    deepseek, cells = g.routing == "deepseek_v3", max(32, power_of_two_at_least(local))
    experts, lanes, by_warp = _tile(g, plan, logits, bias if deepseek else logits)
    choosing = (g.num_experts, local, experts, lanes, cells, g.n_group, g.topk_group, g.top_k, deepseek, by_warp, tile.block_t)
    lists = tuple(b[name] for name in LISTS)
    counter_count = b["counters"].count
    if tile.one_launch:
        assert sizes.tokens <= tile.block_t, f"one launch routes {tile.block_t} tokens, not {sizes.tokens}"
        arguments = (logits, bias, *lists, b["counters"], sizes.tokens, offset, factor, g.top_k, counter_count)
        constants = (*choosing, height, plan.dense, plan.pdl)
        return [round.launch(route_kernel, 1, arguments, constants, tile.num_warps)]
    assert not tile.once or max(sizes.first_tokens, sizes.other_tokens) <= tile.place_t, f"of {sizes} {tile.place_t} tokens are placed"
    runs, equal = (sizes.first_chunks, sizes.first_tokens, sizes.other_tokens), not tile.first
    weights = (b["token_weight"], b["chunk_count"], b["chunk_kinds"])
    arguments = (logits, bias, *weights, sizes.tokens, offset, factor, g.top_k, *runs)
    constants = (*choosing, height > 0, tile.once and tile.place_t == tile.block_t, equal, plan.pdl)
    choose = round.launch(choose_kernel, sizes.chunks, arguments, constants, tile.num_warps)
    arguments = (
        *weights, *lists, b["counters"], b["before"], round.way_taken, sizes.chunks, sizes.tokens, *runs, counter_count, local,
    )  # fmt: skip
    counts = max(1, min(tile.chunks, 8192 // cells))
    warps = 4 if tile.place_t * cells <= 2048 else 8
    sorting = (tile.place_t, *small, height, filling, counts, tile.once, warps, known() and cells == 32, equal)
    constants = (local, cells, g.top_k, *sorting, plan.pdl)
    place = round.launch(place_kernel, sizes.chunks, arguments, constants, warps)
    return [choose, place]
