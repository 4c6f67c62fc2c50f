"""The PTX that routing is written in, executed thread by thread: `tests/operator/warp.py`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import warp  # noqa: E402

from blockmoe.operator.ballots import EARLIER, UP_TO_HERE  # noqa: E402
from blockmoe.operator.largest import EVERY, NONE, _assembly, bit_of, may_rank  # noqa: E402


def chosen(key: np.ndarray, number: np.ndarray, value: np.ndarray, wanted: int, needed: int) -> tuple[np.ndarray, float]:
    """What `choose_largest` says of one token: which of its keys are chosen, and the sum of their values."""
    each, tiles = len(key) // warp.THREADS, (key, number, value, np.zeros_like(key), np.full_like(key, needed))
    total, least, last, _ = warp.by_token(_assembly(each, wanted), [tile[None, None] for tile in tiles], each, 4)
    assert all((tile == tile[0, 0, 0]).all() for tile in (total, least, last))
    return (key > least[0, 0]) | ((key == least[0, 0]) & (number <= last[0, 0])), total.view(np.float32)[0, 0, 0]


@pytest.mark.parametrize("each", [1, 2, 4, 8, 16])
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([1, 2, 5, 40, 10**6]), wanted=st.integers(1, 24), mixed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_largest_and_of_equal_ones_the_first(each, seed, levels, wanted, mixed):
    random, count = np.random.default_rng(seed), each * warp.THREADS
    key = random.integers(-levels, levels, count).astype(np.int32)
    number = (random.permutation(count) if mixed else np.arange(count)).astype(np.int32)
    value = random.integers(1, 100, count).astype(np.float32)
    wanted = min(wanted, count)
    want = np.zeros(count, bool)
    want[np.lexsort((number, -key))[:wanted]] = True
    got, total = chosen(key, number, value, wanted, 1)
    assert (got == want).all() and total == value[want].sum()


@pytest.mark.parametrize("each", [1, 8])
def test_lowest_and_highest_keys_and_none_needed(each):
    count = each * warp.THREADS
    key, number, value = np.full(count, NONE, np.int32), np.arange(count, dtype=np.int32), np.ones(count, np.float32)
    key[3:11] = NONE + 1  # as many as wanted are of groups that were not dropped
    got, total = chosen(key, number, value, 8, 1)
    assert list(np.flatnonzero(got)) == list(range(3, 11)) and total == 8
    got, total = chosen(np.full(count, EVERY, np.int32), number, value, 8, 1)  # a GPU's NaN
    assert list(np.flatnonzero(got)) == list(range(8)) and total == 8
    got, total = chosen(key, number, value, 8, 0)
    assert not got.any() and total == 0


@pytest.mark.parametrize("parts, lanes, size", [
    (1, 256, 32), (2, 128, 32), (2, 128, 128), (1, 256, 8), (2, 128, 8), (4, 128, 64), (4, 128, 16), (1, 64, 2), (2, 32, 16), (1, 32, 1),
])  # fmt: skip
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([1, 2, 5, 10**6]), share=st.floats(0, 1), near=st.booleans())
@settings(max_examples=40, deadline=None)
def test_of_the_groups_that_are_kept(parts, lanes, size, seed, levels, share, near):
    assert may_rank(parts, lanes, size)
    random, count = np.random.default_rng(seed), parts * lanes
    each, threads, groups = count // warp.THREADS, size * warp.THREADS // lanes, count // size
    group_key = random.integers(-levels, levels, groups).astype(np.int32)
    keep = max(1, round(share * groups))
    kept = np.zeros(groups, bool)
    kept[np.lexsort((np.arange(groups), -group_key))[:keep]] = True
    key = random.integers(0, 3 if near else 10**6, count).astype(np.int32)
    number, value = np.arange(count, dtype=np.int32), random.integers(1, 100, count).astype(np.float32)
    wanted = min(8, keep * size)
    want = np.zeros(count, bool)
    want[np.lexsort((-key, ~np.repeat(kept, size)))[:wanted]] = True
    bit = np.array([bit_of.fn(group, threads) for group in range(groups)])
    assert len(set(bit)) == groups
    asked = random.integers(groups)
    needed = np.full(count, 1 << int(bit[asked]), np.int64).astype(np.uint32).view(np.int32)
    tiles = [tile.reshape(1, parts, lanes) for tile in (key, number, value, np.repeat(group_key, size), needed)]
    total, least, last, bits = warp.by_token(_assembly(each, wanted, parts, threads, keep), tiles, each, 4)
    assert (bits == bits[0, 0, 0]).all() and int(bits.view(np.uint32)[0, 0, 0]) == sum(1 << int(b) for b in bit[kept])
    if kept[asked]:
        got = np.repeat(kept, size) & ((key > least[0, 0, 0]) | ((key == least[0, 0, 0]) & (number <= last[0, 0, 0])))
        assert (got == want).all() and (total.view(np.float32) == value[want].sum()).all()
    else:
        assert (total == 0).all() and (least == EVERY).all() and (last == EVERY).all()


@pytest.mark.parametrize("parts, lanes, size", [(1, 256, 4), (1, 256, 12), (2, 128, 256), (4, 128, 8), (1, 16, 2)])
def test_groups_that_a_warp_does_not_rank(parts, lanes, size):
    """A thread has several of a part, or some of one; a group goes over parts; too few threads for a bit a part; no thread has all."""
    assert not may_rank(parts, lanes, size)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_ballots(seed, share):
    random = np.random.default_rng(seed)
    row = np.where(random.random((warp.THREADS, 2, 3)) < share, random.integers(0, 10**6, (warp.THREADS, 2, 3)), -1).astype(np.int32)
    assert (warp.by_lane(UP_TO_HERE.value, row) == (row >= 0).cumsum(0)).all()
    want = np.full_like(row, -1)
    for lane in range(1, warp.THREADS):
        want[lane] = np.where(row[lane - 1] >= 0, row[lane - 1], want[lane - 1])
    assert (warp.by_lane(EARLIER.value, row) == want).all()


def test_the_machine_says_what_a_warp_cannot_do():
    first = np.arange(warp.THREADS, dtype=np.int32)
    with pytest.raises(AssertionError, match="not all threads take the branch"):
        warp.execute("{\nsetp.gt.s32 p, $1, 3;\n@p bra.uni end;\nend:\nmov.b32 $0, $1;\n}", [first], 1)
    with pytest.raises(KeyError, match="x"):
        warp.execute("{\nadd.s32 $0, $1, x;\n}", [first], 1)
    with pytest.raises(AssertionError, match="does not end"):
        warp.execute("{\nagain:\nbra.uni again;\n}", [first], 1)
