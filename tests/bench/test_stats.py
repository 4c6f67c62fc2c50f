"""The statistics keep their promises on simulated clocks, outliers and copies."""

import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockmoe.bench import stats
from blockmoe.bench.stats import Ratio, paired_ratio, unpaired_ratio, word_for

BLOCKS, SAMPLES, RUNS = 12, 5, 150


def simulate(slowdown: float, noise: float, seed: int, blocks: int = BLOCKS) -> Ratio:
    """Two contenders under one wandering clock; the second takes `slowdown` times as long."""
    draw = np.random.default_rng(seed)
    clock = np.exp(0.03 * draw.standard_normal((blocks, 1)).cumsum(axis=0))
    first, second = np.exp(noise * draw.standard_normal((2, blocks, SAMPLES))) * clock
    return paired_ratio(first.tolist(), (slowdown * second).tolist(), seed=seed)


@pytest.mark.parametrize("noise", [0.005, 0.01])
def test_identical_copies_are_same(noise):
    words = [simulate(1.0, noise, seed).word for seed in range(RUNS)]
    assert words.count("SAME") >= 0.9 * RUNS


@pytest.mark.parametrize("noise", [0.005, 0.01])
def test_three_percent_slowdown_is_slower(noise):
    words = [simulate(1.03, noise, seed).word for seed in range(RUNS)]
    assert words.count("SLOWER") >= 0.9 * RUNS


@pytest.mark.parametrize("blocks", [2, 3, 12])
def test_interval_holds_a_repeat_of_the_run(blocks):
    held = 0
    for seed in range(RUNS):
        interval, repeat = simulate(1.1, 0.01, seed, blocks), simulate(1.1, 0.01, seed + RUNS, blocks)
        held += interval.low <= repeat.ratio <= interval.high
    assert held >= 0.9 * RUNS


def of_processes(seed: int, count: int) -> tuple[list, list, list[int]]:
    """Blocks of two contenders in `count` processes each, whose times differ by 1.5 % whatever they run."""
    draw = np.random.default_rng(seed)
    own = np.exp(0.015 * draw.standard_normal((2, count))).repeat(4, axis=1)[:, :, None]
    first, second = own * np.exp(0.003 * draw.standard_normal((2, 4 * count, SAMPLES)))
    return first.tolist(), second.tolist(), [number // 4 for number in range(4 * count)]


@pytest.mark.parametrize(("how", "count"), [("paired", 2), ("paired", 4), ("unpaired", 3), ("one side", 3)])
def test_what_processes_differ_by_is_in_the_interval_where_it_is_known(count, how):
    held, runs = [0, 0], 60
    for seed in range(runs):
        first, second, process = of_processes(seed, count)
        other, other_second, _ = of_processes(seed + runs, count)
        if how == "one side":  # the other's blocks come from one process
            second, other_second = second[:4], other_second[:4]
            known = unpaired_ratio(first, second, processes=(process, None))
        else:
            ratio, processes = (paired_ratio, process) if how == "paired" else (unpaired_ratio, (process, process))
            known = ratio(first, second, processes=processes, resamples=500)
        again = unpaired_ratio(other, other_second, resamples=10).ratio
        for n, interval in enumerate((known, unpaired_ratio(first, second, resamples=500))):
            held[n] += interval.low <= again <= interval.high
    assert held[0] >= 0.9 * runs
    assert held[1] < 0.85 * runs  # the samples alone would not know


def test_processes_that_agree_narrow_the_interval_no_further_than_their_number_allows():
    blocks = (np.random.default_rng(0).normal(1, 0.001, (6, 5)).tolist(),) * 2
    one, three = paired_ratio(*blocks), paired_ratio(*blocks, processes=[0, 0, 1, 1, 2, 2])
    assert math.log(one.high) == pytest.approx(1.96 * stats.PROCESS_SPREAD, rel=0.03)
    assert math.log(three.high) == pytest.approx(math.log(one.high) / math.sqrt(3), rel=0.03)
    assert paired_ratio(*blocks, processes=[0] * 6) == one == unpaired_ratio(*blocks)._replace(low=one.low, high=one.high)


def test_outliers_in_some_blocks_change_nothing():
    clean = np.random.default_rng(0).normal(1, 0.002, (12, 5))
    spoiled = clean.copy()
    spoiled[[1, 5, 9], 0] = 50.0
    assert paired_ratio(clean.tolist(), spoiled.tolist()).ratio == pytest.approx(1, abs=0.005)


def test_same_seed_same_answer_and_fast():
    blocks = np.random.default_rng(0).normal(1, 0.01, (2, 12, 5)).tolist()
    assert paired_ratio(*blocks, seed=3) == paired_ratio(*blocks, seed=3)
    times = []
    for _ in range(10):
        start = time.process_time()
        paired_ratio(*blocks)
        times.append(time.process_time() - start)
    assert min(times) < 0.025  # about 7 ms on an idle core; the room is for busy ones


@pytest.mark.parametrize("blocks", [[[2.0]], [[2.0, 2.1, 2.2]], [[2.0], []][:1]])
def test_one_block_has_no_interval_and_no_warning(blocks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ratio in (paired_ratio, unpaired_ratio):
            result = ratio(blocks, [[1.0]])
            assert (result.low, result.high, result.word) == (None, None, "UNCLEAR")
            assert result.ratio == pytest.approx(stats.median(blocks[0]))


@pytest.mark.parametrize("bad", [[], [[]], [[1.0], []], [[0.0]], [[-1.0]], [[math.nan]], [[math.inf]]])
def test_bad_samples_are_refused(bad):
    with pytest.raises(ValueError, match="samples: expected"):
        paired_ratio(bad, [[1.0], [1.0]])


positive = st.floats(0.01, 100)


@settings(max_examples=50, deadline=None)
@given(
    first=st.lists(st.lists(positive, min_size=1, max_size=6), min_size=1, max_size=6),
    second=st.lists(st.lists(positive, min_size=1, max_size=6), min_size=1, max_size=6),
    scale=positive,
)
def test_ratio_properties(first, second, scale):
    ratio = paired_ratio(first, second, resamples=200)
    if ratio.low is not None:
        assert ratio.low <= ratio.ratio <= ratio.high
    scaled = paired_ratio([[scale * x for x in block] for block in first], second, resamples=200)
    assert scaled.ratio == pytest.approx(scale * ratio.ratio)
    itself = paired_ratio(first, first, resamples=200)
    assert itself.ratio == 1.0 and itself.word in ("SAME", "UNCLEAR")


def test_unpaired_sees_what_pairing_cancels():
    draw = np.random.default_rng(0)
    clock = np.exp(0.05 * draw.standard_normal((12, 1)))
    first, second = clock * np.exp(0.002 * draw.standard_normal((2, 12, 5)))
    paired, unpaired = paired_ratio(first, second), unpaired_ratio(first, second)
    assert paired.word == "SAME"
    assert unpaired.high - unpaired.low > 5 * (paired.high - paired.low)


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((1.0, 0.99, 1.01), "SAME"),
        ((1.005, 1.001, 1.01), "SAME"),
        ((1.03, 1.02, 1.04), "FASTER"),
        ((0.97, 0.96, 0.98), "SLOWER"),
        ((1.01, 1.002, 1.02), "UNCLEAR"),  # surely above 1, surely of no interest or barely
        ((1.03, 0.99, 1.07), "UNCLEAR"),
        ((1.03, None, None), "UNCLEAR"),
    ],
)
def test_words(interval, word):
    assert word_for(*interval, 0.015) == word


def test_weighted_mean():
    """A total's error is that of its parts: 0.9 of the time is known to 0.1 %, the rest hardly."""
    ratios = [Ratio(1.05, 1.049, 1.051, "FASTER"), Ratio(1.0, 0.5, 1.5, "UNCLEAR")]
    mean = stats.weighted_mean(ratios, [9.0, 1.0])
    assert mean.ratio == pytest.approx(1.045) and mean.low == pytest.approx(1.045 - 0.05, abs=1e-4)
    assert stats.weighted_mean(ratios, [999.0, 1.0]).low > 1.048
    assert stats.weighted_mean([*ratios, Ratio(1.0, None, None, "UNCLEAR")], [1, 1, 1]).low is None


def test_geometric_mean():
    ratios = [Ratio(2.0, 1.9, 2.1, "FASTER"), Ratio(0.5, 0.49, 0.51, "SLOWER")]
    mean = stats.geometric_mean(ratios)
    assert mean.ratio == pytest.approx(1.0)
    assert 0.96 < mean.low < 1 < mean.high < 1.04
    assert stats.geometric_mean([*ratios, Ratio(1.0, None, None, "UNCLEAR")]).low is None
    with pytest.raises(ValueError):
        stats.geometric_mean([])


def test_drift():
    draw = np.random.default_rng(0)
    noise = 1 + 0.005 * draw.standard_normal(60)
    assert not stats.drift(noise).drifted
    warming = stats.drift(noise * np.linspace(1, 1.06, 60))
    assert warming.drifted and warming.change == pytest.approx(0.04, abs=0.01)
    assert not stats.drift([1.0, 2.0, 3.0]).drifted
    assert not stats.drift((1 + 0.2 * draw.standard_normal(60)).tolist()).drifted


def test_rank_agreement():
    assert stats.rank_agreement([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert stats.rank_agreement([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert stats.rank_agreement([1], [1]) is None
    assert stats.rank_agreement([1, 1], [1, 2]) is None


def test_median_and_mad():
    assert stats.median([3, 1, 2]) == 2
    assert stats.mad([1, 2, 3, 4, 100]) == 1
