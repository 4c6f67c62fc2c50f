"""Runs attackers beside an honest contender through the real bench, in real worker processes."""

from pathlib import Path

import pytest

from blockmoe.bench.dataset import Dataset, bundled_root, bundled_solutions
from blockmoe.bench.pack import pack
from blockmoe.bench.runner import Plan, Run
from blockmoe.bench.schema import Solution
from blockmoe.bench.settings import Settings
from blockmoe.geometry import TINY

HERE = Path(__file__).parent
TOY = "toy_expert_sum"


class Silent:
    """An observer that says nothing."""

    def __getattr__(self, name):
        return lambda *arguments: None


def source(name: str, file: str | None = None) -> dict:
    return {"path": file or f"{name}.py", "content": (HERE / "attackers" / f"{name}.py").read_text()}


def toy_solution(name: str) -> Solution:
    """An attacker's file, with the honest one beside it. `run_into` takes the destination as an argument."""
    sources = [source(name)] if name == "honest" else [source(name), source("honest")]
    into = "def run_into(" in sources[0]["content"]
    return solution(TOY, name, f"{name}.py::{'run_into' if into else 'run'}", sources, into)


def tiny_solution(name: str) -> Solution:
    """torch_grouped for the small layer; an attacker's file goes in front of it."""
    honest = pack(bundled_solutions() / "torch_grouped", TINY.definition_name)
    sources = [one.model_dump() for one in honest.sources]
    if name == "honest":
        return solution(TINY.definition_name, name, "main.py::run", sources, False)
    return solution(TINY.definition_name, name, f"{name}.py::run", [source(name), *sources], False)


def solution(definition: str, name: str, entry_point: str, sources: list[dict], into: bool) -> Solution:
    spec = {
        "language": "python", "target_hardware": ["cpu", "cuda"], "entry_point": entry_point, "destination_passing_style": into,
    }  # fmt: skip
    return Solution.model_validate({"name": name, "definition": definition, "author": "tests", "spec": spec, "sources": sources})


@pytest.fixture(scope="module")
def evaluate():
    """(names, device, timeout) to evaluations by name, on the toy or on the small layer of the bundled dataset."""

    def run(names, device="cpu", timeout=60.0, tiny=False):
        dataset = Dataset.load([bundled_root() if tiny else HERE / "tree"])
        definition = TINY.definition_name if tiny else TOY
        workload = next(one for one in dataset.workloads[definition] if not tiny or one.axes["seq_len"] == 64)
        settings = Settings(device=device, iterations=5, num_trials=2, warmup_runs=1, timeout=timeout)
        solutions = [tiny_solution(name) if tiny else toy_solution(name) for name in names]
        plan = Plan(dataset, {definition: [workload]}, {definition: solutions}, settings, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_capacity", lambda *_: 1 << 50)  # the estimates leave each process a GiB; these need a tenth
            outcome = Run(plan, Silent()).execute()
        assert not outcome.error
        return {trace.solution: trace.evaluation for trace in outcome.traces}

    return run
