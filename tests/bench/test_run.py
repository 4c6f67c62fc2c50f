"""Whole runs with real worker processes, on y = 2x: one clear line and the right status for everything a solution can do."""

import collections
import dataclasses
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy_tree as toy
from safetensors.numpy import save_file

from blockmoe.bench import record, runner, scratch
from blockmoe.bench.commands import load_dataset
from blockmoe.bench.dataset import Dataset, read_traces
from blockmoe.bench.runner import Plan, Run
from blockmoe.bench.schema import Definition, Solution, Status, Trace
from blockmoe.bench.session import BuildError, Session
from blockmoe.bench.settings import Settings
from blockmoe.files import write_whole
from blockmoe.geometry import TINY

PASSED = toy.workload(8, "aaaa") | {
    "solution": "good",
    "evaluation": {"status": "PASSED", "environment": {"hardware": "cpu"}, "timestamp": "now", "correctness": {}, "performance": {}},
}
QUICK = Settings(warmup_runs=1, iterations=3, num_trials=2, timeout=60.0)


class Watcher:
    """An observer that remembers."""

    def __init__(self):
        self.notes, self.stages, self.lines, self.evaluations = [], [], [], 0

    def begin(self, evaluations):
        self.evaluations = evaluations

    def workload(self, definition, workload, number, total):
        self.stages.append(f"{workload.uuid} {number}/{total}")

    def stage(self, text):
        self.stages.append(text)

    def note(self, text):
        self.notes.append(text)

    def finished(self, trace):
        self.lines.append((trace.solution, trace.evaluation.status))


def plan_of(tree, output=None, settings=QUICK, **more):
    dataset = Dataset.load([tree])
    solutions = {name: dataset.solutions_of(name) for name in dataset.definitions}
    return Plan(dataset, dict(dataset.workloads), solutions, settings, output, **more)


def execute(plan, watcher=None):
    """Outcome of a run that leaves no process and no folder behind."""
    outcome = Run(plan, watcher or Watcher()).execute()
    assert toy.workers_of(os.getpid()) == []
    return outcome


def by_name(outcome):
    return {trace.solution: trace.evaluation for trace in outcome.traces}


# --- one solution after another ---------------------------------------------------------------------------------------

PASSING = {
    "value": toy.GOOD,
    "sets_defaults": "import torch as t\nt.set_default_dtype(t.float64)\nt.set_default_device('meta')\ndef run(x):\n    return x * 2\n",
    "prints": "done = []\ndef run(x):\n    done or print('x' * 50_000_000)\n    done.append(1)\n    return x * 2\n",
}
# name: (source, status, what the message says)
FAILING = {
    "segfaults": ("import ctypes\ndef run(x):\n    ctypes.string_at(0)\n", "RUNTIME_ERROR", "the process died of SIGSEGV"),
    "exits": ("import sys\ndef run(x):\n    sys.exit(3)\n", "RUNTIME_ERROR", "the solution called sys.exit(3)"),
    "leaves": ("import os\ndef run(x):\n    os._exit(0)\n", "RUNTIME_ERROR", "the process exited with code 0"),
    "stops": ("class Stop(BaseException): pass\ndef run(x):\n    raise Stop('now')\n", "RUNTIME_ERROR", "the process exited with code 1"),
    "leaves_a_child": (
        "import os, time\ndef run(x):\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(7)\n",
        "RUNTIME_ERROR", "the process exited with code 7",
    ),
    "raises": ("def run(x):\n    raise ValueError('first line ' * 60 + '\\nsecond line')\n", "RUNTIME_ERROR", "ValueError: first line"),
    "talks_to_the_bench": (
        "import os, sys\ndef run(x):\n    os.write(int(sys.argv[1]), b'[1]\\n')\n", "RUNTIME_ERROR", "the bench's own socket"
    ),
    "answers_for_the_bench": (
        "import os, sys\ndef run(x):\n    os.write(int(sys.argv[1]), b'{}\\n')\n", "RUNTIME_ERROR", "the bench's own socket"
    ),
    "answers_at_import": (
        "import os, sys\nos.write(int(sys.argv[1]), b'{}\\n')\ndef run(x):\n    return x * 2\n",
        "RUNTIME_ERROR", "a reply that is none of the bench's",
    ),
    "blames_itself": (
        "import os, sys\ndef run(x):\n    os.write(int(sys.argv[1]), b'{\"error\": {\"kind\": \"NONE\", \"message\": 1}}\\n')\n",
        "RUNTIME_ERROR", "a reply that is none of the bench's",
    ),
    "wrong_shape": ("def run(x):\n    return (x * 2)[:, :63].contiguous()\n", "INCORRECT_SHAPE", "expected shape [8, 64], got [8, 63]"),
    "wrong_dtype": ("def run(x):\n    return (x * 2).double()\n", "INCORRECT_DTYPE", "expected torch.float32, got torch.float64"),
    "wrong_values": ("def run(x):\n    return x * 3\n", "INCORRECT_NUMERICAL", "matched ratio 0.0"),
    "imports": ("import no_such_package\ndef run(x):\n    return x * 2\n", "COMPILE_ERROR", "No module named 'no_such_package'"),
    "says_much": ("raise RuntimeError('error: expected ;\\n' * 400_000)\n", "COMPILE_ERROR", "RuntimeError: error: expected ; error"),
    "says_much_in_a_line": ("def run(x):\n    raise RuntimeError('no ' * 2_000_000)\n", "RUNTIME_ERROR", "RuntimeError: no no"),
    "hangs": ("import time\ndef run(x):\n    time.sleep(1000)\n", "TIMEOUT", "no result within the timeout of 3 s"),
    "hangs_at_import": ("import time\ntime.sleep(1000)\n", "TIMEOUT", "no result within the timeout of 3 s"),
    "hangs_and_is_deaf": (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef run(x):\n    while True: time.sleep(1)\n",
        "TIMEOUT", "no result within the timeout of 3 s",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parade(tmp_path_factory):
    """Everybody, in waves that fit into memory together; those that hang in a wave of their own, with a short timeout."""
    root, waves = tmp_path_factory.mktemp("parade"), []
    sources = PASSING | {name: case[0] for name, case in FAILING.items()}
    hanging = [name for name in sources if name.startswith("hangs")]
    others = [name for name in sources if name not in hanging]
    for number, (names, timeout) in enumerate(((others[::2], 60.0), (others[1::2], 60.0), (hanging, 3.0))):
        tree = toy.make_tree(root / f"tree{number}", {name: sources[name] for name in names})
        in_place = "import torch\ndef run(x, y):\n    torch.mul(x, 2, out=y)\n"
        extra = {
            "into": toy.solution("into", in_place, destination_passing_style=True),
            "lacking": toy.solution("lacking", dependencies=["torch>=2.0", "no-such-package==1.0"]),
            "elsewhere": toy.solution("elsewhere", target_hardware=["NVIDIA_B200"]),
            "compiled": toy.solution("compiled", language="cuda"),
        }
        for name, content in extra.items() if number == 0 else ():
            toy.write(toy.solution_path(tree, name), content)
        watcher = Watcher()
        plan = plan_of(tree, root / f"out{number}", dataclasses.replace(QUICK, timeout=timeout))
        waves.append((execute(plan, watcher), watcher))
    return root, waves


@pytest.fixture(scope="module")
def evaluations(parade):
    return {name: evaluation for outcome, _ in parade[1] for name, evaluation in by_name(outcome).items()}


@pytest.mark.parametrize("name", [*PASSING, "into", "reference"])
def test_passes(evaluations, name):
    evaluation = evaluations[name]
    assert evaluation.status is Status.PASSED, evaluation.extra["message"]
    assert evaluation.log == "" and evaluation.extra["message"] == "" and evaluation.verdict == "PASSED"
    performance = evaluation.performance
    assert [len(block) for block in performance.extra["samples_ms"]] == [3, 3] and performance.extra["block_trial"] == [0, 1]
    assert performance.latency_ms > 0 and performance.speedup_factor > 0 and performance.extra["timer"] == "host_clock"


@pytest.mark.parametrize("name", FAILING)
def test_fails_with_one_clear_line(evaluations, name):
    _, status, message = FAILING[name]
    evaluation = evaluations[name]
    assert evaluation.status.value == status and message in evaluation.extra["message"], evaluation.extra["message"]
    assert "\n" not in evaluation.extra["message"] and len(evaluation.extra["message"]) <= 500
    assert len(evaluation.log) <= 4000 and evaluation.performance is None


def test_log_of_a_failure_holds_the_traceback(evaluations):
    assert "Traceback" in evaluations["raises"].log and "second line" in evaluations["raises"].log


@pytest.mark.parametrize(
    ("source", "into", "expected"),
    [
        ("def run(x:\n", False, "SyntaxError: '(' was never closed"),
        ("raise SystemExit(5)\n", False, "SystemExit: 5"),
        ("def walk(x):\n    return x * 2\n", False, "has no attribute 'run'"),
        ("run = 7\n", False, "main.py::run: expected a function"),
        ("def run(x, y):\n    return x * 2\n", False, "main.py::run: expected a function of 1 positional arguments"),
        (toy.GOOD, True, "main.py::run: expected a function of 2 positional arguments"),
    ],
)
def test_what_cannot_be_built(source, into, expected, tmp_path):
    """In this process; that a BuildError is a COMPILE_ERROR, `imports` shows above."""
    session = Session(Definition.model_validate(toy.definition()), Path("."), "cpu", "trace", 0)
    with pytest.raises(BuildError) as caught:
        solution = toy.solution("mine", source, destination_passing_style=into)
        session.build(Solution.model_validate(solution), tmp_path)
    assert expected in str(caught.value)


def test_skipped_with_the_reason(parade):
    root, [(outcome, watcher), *_] = parade
    reasons = {skipped["solution"]: skipped["reason"] for skipped in outcome.skipped}
    assert reasons["lacking"] == "needs the package no-such-package==1.0, which is not installed"
    assert reasons["elsewhere"].startswith("runs on NVIDIA_B200; this is ")
    assert reasons["compiled"] == "written in cuda; this bench runs python and triton"
    assert watcher.evaluations == len(outcome.traces) - 1  # the reference's is none
    assert sorted(watcher.notes) == sorted(f"SKIPPED {name}: {reason}" for name, reason in reasons.items())
    assert json.loads((root / "out0" / "run.json").read_text())["skipped"] == outcome.skipped


def test_what_is_on_disk_is_what_came_out(parade):
    root, waves = parade
    for number, (outcome, watcher) in enumerate(waves):
        lines = toy.read_lines(toy.traces_path(root / f"out{number}"))
        assert [line["solution"] for line in lines] == [trace.solution for trace in outcome.traces]
        assert [line["evaluation"]["status"] for line in lines] == [trace.evaluation.status.value for trace in outcome.traces]
        assert {line["evaluation"]["extra"]["interleaved"] for line in lines} == {True}
        assert not outcome.complete(named=False)
        assert {name for name, _ in watcher.lines} == {line["solution"] for line in lines} - {"reference"}
        manifest = json.loads((root / f"out{number}" / "run.json").read_text())
        assert manifest["finished"] and manifest["error"] == "" and not manifest["interrupted"]


# --- what counts as done ----------------------------------------------------------------------------------------------


def test_everything_skipped_is_not_done(tmp_path):
    tree = toy.make_tree(tmp_path / "tree", {})
    toy.write(toy.solution_path(tree, "elsewhere"), toy.solution("elsewhere", target_hardware=["cuda"]))
    outcome = execute(plan_of(tree))
    assert outcome.traces == [] and not outcome.complete(named=False)


def test_a_skip_counts_where_it_was_named():
    outcome = runner.Outcome(skipped=[{"solution": "elsewhere"}], traces=[Trace.model_validate(PASSED)])
    assert outcome.complete(named=False) and not outcome.complete(named=True)
    assert not runner.Outcome(traces=outcome.traces, interrupted=True).complete(named=False)
    assert not runner.Outcome(traces=outcome.traces, error="No space left").complete(named=False)


def test_runs_that_start_at_once_leave_each_other_alone(tmp_path, monkeypatch):
    """In one result folder another run removes the probe; a scratch folder is no moment without the lock that it seems to have."""

    def write(path, content):
        write_whole(path, content).unlink()
        return path

    monkeypatch.setattr(runner, "write_whole", write)
    runner.prepare_output(tmp_path / "out")
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))
    locked = []

    def lock(*_):
        locked.append(list(tmp_path.glob(f"*/{scratch.LOCK}")))

    monkeypatch.setattr(scratch.fcntl, "flock", lock)
    with scratch.scratch_folder() as folder:
        assert locked == [[]] and (folder / scratch.LOCK).exists()


@pytest.mark.parametrize("extra", [None, {"key": ["a"]}, {"key": "a", "settings": None}, {"key": "a", "settings": ["full"]}])
def test_resuming_among_odd_traces(extra, tmp_path):
    """What has no key of a run is left alone, a folder with a trace file's name is said."""
    tree = toy.make_tree(tmp_path / "tree", {}, ())
    toy.write(toy.traces_path(tmp_path), PASSED | {"evaluation": PASSED["evaluation"] | {"extra": extra}})
    (tmp_path / "traces" / "d.jsonl").mkdir()
    watcher = Watcher()
    assert execute(plan_of(tree, tmp_path, resume=True), watcher).resumed == 0
    assert watcher.notes == [f"ignored: {tmp_path / 'traces' / 'd.jsonl'}: Is a directory"]


# --- the reference fails ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reference_that_fails_is_not_blamed_on_solutions_and_the_next_workload_goes_on(tmp_path):
    """The first workload's tensor is missing; then a definition's reference dies at its sixth call, a third can't be imported, and two
    give NaN, one of them when it is timed, beside which nothing is right."""
    tree = toy.make_tree(tmp_path / "tree", {"good": toy.GOOD, "raises": "def run(x):\n    raise ValueError\n"}, ())
    blob = {"x": {"type": "safetensors", "path": "x.safetensors", "tensor_key": "x"}}
    toy.write(toy.workloads_path(tree), toy.workload(8, "aaaa", inputs=blob), toy.workload(4, "bbbb"))
    mortal = "import os\ncalls = []\ndef run(x):\n    calls.append(x)\n    if len(calls) == 6: os.kill(os.getpid(), 9)\n    return x * 2\n"
    late = "calls = []\ndef run(x):\n    calls.append(1)\n    return x * (2 if len(calls) <= 3 else float('inf'))\n"  # timed calls
    broken, nan = "import no_such_package\ndef run(x): return x\n", "def run(x): return x * float('nan')\n"
    for name, source in (("mortal", mortal), ("broken", broken), ("nan", nan), ("late", late)):
        toy.write(toy.definition_path(tree).with_name(f"{name}.json"), toy.definition(name=name, reference=source))
        toy.write(toy.workloads_path(tree).with_name(f"{name}.jsonl"), toy.workload(4, "cccc") | {"definition": name})
        toy.write(toy.solution_path(tree, name), toy.solution(f"good_{name}") | {"definition": name})
    outcome = execute(plan_of(tree, tmp_path / "out"))
    found = {(trace.workload.uuid, trace.solution): trace.evaluation for trace in outcome.traces}
    said = {key: (evaluation.verdict, evaluation.extra["message"]) for key, evaluation in found.items()}

    missing = f"DatasetError: {tree / 'x.safetensors'}: missing, and workload aaaa has no recipe to make it from"
    assert said["aaaa", "reference"] == ("RUNTIME_ERROR", missing)
    assert said["aaaa", "good"] == ("REFERENCE_FAILED", f"the reference failed: {missing}")
    assert found["bbbb", "good"].status is Status.PASSED, said["bbbb", "good"]
    assert said["bbbb", "raises"] == ("RUNTIME_ERROR", "ValueError:")
    assert said["cccc", "good_mortal"] == ("REFERENCE_FAILED", "the reference failed: the process died of SIGKILL (out of memory?)")
    nothing = "the reference failed: ValueError: y: 256 of 256 elements are NaN or infinite: nothing can be held against it"
    assert said["cccc", "good_nan"] == said["cccc", "good_late"] == ("REFERENCE_FAILED", nothing)
    assert said["cccc", "good_broken"][1] == "the reference failed: ModuleNotFoundError: No module named 'no_such_package'"


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_scratch_folder_is_not_blamed_on_a_solution(tmp_path, most_bytes_a_file):
    """As a limit on files' size makes it; a solution that sets the limit for itself is to blame, whatever its process says."""
    itself = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n" + toy.GOOD
    tree = toy.make_tree(tmp_path / "tree", {"good": toy.GOOD, "limits_itself": itself}, [(4, "aaaa"), (4096, "bbbb")])
    outcome = execute(plan_of(tree))
    statuses = {(trace.workload.uuid, trace.solution): trace.evaluation.status.value for trace in outcome.traces}
    assert statuses["bbbb", "good"] == "PASSED" and statuses["bbbb", "limits_itself"] == "RUNTIME_ERROR" and outcome.error == ""

    with most_bytes_a_file(300_000):
        outcome = execute(plan_of(tree, tmp_path / "out"))
    assert {trace.workload.uuid for trace in outcome.traces} == {"aaaa"} and outcome.error.endswith(": File too large")
    assert len(read_traces(tmp_path / "out")[0]) == len(outcome.traces)


# --- several workloads ------------------------------------------------------------------------------------------------


def test_a_solution_that_cannot_be_imported_is_tried_once_and_a_crash_costs_one_workload(tmp_path):
    log = tmp_path / "imports"
    sources = {
        "import_fails": f"open({str(log)!r}, 'a').write('import ')\nraise RuntimeError('no')\n",
        "crashes_once": "import os\ndef run(x):\n    if len(x) == 8: os.abort()\n    return x * 2\n",
        "good": toy.GOOD,
    }
    tree = toy.make_tree(tmp_path / "tree", sources, [(8, "aaaa"), (9, "bbbb"), (10, "cccc")])
    outcome = execute(plan_of(tree))
    assert log.read_text() == "import "
    found = {(trace.workload.uuid, trace.solution): trace.evaluation for trace in outcome.traces}
    assert [found[uuid, "import_fails"].status.value for uuid in ("aaaa", "bbbb", "cccc")] == ["COMPILE_ERROR"] * 3
    assert all("RuntimeError: no" in found[uuid, "import_fails"].log for uuid in ("aaaa", "cccc"))
    assert [found[uuid, "crashes_once"].status.value for uuid in ("aaaa", "bbbb", "cccc")] == ["RUNTIME_ERROR", "PASSED", "PASSED"]
    assert all(found[uuid, "good"].status is Status.PASSED for uuid in ("aaaa", "bbbb", "cccc"))


def test_a_solution_may_change_the_folder_it_runs_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = f"import os\ndef run(x):\n    os.chdir({str(tmp_path / 'tree')!r})\n    return x * 2\n"
    tree = toy.make_tree(Path("tree"), {"moves": source}, ())
    blob = {"x": {"type": "safetensors", "path": "x.safetensors", "tensor_key": "x"}}
    toy.write(toy.workloads_path(tree), *(toy.workload(8, uuid, inputs=blob) for uuid in ("aaaa", "bbbb")))
    save_file({"x": np.ones((8, 64), np.float32)}, tree / "x.safetensors")
    outcome = execute(plan_of(tree))
    assert outcome.complete(named=True), [trace.evaluation.extra["message"] for trace in outcome.traces]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rounds_where_contenders_do_not_fit_together(tmp_path, monkeypatch):
    """The small definition of this project with room for one process at a time; each is warmed again before it is timed."""
    log = tmp_path / "calls"
    dataset = load_dataset(None)
    name = TINY.definition_name
    solution = dataset.solutions[name, "torch_grouped"]
    source = solution.sources[0]
    counted = source.content + f"\n_run = run\ndef run(*args):\n    open({str(log)!r}, 'a').write('.')\n    return _run(*args)\n"
    solution = solution.model_copy(update={"sources": [source.model_copy(update={"content": counted})]})
    monkeypatch.setattr(runner.Run, "_capacity", lambda *_: 1 << 30)
    settings = Settings(warmup_runs=3, iterations=6, num_trials=1)
    watcher = Watcher()
    outcome = execute(Plan(dataset, {name: dataset.workloads[name][:1]}, {name: [solution]}, settings, tmp_path / "out"), watcher)
    assert [trace.evaluation.status for trace in outcome.traces] == [Status.PASSED] * 2, by_name(outcome)["torch_grouped"].extra["message"]
    assert all(trace.evaluation.extra["interleaved"] is False for trace in outcome.traces)
    assert any("measured in rounds, one process at a time, not interleaved" in note for note in watcher.notes)
    assert [len(block) for block in by_name(outcome)["torch_grouped"].performance.extra["samples_ms"]] == [5, 1]
    assert len(log.read_text()) == 1 + 3 + 6  # checked once, warmed once (in the process that is timed), timed
    assert by_name(outcome)["torch_grouped"].extra["pairs"] == dataset.workloads[name][0].recipe["pairs"]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("together", "workloads"), [(True, ((8, "aaaa"), (9, "bbbb"))), pytest.param(False, ((8, "aaaa"),), marks=pytest.mark.slow)]
)
def test_fresh_processes(together, workloads, tmp_path, monkeypatch):
    """Every trial of every workload in processes of its own, warmed up there."""
    log = tmp_path / "calls"
    source = f"import os\ndef run(x):\n    open({str(log)!r}, 'a').write(f'{{os.getpid()}} ')\n    return x * 2\n"
    tree = toy.make_tree(tmp_path / "tree", {"good": source}, workloads)
    if not together:
        monkeypatch.setattr(runner.Run, "_capacity", lambda *_: 1)
    settings = dataclasses.replace(QUICK, warmup_runs=2, iterations=6, num_trials=2, fresh_processes=True)
    outcome = execute(plan_of(tree, settings=settings))
    assert outcome.complete(named=True), by_name(outcome)["good"].extra["message"]
    calls = list(collections.Counter(log.read_text().split()).values())
    timed = 2 + 6  # warmed up and timed; each trial's first output is checked ahead of all
    assert calls == len(workloads) * ([2 + timed, timed] if together else [2, timed, timed])
    evaluation = by_name(outcome)["good"]
    assert evaluation.performance.extra["block_trial"] == [0, 0, 1, 1]
    assert evaluation.extra["settings"]["fresh_processes"] is True


@pytest.mark.slow
def test_fresh_processes_have_the_whole_timeout_each(tmp_path):
    tree = toy.make_tree(tmp_path / "tree", {"slow": "import time\ntime.sleep(2)\n" + toy.GOOD})
    settings = dataclasses.replace(QUICK, num_trials=3, timeout=5.0, fresh_processes=True)
    assert execute(plan_of(tree, settings=settings)).complete(named=True)


def test_fresh_processes_in_keys_and_notes(tmp_path):
    """Without the switch keys are as they were; a result folder that was made with it says so, and the other way about."""
    fresh = dataclasses.replace(QUICK, fresh_processes=True)
    assert "fresh_processes" not in QUICK.identity() and fresh.identity() == QUICK.identity() | {"fresh_processes": True}
    tree = toy.make_tree(tmp_path / "tree", {"good": toy.GOOD})
    for before, now, said in [(fresh, QUICK, "True (now False)"), (QUICK, fresh, "False (now True)"), (QUICK, QUICK, "")]:
        run = Run(plan_of(tree, settings=now), Watcher())
        settings = before.identity() | {"timeout": before.timeout}
        run._kept = {"key": SimpleNamespace(evaluation=SimpleNamespace(extra={"settings": settings}))}
        assert run._settings_that_differ() == (said and f"fresh_processes {said}")


def test_drift_is_no_difference_of_processes():
    blocks = [[1.0 + 1e-4 * n for n in range(5)]] * 4 + [[1.1 + 1e-4 * n for n in range(5)]] * 4
    assert record._drift(blocks, []).drifted and not record._drift(blocks, [0] * 4 + [1] * 4).drifted
    risen = [[1.0 + 0.02 * block + 1e-4 * n for n in range(5)] for block in range(4)]
    assert record._drift(blocks[:4] + risen, [0] * 4 + [1] * 4).drifted


def test_a_child_that_left_its_group_does_not_hold_the_run_up(tmp_path):
    """It can't be killed with its group; the run ends all the same, and in time."""
    pid = tmp_path / "pid"
    source = (
        "import subprocess\n"
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '30'], start_new_session=True).pid))\n" + toy.GOOD
    )
    tree = toy.make_tree(tmp_path / "tree", {"daemon": source})
    start = time.monotonic()
    outcome = execute(plan_of(tree))
    assert outcome.complete(named=True) and time.monotonic() - start < 25
    os.kill(int(pid.read_text()), 9)
