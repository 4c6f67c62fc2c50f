"""What a run keeps when it is cut off, and what `--resume` does afterwards. The parent is a process of its own."""

import dataclasses
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toy_tree as toy

from blockmoe.bench import runner, scratch
from blockmoe.bench.contender import Contender, reference_solution
from blockmoe.bench.dataset import Dataset, read_traces
from blockmoe.bench.interrupts import SIGNALS, held, interruptible
from blockmoe.bench.progress import TerminalObserver
from blockmoe.bench.record import resume_key
from blockmoe.bench.schema import Definition, Solution
from blockmoe.bench.settings import Settings

SLOW = "import time\ndef run(x):\n    time.sleep(0.05 if len(x) < 10 else 0.5)\n    return x * 2\n"
OPTIONS = ["--iterations", "4", "--num-trials", "1", "--device", "cpu"]


@pytest.fixture
def tree(tmp_path):
    """Two quick workloads, then one that gives time to strike."""
    return toy.make_tree(tmp_path / "tree", {"slow": SLOW}, [(8, "aaaa"), (9, "bbbb"), (32, "cccc")])


def start(folder, *arguments, **more):
    command = [sys.executable, "-m", "blockmoe", "run", "--local", str(folder / "tree"), "--output", str(folder / "out")]
    return subprocess.Popen([*command, *OPTIONS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, **more)


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
    return found


def finished(folder):
    path = toy.traces_path(folder / "out")
    return path.read_text().count("\n") if path.exists() else 0


def in_the_third_workload(folder, run):
    """Wait until two workloads are on disk; the workers' pids."""
    wait_for(lambda: finished(folder) >= 4 or run.poll() is not None)
    assert run.poll() is None, run.communicate()
    return wait_for(lambda: len(pids := toy.workers_of(run.pid)) == 2 and pids)


def traces(folder):
    found, faults = read_traces(folder / "out")
    return [(trace.workload.uuid, trace.solution, trace.evaluation.status.value, trace.evaluation.extra["run"]) for trace in found], faults


@pytest.mark.slow
def test_parent_killed(tree, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run = start(tmp_path)
    workers = in_the_third_workload(tmp_path, run)
    run.kill()
    run.communicate()
    wait_for(lambda: not any(toy.alive(pid) for pid in workers), 5.0)
    before, faults = traces(tmp_path)
    assert [entry[:3] for entry in before] == [(uuid, name, "PASSED") for uuid in ("aaaa", "bbbb") for name in ("reference", "slow")]
    assert faults == []
    left_behind = {*scratch._memory().glob(f"{scratch.PREFIX}*"), *temporary.glob(f"{scratch.PREFIX}*")}
    assert len(list(temporary.glob(f"{scratch.PREFIX}*/solution-*"))) == 2  # the workers' sources

    with toy.traces_path(tmp_path / "out").open("a") as file:
        file.write('{"definition": "scale_w64", "workl')  # as if it had been killed in mid-line
    run = start(tmp_path, "--resume")
    said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    after, faults = traces(tmp_path)
    assert after[:4] == before and [entry[:3] for entry in after[4:]] == [("cccc", "reference", "PASSED"), ("cccc", "slow", "PASSED")]
    assert len(faults) == 1 and f"ignored: {faults[0]}" in said[1]
    mine = [path for path in left_behind if not path.exists()]
    assert mine, "the killed run's scratch folder should have gone with the next run"
    assert not list(temporary.iterdir())


def test_interrupted_and_resumed_by_the_hint(tree, tmp_path):
    run = start(tmp_path)
    workers = in_the_third_workload(tmp_path, run)
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGINT)  # impatience does not cut the cleaning up short
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert not any(toy.alive(pid) for pid in workers)
    assert "Traceback" not in err and "slow" in out  # the table of what there is
    before, faults = traces(tmp_path)
    assert len(before) == 4 and not faults and (tmp_path / "out" / "report.md").exists()
    hint = re.search(r"interrupted; 4 traces are kept. To go on: blockmoe (run .*)$", err, re.MULTILINE).group(1)
    again = subprocess.run([sys.executable, "-m", "blockmoe", *shlex.split(hint)], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after, _ = traces(tmp_path)
    assert after[:4] == before and len(after) == 6


def test_hang_up(tree, tmp_path):
    """As a terminal's end, it is an interrupt; under nohup, as these tests may be, it is nothing."""
    run = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    in_the_third_workload(tmp_path, run)
    run.send_signal(signal.SIGHUP)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "blockmoe: interrupted; 4 traces are kept" in err
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["interrupted"] and about["finished"] and (tmp_path / "out" / "report.md").exists()


def test_hang_up_that_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, handler)
            with interruptible():
                assert (signal.getsignal(signal.SIGHUP) is handler) == (handler is signal.SIG_IGN)
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def taken():
    """Ctrl-C, which a shell has what it runs in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupts_are_held_in_the_main_thread_alone(taken):
    def in_a_thread():
        with held():
            return [signal.getsignal(number) for number in SIGNALS]

    before = [signal.getsignal(number) for number in SIGNALS]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(in_a_thread).result() == before
    assert in_a_thread()[0] is not before[0]
    with pytest.raises(KeyboardInterrupt), held():
        os.kill(os.getpid(), signal.SIGINT)
        before.clear()
    assert not before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_group_has_found_is_saved_whole(tree, tmp_path, monkeypatch, number):
    """An interrupt while its first trace is on its way to the disk waits for the last."""
    dataset = Dataset.load([tree])
    settings = Settings(device="cpu", iterations=2, num_trials=1)
    plan = runner.Plan(dataset, dataset.workloads, {toy.NAME: dataset.solutions_of(toy.NAME)}, settings, tmp_path / "out")
    append = runner.append_trace

    def struck(*arguments):
        os.kill(os.getpid(), number)
        append(*arguments)

    monkeypatch.setattr(runner, "append_trace", struck)
    handlers = [signal.getsignal(one) for one in SIGNALS]
    with interruptible(), TerminalObserver("ERROR") as observer:
        outcome = runner.Run(plan, observer).execute()
    assert outcome.interrupted and [trace.solution for trace in outcome.traces] == ["reference", "slow"]
    assert [entry[:2] for entry in traces(tmp_path)[0]] == [("aaaa", "reference"), ("aaaa", "slow")]
    assert handlers == [signal.getsignal(one) for one in SIGNALS]


@pytest.mark.slow
def test_worker_killed_in_a_timed_block(tmp_path):
    """From outside, as the kernel's out-of-memory killer does; the others and the next workload go on."""
    pid = tmp_path / "pid"
    victim = SLOW + f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    toy.make_tree(tmp_path / "tree", {"victim": victim, "good": toy.GOOD}, [(32, "aaaa"), (8, "bbbb")])
    run = start(tmp_path, "--log-level", "debug", "--iterations", "12")
    for line in run.stderr:
        if "trial 1" in line:
            os.kill(int(pid.read_text()), signal.SIGKILL)
            break
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 1
    assert "victim: RUNTIME_ERROR  the process died of SIGKILL (out of memory?)" in err
    found = [entry[:3] for entry in traces(tmp_path)[0]]
    assert found == [
        ("aaaa", "reference", "PASSED"), ("aaaa", "good", "PASSED"), ("aaaa", "victim", "RUNTIME_ERROR"),
        ("bbbb", "reference", "PASSED"), ("bbbb", "good", "PASSED"), ("bbbb", "victim", "PASSED"),
    ]  # fmt: skip


@pytest.mark.slow
def test_full_disk(tree, tmp_path):
    """A limit on file size stands for it: it too fails a write in the middle."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    run = start(tmp_path, preexec_fn=limit)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1 and "Traceback" not in err
    path = toy.traces_path(tmp_path / "out")
    assert f"blockmoe: {path}: File too large; finished evaluations are kept. To go on: blockmoe run " in err
    before, faults = traces(tmp_path)
    assert not faults and 2 <= len(before) < 6 and path.read_text().endswith("\n")
    run = start(tmp_path, "--resume")
    assert run.communicate(timeout=120) and run.returncode == 0
    after, _ = traces(tmp_path)
    assert after[: len(before)] == before and {entry[0] for entry in after if entry[1] == "slow"} == {"aaaa", "bbbb", "cccc"}


@pytest.mark.slow
def test_retry_failed(tmp_path):
    switch = tmp_path / "works"
    toy.make_tree(tmp_path / "tree", {"moody": f"import os\nif not os.path.exists({str(switch)!r}): raise OSError('no')\n" + toy.GOOD})
    assert start(tmp_path).wait(60) == 1
    switch.touch()
    assert start(tmp_path, "--resume").wait(60) == 1  # a failure is a result
    assert [entry[2] for entry in traces(tmp_path)[0]] == ["COMPILE_ERROR"]
    assert start(tmp_path, "--resume", "--retry-failed").wait(60) == 0
    assert [entry[1:3] for entry in traces(tmp_path)[0]] == [("moody", "COMPILE_ERROR"), ("reference", "PASSED"), ("moody", "PASSED")]
    other = start(tmp_path, "--resume", "--iterations", "5")
    said = other.communicate(timeout=60)[1]
    assert other.returncode == 0 and "the earlier run had iterations 4 (now 5)" in " ".join(said.split())


def test_key_changes_with_all_that_an_evaluation_depends_on(tmp_path):
    dataset = Dataset.load([toy.make_tree(tmp_path, {"good": toy.GOOD}, [(8, "aaaa"), (9, "bbbb")])])
    definition, [solution], settings = dataset.definitions[toy.NAME], dataset.solutions_of(toy.NAME), Settings()
    workload, other = (workload.to_json() for workload in dataset.workloads[toy.NAME])

    def key(definition=definition, solution=solution, workload=workload, settings=settings, hardware="H100"):
        return resume_key(Contender(definition, solution, "", settings, Path()), workload, settings, hardware)

    same = {key(), key(settings=dataclasses.replace(settings, timeout=1.0)), key(settings=dataclasses.replace(settings, device="cpu"))}
    assert len(same) == 1
    changes = {
        "rtol": 0.3, "atol": 0.2, "required_matched_ratio": 0.9, "warmup_runs": 1, "iterations": 2, "num_trials": 1,
        "inputs": "realistic", "seed": 1, "device": "cuda:1", "cuda_graph": False, "cupti": False,
    }  # fmt: skip
    others = {key(settings=dataclasses.replace(settings, **{name: value})) for name, value in changes.items()}
    others.add(key(workload=other))
    others.add(key(hardware="H200"))
    others.add(key(solution=reference_solution(definition)))
    others.add(key(solution=Solution.model_validate(toy.solution("good", toy.GOOD + "# other\n"))))
    others.add(key(solution=Solution.model_validate(toy.solution("good", destination_passing_style=True))))
    others.add(key(definition=Definition.model_validate(toy.definition(reference="def run(x):\n    return 2 * x\n"))))
    assert len(others - same) == len(changes) + 6
    on = [key(settings=dataclasses.replace(settings, device=device)) for device in ("cuda", "cuda:1")]
    assert on[0] == on[1]
