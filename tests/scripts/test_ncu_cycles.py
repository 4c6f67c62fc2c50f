"""Cycles by role and part, from a page of samples that is made up."""

import lzma
import subprocess
import sys

import ncu_cycles
import pytest

WAIT = "WARPGROUP.DEPBAR.LE gsb0"
LOOP = ["UIADD3", "BAR.SYNC", "QGMMA", "QGMMA", "BAR.ARV", WAIT, "FFMA", "QGMMA", "LDG", WAIT, "FFMA"]


@pytest.fixture
def page(tmp_path):
    """Eight warps of two programs: four go ten times through a loop of two products, four wait."""
    rows = ["MOV,8,0", *(f"{text},{80 - (n == 10)},{10 * (n + 1)}" for n, text in enumerate(LOOP)), "NANOSLEEP,800,660"]
    path = tmp_path / "page.csv"
    path.write_text('"Kernel Name","made up",\nSource,Instructions Executed,# Samples\n' + "\n".join(rows) + "\n")
    return path


def test_a_loop_by_its_parts(page):
    head, loop, wait = ncu_cycles.table(ncu_cycles.read(page), 66, 8, 2, 1)
    assert "cycles" in head
    # a role's 660 samples are 66 kcycles, so a sample 100 cycles, of ten iterations
    parts = "before 300, issued 700, beside 500, waited 600, before 700, issued 800, beside 900, waited 1000, behind 1100"
    assert loop == f"1 to 11, UIADD3 | 10 | 66.0 | 6600: {parts}"
    assert wait == "12 to 12, NANOSLEEP | 100 | 66.0 | 660"


def test_compressed(page):
    packed = page.with_suffix(".csv.xz")
    packed.write_bytes(lzma.compress(page.read_bytes()))
    assert ncu_cycles.read(packed) == ncu_cycles.read(page)


def test_something_else_is_refused(page):
    page.write_text("==ERROR== option is not applicable\n")
    done = subprocess.run([sys.executable, ncu_cycles.__file__, page, "--kcycles", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "expected a page `source` of ncu as CSV" in done.stderr
