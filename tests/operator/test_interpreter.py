"""Every kernel's arithmetic on the CPU: tests/operator/interpreted in child sessions under TRITON_INTERPRET=1."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file, interpreted):
    interpreted(file)
