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


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("==ERROR== option is not applicable\n", "none"),
        ("Source,# Samples\nMOV,1\n", "none"),
        ("Source,Instructions Executed,# Samples\nMOV,8\n", "list index"),
        ('Source,Instructions Executed,# Samples\nMOV,"1,000",1\n', "invalid literal"),
        ("Source,Instructions Executed,# Samples\nMOV,8,0\n", "no samples"),
    ],
)
def test_something_else_is_refused(page, text, got):
    page.write_text(text)
    with pytest.raises(ValueError, match=f"page.csv: expected a page `source` of ncu as CSV, .*; got {got}"):
        ncu_cycles.read(page)


def test_refused_in_one_line(page):
    for arguments in ([page, "--kcycles", "0"], [page, "--kcycles", "1", "--warps", "0"], [page.parent / "none.csv", "--kcycles", "1"]):
        done = subprocess.run([sys.executable, ncu_cycles.__file__, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_not_compressed_as_it_says(page):
    page.rename(page.with_suffix(".csv.xz"))
    with pytest.raises(ValueError, match=r"page.csv.xz: expected"):
        ncu_cycles.read(page.with_suffix(".csv.xz"))
