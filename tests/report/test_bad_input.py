"""Whatever stands in a result folder, a report says so in words and never breaks."""

import io
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make import DEFINITION, failed, folder, plain, run, trace
from rich.console import Console

from blockmoe.report import ReportError, api
from blockmoe.report.load import load

FORMATS = ("md", "html", "csv", "json")


def rendered(*paths) -> str:
    """Everything that a user may see of these folders, as one text; every format is written on the way."""
    texts = [path.read_text(encoding="utf-8") for path in api.write(list(paths), paths[0] / "out", FORMATS)]
    console = Console(file=io.StringIO(), width=80)
    console.print(api.terminal_table(list(paths)))
    return "\n".join([*texts, console.file.getvalue()])


def test_empty_folder(tmp_path):
    with pytest.raises(ReportError, match="no evaluated traces found"):
        api.write([tmp_path])


def test_missing_folder(tmp_path):
    with pytest.raises(ReportError, match="no such file or folder"):
        api.write([tmp_path / "nowhere"])


def test_workloads_only(tmp_path):
    line = {key: value for key, value in trace().items() if key in ("definition", "workload")}
    with pytest.raises(ReportError, match="no evaluated traces"):
        api.write([folder(tmp_path, [line | {"solution": None, "evaluation": None}])])


def test_only_skipped(tmp_path):
    about = {"skipped": [{"solution": "alpha", "definition": DEFINITION, "reason": "needs SM100"}]}
    (tmp_path / "run.json").write_text(json.dumps(about))
    for text in (rendered(tmp_path), *((tmp_path / "out" / f"report.{name}").read_text() for name in ("md", "html"))):
        assert "no contender was evaluated" in text and "alpha: SKIPPED, needs SM100" in text


def test_skipped_of_a_definition_that_has_no_evaluations(tmp_path):
    about = {"skipped": [{"solution": "gone", "definition": "other", "reason": None}, {"solution": "odd", "definition": ["no name"]}]}
    assert api.read([folder(tmp_path, run({"alpha": 1.0}), about)]).notes == [
        "gone: SKIPPED, no reason given",
        "odd: SKIPPED, no reason given",
    ]


def test_one_solution(tmp_path):
    assert "Only one solution" in rendered(folder(tmp_path, run({"alpha": 1.0})))


def test_reference_only(tmp_path):
    assert "Only the reference was evaluated" in rendered(folder(tmp_path, run({})))


def test_all_failed(tmp_path):
    text = rendered(folder(tmp_path, [failed("alpha", 1), failed("beta", 1, "TIMEOUT", "after 60 s")]))
    assert "No solution passed any workload" in text and "TIMEOUT" in text and "after 60 s" in text


def test_definitions_and_gpus_mixed(tmp_path):
    traces = run({"alpha": 1.0}) + run({"alpha": 2.0}, hardware="NVIDIA H200") + run({"alpha": 1.0}, definition="other")
    text = rendered(folder(tmp_path, traces))
    assert "2 definitions: nothing is averaged across them" in text
    assert "several kinds of hardware (NVIDIA H100 80GB HBM3, NVIDIA H200)" in text


def test_missing_workloads(tmp_path):
    traces = run({"alpha": 1.0}) + [trace("beta", tokens, 0.5) for tokens in (1, 16, 80)] + [trace("gamma", 1, 0.1)]
    found = api.read([folder(tmp_path, traces)]).sections[0]
    assert {c.name: (c.overall.count, c.rank) for c in found.contenders} == {"alpha": (6, 2), "beta": (3, 1), "gamma": (1, None)}
    assert found.shared == 3
    text = rendered(tmp_path)
    assert "beta passed 3 of 6 workloads" in text and "gamma passed 1 of 6 workloads: its averages are over these; it is not" in text


def test_no_workload_in_common(tmp_path):
    assert "nothing is ranked" in rendered(folder(tmp_path, [trace("alpha", 1), trace("beta", 16)]))


def test_trace_from_the_future(tmp_path):
    future = trace("alpha", 1)
    future["evaluation"]["status"] = "PASSED_WITH_HONOURS"
    future["evaluation"]["performance"]["latency_ms"] = {"p50": 1}
    future["quantum"] = [1, {"deep": None}]
    text = rendered(folder(tmp_path, [future, trace("alpha", 16)]))
    assert "PASSED_WITH_HONOURS" in text


@pytest.mark.parametrize("value", [math.nan, "NaN", math.inf, 0, -1, None, "fast", [], True])
def test_unusable_speedup(tmp_path, value):
    odd = trace("alpha", 1)
    odd["evaluation"]["performance"].update(speedup_factor=value, latency_ms=value)
    text = rendered(folder(tmp_path, [odd, trace("beta", 1)]))
    assert "alpha: 1 passed evaluation(s) without a usable speedup" in text


def test_speedup_from_latencies(tmp_path):
    odd = trace("alpha", 1, latency=2.0, noise=0, reference=20.0)
    odd["evaluation"]["performance"]["speedup_factor"] = math.nan
    assert load([folder(tmp_path, [odd])]).records[0].speedup == pytest.approx(10)


def test_corrupt_lines(tmp_path):
    text = rendered(folder(tmp_path, ["{not json", trace("alpha", 1), "[]", '"text"', "null", "12", "[" * 5000]))
    assert "6 malformed line(s) left out (line 1:" in text


def test_not_text(tmp_path):
    folder(tmp_path, [trace()])
    (tmp_path / "traces" / "blob.jsonl").write_bytes(bytes(range(256)))
    assert "malformed" in rendered(tmp_path)


@pytest.mark.parametrize("about", ["", "{", "[]", '{"contenders": 3, "skipped": {"a": 1}, "command": {}, "settings": []}'])
def test_bad_run_json(tmp_path, about):
    assert "alpha" in rendered(folder(tmp_path, run({"alpha": 1.0}), about))


def test_latest_evaluation_counts(tmp_path):
    traces = [trace(latency=1.0, timestamp="2026-11-21T20:00:00Z"), trace(latency=5.0, timestamp="2026-11-20T20:00:00+00:00")]
    loaded = load([folder(tmp_path, traces)])
    assert loaded.records[0].latency == pytest.approx(1.0, rel=0.01)
    assert loaded.notes == ["1 older evaluation(s) of the same workload and solution left out: the latest counts"]


def test_a_file_counts_once(tmp_path):
    """However it is named, and if one of the paths holds another."""
    run_folder = folder(tmp_path / "run", run({"alpha": 1.0}), {"command": "blockmoe run"})
    (tmp_path / "link").symlink_to(run_folder)
    traces = next(run_folder.rglob("*.jsonl"))
    loaded = load([run_folder, tmp_path / "run" / "..", run_folder / "traces", traces, tmp_path / "link"])
    assert (loaded.notes, len(loaded.runs), len(loaded.records)) == ([], 1, len(load([traces]).records))


def test_flashinfer_bench_traces(tmp_path):
    traces = [plain(name, tokens, latency) for tokens in (1, 80) for name, latency in (("alpha", 1.0), ("beta", 1.2))]
    text = rendered(folder(tmp_path, traces))
    assert "no interval and no verdict word" in text and "FASTER" not in text


def test_half_a_surrogate_pair(tmp_path):
    assert "al?pha" in rendered(folder(tmp_path, [trace("al\ud800pha", 1)]))


def test_names_are_escaped(tmp_path):
    nasty = "<script>alert(1)</script>|**`x"
    folder(tmp_path, [trace(nasty, 1), trace("beta", 1)])
    api.write([tmp_path], tmp_path, FORMATS)
    html = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in html
    outside_code = re.sub(r"`[^`]*`", "", (tmp_path / "report.md").read_text())
    assert "<script>" not in outside_code and "script>alert(1)&lt;/script>\\|" in outside_code


@pytest.mark.parametrize("nasty", ["<img src=x>", "x[/fp8]", "moe[v2]", "a$x_$b", "**b**|_c_"])
def test_names_stay_what_they_are(tmp_path, nasty):
    """As a winner, a runner-up, a failure, and in every place that takes markup for itself."""
    folder(tmp_path, run({"alpha": 1.0, nasty: 1.2, "gamma": 1.4}, noise=0.001) + [failed(f"{nasty} too", 16)])
    text = rendered(tmp_path)
    assert nasty.replace("<", "&lt;") in text and "<img" not in re.sub(r"`[^`]*`", "", (tmp_path / "out" / "report.md").read_text())
    console = Console(file=io.StringIO(), width=200)
    console.print(api.terminal_table([tmp_path]))
    assert f"{nasty} " in console.file.getvalue() and f"{nasty} too" in console.file.getvalue()
    api.write([tmp_path], tmp_path / "pictures", ["svg", "png"])
    only = api.read([tmp_path], solutions=[nasty])
    assert only.sections[0].names == [nasty]


def test_asterisks_are_not_bold(tmp_path):
    latencies = {"x**y": lambda t: 0.1 if t < 1000 else 10.0, "z**": lambda t: 0.2 if t < 1000 else 2.0}
    text = rendered(folder(tmp_path, run(latencies)))
    assert "<b>dispatcher</b>: <code>x**y</code> up to" in text and "<code>z**</code> from" in text
    assert "decode: x**y (" in text and "prefill: z** (" in text  # in the terminal, where the phase is marked by nothing


def test_names_of_settings_and_libraries_are_escaped(tmp_path):
    odd = trace("alpha", 16)
    odd["evaluation"]["environment"]["libs"] = {"<img src=x>": "1"}
    folder(tmp_path, [odd, trace("beta", 16)], {"settings": {"<img src=y>": 1}, "started": "<img src=z>"})
    (path,) = api.write([tmp_path], formats=["md"], mix="<img>:1-80=1")
    assert "<img" not in path.read_text() and path.read_text().count("&lt;img") == 4


@pytest.mark.parametrize("tokens", [-5, 10**30, 1 << 60])
def test_no_number_of_tokens(tmp_path, tokens):
    odd = trace("alpha", 16, 1.0)
    odd["workload"]["axes"]["seq_len"] = tokens
    folder(tmp_path, [trace("alpha", 1, 1.0), trace("beta", 1, 1.1), odd])
    api.write([tmp_path], tmp_path / "out", [*FORMATS, "svg"])
    report = api.read([tmp_path])
    assert sorted(str(row.tokens) for row in report.sections[0].rows) == ["1", "None"]
    assert report.notes == ["alpha: 1 evaluation(s) of a T below 0 or above 2**53, which counts as unknown"]


def test_work_beyond_all_numbers(tmp_path):
    odd = trace("alpha", 16)
    odd["evaluation"]["extra"]["pairs"] = 1e308
    odd["evaluation"]["performance"]["extra"].pop("flops")
    assert "1 malformed line(s) left out" in rendered(folder(tmp_path, [odd, trace("beta", 16)]))


def test_numbers_of_a_run_that_are_none(tmp_path):
    folder(tmp_path, run({"alpha": 1.0}), '{"settings": {"rtol": NaN}}')
    rendered(tmp_path)


def test_unwritable_output(tmp_path):
    folder(tmp_path, [trace()])
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="not writable"):
        api.write([tmp_path], tmp_path / "file", ["md"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["pdf"]}, "--format pdf: expected some of md"),
        ({"formats": []}, "--format"),
        ({"baseline": "gamma"}, "no such solution in these traces, which have alpha, beta$"),
        ({"baseline": "reference"}, "--baseline reference: every speedup is over it already; expected one of alpha, beta$"),
        ({"regimes": "warm"}, "--regimes warm: expected sizes, published or NAME:LOW-HIGH"),
        ({"regimes": "a:1-20,a:900-"}, "--regimes a:1-20,a:900-: expected a name of its own for each range, got 'a' again"),
        ({"regimes": "all:1-20,b:900-"}, "expected a name of its own for each range, got 'all' again"),
        ({"regimes": "a:9-1"}, "begins above its end"),
        ({"mix": "decode"}, "expected PHASE=SHARE"),
        ({"mix": "dec=1"}, "--mix dec=1: expected decode, prefill, tiny, .* or a range of T"),
        ({"mix": "decode=0"}, "sum to 0"),
        ({"mix": "decode=nan"}, "expected PHASE=SHARE"),
    ],
)
def test_bad_options(tmp_path, options, message):
    folder(tmp_path, run({"alpha": 1.0, "beta": 2.0}))
    with pytest.raises(ReportError, match=message):
        api.write([tmp_path], **options)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PLACES = (
    ("definition",),
    ("workload",),
    ("workload", "axes"),
    ("workload", "uuid"),
    ("workload", "inputs"),
    ("solution",),
    ("evaluation",),
    ("evaluation", "status"),
    ("evaluation", "timestamp"),
    ("evaluation", "log"),
    ("evaluation", "environment"),
    ("evaluation", "environment", "libs"),
    ("evaluation", "environment", "extra"),
    ("evaluation", "correctness"),
    ("evaluation", "correctness", "extra"),
    ("evaluation", "performance"),
    ("evaluation", "performance", "latency_ms"),
    ("evaluation", "performance", "speedup_factor"),
    ("evaluation", "performance", "extra"),
    ("evaluation", "performance", "extra", "samples_ms"),
    ("evaluation", "performance", "extra", "speedup_interval"),
    ("evaluation", "performance", "extra", "floor_ms"),
    ("evaluation", "performance", "extra", "stages_ms"),
    ("evaluation", "performance", "extra", "drift"),
    ("evaluation", "extra"),
    ("evaluation", "extra", "settings"),
    ("evaluation", "extra", "pairs"),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=3))
def test_anything_in_any_field(tmp_path, places):
    odd = trace("alpha", 16, blocks=2)
    for path, value in places:
        parent = odd
        for key in path[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        if isinstance(parent, dict):
            parent[path[-1]] = value
    folder(tmp_path, [odd, trace("beta", 16, blocks=2), trace("alpha", 80, blocks=2)])
    api.write([tmp_path], tmp_path / "out", ("md", "csv", "json"))
    json.loads((tmp_path / "out" / "report.json").read_text())
    Console(file=io.StringIO(), width=80).print(api.terminal_table([tmp_path]))
