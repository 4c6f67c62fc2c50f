"""The examples run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=EXAMPLES.parent, env=environment)


def test_deepseek_moe_layer():
    done = run("examples/deepseek_moe_layer.py", "cpu")
    assert (done.returncode, done.stderr) == (0, "") and "relative L2 between plain float32 and fused FP8 experts: 0.0" in done.stdout


@pytest.mark.slow
def test_expert_parallel():
    done = run("examples/expert_parallel.py", "--ranks", "2", "--device", "cpu")
    assert done.returncode == 0 and sorted(line[:18] for line in done.stdout.splitlines()) == ["cpu, experts 0 on:", "cpu, experts 16 on"]


def test_more_ranks_than_gpus():
    done = run("examples/expert_parallel.py", "--ranks", "3")
    assert done.returncode == 2 and "argument --ranks: invalid choice: 3" in done.stderr
