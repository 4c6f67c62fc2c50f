"""Helpers beside the tests are importable by their plain names, in the child session of the interpreter too."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package", autouse=True)
def interpreters_begin_first(request):
    """The child sessions of test_interpreter.py run beside the tests before it, which compile on one core."""
    if any("interpreted" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("interpreted")
