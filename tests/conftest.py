"""Shared by all tests. That this file exists puts `tests/` on the path, for `toy_tree`."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """Who waits for a child session (`interpreted`) comes last: until then it runs beside all other tests."""
    items.sort(key=lambda item: "interpreted" in getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def the_same_numbers_every_time():
    """torch's generator begins with another seed in every process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def most_bytes_a_file():
    """`with most_bytes_a_file(1000):` as a disk that is full then, for this process and those it starts."""

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session", autouse=True)
def child_sessions_begin_first(request):
    """So they run beside all other tests."""
    if any("interpreted" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("interpreted")


@pytest.fixture(scope="session")
def interpreted(request):
    """Passes if a file's tests pass in a child session under Triton's interpreter, which has to be chosen before triton is imported. Of
    those it runs what this session would, by their marks.

    The children of all selected tests begin at once: each keeps one core busy, where nothing else wants it.
    """
    files = dict.fromkeys(item.callspec.params["file"] for item in request.session.items if "interpreted" in item.fixturenames)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    children = {}
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["--timeout", "900", "-m", request.config.option.markexpr, str(file)]
        text = tempfile.TemporaryFile("w+")  # noqa: SIM115
        child = subprocess.Popen(command, env=environment, stdout=text, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1])
        os.setpriority(os.PRIO_PROCESS, child.pid, 19)
        children[file] = child, text

    def passes(file: Path) -> None:
        child, text = children[file]
        code = child.wait()
        text.seek(0)
        assert code == 0, text.read()[-8000:]

    yield passes
    for child, text in children.values():
        child.kill()
        child.wait()
        text.close()
