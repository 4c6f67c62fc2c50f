"""Two runs joined: what moved, what changed around it, and the threshold for CI."""

import io
import json
import re

import pytest
from make import DEFINITION, GPU, SIZES, failed, folder, plain, run, trace
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from blockmoe.report import ReportError, api
from blockmoe.report.commands import register
from blockmoe.report.compare import compare, parse_threshold, tables

app = Typer()
register(app)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def of(comparison, solution):
    (ratio,) = [ratio for group, ratio in comparison.solutions.items() if group.solution == solution]
    return ratio


@pytest.fixture
def runs(tmp_path):
    old = folder(tmp_path / "old", run({"alpha": 1.0, "beta": 2.0, "gone": 3.0}, seed=1, run="r1"))
    new = folder(tmp_path / "new", run({"alpha": 1.0, "beta": 2.2, "new": 3.0}, seed=2, run="r2"))
    return old, new


def test_words(runs):
    found = compare(*runs)
    assert found.measure == "latency"
    assert of(found, "alpha").word == "SAME"
    assert of(found, "beta").word == "SLOWER"
    assert of(found, "beta").ratio == pytest.approx(1 / 1.1, rel=0.005)
    assert {move.before.solution for move in found.moves if move.moved} == {"beta"}
    assert (found.only_first, found.only_second) == ({"gone": 6}, {"new": 6})
    assert list(found.agreement.values()) == [1.0]


def test_threshold(runs):
    assert len(compare(*runs, fail_slower=0.03, allow_missing=True).failures) == 6
    assert compare(*runs, fail_slower=0.2, allow_missing=True).failures == []
    assert compare(runs[1], runs[0], fail_slower=0.03, allow_missing=True).failures == []  # faster is no failure


def test_what_is_missing_is_a_failure(tmp_path):
    """Where it passed before; the reference is no solution."""
    old = folder(tmp_path / "old", run({"alpha": 1.0, "beta": 1.0}, sizes=[1, 16, 80]) + [failed("beta", 901)])
    new = folder(tmp_path / "new", run({"beta": 1.0}, sizes=[1], seed=2))
    missing = [f"{name}: {number} evaluation(s) that passed before are missing" for name, number in (("alpha", 3), ("beta", 2))]
    assert compare(old, new, fail_slower=0.03).failures == missing
    assert not compare(old, new).failed
    assert invoke("compare", old, new, "--fail-slower", "3%").exit_code == 1
    assert invoke("compare", old, new, "--fail-slower", "3%", "--allow-missing").exit_code == 0
    assert invoke("compare", old, new, "--allow-missing").exit_code == 2


def test_noise_is_no_failure(tmp_path):
    old = folder(tmp_path / "old", [trace("alpha", 1, noise=0.3, blocks=3, seed=1)])
    new = folder(tmp_path / "new", [trace("alpha", 1, 1.1, noise=0.3, blocks=3, seed=2)])
    assert not compare(old, new, fail_slower=0.01).failed


@pytest.mark.parametrize("by", ["latency", "speedup"])
def test_one_block_is_no_failure(tmp_path, by):
    """It has no interval, so nobody knows whether a difference is noise; without samples at all the ratio decides."""
    old, new = folder(tmp_path / "old", [trace("alpha", 1, blocks=1)]), folder(tmp_path / "new", [trace("alpha", 1, 1.3, blocks=1)])
    for file in tmp_path.rglob("*.jsonl"):
        file.write_text(file.read_text().replace('"speedup_interval"', '"none"'))
    found = compare(old, new, fail_slower=0.03, by=by)
    assert not found.failed and found.moves[0].moved
    assert any(note.startswith("1 of them have samples but no interval") for note in tables(found)[0].notes)


def test_without_samples(tmp_path):
    old = folder(tmp_path / "old", [plain("alpha", 1, 1.0), plain("alpha", 16, 1.0)])
    new = folder(tmp_path / "new", [plain("alpha", 1, 1.1), plain("alpha", 16, 1.0)])
    found = compare(old, new, fail_slower=0.03)
    assert of(found, "alpha").low is None
    assert found.failures == ["alpha at T = 1: 10.0% slower"]


def test_now_failing(tmp_path):
    old, new = folder(tmp_path / "old", [trace("alpha", 1)]), folder(tmp_path / "new", [failed("alpha", 1, "TIMEOUT")])
    assert compare(old, new, fail_slower=0.5).failures == ["alpha at T = 1: TIMEOUT"]
    assert any("passes now" in note for note in tables(compare(new, old))[0].notes)


def test_speedups_cancel_the_machine(tmp_path):
    old = folder(tmp_path / "old", run({"alpha": 1.0}, seed=1))
    new = folder(tmp_path / "new", run({"alpha": 1.2}, reference=24.0, seed=2))
    assert of(compare(old, new), "alpha").word == "SLOWER"
    assert of(compare(old, new, by="speedup"), "alpha").word == "SAME"


def test_what_changed(tmp_path):
    first, second = trace("alpha", 1), trace("alpha", 1)
    first["evaluation"]["extra"]["solution_digest"] = "aaaa"
    second["evaluation"]["extra"]["solution_digest"] = "bbbb"
    second["evaluation"]["environment"]["libs"]["torch"] = "2.12.0"
    second["evaluation"]["environment"]["hardware"] = "NVIDIA H200"
    found = compare(folder(tmp_path / "a", [first]), folder(tmp_path / "b", [second]))
    assert "hardware: NVIDIA H100 80GB HBM3 → NVIDIA H200" in found.changes
    assert "torch: 2.11.0 → 2.12.0" in found.changes
    assert "sources of alpha" in found.changes
    assert any("different hardware" in note for note in found.notes)


def fresh(traces: list[dict], trials: list) -> list[dict]:
    """As with --fresh-processes: the second trial's process takes 5 % longer."""
    for one in traces:
        one["evaluation"]["extra"]["settings"]["fresh_processes"] = True
        extra = one["evaluation"]["performance"]["extra"]
        extra["samples_ms"] = [[1.05 * t if n >= 6 else t for t in block] for n, block in enumerate(extra["samples_ms"])]
        extra["block_trial"] = trials
    return traces


def test_what_processes_differ_by_widens_a_comparison(tmp_path):
    """With one side fresh too; and the switch is said to have changed, from what it was before it existed."""
    old, new = folder(tmp_path / "old", run({"alpha": 1.0})), folder(tmp_path / "new", run({"alpha": 1.03}, run="r2"))
    fresh_new = folder(tmp_path / "fresh", fresh(run({"alpha": 1.03}, run="r2"), [0] * 6 + [1] * 6))
    assert of(compare(old, new), "alpha").word == "SLOWER"
    found = compare(old, fresh_new)
    assert of(found, "alpha").word == "UNCLEAR"
    assert "fresh_processes: False → True" in found.changes


@pytest.mark.parametrize("trials", [[10**30] * 12, [0, True] * 6, ["0"] * 12, [0] * 11, {"0": 1}, [-1] * 12])
def test_processes_that_are_none_are_passed_over(trials, tmp_path):
    old, new = folder(tmp_path / "old", run({"alpha": 1.0})), folder(tmp_path / "new", fresh(run({"alpha": 1.0}, run="r2"), trials))
    assert of(compare(old, new), "alpha").low


@pytest.mark.parametrize("change", ["definition", "hardware"])
def test_nothing_is_averaged_across_definitions_and_hardware(tmp_path, change):
    """Twice as fast on one and half as fast on the other is not the same."""
    other = {change: "other"}
    old = folder(tmp_path / "old", run({"alpha": 1.0}, [1, 16]) + run({"alpha": 1.0}, [1, 16], **other))
    new = folder(tmp_path / "new", run({"alpha": 0.5}, [1, 16], seed=3) + run({"alpha": 2.0}, [1, 16], seed=3, **other))
    found = compare(old, new, fail_slower=0.03)
    words = {getattr(group, change): ratio.word for group, ratio in found.solutions.items() if group.solution == "alpha"}
    assert words == {GPU if change == "hardware" else DEFINITION: "FASTER", "other": "SLOWER"}
    assert [failure.partition(":")[0] for failure in found.failures] == ["alpha at T = 1, other", "alpha at T = 16, other"]
    for table in tables(found):
        assert table.columns[1] == change and {row[1].text for row in table.rows} >= {"other"}


def test_nothing_in_common(tmp_path):
    with pytest.raises(ReportError, match="is in both"):
        compare(folder(tmp_path / "a", [trace("alpha")]), folder(tmp_path / "b", [trace("beta")]))


def test_thresholds():
    assert parse_threshold("3%") == parse_threshold("0.03") == parse_threshold(" 3 %") == pytest.approx(0.03)
    for bad in ("", "fast", "-1%", "300%", "nan"):
        with pytest.raises(ReportError):
            parse_threshold(bad)


def test_exit_codes(runs, tmp_path):
    old, new = runs
    assert invoke("compare", old, new).exit_code == 0
    result = invoke("compare", old, new, "--fail-slower", "3%")
    assert result.exit_code == 1 and "over the threshold: beta at T = 1" in result.output
    result = invoke("compare", old, tmp_path / "nothing")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert invoke("compare", old, new, "--fail-slower", "much").exit_code == 2


def test_commands(runs, tmp_path):
    old, new = runs
    result = invoke("report", new, "--against", old, "--format", "md,csv,json", "--output", tmp_path / "out")
    assert result.exit_code == 0 and len(result.output.split()) == 3
    text = (tmp_path / "out" / "report.md").read_text()
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["verdict"] for row in document["against"][1]["rows"]] == ["SLOWER"] * 6
    assert "What moved" in text and "Kendall's tau" in text
    assert "alpha" in invoke("best", old).output
    assert "block 12" in invoke("show", old, "--workload", "1", "--solution", "alpha").output
    line = next((old / "traces").rglob("*.jsonl"))
    assert "alpha" in invoke("show", f"{line}:2").output
    assert "no such file or folder" in invoke("show", f"{line}:²").stderr
    result = invoke("show", f"{line}:9999")
    assert result.exit_code == 2 and "expected the line of an evaluation" in result.stderr
    invoke("report", new, "--against", old, "--format", "md", "--solutions", "alpha", "--output", tmp_path / "one")
    assert "`beta`" not in (text := (tmp_path / "one" / "report.md").read_text()).partition("What moved")[2] and "What moved" in text
    assert invoke("report", tmp_path / "none").exit_code == 2


def test_lines_that_are_left_out_are_told_beside_winners_and_traces(tmp_path):
    some = folder(tmp_path, [*run({"alpha": 1.0}), "{broken"])
    note = "1 malformed line(s) left out"
    for command in (["best", some], ["show", some, "--workload", "1"]):
        result = invoke(*command)
        assert result.exit_code == 0 and note in result.stderr and note not in result.stdout and "alpha" in result.stdout
    result = invoke("show", some, "--workload", "5")
    assert result.exit_code == 2 and note in result.stderr
    assert "no trace of workload 5, solution any; solutions: alpha, reference; T: 1, " in result.stderr


def test_names_stay_whole_in_a_pipe_and_readable_in_a_narrow_terminal(tmp_path, monkeypatch):
    name = "a_solution_with_a_rather_long_name_v2"
    old, new = (folder(tmp_path / run_id, run({name: latency}, run=run_id)) for run_id, latency in (("r1", 1.0), ("r2", 1.1)))
    for columns, shown in ((None, name), (80, name[:16]), (40, name[:16])):
        monkeypatch.delenv("COLUMNS", raising=False) if columns is None else monkeypatch.setenv("COLUMNS", str(columns))
        for command in (["compare", old, new], ["best", old]):
            lines = invoke(*command).output.splitlines()
            assert sum(line.startswith(shown) for line in lines) >= (len(SIZES) if command[0] == "best" else 1 + len(SIZES))


def test_a_workload_without_a_size_has_its_name(tmp_path):
    """In the table of the best, in doubts, failures, pictures and what is over the threshold."""
    old, new = (run({"alpha": latency, "beta": 1.005}, [16], run=run_id) for latency, run_id in ((1.0, "r1"), (1.5, "r2")))
    for line in old + new:
        line["workload"] = {"axes": {}, "inputs": {}, "uuid": "the only one"}
        line["evaluation"]["performance"]["extra"] |= {"drift": {"change": 0.1, "drifted": True}, "stages_ms": {"route": 1.0}}
    new.append(failed("gamma", message="broke") | {"workload": new[0]["workload"]})
    old, new = folder(tmp_path / "old", old), folder(tmp_path / "new", new)
    found = invoke("compare", old, new, "--fail-slower", "3%").output, invoke("best", new).output
    assert "over the threshold: alpha at the only one: " in found[0] and re.search("^beta +the only one +– ", found[1], re.MULTILINE)
    (written,) = api.write([new], formats=["html"])
    console = Console(file=io.StringIO(), width=200)
    console.print(api.terminal_table([new]))
    said = console.file.getvalue()
    assert " at the only one by +10.0%" in said and "gamma, the only one: RUNTIME_ERROR" in said
    assert "alpha, the only one (" in written.read_text()
    assert not any("T = None" in text or " None " in text for text in (*found, said, written.read_text()))


def test_show_shows_what_was_asked_for(tmp_path):
    """A T before what a uuid begins with, of which it takes four characters; and a line that a later one has superseded."""
    traces = [trace("alpha", tokens, 1.0) for tokens in (7, 54)] + [trace("alpha", 7, 2.0, timestamp="2026-12-01T00:00:00")]
    traces[1]["workload"]["uuid"] = "7abc1234"
    folder(tmp_path, traces)
    shown = {asked: invoke("show", tmp_path, "--workload", asked) for asked in ("7", "7a", "7abc")}
    assert "seq_len 7" in shown["7"].output and "seq_len 54" not in shown["7"].output
    assert shown["7a"].exit_code == 2 and "seq_len 54" in shown["7abc"].output
    line = next((tmp_path / "traces").rglob("*.jsonl"))
    assert f"{line.name}:1" in invoke("show", f"{line}:1").output


def test_show_finds_a_size_whoever_was_measured_at_it(tmp_path):
    """That the solution has no such T is no reason to take the number for a uuid's beginning."""
    traces = [trace("alpha", 1000, 1.0), trace("beta", 5, 1.0)]
    traces[1]["workload"]["uuid"] = "1000abcd"
    folder(tmp_path, traces)
    assert invoke("show", tmp_path, "--workload", "1000", "--solution", "beta").exit_code == 2
    assert "seq_len 5" in invoke("show", tmp_path, "--workload", "1000a").output


def test_import_csv(tmp_path):
    source = tmp_path / "table.csv"
    source.write_text("seq_len,local_expert_offset,alpha,beta\n1,32,10,12\n80,0,11,\n")
    assert invoke("import-csv", source, tmp_path / "run").exit_code == 0
    result = invoke("report", tmp_path / "run", "--format", "md")
    text = (tmp_path / "run" / "report.md").read_text()
    assert result.exit_code == 0 and "Latency" not in text and "**12.00x**" in text and "Errors" not in text
    said = invoke("best", tmp_path / "run", "--max-relative-l2", "0.5").output  # a table of speedups knows no errors
    assert said == "no solution that passed is known to have a relative L2 error of at most 0.5\n"
    for bad in ("", "seq_len\n1\n", "alpha\n1\n", "seq_len,alpha\n1,fast\n", "seq_len,alpha\n1,-2\n", "seq_len,alpha\n1,2,3\n"):
        source.write_text(bad)
        result = invoke("import-csv", source, tmp_path / "other")
        assert result.exit_code == 2 and "Traceback" not in result.output and not (tmp_path / "other").exists()
    assert invoke("import-csv", tmp_path / "none.csv", tmp_path / "other").exit_code == 2


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("seq_len,a,a\n1,2,3\n", "expected columns of different names, got 'a' 2 times"),
        ("seq_len, a,b ,a\n1,2,3,4\n", "expected columns of different names, got 'a' 2 times"),
        ("seq_len,a\n\n1,2\n\n80,fast\n", "line 5: a: expected a positive number, got 'fast'"),
        ("seq_len,a\n80.7,2\n", "line 2: seq_len: expected a whole number, got '80.7'"),
        ("seq_len,a\n80,2\n80,3\n", "line 3: expected a workload a line, got T80 again"),
        ("seq_len,a\n80,\n", "expected at least one speedup, got empty cells"),
    ],
)
def test_import_csv_of_what_is_no_table(tmp_path, table, said):
    (tmp_path / "t.csv").write_text(table)
    result = invoke("import-csv", tmp_path / "t.csv", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "out").exists()


def test_import_csv_destroys_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("seq_len,a\n80,2\n")
    measured = folder(tmp_path / "run", run({"alpha": 1.0}))
    before = {path: path.read_bytes() for path in measured.rglob("*.json*")}
    result = invoke("import-csv", tmp_path / "t.csv", measured)
    assert result.exit_code == 2 and "expected a new folder or that of an earlier import" in result.stderr
    assert {path: path.read_bytes() for path in measured.rglob("*.json*")} == before
    assert invoke("import-csv", tmp_path / "t.csv", tmp_path / "out", "--definition", "../x").exit_code == 2
    assert [invoke("import-csv", tmp_path / "t.csv", tmp_path / "out").exit_code for _ in range(2)] == [0, 0]


def test_a_full_disk_leaves_no_torso(tmp_path, most_bytes_a_file):
    """A table can be imported again afterwards, and an earlier report stays."""
    (tmp_path / "t.csv").write_text("seq_len,a\n" + "".join(f"{tokens},2\n" for tokens in range(1, 40)))
    out = tmp_path / "out"
    with most_bytes_a_file(1000):
        assert invoke("import-csv", tmp_path / "t.csv", out).exit_code == 2
    assert invoke("import-csv", tmp_path / "t.csv", out).exit_code == 0 and invoke("report", out).exit_code == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with most_bytes_a_file(1000):
        assert invoke("report", out).exit_code == 2
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
