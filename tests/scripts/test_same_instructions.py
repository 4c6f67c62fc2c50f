"""scripts/same_instructions.py: what counts as a difference between two kernels."""

import subprocess
import sys

import pytest
import same_instructions as script

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R1, R1 ;
.L_x_1:
        /*0020*/                   EXIT ;
"""


def test_differences():
    kernel = script.instructions(SASS)
    assert kernel == ["LDC R1, c[0x0][0x28] ;", "FADD R2, R1, R1 ;", "EXIT ;"]
    assert script.differences(kernel, kernel) == (0, 0)
    assert script.differences(kernel, script.instructions(SASS.replace("0x28", "0x30"))) == (1, 0)
    assert script.differences(kernel, script.instructions(SASS.replace("FADD", "FMUL"))) == (1, 1)
    assert script.differences(kernel, kernel[:2]) == script.differences([], kernel[:1]) == (1, 1)


@pytest.mark.parametrize("arguments", [("HEAD", "--tokens", "1,x"), ("HEAD", "--tokens", ""), ("nowhere",)])
def test_wrong_arguments(arguments):
    said = subprocess.run([sys.executable, script.__file__, *arguments], capture_output=True, text=True)
    assert said.returncode == 2 and ("--tokens: expected" in said.stderr or "commit: " in said.stderr)
