"""Routing logits with an exact number of pairs and active experts, the same bits on every machine.

How much work a workload is depends on its routing alone: how many pairs it has, over how many experts, how unevenly.
This generator hits the first two exactly and draws the third with a realistic skew.

It works backwards. First a token's experts are decided; then its scores are drawn, sorted, and dealt out so that the
chosen experts get the largest. Scores b = sigmoid(logit) + bias are integers in units of 1/4096, so a chosen score
exceeds a rejected one, and a kept group's score a dropped one's, by at least one unit (2.4e-4, far above any rounding
of a float32 sigmoid). Some dropped groups get one score large enough to be chosen, so that routing that forgets the
groups, or ranks them by their best expert, picks wrongly.

Only integers and single IEEE operations are used (no exp, no log), drawn from splitmix64.
"""

from __future__ import annotations

import numpy as np

from blockmoe.geometry import MoEGeometry

UNIT = 4096  # scores and sigmoids are multiples of 1 / UNIT
MARGIN = 2.3e-4  # least difference that decides a choice: one unit, less the rounding of the logits to 2**-16
LARGEST_BIAS = 255  # in units of 2 / UNIT: 8 significant bits, exact in bfloat16
LOWEST_SCORE, HIGHEST_SCORE = 520, 3580  # so that score - bias stays inside (0, UNIT)
SKEW = 3, 8  # an expert's popularity over a token's own taste: at 3/8 the heaviest expert gets 3 to 4 times the mean

# Streams of random bits, one for each purpose.
_POPULARITY, _PREFERENCE, _APPETITE, _STEPS, _ACTIVE, _LEVELS, _BIAS, _LURES = range(8)


def routing_inputs(
    geometry: MoEGeometry, tokens: int, local_expert_offset: int, pairs: int, active_experts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [tokens, num_experts] and bias float32 [num_experts], the bias exact in bfloat16.

    Routing them by `geometry` gives exactly `pairs` (token, local expert) pairs over exactly `active_experts` local
    experts, which begin at `local_expert_offset`. For `renormalize` the bias is zero. Raises ValueError for counts that
    no routing can have, and where groups exist but the local experts are not all in one.
    """
    least, most = _bounds(geometry, tokens, local_expert_offset, pairs, active_experts)
    experts = geometry.num_experts
    local = slice(local_expert_offset, local_expert_offset + geometry.num_local_experts)

    popularity = _bell(_bits(seed, _POPULARITY, (experts,))) * SKEW[0] // SKEW[1]
    preference = _bell(_bits(seed, _PREFERENCE, (tokens, experts))) + popularity
    preference = preference * experts + np.arange(experts)  # distinct within a row

    chosen = np.zeros((tokens, experts), dtype=bool)
    counts = _local_counts(seed, tokens, pairs, least, most)
    chosen[:, local] = _local_choice(seed, preference[:, local], counts, active_experts)
    kept = _kept_groups(geometry, preference, local_expert_offset, counts)  # [tokens, n_group]
    elsewhere = np.where(np.repeat(kept, geometry.experts_per_group, axis=1), preference, -1)
    elsewhere[:, local] = -1
    chosen |= _largest(elsewhere, geometry.top_k - counts)

    scores = _scores(seed, geometry, preference, chosen, kept)
    bias = np.zeros(experts, dtype=np.int64)
    if geometry.routing == "deepseek_v3":
        bias = (_bits(seed, _BIAS, (experts,)) % (2 * LARGEST_BIAS + 1)).astype(np.int64) * 2 - 2 * LARGEST_BIAS
    return _logit_table()[scores - bias], (bias / UNIT).astype(np.float32)


def _bounds(geometry: MoEGeometry, tokens: int, offset: int, pairs: int, active_experts: int) -> tuple[int, int]:
    """Least and most local experts of one token; raises ValueError if the counts asked for are impossible."""
    local = geometry.num_local_experts
    if not 0 <= offset <= geometry.num_experts - local:
        raise ValueError(f"local_expert_offset: expected 0 to {geometry.num_experts - local}, got {offset}")
    group = geometry.experts_per_group
    if geometry.n_group > 1 and offset // group != (offset + local - 1) // group:
        raise ValueError(f"local_expert_offset: expected local experts inside one group of {group}, got {offset}")
    least = max(0, geometry.top_k - (geometry.topk_group * group - local))
    most = min(geometry.top_k, active_experts)
    if not least * tokens <= pairs <= most * tokens:
        raise ValueError(f"pairs: expected {least * tokens} to {most * tokens} for {tokens} tokens, got {pairs}")
    if not min(pairs, 1) <= active_experts <= min(pairs, local):
        raise ValueError(f"active_experts: expected {min(pairs, 1)} to {min(pairs, local)}, got {active_experts}")
    return least, most


def _local_counts(seed: int, tokens: int, pairs: int, least: int, most: int) -> np.ndarray:
    """Local experts of each token, int64 [tokens], `pairs` in all.

    Every token has most - least slots of growing price, and the cheapest slots are taken. Half of the tokens begin at a
    price that is rarely reached: real tokens keep the local group or do not.
    """
    room = most - least
    appetite = _bits(seed, _APPETITE, (tokens, 1)).astype(np.int64) & 0xFFFF
    steps = (_bits(seed, _STEPS, (tokens, room)).astype(np.int64) & 0xFFFF) * (1 + appetite % 4)
    price = np.cumsum(steps, axis=1) + (appetite & 1024) * 512  # [tokens, room]
    taken = np.argsort(price, axis=None, kind="stable")[: pairs - least * tokens]
    return least + np.bincount(taken // max(room, 1), minlength=tokens)


def _local_choice(seed: int, preference: np.ndarray, counts: np.ndarray, active_experts: int) -> np.ndarray:
    """Which local experts each token chooses, bool [tokens, num_local_experts], with every active expert chosen once."""
    lots = _bits(seed, _ACTIVE, (preference.shape[1],))
    active = np.argsort(lots, kind="stable")[:active_experts]
    allowed = np.full_like(preference, -1)
    allowed[:, active] = preference[:, active]
    chosen = _largest(allowed, counts)
    for missing in active[~chosen[:, active].any(axis=0)]:
        donor = chosen.sum(axis=0).argmax()
        token = np.where(chosen[:, donor], preference[:, missing], -1).argmax()
        chosen[token, [donor, missing]] = False, True
    return chosen


def _kept_groups(geometry: MoEGeometry, preference: np.ndarray, offset: int, counts: np.ndarray) -> np.ndarray:
    """Groups that each token keeps, bool [tokens, n_group]: the local one where it has pairs, the preferred otherwise."""
    score = _grouped(geometry, preference).max(axis=2)
    score[counts > 0, offset // geometry.experts_per_group] = np.iinfo(np.int64).max
    return _largest(score, np.full(len(counts), geometry.topk_group))


def _scores(seed: int, geometry: MoEGeometry, preference: np.ndarray, chosen: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Scores that routing turns into `chosen`, in units of 1 / UNIT, int64 [tokens, num_experts].

    Tier 2 are the chosen experts, tier 1 the best two of every kept group that are not, tier 0 all others. A token's
    sorted levels are dealt out by tier, then by preference, and each tier is lifted one unit above the next.
    """
    tokens, experts = preference.shape
    above = np.int64(preference.max(initial=0) + 1)
    wanted = preference + chosen * above
    second = np.partition(_grouped(geometry, wanted), -2, axis=2)[:, :, -2:].min(axis=2)  # [tokens, n_group]
    support = (_grouped(geometry, wanted) >= second[:, :, None]) & kept[:, :, None]
    tier = np.where(chosen, 2, support.reshape(tokens, experts).astype(np.int64))

    bits = _bits(seed, _LEVELS, (tokens, experts))
    spread = (bits & 0xFFFF) * (bits >> np.uint64(48)) * np.uint64(HIGHEST_SCORE - 2 - LOWEST_SCORE)
    levels = np.sort(LOWEST_SCORE + (spread >> np.uint64(32)).astype(np.int64), axis=1)
    order = np.argsort(preference + tier * above, axis=1)
    scores = np.empty_like(levels)
    np.put_along_axis(scores, order, levels, axis=1)
    scores += tier
    if geometry.topk_group < geometry.n_group:
        _lure(seed, geometry, scores, kept)
    return scores


def _lure(seed: int, geometry: MoEGeometry, scores: np.ndarray, kept: np.ndarray) -> None:
    """In an eighth of the dropped groups, lift the best expert as far as the group stays three units from being kept."""
    groups = _grouped(geometry, scores)
    pair = np.partition(groups, -2, axis=2)[:, :, -2:]  # [tokens, n_group, 2], second and best
    least_kept = np.where(kept, pair.sum(axis=2), np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    lured = ~kept & (_bits(seed, _LURES, kept.shape) % 8 == 0)
    lifted = np.minimum(least_kept - pair[:, :, 0] - 3, scores.max(axis=1, keepdims=True))
    token, group = np.nonzero(lured & (lifted > pair[:, :, 1]))
    groups[token, group, groups[token, group].argmax(axis=1)] = lifted[token, group]


def _grouped(geometry: MoEGeometry, values: np.ndarray) -> np.ndarray:
    """A view of [tokens, num_experts] as [tokens, n_group, experts_per_group]."""
    return values.reshape(len(values), geometry.n_group, geometry.experts_per_group)


def _largest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mask of the counts[row] largest values of each row, which must be distinct; bool, the shape of values."""
    most = int(counts.max(initial=0))
    if most == 0:
        return np.zeros(values.shape, dtype=bool)
    top = np.sort(np.partition(values, -most, axis=1)[:, -most:], axis=1)
    threshold = np.take_along_axis(top, np.minimum(most - counts, most - 1)[:, None], axis=1)
    return (values >= threshold) & (counts > 0)[:, None]


def _bits(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits by splitmix64, uint64 of the given shape; streams of a seed are 2**40 draws apart."""
    start = ((seed << 48) + (stream << 40)) % 2**64
    state = (np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64) + np.uint64(start)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))).reshape(shape)


def _bell(bits: np.ndarray) -> np.ndarray:
    """Sum of the four 16-bit fields, int64: bell-shaped, mean 131070, standard deviation 37837."""
    return sum((bits >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))


def _logit_table() -> np.ndarray:
    """ln(s / (UNIT - s)) for s = 1 .. UNIT - 1, rounded to multiples of 2**-16; float32 [UNIT], NaN at 0.

    ln n - ln(n - 1) = 2 artanh(1 / (2n - 1)), summed as a series, because the logarithms of C libraries differ.
    """
    ratio = 1.0 / (2.0 * np.arange(2, UNIT) - 1.0)
    step, power = np.zeros_like(ratio), ratio
    for odd in range(1, 41, 2):
        step = step + power / odd
        power = power * ratio * ratio
    log = np.concatenate([[np.nan, 0.0], np.cumsum(2.0 * step)])  # [UNIT]
    table = np.full(UNIT, np.nan, dtype=np.float32)
    table[1:] = np.rint((log[1:] - log[:0:-1]) * 65536.0) / 65536.0
    return table
