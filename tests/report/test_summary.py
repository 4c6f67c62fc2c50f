"""Winners, words, cliffs and conclusions on runs whose answer is known."""

import io
import math

import pytest
from make import DEFINITION, GPU, SIZES, failed, folder, plain, run, trace
from rich.console import Console

from blockmoe.report import api, plots
from blockmoe.report.regimes import parse_mix, parse_regimes
from blockmoe.report.sentences import dispatcher_sentence
from blockmoe.report.tables import average_table, error_table, host_table, latency_table


def section(path, traces, **options):
    return api.read([folder(path, traces)], **options).sections[0]


def contender(found, name):
    return next(c for c in found.contenders if c.name == name)


def test_reference_is_the_scale(tmp_path):
    found = section(tmp_path, run({"slow": 40.0}))
    assert found.names == ["slow"]  # the reference would have won everywhere
    assert all(row.winners == ["slow"] for row in found.rows)
    assert found.rows[0].reference_latency == pytest.approx(20, rel=0.01)


def test_words_of_winners(tmp_path):
    found = section(tmp_path, run({"alpha": 1.0, "beta": 1.0, "gamma": 1.2}))
    assert {row.duel.word for row in found.rows} == {"SAME"}
    found = section(tmp_path / "b", run({"alpha": 1.0, "gamma": 1.2}))
    assert {row.duel.word for row in found.rows} == {"FASTER"}
    assert contender(found, "alpha").clear_wins == len(SIZES)
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.overall.word) == ("alpha", "gamma", "FASTER")
    assert pair.overall.low < 1.2 < pair.overall.high


def test_one_block_has_no_word(tmp_path):
    found = section(tmp_path, run({"alpha": 1.0, "beta": 2.0}, blocks=1))
    assert {row.duel.word for row in found.rows} == {"UNCLEAR"}
    assert all(row.winners == ["alpha"] for row in found.rows)


def test_different_runs_are_not_paired(tmp_path):
    traces = [trace("alpha", 1, 1.0, run="r1"), trace("beta", 1, 1.3, run="r2")]
    found = section(tmp_path, traces)
    assert found.rows[0].duel.word == "FASTER"
    assert any("2 runs" in doubt for doubt in found.doubts)


def test_rounds_are_not_paired(tmp_path):
    traces = [trace("alpha", 1, 1.0), trace("beta", 1, 1.3)]
    traces[1]["evaluation"]["extra"]["interleaved"] = False
    assert any("1 evaluations were not interleaved" in doubt for doubt in section(tmp_path, traces).doubts)


def test_cliff_of_its_own(tmp_path):
    found = section(tmp_path, run({"smooth": 1.0, "cliff": lambda t: 1.0 if t < 1000 else 8.0}))
    (cliff,) = found.cliffs
    assert (cliff.solution, cliff.tokens, cliff.next_tokens, cliff.against) == ("cliff", 901, 11948, ["smooth"])


def test_conclusion_and_dispatcher(tmp_path):
    latencies = {"decoder": lambda t: 0.1 if t < 1000 else 10.0, "prefiller": lambda t: 0.2 if t < 1000 else 2.0}
    conclusion = section(tmp_path, run(latencies)).conclusion
    decode, prefill, mixed = conclusion.scenarios
    assert (decode.choice, prefill.choice, mixed.choice) == ("decoder", "prefiller", "prefiller")
    assert decode.clear and decode.lead == pytest.approx(2, rel=0.01)
    dispatcher = conclusion.dispatcher
    assert (dispatcher.below, dispatcher.last_below, dispatcher.above, dispatcher.first_above) == (
        "decoder",
        901,
        "prefiller",
        11948,
    )
    assert dispatcher.bound == pytest.approx(dispatcher.gain)


def test_mix_decides(tmp_path):
    latencies = {"decoder": lambda t: 0.1 if t < 1000 else 10.0, "prefiller": lambda t: 0.2 if t < 1000 else 2.0}
    traces = run(latencies)
    assert section(tmp_path, traces, mix="decode=0.999,prefill=0.001").conclusion.scenarios[2].choice == "decoder"
    assert section(tmp_path, traces, mix="1-80=0.5,901-=0.5").conclusion.scenarios[2].choice == "prefiller"


def test_a_choice_is_not_clear_by_what_costs_little(tmp_path):
    """Where little of the time goes beta is slower beyond doubt; where most goes nobody can tell, and beta leads."""
    little = [trace("alpha", 901, 0.5, noise=0.003, seed=1), trace("beta", 901, 0.6, noise=0.003, seed=1)]
    most = [trace("alpha", 14107, 11.0, noise=0.15, seed=1), trace("beta", 14107, 10.0, noise=0.15, seed=1)]
    prefill = section(tmp_path, little + most).conclusion.scenarios[1]
    assert prefill.choice == "beta" and prefill.lead > 1.02 and not prefill.clear


def test_same_solutions_are_not_told_apart(tmp_path):
    decode = section(tmp_path, run({"alpha": 1.0, "beta": 1.0})).conclusion.scenarios[0]
    assert not decode.clear and set(decode.label.split(" or ")) == {"alpha", "beta"}


def test_failures_exclude_from_the_choice(tmp_path):
    traces = [t for t in run({"quick": 0.1, "sound": 1.0}) if not (t["solution"] == "quick" and t["workload"]["axes"]["seq_len"] == 16)]
    found = section(tmp_path, [*traces, failed("quick", 16, "INCORRECT_NUMERICAL", "wrong")])
    decode = found.conclusion.scenarios[0]
    assert decode.choice == "sound" and decode.excluded == {"quick": "did not pass 1 of 3 workloads"}
    assert [f.what for f in contender(found, "quick").failures] == ["INCORRECT_NUMERICAL"]
    assert contender(found, "quick").rank == 1  # over the workloads that both passed


def test_guard_verdicts_count_as_failures(tmp_path):
    caught = failed("cheat", 1)
    caught["evaluation"]["extra"]["verdict"] = "OUTPUT_CACHED"
    found = section(tmp_path, [caught, trace("honest", 1)])
    assert contender(found, "cheat").failures[0].what == "OUTPUT_CACHED"
    assert found.rows[0].winners == ["honest"]


def test_doubts(tmp_path):
    odd = trace("alpha", 1)
    odd["evaluation"]["performance"]["extra"] |= {"drift": 0.05, "drifted": True, "floor_ms": 9.0, "speedup_interval": [10, 30]}
    odd["evaluation"]["environment"]["extra"]["gpu"] = {"throttle": [0, 4]}
    text = " ".join(section(tmp_path, [odd, trace("beta", 1, 1.001)]).doubts)
    assert "drifted" in text and "+5.0%" in text
    assert "faster than the floor" in text
    assert "wider than ±3 %" in text
    assert "held its clocks back in 1 of 2 evaluations: software power cap" in text


@pytest.mark.parametrize(
    ("released", "said"),
    [
        ((True, True), None),
        ((None, True), "In 1 of 2 evaluations lines that a kernel had the L2 keep could outlast the flush"),
        ((False, False), "could outlast the flush: the driver did not let them go"),
        ((None, None), None),  # all from before that was known
    ],
)
def test_doubts_about_the_flush(tmp_path, released, said):
    traces = [trace("alpha", 1), trace("beta", 1)]
    for one, value in zip(traces, released, strict=True):
        one["evaluation"]["environment"]["extra"] |= {"flush_bytes": 1 << 26} | ({} if value is None else {"releases_l2": value})
    text = " ".join(section(tmp_path, traces).doubts)
    assert said in text if said else "outlast" not in text


def test_baseline_stands_on_the_right(tmp_path):
    pairs = section(tmp_path, run({"a": 1.0, "b": 2.0, "c": 3.0}), baseline="a").pairs
    assert [(p.first, p.second) for p in pairs] == [("b", "a"), ("c", "a"), ("b", "c")]


def test_many_solutions_pair_with_the_leader_only(tmp_path):
    found = section(tmp_path, run({f"s{i}": 1.0 + i for i in range(10)}, sizes=[1, 16]), baseline="s5")
    assert len(found.pairs) == 9 + 8
    assert all("s0" in (p.first, p.second) or "s5" in (p.first, p.second) for p in found.pairs)


def test_regimes():
    (one,) = parse_regimes("warm:2-40")
    assert one.holds(2) and one.holds(40) and not one.holds(41) and one.label == "warm (T 2–40)"
    low, high = parse_regimes("-9,10-")
    assert (low.name, high.name) == ("T ≤ 9", "T ≥ 10")
    assert [share for _, share in parse_mix("decode=3,prefill=1")] == [0.75, 0.25]
    assert not one.holds(None)


def test_terminal_fits_80_columns(tmp_path):
    about = {
        "contenders": [{"name": "alpha", "description": "words"}],
        "skipped": [{"solution": "gone", "definition": DEFINITION, "reason": "needs SM100, this is SM90"}],
    }
    names = ["a_rather_long_solution_name", "another_rather_long_solution_name", "c", "d"]
    traces = run({name: 1.0 + place for place, name in enumerate(names)})
    folder(tmp_path, [*traces, failed("broken", 1, "TIMEOUT", "no answer after 60 s")], about)
    console = Console(file=io.StringIO(), width=80)
    console.print(api.terminal_table([tmp_path]))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "SKIPPED, needs SM100" in text and "no answer after 60 s" in text and "\x1b" not in text
    assert "decode: a_rather_long_solution_name" in text


def test_show_and_best(tmp_path):
    folder(tmp_path, run({"alpha": 1.0, "beta": lambda t: 2.0 if t < 100 else 0.5}))
    assert [(r.tokens, r.solution) for _, _, r in api.best([tmp_path])][:4] == [(1, "alpha"), (16, "alpha"), (80, "alpha"), (901, "beta")]
    assert api.best([tmp_path], max_relative_l2=1e-6) == []
    console = Console(file=io.StringIO(), width=80)
    console.print(api.show(tmp_path, "901", "beta"))
    assert "60 samples in 12 blocks" in console.file.getvalue()
    with pytest.raises(api.ReportError, match="no trace of workload 5"):
        api.show(tmp_path, "5")


def test_watch(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    api.watch([tmp_path], console, seconds=0, rounds=1)
    assert "waiting" in console.file.getvalue()
    api.watch([folder(tmp_path, run({"alpha": 1.0}))], console, seconds=0, rounds=2)
    assert "alpha" in console.file.getvalue()


def test_show_has_the_end_of_a_failures_log(tmp_path):
    broken = failed("alpha", 1, message="")
    broken["evaluation"]["log"] = "\n".join([*(f"earlier {number}" for number in range(100)), "  assert False", "AssertionError:"])
    console = Console(file=io.StringIO(), width=80)
    console.print(api.show(folder(tmp_path, [broken]), "1"))
    text = console.file.getvalue()
    assert "earlier 99" in text and "assert False" in text and "earlier 50" not in text
    assert "times" not in text and text.count("RUNTIME_ERROR") == 1


@pytest.mark.parametrize(
    ("options", "measured", "message"),
    [
        ({"regimes": "warm"}, False, "--regimes warm: expected sizes"),
        ({"mix": "decode"}, False, "--mix decode: expected PHASE=SHARE"),
        ({"baseline": "gamma"}, True, "--baseline gamma: no such solution"),
    ],
)
def test_watch_does_not_wait_for_what_no_trace_will_mend(tmp_path, options, measured, message):
    if measured:
        folder(tmp_path, run({"alpha": 1.0}))
    with pytest.raises(api.ReportError, match=message):
        api.watch([tmp_path], Console(file=io.StringIO()), seconds=0, rounds=1, **options)


def test_the_only_solution_is_judged_against_the_reference(tmp_path):
    folder(tmp_path, run({"alpha": 1.0}))
    console = Console(file=io.StringIO(), width=80)
    console.print(api.terminal_table([tmp_path]))
    text = console.file.getvalue()
    assert "95 % interval" in text and "FASTER" in text and "*" not in text
    (path,) = api.write([tmp_path], formats=["md"])
    assert "against the reference" in path.read_text() and "| wins" not in path.read_text()


def test_workloads_without_pairs_make_no_cliff(tmp_path):
    traces = run({"alpha": lambda t: 0.1 if t == 16 else 1.0})
    for item in traces:
        if item["workload"]["axes"]["seq_len"] == 16:
            item["evaluation"]["extra"]["pairs"] = 0
    assert section(tmp_path, traces).cliffs == []


def test_the_reference_of_another_run_decides_nothing(tmp_path):
    """As `run --resume` leaves it: each solution's speedup is over its own session's reference, and the second's took 15 % longer."""
    first = [one for one in run({"old": 1.0}, reference=20.0, run="r1") if one["solution"] != "reference"]
    found = section(tmp_path, first + run({"new": 1.08}, reference=23.0, run="r2"))
    assert all((row.winners, row.runner_up, row.duel.word, row.paired) == (["old"], "new", "FASTER", False) for row in found.rows)
    assert found.rows[0].margin == pytest.approx(0.08, abs=0.005)
    assert [(c.name, c.rank) for c in found.contenders] == [("old", 1), ("new", 2)]
    assert contender(found, "old").overall.geometric == pytest.approx(23.0, rel=0.01)
    (pair,) = found.pairs
    assert (pair.first, pair.wins, pair.unpaired, pair.overall.word) == ("old", 6, 6, "FASTER")
    assert {record.solution for _, _, record in api.best([tmp_path])} == {"old"}
    (path,) = api.write([tmp_path], formats=["md"])
    for said in ("samples, unpaired on 6 of 6 workloads", ", unpaired |", "On 6 workloads solutions of several runs meet"):
        assert said in path.read_text()


def test_one_block_makes_no_clear_choice(tmp_path):
    found = section(tmp_path, run({"alpha": 1.0, "beta": 1.2}, blocks=1))
    assert not any(scenario.clear for scenario in found.conclusion.scenarios)
    assert found.conclusion.scenarios[0].why.endswith("but the samples give no interval")
    assert found.conclusion.scenarios[0].label == "alpha or beta"


def test_skipped_is_what_did_not_run_on_this_hardware(tmp_path):
    reason = {"definition": DEFINITION, "reason": "needs SM90"}
    skipped = [{"solution": name, **reason} for name in ("alpha", "beta")]
    folder(tmp_path / "gpu", run({"alpha": 1.0}), {"environment": {"hardware": GPU}, "skipped": [{"solution": "beta", **reason}]})
    folder(tmp_path / "cpu", run({"gamma": 1.0}, hardware="Xeon"), {"environment": {"hardware": "Xeon"}, "skipped": skipped})
    folder(tmp_path / "more", run({"beta": 1.0}, hardware="Xeon"))  # added to that run later
    folder(tmp_path / "nowhere", [], {"environment": {"hardware": "TPU"}, "skipped": [{"solution": "delta", **reason}]})
    report = api.read([tmp_path])
    found = {section.hardware: [item["solution"] for item in section.skipped] for section in report.sections}
    assert found == {GPU: ["beta"], "Xeon": ["alpha"]}
    assert "delta: SKIPPED, needs SM90" in report.notes


def test_a_mean_over_fewer_workloads_is_not_the_best(tmp_path):
    """`part` fails where every speedup is small."""
    slow = {"full": lambda t: 1.0 if t <= 80 else 4.0, "less": lambda t: 1.2 if t <= 80 else 5.0}
    found = section(tmp_path, run(slow) + [trace("part", t, 1.05) if t <= 80 else failed("part", t) for t in SIZES])
    bold = {row[0].text: [name for name, cell in zip(found.names, row[1:], strict=True) if cell.bold] for row in average_table(found).rows}
    assert contender(found, "part").overall.geometric > contender(found, "full").overall.geometric
    for line in ("arithmetic mean, all", "geometric mean, all", "median", "min", "share of the floor, median"):
        assert bold[line] == ["full"], line
    assert bold["geometric mean, T ≤ 80"] == ["full"] and bold["wins"] == ["full"]
    assert found.leaders["all"] == "full"


CROSSING = {"alpha": lambda t: 1.0 if t <= 80 else 1.1, "beta": lambda t: 1.1 if t <= 80 else 1.0}


@pytest.mark.parametrize(("noise", "clear"), [(0.002, True), (0.2, False)])
def test_a_dispatcher_from_noise_is_not_clear(tmp_path, noise, clear):
    """Each is 10 % faster on one side of the cut, which is much or nothing by what the samples scatter."""
    found = section(tmp_path, run(CROSSING, noise=noise, blocks=6))
    said = dispatcher_sentence(found)
    assert found.conclusion.dispatcher.gain > 1.02 and "`alpha` up to T = 80 and `beta` from T = 901" in said
    assert ("not clear: " in said, "with the errors of measurement 0." in said) == (not clear, not clear)


def test_one_block_recommends_no_dispatcher(tmp_path):
    said = dispatcher_sentence(section(tmp_path, run(CROSSING, noise=0.002, blocks=1)))
    assert "not clear: `alpha` up to T = 80" in said and "but the samples give no interval" in said


def test_versions_and_settings_that_differ_are_doubts(tmp_path):
    traces = run({"alpha": 1.0, "beta": 1.2})
    for one in traces:
        late, extra = one["workload"]["axes"]["seq_len"] > 80, one["evaluation"]["extra"]
        extra |= {"solution_digest": f"{one['solution']}-{late}" if one["solution"] == "alpha" else "same", "definition_digest": str(late)}
        extra["settings"] = {"rtol": 0.2, "iterations": 3 if late else 20, "warmup_runs": 5, "seed": 0 if late else 1}
    found = section(tmp_path, traces)
    versions = ("alpha is of 2 versions (alpha-False, alpha-True)", f"{DEFINITION} is of 2 versions")
    for said in (*versions, "Mixed iterations: 20, 3.", "Mixed seeds"):
        assert any(doubt.startswith(said) for doubt in found.doubts), said
    assert not any(doubt.startswith(("beta is of", "Mixed warm-up")) for doubt in found.doubts)
    assert (contender(found, "alpha").digest, contender(found, "beta").digest) == ("alpha-False | alpha-True", "same")


def test_what_is_left_out_was_judged_otherwise(tmp_path):
    """A run of strict tolerances among those of published ones takes their place, and the report says so."""
    strict = [failed("alpha", 1, "INCORRECT_NUMERICAL")]
    strict[0]["evaluation"]["extra"]["settings"] = {"rtol": 0.01}
    report = api.read([folder(tmp_path, [trace("alpha", 1), trace("alpha", 16), trace("alpha", 16), *strict])])
    assert report.notes == [
        "2 older evaluation(s) of the same workload and solution left out: the latest counts",
        "1 of the evaluations left out were judged otherwise than what counts: rtol 0.2 → 0.01",
    ]


def test_the_worst_errors(tmp_path):
    """An infinite error is one, and has no mark in the picture; a row's number and counts are none."""
    traces = [trace("alpha", tokens) for tokens in (1, 16, 80)]
    for one, error, worst_row in zip(traces, ("Infinity", 0.01, 0.02), (3, 4435, 12), strict=True):
        counts = {"worst_row": worst_row, "nonzero_rows": 9, "rechecked": 3}
        one["evaluation"]["correctness"]["extra"] = {"relative_l2": error, "matched_ratio": 0.9, "cosine": 1.0 - worst_row / 1e5} | counts
    found = section(tmp_path, traces)
    errors = contender(found, "alpha").errors
    assert errors == {
        "max_relative_error": 0.1, "max_absolute_error": 8.0, "relative_l2": math.inf, "matched_ratio": 0.9, "cosine": 1 - 4435 / 1e5
    }  # fmt: skip
    assert "inf" in [cell.text for cell in error_table(found).rows[0]]
    assert plots.errors(found)[1].endswith("Infinite ones (1) have no mark.")
    api.write([tmp_path], formats=api.FORMATS)
    assert [record.tokens for _, _, record in api.best([tmp_path], max_relative_l2=0.5)] == [16, 80]


def test_replays_and_host_times_stand_beside_the_spans(tmp_path):
    traces = run({"alpha": 1.0, "beta": 2.0})
    for one in traces:
        if one["solution"] == "beta":
            one["evaluation"]["performance"]["extra"] |= {"graph_ms": None, "host_us": 1234.4}
    table = host_table(section(tmp_path / "a", [*traces, failed("gamma", 1)]))
    assert table.columns == ["workload", "T", "alpha", "beta", "gamma"] and len(table.rows) == 6
    assert [cell.text for cell in table.rows[0][2:]] == [f"{table.rows[0][2].value:#.4g} (40)", "– (1,234)", "–"]
    assert host_table(section(tmp_path / "b", [plain("alpha", 1)])) is None


def test_whose_timer_differs_is_said(tmp_path):
    traces = run({"alpha": 1.0, "beta": 2.0})
    assert not any("timers" in doubt for doubt in section(tmp_path / "a", traces).doubts)
    alone = "Mixed timers: the reference's by cuda_events on 6 workloads, all else by cupti."
    by = {"reference": alone, "beta": "Mixed timers: cuda_events, cupti."}
    for solution, said in by.items():
        for one in traces:
            one["evaluation"]["performance"]["extra"]["timer"] = "cuda_events" if one["solution"] == solution else "cupti"
        assert said in section(tmp_path / solution, traces).doubts


def test_a_speedup_is_no_quotient_of_latencies(tmp_path):
    """A slow block moves the median of all samples, and hardly that of the blocks' ratios: the report says which is which."""
    said = "A speedup is the median of its blocks' ratios"
    assert any(note.startswith(said) for note in latency_table(section(tmp_path / "a", run({"alpha": 1.0}))).notes)
    assert not any(note.startswith(said) for note in latency_table(section(tmp_path / "b", [plain("alpha", 1)])).notes)
