"""Counters over time, from a page that is made up and from one that is committed."""

import lzma
import subprocess
import sys
from pathlib import Path

import ncu_over_time
import pytest

COMMITTED = Path(__file__).parents[2] / "results/h200/ncu/t901-flight.csv.xz"
SAMPLES = {"reads": "0; 0; 50; 70; 0", "writes": "0; 0; 5; 0; 0", "instructions": "0; 1; 2; 3; 0", "products": "0; 0; 4; 8; 0"}


@pytest.fixture
def page(tmp_path):
    """Five samples, in three of which programs run."""
    values = {f"A.{ncu_over_time.COLUMNS[name]}_of_peak": f"({text})" for name, text in SAMPLES.items()}
    values |= {"B.sm__cycles_active.avg": '"(0; 500; 1,000; 250; 0)"', ncu_over_time.INTERVAL: "1.50 (1.50)"}
    path = tmp_path / "raw.csv"
    path.write_text(f"{','.join(values)}\n{',' * (len(values) - 1)}\n{','.join(values.values())}\n")
    return path


def test_samples_while_programs_run(page):
    lines = ncu_over_time.table(*ncu_over_time.read(page), 3)
    assert lines[0] == "us | reads | writes | instructions | products | at work"
    assert lines[1:4] == [
        "0.0 | 0.0 | 0.0 | 1.0 | 0.0 | 50.0",
        "1.5 | 50.0 | 5.0 | 2.0 | 4.0 | 100.0",
        "3.0 | 70.0 | 0.0 | 3.0 | 8.0 | 25.0",
    ]
    assert lines[4:] == ["mean of reads over 3 us from 1.5 us on: 60.0"]
    packed = page.with_suffix(".csv.xz")
    packed.write_bytes(lzma.compress(page.read_bytes()))
    assert ncu_over_time.read(packed) == ncu_over_time.read(page)


def test_a_committed_page():
    interval, found = ncu_over_time.read(COMMITTED)
    assert interval == 1.5 and len({len(samples) for samples in found.values()}) == 1


@pytest.mark.parametrize("text", ["", "a\nb\n", "a,b\n,\n1,2\n", f"{ncu_over_time.INTERVAL}\nus\n1.5\n"])
def test_something_else_is_refused_in_one_line(page, text):
    page.write_text(text)
    for arguments in ([page], [page.parent / "none.csv"], [COMMITTED, "--until", "0"]):
        done = subprocess.run([sys.executable, ncu_over_time.__file__, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
