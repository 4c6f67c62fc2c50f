"""Statistics of repeated timings: centre, spread, intervals of ratios, and the words drawn from them. No torch here.

Times come in blocks: block i of every contender was measured next to each other in time over the same inputs, so a
block's ratio is free of what clocks and heat did between blocks. No sample is ever dropped: medians carry the outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

Word = Literal["FASTER", "SLOWER", "SAME", "UNCLEAR"]
Blocks = Sequence[Sequence[float]]

CONFIDENCE = 0.95
MARGIN = 0.02  # differences below it are of no interest: a copy of the same source differs by up to 1 % (see below)
# Standard deviation of the ratio of two processes that run the same code, beyond the noise inside them: where an allocation
# lands stays for a process's life. Two runs of 19 workloads on an H100 (results/h100/repeatability) moved the ratio of a
# solution and its copy by 0.46 %, and of a slowed copy by 0.39 %, where the samples explain 0.24 %.
PROCESS_SPREAD = 0.004


class Ratio(NamedTuple):
    """A ratio of times, its interval (None where there are too few blocks for one), and the word for it."""

    ratio: float
    low: float | None
    high: float | None
    word: Word


class Drift(NamedTuple):
    """Relative change from the first to the last third of a run, and whether it exceeds the run's own noise."""

    change: float
    drifted: bool


def median(samples: Sequence[float]) -> float:
    return float(np.median(np.asarray(samples, dtype=float)))


def mad(samples: Sequence[float]) -> float:
    """Median absolute deviation from the median, unscaled."""
    values = np.asarray(samples, dtype=float)
    return float(np.median(np.abs(values - np.median(values))))


def word_for(ratio: float, low: float | None, high: float | None, margin: float = MARGIN) -> Word:
    """SAME: the whole interval lies within 1 +- margin. FASTER, SLOWER: it lies on one side of 1, beyond the margin."""
    if low is None or high is None:
        return "UNCLEAR"
    if 1 - margin <= low and high <= 1 + margin:
        return "SAME"
    if low > 1 and ratio > 1 + margin:
        return "FASTER"
    if high < 1 and ratio < 1 - margin:
        return "SLOWER"
    return "UNCLEAR"


def paired_ratio(
    baseline_blocks: Blocks,
    contender_blocks: Blocks,
    *,
    processes: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
    margin: float = MARGIN,
    seed: int = 0,
    resamples: int = 2000,
) -> Ratio:
    """How many times faster the contender is than the baseline, where block i of both was measured side by side.

    The estimate is the median over blocks of (baseline's block median / contender's block median). The interval comes
    from drawing blocks anew, and samples within them: it is where a repeat of the run should land, about 1.4 times as
    wide as the error of this run alone. Where one side has more blocks, the surplus has no partner and is left out.
    `processes`: the number of the process, of both, that each block ran in. With several of them what they differ by is known.
    Raises ValueError for an empty block or a time that is not positive and finite.
    """
    count = min(len(baseline_blocks), len(contender_blocks))
    baseline, contender = _Padded(baseline_blocks[:count]), _Padded(contender_blocks[:count])
    by_block = baseline.medians() / contender.medians()
    estimate = float(np.median(by_block))
    if not (baseline.repeated and contender.repeated):
        return Ratio(estimate, None, None, "UNCLEAR")
    draw = np.random.default_rng(seed)
    blocks = draw.integers(count, size=(resamples, count))
    ratios = np.median(baseline.resampled(blocks, draw) / contender.resampled(blocks, draw), axis=1)
    spread = _spread_of_processes([_by_process(by_block, processes)], confidence)
    return _with_interval(estimate, ratios, count, spread, confidence, margin)


def unpaired_ratio(
    baseline_blocks: Blocks,
    contender_blocks: Blocks,
    *,
    processes: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
    confidence: float = CONFIDENCE,
    margin: float = MARGIN,
    seed: int = 0,
    resamples: int = 2000,
) -> Ratio:
    """As `paired_ratio`, for blocks of two different runs: each side's blocks are resampled on their own.

    The interval holds what happened within the two runs; what changed between them (clocks, heat) is in the ratio.
    """
    baseline, contender = _Padded(baseline_blocks), _Padded(contender_blocks)
    estimate = float(np.median(baseline.medians()) / np.median(contender.medians()))
    if not (baseline.repeated and contender.repeated):
        return Ratio(estimate, None, None, "UNCLEAR")
    draw = np.random.default_rng(seed)
    sides = [
        np.median(side.resampled(draw.integers(side.count, size=(resamples, side.count)), draw), axis=1)
        for side in (baseline, contender)
    ]
    spread = _spread_of_processes(
        [_by_process(side.medians(), of) for side, of in zip((baseline, contender), processes, strict=True)], confidence
    )
    return _with_interval(estimate, sides[0] / sides[1], min(baseline.count, contender.count), spread, confidence, margin)


def geometric_mean(ratios: Sequence[Ratio], *, margin: float = MARGIN) -> Ratio:
    """Geometric mean of ratios over workloads, with the interval that their own intervals imply.

    The workloads are the whole population, not a sample of one, so only the errors of measurement spread: independent
    per workload, they add in squares on the log scale. No interval where any ratio has none.
    """
    if not ratios:
        raise ValueError("geometric mean: expected at least one ratio, got none")
    logs = np.log([ratio.ratio for ratio in ratios])
    centre = float(logs.mean())
    if any(ratio.low is None or ratio.high is None for ratio in ratios):
        return Ratio(math.exp(centre), None, None, "UNCLEAR")
    below = logs - np.log([ratio.low for ratio in ratios])
    above = np.log([ratio.high for ratio in ratios]) - logs
    low = math.exp(centre - math.sqrt(np.sum(below**2)) / len(logs))
    high = math.exp(centre + math.sqrt(np.sum(above**2)) / len(logs))
    return Ratio(math.exp(centre), low, high, word_for(math.exp(centre), low, high, margin))


def weighted_mean(ratios: Sequence[Ratio], weights: Sequence[float], *, margin: float = MARGIN) -> Ratio:
    """Mean of ratios over workloads, with the interval that their own intervals imply, as `geometric_mean`: of two solutions' total times
    the ratio, where `weights` are what the one below the line spends on each."""
    shares = np.asarray(weights, dtype=float) / np.sum(weights)
    centre = float(sum(share * ratio.ratio for share, ratio in zip(shares, ratios, strict=True)))
    if any(ratio.low is None or ratio.high is None for ratio in ratios):
        return Ratio(centre, None, None, "UNCLEAR")
    low = centre - math.sqrt(sum((share * (ratio.ratio - ratio.low)) ** 2 for share, ratio in zip(shares, ratios, strict=True)))
    high = centre + math.sqrt(sum((share * (ratio.high - ratio.ratio)) ** 2 for share, ratio in zip(shares, ratios, strict=True)))
    return Ratio(centre, low, high, word_for(centre, low, high, margin))


def drift(samples: Sequence[float], *, threshold: float = 0.01) -> Drift:
    """Compare the medians of the first and last third of samples in time order.

    Drifted: the change exceeds both `threshold` and three standard errors, taken from the spread within the thirds.
    Fewer than 9 samples can't tell drift from noise.
    """
    values = np.asarray(samples, dtype=float)
    third = len(values) // 3
    if third < 3:
        return Drift(0.0, False)
    first, last = values[:third], values[-third:]
    change = float(np.median(last) / np.median(first) - 1)
    spread = 1.4826 * max(mad(first), mad(last)) / float(np.median(first))  # as a standard deviation, where normal
    error = 1.2533 * spread * math.sqrt(2 / third)  # of a difference of two medians
    return Drift(change, abs(change) > max(threshold, 3 * error))


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two scores of the same items: 1 same order, -1 reversed, None where no order exists."""
    if len(first) < 2:
        return None
    from scipy.stats import kendalltau  # half a second to import, and few callers

    tau = float(kendalltau(first, second).statistic)
    return None if math.isnan(tau) else tau


class _Padded:
    """Blocks as one matrix [block, sample], padded with infinity so that sorting puts the padding last."""

    def __init__(self, blocks: Blocks) -> None:
        if len(blocks) == 0 or any(len(block) == 0 for block in blocks):
            raise ValueError("samples: expected at least one block, each with at least one time")
        self.count = len(blocks)
        self.lengths = np.array([len(block) for block in blocks])
        self.values = np.full((self.count, self.lengths.max()), np.inf)
        for row, block in zip(self.values, blocks, strict=True):
            row[: len(block)] = block
        real = self.values[np.arange(self.values.shape[1]) < self.lengths[:, None]]
        if not (np.isfinite(real).all() and (real > 0).all()):
            raise ValueError("samples: expected positive, finite times")

    @property
    def repeated(self) -> bool:
        """Whether the blocks can say anything of their own noise."""
        return self.count > 1

    def medians(self) -> np.ndarray:
        return _sorted_median(np.sort(self.values), self.lengths)  # [block]

    def resampled(self, blocks: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Medians of the chosen blocks [resample, block], each after drawing its own samples anew."""
        lengths = self.lengths[blocks]
        width = self.values.shape[1]
        chosen = (draw.random((*blocks.shape, width), dtype=np.float32) * lengths[..., None]).astype(np.intp)
        chosen = np.minimum(chosen, lengths[..., None] - 1)  # float32 may round up to the length
        drawn = self.values[blocks[..., None], chosen]
        if (self.lengths < width).any():
            drawn[np.arange(width) >= lengths[..., None]] = np.inf
        drawn.sort(axis=-1)
        return _sorted_median(drawn, lengths)


def _sorted_median(ordered: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    lower = np.take_along_axis(ordered, (lengths[..., None] - 1) // 2, axis=-1)
    upper = np.take_along_axis(ordered, lengths[..., None] // 2, axis=-1)
    return (0.5 * (lower + upper))[..., 0]


def _by_process(by_block: np.ndarray, processes: Sequence[int] | None) -> np.ndarray:
    """Logarithms of each process's median over its blocks; empty where there is one process, or it isn't known which."""
    numbers = np.asarray(processes if processes is not None else [], dtype=int)[: len(by_block)]
    if len(numbers) < len(by_block) or len(set(numbers)) < 2:
        return np.empty(0)
    return np.log([float(np.median(by_block[numbers == number])) for number in sorted(set(numbers))])


def _spread_of_processes(sides: Sequence[np.ndarray], confidence: float) -> float:
    """Half-width, on the log scale, of where another run's processes would put a ratio, given those of this run (`_by_process`).

    Their standard deviation times Student's t; the difference of two means of n has the variance 2 / n. A side of one process (an empty
    array) is taken to spread as the other does. Few may agree by chance, so it is no less than PROCESS_SPREAD makes of n processes.
    """
    tail, several = (1 - confidence) / 2, [side for side in sides if len(side)]
    known = float(ndtri(1 - tail)) * PROCESS_SPREAD
    if not several:
        return known
    variance = max(float(np.var(side, ddof=1)) for side in several)
    seen = sum(2 * (float(np.var(side, ddof=1)) / len(side) if len(side) else variance) for side in sides)
    t = -float(stdtrit(min(len(side) for side in several) - 1, tail))
    return max(known / math.sqrt(min(max(len(side), 1) for side in sides)), t * math.sqrt(seen))


def _with_interval(estimate: float, ratios: np.ndarray, blocks: int, process: float, confidence: float, margin: float) -> Ratio:
    """Percentile interval on the log scale, widened for few blocks (a bootstrap of n is narrow by that factor) and by what processes
    differ by."""
    tail = (1 - confidence) / 2
    widen = float(stdtrit(blocks - 1, tail) / ndtri(tail)) * math.sqrt(blocks / (blocks - 1))
    low, high = np.log(np.quantile(ratios, [tail, 1 - tail]))
    centre = math.log(estimate)
    low = math.exp(centre - math.hypot(min(0.0, float(low) - centre) * widen, process))
    high = math.exp(centre + math.hypot(max(0.0, float(high) - centre) * widen, process))
    return Ratio(estimate, low, high, word_for(estimate, low, high, margin))
