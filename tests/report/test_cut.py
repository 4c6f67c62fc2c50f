"""Reports of some of the solutions that a session measured."""

import pytest
from make import SIZES, folder, run, trace

from blockmoe.report import api
from blockmoe.report.load import ReportError

ABOUT = {
    "contenders": [{"name": name, "description": name} for name in ("alpha", "beta", "gamma")],
    "skipped": [{"solution": "only_elsewhere", "reason": "needs sm_100"}, {"solution": "other", "reason": "needs a package"}],
}


@pytest.fixture
def results(tmp_path):
    return folder(tmp_path / "all", run({"alpha": 1.0, "beta": 1.2, "gamma": 3.0}), ABOUT)


def test_the_cut_ranks_and_compares_what_is_left(results):
    report = api.read([results], solutions=["beta", "gam*", "only_elsewhere"])
    found = report.sections[0]
    assert found.names == ["beta", "gamma"]
    assert [contender.wins for contender in found.contenders] == [len(SIZES), 0]
    assert [(pair.first, pair.second) for pair in found.pairs] == [("beta", "gamma")]
    assert [item["solution"] for item in found.skipped] == ["only_elsewhere"]
    assert [item["name"] for item in report.runs[0]["contenders"]] == ["beta", "gamma"]
    assert found.rows[0].reference_latency == pytest.approx(20, rel=0.01)


def test_the_report_says_what_it_leaves_out(results, tmp_path):
    api.write([results], tmp_path / "out", ["md", "html"], solutions=["beta", "gamma"])
    told = "Cut to 2 of 3 solutions. Left out of this report, measured in the same interleaved session: alpha"
    assert told in (tmp_path / "out" / "report.md").read_text()
    assert told in (tmp_path / "out" / "report.html").read_text()
    assert not api.read([results], solutions=["*"]).notes


def test_another_run_is_not_the_same_session(tmp_path):
    apart = folder(tmp_path / "a", run({"alpha": 1.0}, run="r1") + [trace("beta", tokens, 2.0, run="r2") for tokens in SIZES])
    assert api.read([apart], solutions=["beta"]).notes[-1].endswith("measured apart: alpha")
    partly = folder(tmp_path / "b", run({"alpha": 1.0, "beta": 2.0}) + [trace("beta", 1, 2.0, run="r2", timestamp="2026-12-01T00:00:00")])
    assert "in part in the same interleaved session" in api.read([partly], solutions=["beta"]).notes[-1]


def test_a_name_that_matches_nothing_is_refused(results):
    with pytest.raises(ReportError, match="--solutions delta: no such solution here, only alpha, beta, gamma, only_elsewhere, other"):
        api.read([results], solutions=["beta", "delta"])


def test_runs_that_share_no_workload_leave_samples_paired(tmp_path):
    few, many = [size for size in SIZES if size <= 80], [size for size in SIZES if size > 80]
    for sizes, name in ((few, "r1"), (many, "r2")):
        folder(tmp_path / name, run({"alpha": 1.0, "beta": 1.2}, sizes, run=name), {"command": f"blockmoe run {name}"})
    report = api.read([tmp_path])
    assert [record["command"] for record in report.runs] == ["blockmoe run r1", "blockmoe run r2"]
    assert any(doubt.startswith("Traces of 2 runs, each workload of one") for doubt in report.sections[0].doubts)
    assert {row.duel.word for row in report.sections[0].rows} == {"FASTER"}
