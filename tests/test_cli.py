"""The command line as a new user meets it: one clear line and exit code 2 for a usage fault, never a stack trace."""

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest
import toy_tree as toy
from typer.main import get_command

from blockmoe import __version__, cli
from blockmoe.bench import commands, settings
from blockmoe.bench.dataset import append_trace
from blockmoe.bench.schema import Trace
from blockmoe.geometry import HEADLINE, TINY
from blockmoe.report import ReportError

COMMANDS = ("run", "list", "doctor", "pack", "report", "compare", "best", "show", "import-csv", "warmup")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return toy.make_tree(tmp_path / "tree", {"good": toy.GOOD, "better": toy.GOOD}, [(8, "aaaa-first"), (32, "bbbb-second")])


@pytest.fixture
def blockmoe(monkeypatch, capsys):
    """Calls the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["blockmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return caught.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def planned(monkeypatch):
    """Stops `run` before anything starts and keeps its plan."""
    plans = []

    def execute(plan, log_level):
        plans.append(plan)
        return commands.Outcome()

    monkeypatch.setattr(commands, "_execute", execute)
    monkeypatch.setattr(commands, "_summary", lambda *_: None)
    return plans


# --- help -------------------------------------------------------------------------------------------------------------


def test_version_and_no_arguments(blockmoe):
    assert blockmoe("--version") == (0, f"blockmoe {__version__}\n", "")
    code, out, _ = blockmoe()
    assert code == 0 and all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_each_option_is_for(blockmoe, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = blockmoe(command, "--help")
    assert code == 0 and f"blockmoe {command}" in out
    for line in out.splitlines():
        assert not re.fullmatch(r"│ +--[a-z-]+ +(<\S+>)? *│", line), f"no help: {line}"
    if command == "run":
        assert all(f"--{name}" in out for name in ("resume", "warmup-runs", "required-matched-ratio", "no-save-results", "log-level"))
        assert "[default: (0.85)]" in out and "Exit codes: 0" in out


def test_no_option_is_named_by_its_placeholder():
    """typer 0.27.0 takes a metavar that is the option's name in capitals for how it is written: --DEVICE."""
    for name, command in get_command(cli.app).commands.items():
        for option in command.params:
            assert all(written == written.lower() for written in (*option.opts, *option.secondary_opts)), f"{name}: {option.opts}"
            assert (option.metavar or "").lower() != option.name, f"{name}: {option.metavar}"


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--solutions", "goood"], "unknown solution 'goood'; did you mean good"),
        (["--solutions", "good", "zzz"], "unknown solution 'zzz'; known: better, good"),
        (["--solutions", "reference"], "--solutions reference: it is measured with every run"),
        (["--definitions", "scale"], "unknown definition 'scale'; did you mean scale_w64?"),
        (["--workloads", "9"], "workload '9': expected a uuid prefix, a size or a range like 1-80; known: aaaa-fir (8), bbbb-sec (32)"),
        (["--timeout", "-5"], "--timeout: expected a number above 0, got -5"),
        (["--timeout", "nan"], "--timeout: expected a number above 0, got nan"),
        (["--iterations", "0"], "--iterations: expected at least 1, got 0"),
        (["--iterations", "90001", "--num-trials", "1"], "--iterations: expected at most 90000 in all trials, got 90001"),
        (["--num-trials", "1001", "--iterations", "1"], "--num-trials: expected at most 1000, got 1001"),
        (["--warmup-runs", "1000000000"], "--warmup-runs: expected at most 90000, got 1000000000"),
        (["--num-trials", "-1"], "--num-trials: expected at least 1, got -1"),
        (["--warmup-runs", "-1"], "--warmup-runs: expected at least 0, got -1"),
        (["--rtol", "-0.1"], "--rtol: expected a number of at least 0, got -0.1"),
        (["--required-matched-ratio", "1.5"], "--required-matched-ratio: expected a number in (0, 1], got 1.5"),
        (["--device", "gpu"], "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (["--inputs", "realistic"], "--inputs realistic: made for FP8 block-scale MoE definitions, not for scale_w64"),
        (["--resume", "--no-save-results"], "--resume: expected saved results, got --no-save-results"),
        (["--retry-failed"], "--retry-failed: expected --resume beside it"),
        (["--resume"], "--resume: expected an earlier run in runs/, found none; name its folder with --output"),
        (["--output", "tree/definitions/toy/scale_w64.json"], "not writable (File exists)"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere: not writable ("),
        (["--local", "nowhere"], "nowhere: expected a FlashInfer-Trace tree with a folder `definitions`, found none"),
    ],
)
def test_run_faults_are_one_line(tree, blockmoe, arguments, expected):
    local = [] if "--local" in arguments else ["--local", tree]
    code, out, err = blockmoe("run", *local, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("blockmoe: ") and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--timeout", "soon"], "Invalid value for '--timeout': .*'soon'"),
        (["run", "--iterations=1.5", "--seed", "2"], "Invalid value for '--iterations': .*'1.5'"),
        (["run", "--preset", "slow"], "Invalid value for '--preset': .*'slow' is not one of 'quick', 'full'"),
        (["run", "--no-such-flag"], "[Nn]o such option.*--no-such-flag"),
        (["run", "--solutions"], "Option '--solutions' requires an argument"),
        (["run", "stray"], "unexpected extra argument.*stray"),
        (["rnu"], "No such command 'rnu'"),
        (["compare", "a"], "Missing argument"),
    ],
)
def test_what_the_parser_refuses(blockmoe, arguments, expected):
    code, out, err = blockmoe(*arguments)
    assert code == 2 and out == "" and err.startswith("blockmoe: ") and re.search(expected, err) and err.count("\n") == 1
    assert err.endswith("--help)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "--solutions", "alpha", "results"],
        ["pack", "--definitions", "*e8*", "torch_grouped"],
        ["list", "--definitions", "*e8*", "workloads"],
    ],
)
def test_what_an_option_of_several_values_took(blockmoe, monkeypatch, tmp_path, arguments):
    """It says so in the help and where an argument is missing; after -- that argument is one."""
    monkeypatch.chdir(tmp_path)
    command, flag, value, _ = arguments
    code, out, err = blockmoe(*arguments)
    said = f"{flag} takes all words up to the next option: other arguments stand before it, or after --"
    assert code == 2 and out == "" and said in err and err.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "200")
    out = blockmoe(command, "--help")[1]
    assert "all words up to the next option" in out and re.search(rf"{flag} +NAME…", out)
    assert "takes all words" not in blockmoe(command, flag, value, "--", "nothing")[2]


def test_cuda_without_a_cuda_torch(tree, blockmoe, monkeypatch):
    monkeypatch.setattr(commands, "torch_build", lambda: "")
    code, _, err = blockmoe("run", "--local", tree, "--device", "cuda:1")
    assert (code, err) == (2, "blockmoe: --device cuda:1: this Python's torch is built without CUDA; --device cpu works\n")


def test_no_torch(tree, blockmoe, monkeypatch):
    monkeypatch.setattr(commands, "torch_build", lambda: None)
    code, _, err = blockmoe("run", "--local", tree)
    assert (code, err) == (1, "blockmoe: run needs torch, which is not installed: pip install 'blockmoe[torch]'\n")


def test_nothing_to_run(tree, blockmoe):
    for path in (tree / "solutions").rglob("*.json"):
        path.unlink()
    assert blockmoe("run", "--local", tree)[2] == f"blockmoe: nothing to run: definition {toy.NAME} has no solutions\n"
    toy.workloads_path(tree).unlink()
    code, _, err = blockmoe("run", "--local", tree, "--workloads", "8")
    assert (code, err) == (2, f"blockmoe: nothing to run: definition {toy.NAME} has no workloads\n")
    toy.definition_path(tree).unlink()
    assert blockmoe("run", "--local", tree)[2] == "blockmoe: nothing to run: there is no definition\n"
    assert blockmoe("list", "--local", tree)[0] == 0


def test_nothing_to_run_says_what_each_definition_lacks(tree, blockmoe):
    toy.write(toy.definition_path(tree).with_name("other.json"), toy.definition(name="other"))
    toy.write(toy.workloads_path(tree).with_name("other.jsonl"), toy.workload(50, "cccc") | {"definition": "other"})
    toy.write(toy.solution_path(tree, "mine"), toy.solution("mine") | {"definition": "other"})
    code, _, err = blockmoe("run", "--local", tree, "--solutions", "mine", "--workloads", "8")
    lacks = f"definition other has none of these workloads; definition {toy.NAME} has none of these solutions"
    assert (code, err) == (2, f"blockmoe: nothing to run: {lacks}\n")


def test_malformed_tree(tree, blockmoe):
    path = toy.write(toy.workloads_path(tree), toy.workload(8, "aaaa"), '{"definition"')
    for command in ("run", "list"):
        code, _, err = blockmoe(command, "--local", tree)
        assert code == 2 and err.startswith(f"blockmoe: {path}:2: Invalid JSON") and err.count("\n") == 1


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_several_values_after_one_flag(tree, blockmoe, planned):
    blockmoe("run", "--local", tree, "--solutions", "better", "good", "--workloads", "8", "bbbb", "--timeout", "7", "--output", "out")
    [plan] = planned
    assert [solution.name for solution in plan.solutions[toy.NAME]] == ["better", "good"] and plan.named
    assert [workload.uuid for workload in plan.workloads[toy.NAME]] == ["aaaa-first", "bbbb-second"]
    assert plan.settings.timeout == 7 and str(plan.output) == "out"
    assert plan.command == f"blockmoe run --local {tree} --solutions better good --workloads 8 bbbb --timeout 7 --output out"


def test_expand_leaves_everything_else_alone():
    assert cli.expand(["run", "--solutions", "A", "B", "--resume", "--local=x", "y"]) == [
        "run", "--solutions", "A", "--solutions", "B", "--resume", "--local=x", "y",
    ]  # fmt: skip
    assert cli.expand(["run", "--solutions", "--resume"]) == ["run", "--solutions", "--resume"]


def test_defaults_are_the_published_ones_and_quick_on_a_cpu(tree, blockmoe, planned, monkeypatch):
    monkeypatch.setattr(commands, "default_device", lambda: "cpu")
    blockmoe("run", "--no-save-results")
    blockmoe("run", "--no-save-results", "--preset", "full")
    blockmoe("run", "--no-save-results", "--definitions", TINY.definition_name, "--rtol", "0", "--log-level", "warning")
    blockmoe("run", "--no-save-results", "--definitions", HEADLINE.definition_name, TINY.definition_name)
    quick, full, tiny, both = planned
    assert [workload.axes["seq_len"] for workload in quick.workloads[HEADLINE.definition_name]] == [1, 80]
    assert (quick.settings.warmup_runs, quick.settings.iterations, quick.settings.num_trials) == (1, 3, 1)
    assert len(full.workloads[HEADLINE.definition_name]) == 19 and full.settings == settings.Settings()
    assert (full.settings.rtol, full.settings.atol, full.settings.required_matched_ratio) == (0.2, 0.1, 0.85)
    assert (full.settings.warmup_runs, full.settings.iterations, full.settings.num_trials) == (5, 20, 3)
    assert both.workloads == quick.workloads | tiny.workloads
    assert len(tiny.workloads[TINY.definition_name]) == 6 and tiny.settings.rtol == 0 and not tiny.named


def test_workloads_are_chosen_of_each_definition(tree, blockmoe, planned):
    """One that has none of a size is left out, one that has some keeps them."""
    blockmoe("run", "--no-save-results", "--definitions", "*", "--workloads", "1", "80")
    blockmoe("run", "--no-save-results", "--definitions", "*", "--workloads", "1")
    both, one = ({name: [w.axes["seq_len"] for w in chosen] for name, chosen in plan.workloads.items()} for plan in planned)
    assert both == one | {HEADLINE.definition_name: [1, 80]} and len(one) > 3


def test_runs_of_the_same_second_have_folders_of_their_own(tree, blockmoe, planned, monkeypatch):
    monkeypatch.setattr(commands, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 2)))
    for _ in range(3):
        blockmoe("run", "--local", tree)
    assert [plan.output.name for plan in planned] == ["20260102-000000", "20260102-000000-2", "20260102-000000-3"]


def test_resume_takes_the_newest_run_of_the_command(tree, blockmoe, planned):
    (commands.RUNS / "20260103-000000").mkdir(parents=True)
    command = f"blockmoe run --local {tree} --workloads 8"
    others = {"other": "blockmoe run --local elsewhere", "null": None, "broken": "'"}
    earlier = others | {"20260102-000000": f"{command} --output runs/20260102-000000 --resume", "20260101-000000": command}
    for age, (name, said) in enumerate(earlier.items()):  # a name says nothing of when
        about = toy.write(commands.RUNS / name / "run.json", {"command": said})
        os.utime(about, (1e9, 1e9 - age))
    blockmoe("run", "--local", tree, "--workloads", "8", "--resume", "--retry-failed")
    assert planned[0].output == commands.RUNS / "20260102-000000" and planned[0].resume
    code, _, err = blockmoe("run", "--local", tree, "--resume")
    assert code == 2 and err.endswith("of this command in runs/, found others; to go on in the newest: --output runs/other\n")


# --- whole commands ---------------------------------------------------------------------------------------------------


def test_run_from_a_pipe_is_plain(tree, tmp_path):
    """Also: nothing is saved, and a solution that can't run here is an error only where it was named."""
    toy.write(toy.solution_path(tree, "elsewhere"), toy.solution("elsewhere", target_hardware=["NVIDIA_B200"]))
    command = [sys.executable, "-m", "blockmoe", "run", "--local", "tree", "--workloads", "8", "--iterations", "2", "--no-save-results"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"NO_COLOR": "1"}
    before = sorted(tmp_path.rglob("*"))
    for named, code in (([], 0), (["--solutions", "elsewhere"], 1)):
        answer = subprocess.run([*command, *named], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert answer.returncode == code, answer.stderr
        assert "\x1b" not in answer.stdout + answer.stderr and "Traceback" not in answer.stderr
        assert answer.stderr.count("SKIPPED elsewhere: runs on NVIDIA_B200; this is ") == 1
        assert ("good: PASSED" in answer.stderr) == ("better" in answer.stdout) == (code == 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_in_which_nothing_can_run_says_so(tree, blockmoe, monkeypatch):
    skipped = [{"solution": name, "reason": "written in cuda; this bench runs python and triton"} for name in ("good", "better")]
    monkeypatch.setattr(commands, "_execute", lambda *_: commands.Outcome(skipped=skipped))
    said = "blockmoe: no solution can run here: the first of 2, good: written in cuda; this bench runs python and triton\n"
    assert blockmoe("run", "--local", tree, "--no-save-results", "--log-level", "ERROR") == (1, "", said)


def test_a_run_without_its_report_is_not_all_that_was_asked_for(tree, blockmoe, monkeypatch):
    trace = {"solution": "good", "evaluation": {"status": "PASSED", "environment": {"hardware": "cpu"}, "timestamp": "now"}}
    trace["evaluation"] |= {"correctness": {}, "performance": {"latency_ms": 1.0, "reference_latency_ms": 2.0, "speedup_factor": 2.0}}
    done = Trace.model_validate(toy.workload(8, "aaaa-first") | trace)

    def execute(plan, log_level):
        append_trace(plan.output, toy.OP, done)
        return commands.Outcome([done])

    monkeypatch.setattr(commands, "_execute", execute)
    assert blockmoe("run", "--local", tree, "--output", "out")[0] == 0

    def full(*_, **__):
        raise ReportError("out: not writable (No space left on device)")

    monkeypatch.setattr("blockmoe.report.write", full)
    code, _, err = blockmoe("run", "--local", tree, "--output", "out")
    assert code == 1 and err.endswith("blockmoe: no report: out: not writable (No space left on device)\n")


def test_list_says_what_runs_here(tree, blockmoe):
    toy.write(toy.solution_path(tree, "lacking"), toy.solution("lacking", dependencies=["no_such_package"]))
    toy.write(toy.solution_path(tree, "better"), toy.solution("bet[/red]ter"))
    toy.write(toy.workloads_path(tree), toy.workload(8, "aaaa-first", recipe="by hand"))
    code, out, _ = blockmoe("list", "--local", tree)
    assert code == 0 and re.search(r"scale_w64 +toy +1 +3", out) and re.search(r"aaaa-fir +n=8", out)
    assert re.search(r"lacking +python +needs the package no_such_package, which is not installed +1", out)
    assert re.search(r"good +python +runs +1", out) and "bet[/red]ter" in out


def test_list_of_the_bundled_dataset_is_fit_for_grep(blockmoe, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = blockmoe("list", "definitions")
    assert re.search(rf"^{HEADLINE.definition_name} +moe +19 ", out, re.MULTILINE) and len(out.splitlines()) == 8
    _, out, _ = blockmoe("list", "workloads", "--definitions", TINY.definition_name)
    assert out.startswith(TINY.definition_name) and "seq_len=64" in out and len(out.splitlines()) == 8
    code, _, err = blockmoe("list", "--definitions", "moe_fp8")
    assert code == 2 and "unknown definition 'moe_fp8'; did you mean moe_fp8_block_scale" in err


def test_pack_writes_a_tree_that_runs_would_read(blockmoe, planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blockmoe("pack", "torch_groupd", "--output", "packed")[0] == 2 and not list(tmp_path.iterdir())
    code, out, _ = blockmoe("pack", "torch_grouped", "--definitions", TINY.definition_name, HEADLINE.definition_name, "--output", "packed")
    assert code == 0
    names = {json.loads((tmp_path / line).read_text())["name"] for line in out.splitlines()}
    assert names == {"torch_grouped", "torch_grouped__ds_routing_topk4_ng4_kg2_e8_h256_i128"}
    blockmoe("run", "--local", commands.trees.bundled_root(), "packed", "--definitions", TINY.definition_name, "--no-save-results")
    blockmoe("run", "--local", "packed", "--definitions", TINY.definition_name, "--no-save-results")  # the tree alone will do
    for plan in planned:
        assert [solution.name for solution in plan.solutions[TINY.definition_name]] == [max(names)]
        assert len(plan.workloads[TINY.definition_name]) == 6
    code, _, err = blockmoe("pack", "--output", "/proc/nowhere")
    assert code == 2 and err.startswith("blockmoe: --output /proc/nowhere: not writable (")


def test_doctor(blockmoe, monkeypatch):
    code, out, _ = blockmoe("doctor")
    assert code == 0 and all(re.search(rf"^(ok|--) +{what}", out, re.MULTILINE) for what in ("python", "torch", "memory", "dataset"))
    assert re.search(r"^-- +NVIDIA GPU +none|^ok +NVIDIA GPU", out, re.MULTILINE)
    for module in ("blockmoe.bench.doctor", "blockmoe.bench.settings"):
        monkeypatch.setattr(f"{module}.torch_build", lambda: None)
    code, out, _ = blockmoe("doctor")
    assert code == 1 and re.search(r"^!! +torch +not installed +pip install 'blockmoe\[torch\]'", out, re.MULTILINE)


def test_doctor_timers(blockmoe, monkeypatch):
    monkeypatch.setattr("blockmoe.bench.doctor.gpus", list)
    code, _, err = blockmoe("doctor", "--timers")
    assert (code, err) == (2, "blockmoe: --timers: comparing the timers needs CUDA and CUPTI: this machine has no NVIDIA GPU\n")
    assert blockmoe("doctor", "--output", "x.json")[::2] == (2, "blockmoe: --output: only with --timers\n")
    monkeypatch.setattr(commands, "timers_lack", lambda: None)
    for expected in (0, 1):
        monkeypatch.setattr("blockmoe.bench.agreement.show", lambda output, code=expected: code)
        assert blockmoe("doctor", "--timers")[0] == expected
