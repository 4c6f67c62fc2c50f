"""Every kernel's arithmetic on the CPU: tests/operator/interpreted in child sessions under TRITON_INTERPRET=1."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
QUICK = [pytest.param(file, id=file.stem) for file in FILES]
SLOW = [
    pytest.param(file, marks=pytest.mark.slow, id=f"{file.stem}, slow")
    for file in FILES
    if "mark.slow" in file.read_text(encoding="utf-8")
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", [*QUICK, *SLOW])
def test_interpreted(file, interpreted):
    interpreted(file)
