"""The format's rule against a plain numpy version of it, and the figures beside it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockmoe.bench import correctness
from blockmoe.bench.correctness import Tolerance, judge, worse
from blockmoe.bench.schema import Status

PUBLISHED = Tolerance(0.2, 0.1, 0.85)
FLOATS = st.floats(-1e4, 1e4, width=32)


@st.composite
def outputs_and_references(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7))
    reference = draw(hnp.arrays(np.float32, shape, elements=st.one_of(FLOATS, st.just(0.0))))
    error = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.05, 0.1, 0.1000001, 0.2, 1.0, -0.3, 50.0])))
    scale = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([1.0, 1.1, 1.2, 1.2001, 0.5, -1.0])))
    return reference * scale + error, reference


@settings(max_examples=120, deadline=None)
@given(outputs_and_references(), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.01, 0.2]), st.sampled_from([0.5, 0.85, 1.0]))
def test_rule_is_the_formats(pair, atol, rtol, ratio):
    output, reference = (array.astype(np.float64) for array in pair)
    absolute = np.abs(output - reference)
    relative = absolute / (np.abs(reference) + 1e-8)
    fails = (absolute > atol) & (relative > rtol)
    matched = 1 - fails.sum() / fails.size

    found = judge(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]), Tolerance(rtol, atol, ratio))
    assert found.passed == (matched >= ratio) and found.matched_ratio == pytest.approx(matched)
    assert found.max_absolute_error == pytest.approx(absolute.max()) and found.max_relative_error == pytest.approx(relative.max())
    norm = np.linalg.norm(reference)
    if norm:
        assert found.relative_l2 == pytest.approx(np.linalg.norm(output - reference) / norm, rel=1e-6, abs=1e-12)
    nonzero = (reference.reshape(len(reference), -1) != 0).any(1)
    assert found.nonzero_rows == nonzero.sum()
    if nonzero.any():
        assert found.matched_ratio_nonzero_rows == pytest.approx(1 - fails.reshape(len(fails), -1)[nonzero].mean())


def test_pieces_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    reference = torch.randn(50, 16)
    output = reference + 0.2 * torch.randn(50, 16)
    whole = judge(output, reference, PUBLISHED)
    monkeypatch.setattr(correctness, "CHUNK", 100)
    pieces = judge(output, reference, PUBLISHED)
    assert pieces.worst_row == whole.worst_row and pieces.relative_l2 == pytest.approx(whole.relative_l2)
    assert pieces.matched_ratio == whole.matched_ratio and pieces.cosine == pytest.approx(whole.cosine)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_no_number_fails_all(bad):
    reference = torch.ones(4, 8)
    output = reference.clone()
    output[2, 3] = bad
    found = judge(output, reference, Tolerance(0.2, 0.1, 0.01))
    assert found.status is Status.INCORRECT_NUMERICAL and found.message == "output: 1 of 32 elements are NaN or infinite"
    assert math.isnan(found.correctness().max_absolute_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_matches_a_reference_that_is_no_number(bad):
    reference = torch.ones(4, 8)
    reference[2, 3:] = bad
    found = judge(torch.ones(4, 8), reference, Tolerance(0.2, 0.1, 0.9))
    assert found.status is Status.INCORRECT_NUMERICAL and found.matched_ratio == 27 / 32


def test_shape_and_dtype_come_first():
    reference = torch.ones(4, 8)
    found = judge(torch.full((8, 4), math.nan), reference, PUBLISHED)
    assert found.status is Status.INCORRECT_SHAPE and found.message == "output: expected shape [4, 8], got [8, 4]"
    found = judge(reference.bfloat16(), reference, PUBLISHED)
    assert found.status is Status.INCORRECT_DTYPE and found.message == "output: expected torch.float32, got torch.bfloat16"
    assert found.correctness() is None


def test_zero_rows_do_not_hide_wrong_ones():
    reference = torch.zeros(100, 8)
    reference[:5] = 10.0
    found = judge(torch.zeros(100, 8), reference, PUBLISHED)
    assert found.passed and found.matched_ratio == 0.95  # the format's rule lets it pass …
    assert found.matched_ratio_nonzero_rows == 0.0 and found.relative_l2 == 1.0 and found.cosine == 0.0  # … these don't
    assert found.nonzero_rows == 5 and found.worst_row == 0 and found.worst_row_relative_l2 == 1.0


def test_all_zero_reference():
    zeros = torch.zeros(3, 4)
    found = judge(zeros, zeros, PUBLISHED)
    assert found.passed and found.relative_l2 == 0.0 and found.cosine == 1.0 and found.worst_row == -1
    found = judge(zeros + 5, zeros, PUBLISHED)
    assert not found.passed and found.relative_l2 == math.inf and found.cosine == 0.0


def test_empty_and_zero_dimensional():
    assert judge(torch.empty(0, 8), torch.empty(0, 8), PUBLISHED).passed
    assert judge(torch.tensor(2.0), torch.tensor(2.05), PUBLISHED).passed
    assert not judge(torch.tensor(2.0), torch.tensor(9.0), PUBLISHED).passed


def test_worse_of_several():
    reference = torch.ones(10, 10)
    slight, heavy, wrong = (judge(reference + error, reference, PUBLISHED) for error in (0.01, 0.05, 5.0))
    both = worse(worse(None, slight), heavy)
    assert both.passed and both.max_absolute_error == heavy.max_absolute_error and both.relative_l2 == heavy.relative_l2
    assert worse(wrong, slight) is wrong and worse(slight, wrong) is wrong


def test_the_worst_row_and_the_worst_cosine_are_kept_whichever_call_they_are_of():
    torch.manual_seed(0)
    reference = torch.randn(100, 64)
    one_row, turned = reference.clone(), reference.clone()
    one_row[7] *= 0.82  # its row is the worst, with a small error over all
    turned[:, 0] = 0.0  # its direction is the worst …
    scaled = judge(reference * 1.15, reference, PUBLISHED)  # … and this one's error over all
    one_row, turned = judge(one_row, reference, PUBLISHED), judge(turned, reference, PUBLISHED)
    for order in ((scaled, one_row), (one_row, scaled)):
        both = worse(*order)
        assert (both.worst_row, both.relative_l2) == (one_row.worst_row, scaled.relative_l2)
        assert both.worst_row_relative_l2 == one_row.worst_row_relative_l2
    for order in ((scaled, turned), (turned, scaled)):
        assert worse(*order).cosine == turned.cosine < scaled.cosine and worse(*order).relative_l2 == scaled.relative_l2
