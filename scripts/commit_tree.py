"""A commit's files, for scripts that look at another tree beside this one."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A folder that holds them meanwhile. Raises ValueError, as git says it, where there is no such commit."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
    if archive.returncode:
        raise ValueError(archive.stderr.decode().strip())
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)
