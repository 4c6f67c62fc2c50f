"""The PTX that finds the largest keys of a warp, executed thread by thread: `tests/operator/warp.py`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import warp  # noqa: E402

from blockmoe.operator.largest import EVERY, NONE, _assembly  # noqa: E402


def chosen(key: np.ndarray, number: np.ndarray, value: np.ndarray, wanted: int, needed: int) -> tuple[np.ndarray, float]:
    """What `choose_largest` says of one token: which of its keys are chosen, and the sum of their values."""
    each, tiles = len(key) // warp.THREADS, (key, number, value, np.full_like(key, wanted), np.full_like(key, needed))
    shares, least, last = warp.by_token(_assembly(each), [tile[None] for tile in tiles], each, 3)
    assert (least == least[0, 0]).all() and (last == last[0, 0]).all()
    return (key > least[0]) | ((key == least[0]) & (number <= last[0])), shares.sum()


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


def test_the_machine_says_what_a_warp_cannot_do():
    first = np.arange(warp.THREADS, dtype=np.int32)
    with pytest.raises(AssertionError, match="not all threads take the branch"):
        warp.execute("{\nsetp.gt.s32 p, $1, 3;\n@p bra.uni end;\nend:\nmov.b32 $0, $1;\n}", [first], 1)
    with pytest.raises(KeyError, match="x"):
        warp.execute("{\nadd.s32 $0, $1, x;\n}", [first], 1)
    with pytest.raises(AssertionError, match="does not end"):
        warp.execute("{\nagain:\nbra.uni again;\n}", [first], 1)
