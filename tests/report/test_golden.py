"""Every statistic of the two published reports, pinned; and the list of their claims is what is committed."""

from pathlib import Path

import pytest

from blockmoe.report import api, published
from blockmoe.report.importing import import_csv
from blockmoe.report.published import FLASHINFER, FOUR, SGLANG1, SGLANG2, TRITON1, TRITON2, TWO

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    found = {}
    for name in (TWO, FOUR):
        output = tmp_path_factory.mktemp(name)
        import_csv(DATA / f"{name}.csv", output, hardware="NVIDIA B200")
        found[name] = api.read([output], regimes="published").sections[0]
    return found


# All expected numbers were computed apart, with Python's `statistics` module on the tables.
# report, solution: (arithmetic, geometric, median, min at T, max at T, deviation, variation, wins, ties, rank)
OVERALL = {
    (TWO, FLASHINFER): (27.382, 26.879, 28.19, (15.73, 14107), (35.77, 7), 4.883, 0.1783, 5, 0, 1),
    (TWO, TRITON2): (27.451, 24.810, 30.41, (4.82, 11948), (33.87, 16), 8.298, 0.3023, 14, 0, 2),
    (FOUR, SGLANG1): (17.694, 16.106, 20.17, (3.61, 11948), (22.35, 58), 5.557, 0.3140, 0, 0, 4),
    (FOUR, SGLANG2): (23.323, 20.985, 26.40, (4.07, 11948), (30.34, 16), 7.461, 0.3199, 1, 0, 2),
    (FOUR, TRITON1): (22.688, 20.547, 26.40, (4.64, 11948), (30.16, 16), 7.570, 0.3337, 0, 1, 3),
    (FOUR, TRITON2): (29.481, 26.359, 31.85, (4.67, 11948), (37.58, 1), 9.297, 0.3154, 17, 1, 1),
}


@pytest.mark.parametrize(("report", "solution"), OVERALL)
def test_overall(sections, report, solution):
    contender = next(c for c in sections[report].contenders if c.name == solution)
    found, wanted = contender.overall, OVERALL[report, solution]
    assert (found.count, contender.evaluated, contender.failures) == (19, 19, [])
    assert (found.arithmetic, found.geometric) == pytest.approx(wanted[:2], abs=6e-4)
    assert found.median == pytest.approx(wanted[2])
    assert ((found.low, found.low_at), (found.high, found.high_at)) == wanted[3:5]
    assert found.deviation == pytest.approx(wanted[5], abs=6e-4)
    assert found.variation == pytest.approx(wanted[6], abs=6e-5)
    assert (contender.wins, contender.ties, contender.rank) == wanted[7:]
    assert contender.shared_geometric == pytest.approx(found.geometric)
    assert contender.clear_wins == 0  # no samples, no significance


# report, regime: arithmetic and geometric means, in the order of the report's table
REGIMES = {
    (TWO, "T ≤ 80"): ((28.464, 30.527), (28.346, 30.465)),
    (TWO, "T ≥ 901"): ((21.610, 11.043), (20.243, 8.298)),
    (TWO, "T 1–16"): ((28.772, 31.312), (28.418, 31.198)),
    (TWO, "T 32–80"): ((28.325, 30.171), (28.313, 30.138)),
    (TWO, "T 901–14107"): ((21.610, 11.043), (20.243, 8.298)),
    (TWO, "T ≤ 901"): ((28.745, 30.096), (28.612, 29.981)),
    (TWO, "T > 10,000"): ((15.800, 4.965), (15.800, 4.963)),
    (FOUR, "T ≤ 80"): ((19.417, 25.828, 24.871, 32.795), (19.204, 25.606, 24.427, 32.637)),
    (FOUR, "T ≥ 901"): ((8.503, 9.960, 11.050, 11.803), (6.303, 7.260, 8.166, 8.435)),
    (FOUR, "T 1–16"): ((17.054, 24.642, 22.420, 35.616), (16.901, 24.442, 21.712, 35.596)),
    (FOUR, "T 32–80"): ((20.491, 26.367, 25.985, 31.513), (20.352, 26.153, 25.771, 31.375)),
    (FOUR, "T 901–14107"): ((8.503, 9.960, 11.050, 11.803), (6.303, 7.260, 8.166, 8.435)),
    (FOUR, "T ≤ 901"): ((19.337, 25.569, 24.791, 32.381), (19.134, 25.338, 24.373, 32.185)),
    (FOUR, "T > 10,000"): ((3.725, 4.230, 4.815, 4.830), (3.723, 4.227, 4.812, 4.827)),
}


@pytest.mark.parametrize(("report", "regime"), REGIMES)
def test_regimes(sections, report, regime):
    names = published.PAIR if report == TWO else published.QUARTET
    spreads = {c.name: c.regimes[regime] for c in sections[report].contenders}
    arithmetic, geometric = REGIMES[report, regime]
    assert [spreads[name].arithmetic for name in names] == pytest.approx(arithmetic, abs=6e-4)
    assert [spreads[name].geometric for name in names] == pytest.approx(geometric, abs=6e-4)


# first, second: (geometric mean, mean of ratios, ratio of means, low at T, high at T, won, lost, tied)
PAIRS = {
    (TWO, FLASHINFER, TRITON2): (1.083, 1.196, 0.997, (0.831, 1), (3.293, 11948), 5, 14, 0),
    (FOUR, TRITON2, SGLANG2): (1.256, 1.278, 1.264, (0.870, 52), (1.956, 62), 18, 1, 0),
    (FOUR, TRITON2, TRITON1): (1.283, 1.314, 1.299, (1.000, 14107), (2.065, 7), 18, 0, 1),
    (FOUR, TRITON2, SGLANG1): (1.637, 1.675, 1.666, (1.167, 52), (2.564, 15), 19, 0, 0),
    (FOUR, SGLANG2, TRITON1): (1.021, 1.037, 1.028, (0.800, 1), (1.524, 52), 9, 9, 1),
    (FOUR, SGLANG2, SGLANG1): (1.303, 1.316, 1.318, (0.953, 62), (1.933, 15), 18, 1, 0),
    (FOUR, TRITON1, SGLANG1): (1.276, 1.290, 1.282, (0.881, 52), (1.701, 32), 17, 2, 0),
}


@pytest.mark.parametrize("key", PAIRS)
def test_pairs(sections, key):
    report, first, second = key
    pair = next(p for p in sections[report].pairs if (p.first, p.second) == (first, second))
    geometric, arithmetic, of_averages, low, high, *counts = PAIRS[key]
    assert (pair.geometric, pair.arithmetic, pair.of_averages) == pytest.approx((geometric, arithmetic, of_averages), abs=6e-4)
    assert (pair.low, pair.high) == pytest.approx((low[0], high[0]), abs=6e-4)
    assert (pair.low_at, pair.high_at) == (low[1], high[1])
    assert [pair.wins, pair.losses, pair.ties] == counts
    assert pair.count == 19 and pair.overall is None


def test_leaders(sections):
    decode = {"T ≤ 80", "T 1–16", "T 32–80", "T ≤ 901"}
    for regime, leader in sections[TWO].leaders.items():
        assert leader == (TRITON2 if regime in decode else FLASHINFER), regime
    assert set(sections[FOUR].leaders.values()) == {TRITON2}


def test_cliffs(sections):
    cliffs = {(c.solution, c.tokens, c.next_tokens): c for c in sections[TWO].cliffs}
    assert set(cliffs) == {(FLASHINFER, 901, 11948), (TRITON2, 901, 11948)}
    assert cliffs[FLASHINFER, 901, 11948].kept == pytest.approx(0.478, abs=1e-3)
    assert cliffs[FLASHINFER, 901, 11948].against == []
    assert cliffs[TRITON2, 901, 11948].against == [FLASHINFER]
    assert {(c.tokens, c.next_tokens) for c in sections[FOUR].cliffs} == {(901, 11948)}
    assert len(sections[FOUR].cliffs) == 4 and not any(c.against for c in sections[FOUR].cliffs)


def test_conclusions(sections):
    two, four = sections[TWO].conclusion, sections[FOUR].conclusion
    assert [s.choice for s in two.scenarios] == [TRITON2, FLASHINFER, FLASHINFER]
    assert [s.lead for s in two.scenarios] == pytest.approx([1.077, 2.848, 2.072], abs=1e-3)
    assert all(s.clear for s in two.scenarios)
    assert (two.dispatcher.below, two.dispatcher.above) == (TRITON2, FLASHINFER)
    assert (two.dispatcher.last_below, two.dispatcher.first_above) == (80, 901)
    assert (two.dispatcher.gain, two.dispatcher.bound) == pytest.approx((1.02978, 1.03416), abs=1e-5)
    assert [s.choice for s in four.scenarios] == [TRITON2] * 3
    assert [s.clear for s in four.scenarios] == [True, False, True]  # prefill: triton v1 within 1.1 %
    assert four.dispatcher.gain == pytest.approx(1.0)


WRONG = {
    "averages, T 1–16",
    "averages, T 32–80",
    "… by 5 to 20 %",
    "triton v2 relative to flashinfer_moe at T = 80, 901, 11948, 14107",
    "… where they had 30.37 and 29.50: the ranking is the same",
    "… since flashinfer_moe has no cliff",
    "… range against sglang v1",
    "… range against sglang v2",
    "triton v2 wins all 19 workloads, with one tie",
    "preallocating buffers (triton v2 over v1), T 1–32",
}


def test_claims(sections):
    judged = {}
    for claims, report in ((published.claims_two_way(), TWO), (published.claims_four_way(), FOUR)):
        judged |= {claim.text: published.judge(claim, sections[report])[1] for claim in claims}
    assert {text for text, verdict in judged.items() if verdict == published.WRONG} == WRONG


def test_committed_documents_are_current(tmp_path):
    published.write(DATA, tmp_path, ("md",))
    assert (tmp_path / "published-reports.md").read_text() == (ROOT / "docs" / "published-reports.md").read_text()
    for name in (TWO, FOUR):
        fresh = (tmp_path / "published" / name / "report.md").read_text().splitlines()
        committed = (ROOT / "docs" / "published" / name / "report.md").read_text().splitlines()
        assert [line for line in fresh if line] == [line for line in committed if line and not line.startswith("![")]
