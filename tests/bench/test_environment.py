"""What decides whether a solution can run here, the settings, and how a run shows itself."""

import dataclasses
import io
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_tree as toy
from rich.console import Console

from blockmoe.bench.environment import Hardware, commit, cpu_name, gpu_state, host_memory
from blockmoe.bench.progress import TerminalObserver
from blockmoe.bench.schema import Solution, Trace, Workload
from blockmoe.bench.settings import Settings, preset

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 90)
CPU = Hardware("cpu", "AMD EPYC (2 cores)")


def lacks(hardware, **spec):
    return hardware.lacks(Solution.model_validate(toy.solution("mine", **spec)))


@pytest.mark.parametrize("target", ["cuda", "gpu", "GPU", "NVIDIA_H100", "H100", "nvidia h100", "sm_90", "sm90a", "SM_90A"])
def test_targets_of_an_h100(target):
    assert lacks(H100, target_hardware=[target]) is None
    assert lacks(CPU, target_hardware=[target]) == f"runs on {target}; this is AMD EPYC (2 cores)"
    assert lacks(CPU, target_hardware=[target, "cpu"]) is None


@pytest.mark.parametrize("target", ["cpu", "CPU", "B200", "NVIDIA_A100", "NVIDIA_H10", "H1", "sm_100", "sm_80"])
def test_targets_of_other_machines(target):
    assert lacks(H100, target_hardware=[target]) == f"runs on {target}; this is NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"])
def test_names_with_more_words(name):
    assert lacks(Hardware("cuda", name, 80), target_hardware=["NVIDIA_A100"]) is None
    assert lacks(Hardware("cuda", name, 80), target_hardware=["NVIDIA_A10"]) is not None


def test_the_gpu_is_asked_for_by_its_uuid(monkeypatch):
    """CUDA's first device need not be nvidia-smi's; where that knows no such one its number has to do."""
    asked = []

    def run(command, **_):
        asked.append(command[1])
        if command[1] == "--id=GPU-unknown":
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout="1980, 2619\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_state(0, "1-2") and gpu_state(1, "unknown") and gpu_state(2)
    assert asked == ["--id=GPU-1-2", "--id=GPU-unknown", "--id=1", "--id=2"]


def test_a_container_has_what_it_can_reclaim(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 200000000 kB\nMemAvailable: 190000000 kB\n"}
    files |= {"/sys/fs/cgroup/memory.max": "64000000000\n", "/sys/fs/cgroup/memory.current": "63000000000\n"}
    files |= {"/sys/fs/cgroup/memory.stat": "anon 3000000000\ninactive_file 50000000000\nslab_reclaimable 1000000000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert host_memory() == (52_000_000_000, 64_000_000_000)


HERE = ["torch", "torch>=2.0", "torch==2.1", "torch~=2.1", "torch<99", "torch[opt] != 1", "Torch", "pytest-timeout"]


@pytest.mark.parametrize("requirement", HERE)
def test_packages_that_are_here(requirement):
    assert lacks(CPU, dependencies=[requirement]) is None


@pytest.mark.parametrize("requirement", ["no-such-package", "no_such.thing>=1", "~", "no-such-package @ git+https://x/y"])
def test_packages_that_are_not(requirement):
    assert lacks(CPU, dependencies=["torch", requirement]) == f"needs the package {requirement}, which is not installed"


def test_this_machine():
    available, total = host_memory()
    assert 0 < available <= total and "core" in cpu_name()
    assert commit() is None or len(commit().rstrip("+")) == 12
    assert isinstance(gpu_state(), dict)


def test_settings_in_blocks_and_presets():
    assert [Settings(iterations=count).blocks() for count in (12, 5, 1)] == [[5, 5, 2], [5], [1]]
    assert preset("full", "cuda:1") == Settings(device="cuda:1") and preset("full", "cuda:1").device_index == 1
    assert (preset("quick", "cuda").iterations, preset("quick", "cpu").warmup_runs) == (10, 1)
    identity = Settings(device="cuda:1").identity()
    assert identity["device"] == "cuda" and "timeout" not in identity


def finished(status="PASSED", message="", **performance):
    correctness = {"max_relative_error": 0.0, "max_absolute_error": 0.0}
    evaluation = {"status": status, "environment": {"hardware": "cpu"}, "timestamp": "now", "extra": {"message": message}}
    if status == "PASSED":
        evaluation |= {"correctness": correctness, "performance": {"latency_ms": 1.25, "speedup_factor": 3.0} | performance}
    return Trace.model_validate(toy.workload(8, "aaaa-first") | {"solution": "mine[0]", "evaluation": evaluation})


def shown(level, terminal=False):
    """What an observer prints of one short run."""
    stream = io.StringIO()
    with TerminalObserver(level) as observer:
        observer.console = Console(file=stream, force_terminal=terminal, width=100, highlight=False, color_system=None)
        observer.begin(2)
        observer.workload(toy.NAME, Workload.model_validate(toy.workload(8, "aaaa-first")["workload"]), 1, 1)
        observer.stage("checking mine[0] [/red]")
        observer.note("a note [/red]")
        observer.finished(finished())
        observer.finished(finished("RUNTIME_ERROR", "ValueError: [bold]no"))
    return stream.getvalue()


def test_lines_by_level():
    lines = {level: [line.split("] ", 1)[1] for line in shown(level).splitlines()] for level in ("DEBUG", "INFO", "WARNING", "ERROR")}
    failed = "aaaa-fir T=8      mine[0]: RUNTIME_ERROR  ValueError: [bold]no"
    assert lines["ERROR"] == [failed] and lines["WARNING"] == ["a note [/red]", failed]
    assert lines["INFO"] == ["2 evaluations", "a note [/red]", "aaaa-fir T=8      mine[0]: PASSED  1.25 ms, 3.00x", failed]
    assert "aaaa-fir T=8 (1/1) checking mine[0] [/red]" in lines["DEBUG"] and len(lines["DEBUG"]) == 6


def test_live_line_on_a_terminal():
    text = shown("INFO", terminal=True)
    assert "checking mine[0]" in text and "2/2" in text and "mine[0]: PASSED" in text


def test_settings_are_checked_field_by_field():
    for name, value in (("timeout", 0), ("rtol", float("inf")), ("iterations", 0), ("inputs", "other"), ("device", "cuda:x"), ("seed", -1)):
        with pytest.raises(ValueError, match=f"--{name}: expected "):
            dataclasses.replace(Settings(), **{name: value})
