"""The examples run on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    result = subprocess.run([sys.executable, str(path), "cpu"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
