"""The examples run on a CPU, with and without Triton: torch's CPU builds come without it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    result = subprocess.run([sys.executable, str(path), "cpu"], capture_output=True, text=True)
    assert result.returncode == 0 and "relative L2" in result.stdout, result.stderr[-2000:]


def test_without_triton() -> None:
    path = next(path for path in EXAMPLES if path.stem == "deepseek_moe_layer")
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, str(path), "cpu"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
