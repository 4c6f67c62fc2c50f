"""Routing: from logits to the pairs of each local expert, without the host.

DeepSeek-V3: s = sigmoid(logits), b = s + bias; a group's score is the sum of its two largest b; the TOPK_GROUP best
groups stay, of their experts the TOP_K largest b are chosen; weight = s / (sum of the chosen s + 1e-20) * factor.
Renormalize: the TOP_K largest logits; weight = softmax over them * factor. Ties go to the lower index. A NaN logit is
the lowest there is.

Two steps over runs ("chunks") of tokens: `choose_chunk` notes each token's weight for every local expert and how many
pairs each expert has in the chunk; `place_chunk` turns all chunks' counts into a tile list (tile_expert, tile_begin,
tile_end, tile_count), sorts its own tokens' pairs by expert, then token (pair_token, pair_weight), and notes each token's
rows for the combine. `route_kernel` does both in one program; `choose_kernel` and `place_kernel` take a program a chunk.

Where DENSE, an active expert's tile instead lists every token, with weight 0 for those that did not choose it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.operator.kernel_parts import before_next_kernel
from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.plan import power_of_two_at_least
from blockmoe.operator.workspace import Round

LOWEST = tl.constexpr(-(2**31))  # below the key of every float
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def order_key(score):
    """An int32 that orders as `score` does; -0 and 0 are equals."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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
def keep_best_groups(
    score, key, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr
):
    """`key` [BLOCK_T, PARTS, LANES] with LOWEST for the experts of dropped groups."""
    SIZE: tl.constexpr = PARTS * LANES // N_GROUP
    grouped = tl.reshape(score, (BLOCK_T, N_GROUP, SIZE))
    best = tl.max(grouped, 2)
    if SIZE > 1:
        position = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(grouped == best[:, :, None], position, SIZE), 2)
        best += tl.max(tl.where(position == first[:, :, None], float("-inf"), grouped), 2)
    group = tl.arange(0, N_GROUP)
    earlier = group[None, None, :] < group[None, :, None]
    better = (best[:, None, :] > best[:, :, None]) | ((best[:, None, :] == best[:, :, None]) & earlier)
    kept = tl.sum(better.to(tl.int32), 2) < TOPK_GROUP
    key = tl.where(kept[:, :, None], tl.reshape(key, (BLOCK_T, N_GROUP, SIZE)), LOWEST)
    return tl.reshape(key, (BLOCK_T, PARTS, LANES))


@triton.jit
def choose_experts(
    logits, bias, token, expert, tokens, factor,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr,
    BLOCK_T: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Weight of each of `token` [BLOCK_T, 1, 1] for each of `expert` [1, PARTS, LANES], 0 where not chosen."""
    real = expert < NUM_EXPERTS
    x = tl.load(logits + token.to(tl.int64) * NUM_EXPERTS + expert, mask=(token < tokens) & real, other=0.0).to(tl.float32)
    if DEEPSEEK:
        x = tl.where(x != x, float("-inf"), x)
        x = 1.0 / (1.0 + tl.exp(-x))
        score = x + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    else:
        x = tl.where(x != x, -FLOAT_MAX, tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX))
        score = x
    score = tl.where(real, score, float("-inf"))
    key = order_key(score)
    if TOPK_GROUP < N_GROUP:
        key = keep_best_groups(score, key, BLOCK_T, PARTS, LANES, N_GROUP, TOPK_GROUP)

    left = key
    for _ in range(TOP_K):  # unrolled, it spills
        first = over_experts_min(tl.where(left == over_experts_max(left), expert, PARTS * LANES))
        left = tl.where(expert == first, LOWEST, left)
    chosen = (left == LOWEST) & (key != LOWEST)

    if DEEPSEEK:
        share = tl.where(chosen, x, 0.0)
        total = over_experts_sum(share) + 1e-20
    else:
        share = tl.where(chosen, tl.exp(x - over_experts_max(tl.where(real, x, -FLOAT_MAX))), 0.0)
        total = over_experts_sum(share)
    return share / total * factor


@triton.jit
def choose_chunk(
    logits, bias, token_weight, chunk_count, chunk, tokens, offset, factor, chunk_tokens,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """token_weight [T, LOCAL] (0: not chosen) and each local expert's pairs in `chunk`: chunk_count [chunks, LOCAL].

    Tiles are [BLOCK_T, PARTS, LANES] with 128 experts in LANES: Triton then gives a token's experts to one warp, 4 to a
    thread and part, and no reduction over experts leaves the warp. Over [BLOCK_T, 256] two warps would share a token.
    """
    GROUP: tl.constexpr = EXPERTS // N_GROUP if TOPK_GROUP < N_GROUP else 1
    LEAST: tl.constexpr = min(128, EXPERTS)
    LANES: tl.constexpr = max(LEAST, GROUP)
    PARTS: tl.constexpr = EXPERTS // LANES
    expert = (tl.arange(0, PARTS) * LANES)[None, :, None] + tl.arange(0, LANES)[None, None, :]
    local = expert - offset
    here = (local >= 0) & (local < LOCAL)
    count = tl.zeros((BLOCK_T, PARTS, LANES), tl.int32)
    for t in range(0, chunk_tokens, BLOCK_T):
        token = (chunk * chunk_tokens + t + tl.arange(0, BLOCK_T))[:, None, None]
        weight = choose_experts(
            logits, bias, token, expert, tokens, factor,
            NUM_EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, DEEPSEEK, BLOCK_T, PARTS, LANES,
        )  # fmt: skip
        inside = here & (token < tokens)
        tl.store(token_weight + token.to(tl.int64) * LOCAL + local, weight, mask=inside)
        count += (inside & (weight != 0.0)).to(tl.int32)
    total = tl.sum(count, 0)[None, :, :]
    tl.store(chunk_count + chunk * LOCAL + local, total, mask=here)


@triton.jit
def place_chunk(
    token_weight, chunk_count, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, token_pair,
    token_pairs, chunk, chunks, tokens, chunk_tokens,
    LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    COUNTS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Rows and tiles of `chunk`; EXPERTS is LOCAL's next power of two, COUNTS how many chunks' counts are read at once."""
    expert = tl.arange(0, EXPERTS)
    real = expert < LOCAL
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for c in range(0, chunks, COUNTS):
        other = c + tl.arange(0, COUNTS)
        listed = (other < chunks)[:, None] & real[None, :]
        count = tl.load(chunk_count + other[:, None] * LOCAL + expert[None, :], mask=listed, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < chunk)[:, None], count, 0), 0)
    active = total > 0
    if DENSE:
        total = tl.where(active, tokens, 0)

    tiles = (total + BLOCK_N - 1) // BLOCK_N
    first_tile = tl.cumsum(tiles, 0) - tiles
    start = first_tile * BLOCK_N if DENSE else tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(tile_count, tl.sum(tiles, 0))
    for i in range(chunk, tl.max(tiles, 0), chunks):
        begin = start + i * BLOCK_N
        tl.store(tile_expert + first_tile + i, expert, mask=i < tiles)
        tl.store(tile_begin + first_tile + i, begin, mask=i < tiles)
        tl.store(tile_end + first_tile + i, tl.minimum(begin + BLOCK_N, start + total), mask=i < tiles)

    base = start + before
    past = tl.minimum((chunk + 1) * chunk_tokens, tokens)
    for t in range(0, chunk_tokens, BLOCK_T):
        token = chunk * chunk_tokens + t + tl.arange(0, BLOCK_T)
        inside = (token < past)[:, None] & real[None, :]
        at = token_weight + token.to(tl.int64)[:, None] * LOCAL + expert[None, :]
        weight = tl.load(at, mask=inside, other=0.0)
        mine = (weight != 0.0).to(tl.int32)
        if DENSE:
            row = start[None, :] + token[:, None]
            listed = inside & active[None, :]
        else:
            row = base[None, :] + tl.cumsum(mine, 0) - mine
            listed = mine > 0
            nth = tl.cumsum(mine, 1) - mine
            tl.store(token_pair + token[:, None] * TOP_K + nth, row, mask=listed)
            tl.store(token_pairs + token, tl.sum(mine, 1), mask=token < past)
            base += tl.sum(mine, 0)
        tl.store(pair_token + row, token[:, None] + tl.zeros_like(row), mask=listed)
        tl.store(pair_weight + row, weight, mask=listed)


@triton.jit(do_not_specialize=["tokens", "offset"])
def route_kernel(
    logits, bias, token_weight, chunk_count, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight,
    token_pair, token_pairs, tokens, offset, factor,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, CHOOSE_T: tl.constexpr, LOCALS: tl.constexpr, PLACE_T: tl.constexpr,
    BLOCK_N: tl.constexpr, DENSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    before_next_kernel(PDL)
    choose_chunk(
        logits, bias, token_weight, chunk_count, 0, tokens, offset, factor, tokens,
        NUM_EXPERTS, LOCAL, EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, DEEPSEEK, CHOOSE_T,
    )  # fmt: skip
    tl.debug_barrier()  # this program's own stores are read from here on
    place_chunk(
        token_weight, chunk_count, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, token_pair,
        token_pairs, 0, 1, tokens, tokens, LOCAL, LOCALS, TOP_K, PLACE_T, BLOCK_N, 1, DENSE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "offset", "chunk_tokens"])
def choose_kernel(
    logits, bias, token_weight, chunk_count, tokens, offset, factor, chunk_tokens,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, CHOOSE_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    before_next_kernel(PDL)
    choose_chunk(
        logits, bias, token_weight, chunk_count, tl.program_id(0), tokens, offset, factor, chunk_tokens,
        NUM_EXPERTS, LOCAL, EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, DEEPSEEK, CHOOSE_T,
    )  # fmt: skip


@triton.jit(do_not_specialize=["chunks", "tokens", "chunk_tokens"])
def place_kernel(
    token_weight, chunk_count, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, token_pair,
    token_pairs, chunks, tokens, chunk_tokens,
    LOCAL: tl.constexpr, LOCALS: tl.constexpr, TOP_K: tl.constexpr, PLACE_T: tl.constexpr, BLOCK_N: tl.constexpr,
    COUNTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    before_next_kernel(PDL)
    place_chunk(
        token_weight, chunk_count, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, token_pair,
        token_pairs, tl.program_id(0), chunks, tokens, chunk_tokens,
        LOCAL, LOCALS, TOP_K, PLACE_T, BLOCK_N, COUNTS, False,
    )  # fmt: skip


def route(logits: Slot, bias: Slot, offset: int, factor: float, round: Round) -> list[Launch]:
    """One launch or two, as the plan says. `bias` may be anything where routing is renormalize."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    tile, block_n, dense = plan.route, plan.gate_up.block_n, plan.path == "dense"
    local, locals_ = g.num_local_experts, power_of_two_at_least(g.num_local_experts)
    choosing = (
        g.num_experts, local, power_of_two_at_least(g.num_experts), g.top_k, g.n_group, g.topk_group,
        g.routing == "deepseek_v3", tile.block_t,
    )  # fmt: skip
    weights = (b["token_weight"], b["chunk_count"])
    lists = tuple(b[n] for n in ("tile_count", "tile_expert", "tile_begin", "tile_end", "pair_token", "pair_weight"))
    lists += (b["token_pair"], b["token_pairs"])
    if tile.one_launch:
        arguments = (logits, bias, *weights, *lists, sizes.tokens, offset, factor)
        constants = (*choosing, locals_, tile.place_t, block_n, dense, plan.pdl)
        return [round.launch(route_kernel, 1, arguments, constants, tile.num_warps)]
    counts = max(1, min(64, 2048 // locals_))
    arguments = (logits, bias, *weights, sizes.tokens, offset, factor, sizes.chunk_tokens)
    choose = round.launch(choose_kernel, sizes.chunks, arguments, (*choosing, plan.pdl), tile.num_warps)
    arguments = (*weights, *lists, sizes.chunks, sizes.tokens, sizes.chunk_tokens)
    constants = (local, locals_, g.top_k, tile.place_t, block_n, counts, plan.pdl)
    place = round.launch(place_kernel, sizes.chunks, arguments, constants, 4 if tile.place_t * locals_ <= 2048 else 8)
    return [choose, place]
