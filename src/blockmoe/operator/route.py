"""Routing: from logits to the pairs of each local expert, without the host.

DeepSeek-V3: s = sigmoid(logits), b = s + bias; a group's score is the sum of its two largest b; the TOPK_GROUP best
groups stay, of their experts the TOP_K largest b are chosen; weight = s / (sum of the chosen s + 1e-20) * factor.
Renormalize: the TOP_K largest logits; weight = softmax over them * factor. Ties go to the lower index. A NaN logit is
the lowest there is.

Results: a tile list (tile_expert, tile_begin, tile_end, tile_count) over rows of pairs (pair_token, pair_weight).
`route_dense` (one program) gives each active expert one tile that holds every token, with weight 0 for those that
did not choose it. `choose` and `place` (T split over programs) sort the pairs by expert, then by token, and note each
token's rows for the combine.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.operator.kernel_parts import after_previous_kernel
from blockmoe.operator.plan import power_of_two_at_least
from blockmoe.operator.workspace import Round

LOWEST = tl.constexpr(-(2**63) + 1)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def order_key(score, index, EXPERTS: tl.constexpr):
    """An int64 that orders as `score` does and, among equals, puts the lower index first."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0 and 0 are equals
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (EXPERTS - 1 - index).to(tl.int64)


@triton.jit
def keep_best_groups(score, key, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr):
    """`key` with LOWEST for the experts of dropped groups."""
    SIZE: tl.constexpr = EXPERTS // N_GROUP
    grouped = tl.reshape(score, (BLOCK_T, N_GROUP, SIZE))
    best = tl.max(grouped, 2)  # [BLOCK_T, N_GROUP]
    if SIZE > 1:
        position = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(grouped == best[:, :, None], position, SIZE), 2)
        best += tl.max(tl.where(position == first[:, :, None], float("-inf"), grouped), 2)
    group = tl.arange(0, N_GROUP)
    earlier = group[None, None, :] < group[None, :, None]
    better = (best[:, None, :] > best[:, :, None]) | ((best[:, None, :] == best[:, :, None]) & earlier)
    kept = tl.sum(better.to(tl.int32), 2) < TOPK_GROUP
    key = tl.where(kept[:, :, None], tl.reshape(key, (BLOCK_T, N_GROUP, SIZE)), LOWEST)
    return tl.reshape(key, (BLOCK_T, EXPERTS))


@triton.jit
def choose_experts(
    logits, bias, token, tokens, factor,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Whether each of `token` [BLOCK_T] chose each expert, and its weight: [BLOCK_T, EXPERTS], EXPERTS a power of 2."""
    expert = tl.arange(0, EXPERTS)
    real = expert < NUM_EXPERTS
    inside = (token < tokens)[:, None] & real[None, :]
    at = logits + token.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if DEEPSEEK:
        x = tl.where(x != x, float("-inf"), x)
        x = 1.0 / (1.0 + tl.exp(-x))
        score = x + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    else:
        x = tl.where(x != x, -FLOAT_MAX, tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX))
        score = x
    score = tl.where(real[None, :], score, float("-inf"))
    key = order_key(score, expert[None, :], EXPERTS)
    if N_GROUP > 1:
        key = keep_best_groups(score, key, BLOCK_T, EXPERTS, N_GROUP, TOPK_GROUP)

    chosen = key != key
    for _ in range(TOP_K):  # unrolled, it spills
        hit = key == tl.max(key, 1)[:, None]
        chosen = chosen | hit
        key = tl.where(hit, LOWEST, key)

    if DEEPSEEK:
        share = tl.where(chosen, x, 0.0)
        share = share / (tl.sum(share, 1)[:, None] + 1e-20)
    else:
        largest = tl.max(tl.where(real[None, :], x, -FLOAT_MAX), 1)
        share = tl.where(chosen, tl.exp(x - largest[:, None]), 0.0)
        share = share / tl.sum(share, 1)[:, None]
    return chosen, share * factor


@triton.jit(do_not_specialize=["tokens", "offset"])
def route_dense_kernel(
    logits, bias, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, tokens, offset, factor,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    token = tl.arange(0, BLOCK_T)
    chosen, weight = choose_experts(
        logits, bias, token, tokens, factor, NUM_EXPERTS, EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, DEEPSEEK, BLOCK_T
    )
    local = tl.arange(0, EXPERTS) - offset
    here = (local >= 0) & (local < LOCAL)
    mine = chosen & here[None, :] & (token < tokens)[:, None]

    active = (tl.sum(mine.to(tl.int32), 0) > 0).to(tl.int32)
    slot = tl.cumsum(active, 0) - active
    tl.store(tile_count, tl.sum(active, 0))
    tl.store(tile_expert + slot, local, mask=active > 0)
    tl.store(tile_begin + slot, slot * BLOCK_N, mask=active > 0)
    tl.store(tile_end + slot, slot * BLOCK_N + tokens, mask=active > 0)

    row = slot[None, :] * BLOCK_N + token[:, None]  # [BLOCK_T, EXPERTS]
    tl.store(pair_token + row, token[:, None] + tl.zeros_like(row), mask=(active > 0)[None, :])
    tl.store(pair_weight + row, tl.where(mine, weight, 0.0), mask=(active > 0)[None, :])


@triton.jit(do_not_specialize=["tokens", "offset", "chunk_tokens"])
def choose_kernel(
    logits, bias, token_weight, chunk_count, tokens, offset, factor, chunk_tokens,
    NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, DEEPSEEK: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights token_weight [T, LOCAL] (0: not chosen) and pairs of each expert in this program's run of tokens."""
    after_previous_kernel(PDL)
    chunk = tl.program_id(0)
    local = tl.arange(0, EXPERTS) - offset
    here = (local >= 0) & (local < LOCAL)
    count = tl.zeros((EXPERTS,), tl.int32)
    for t in range(0, chunk_tokens, BLOCK_T):
        token = chunk * chunk_tokens + t + tl.arange(0, BLOCK_T)
        chosen, weight = choose_experts(
            logits, bias, token, tokens, factor, NUM_EXPERTS, EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, DEEPSEEK, BLOCK_T
        )
        inside = here[None, :] & (token < tokens)[:, None]
        weight = tl.where(chosen, weight, 0.0)
        tl.store(token_weight + token.to(tl.int64)[:, None] * LOCAL + local[None, :], weight, mask=inside)
        count += tl.sum((inside & (weight != 0.0)).to(tl.int32), 0)
    tl.store(chunk_count + chunk * LOCAL + local, count, mask=here)


@triton.jit(do_not_specialize=["tokens", "chunks", "chunk_tokens"])
def place_kernel(
    token_weight, chunk_count, tile_count, tile_expert, tile_begin, tile_end, pair_token, pair_weight, token_pair,
    token_pairs, tokens, chunks, chunk_tokens,
    LOCAL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rows by expert, then by token; each program places its run of tokens and writes a share of the tile list."""
    after_previous_kernel(PDL)
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    real = expert < LOCAL
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for c in range(0, chunks, 8):
        other = c + tl.arange(0, 8)
        listed = (other < chunks)[:, None] & real[None, :]
        count = tl.load(chunk_count + other[:, None] * LOCAL + expert[None, :], mask=listed, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < chunk)[:, None], count, 0), 0)
    start = tl.cumsum(total, 0) - total

    tiles = (total + BLOCK_N - 1) // BLOCK_N
    first_tile = tl.cumsum(tiles, 0) - tiles
    if chunk == 0:
        tl.store(tile_count, tl.sum(tiles, 0))
    for i in range(chunk, tl.max(tiles, 0), chunks):
        begin = start + i * BLOCK_N
        tl.store(tile_expert + first_tile + i, expert, mask=i < tiles)
        tl.store(tile_begin + first_tile + i, begin, mask=i < tiles)
        tl.store(tile_end + first_tile + i, tl.minimum(begin + BLOCK_N, start + total), mask=i < tiles)

    base = start + before
    for t in range(0, chunk_tokens, BLOCK_T):
        token = chunk * chunk_tokens + t + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & real[None, :]
        at = token_weight + token.to(tl.int64)[:, None] * LOCAL + expert[None, :]
        weight = tl.load(at, mask=inside, other=0.0)
        mine = (weight != 0.0).to(tl.int32)
        row = base[None, :] + tl.cumsum(mine, 0) - mine
        tl.store(pair_token + row, token[:, None] + tl.zeros_like(row), mask=mine > 0)
        tl.store(pair_weight + row, weight, mask=mine > 0)
        nth = tl.cumsum(mine, 1) - mine
        tl.store(token_pair + token[:, None] * TOP_K + nth, row, mask=mine > 0)
        tl.store(token_pairs + token, tl.sum(mine, 1), mask=token < tokens)
        base += tl.sum(mine, 0)


def route(logits, bias, offset: int, factor: float, round: Round) -> None:
    """One launch where the plan is dense, else two. `bias` may be anything where routing is renormalize."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    tile, block_n = plan.route, plan.gate_up.block_n
    experts = power_of_two_at_least(g.num_experts)
    sizes_and_method = (
        g.num_experts, g.num_local_experts, experts, g.top_k, g.n_group, g.topk_group, g.routing == "deepseek_v3",
    )  # fmt: skip
    tiles = (b["tile_count"], b["tile_expert"], b["tile_begin"], b["tile_end"], b["pair_token"], b["pair_weight"])
    if plan.path == "dense":
        arguments = (logits, bias, *tiles, sizes.tokens, offset, factor)
        constants = (*sizes_and_method, tile.block_t, block_n, plan.pdl)
        round.launch(route_dense_kernel, (1, 1), arguments, constants, tile.num_warps)
        return
    arguments = (logits, bias, b["token_weight"], b["chunk_count"], sizes.tokens, offset, factor, sizes.chunk_tokens)
    constants = (*sizes_and_method, tile.block_t, plan.pdl)
    round.launch(choose_kernel, (sizes.chunks, 1), arguments, constants, tile.num_warps)

    pairs = (b["token_pair"], b["token_pairs"])
    arguments = (b["token_weight"], b["chunk_count"], *tiles, *pairs, sizes.tokens, sizes.chunks, sizes.chunk_tokens)
    local = power_of_two_at_least(g.num_local_experts)
    constants = (g.num_local_experts, local, g.top_k, tile.block_t, block_n, plan.pdl)
    round.launch(place_kernel, (sizes.chunks, 1), arguments, constants, tile.num_warps)
