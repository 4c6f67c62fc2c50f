"""The folders of a run: for outputs on their way between its processes, its solutions' sources, results that are not saved."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "blockmoe-run-"
LOCK = ".lock"  # held as long as the run lives, so that the next run knows what a killed one has left behind
LEAST_FREE_BYTES = 4 << 30
SLACK_BYTES = 1 << 16  # of a file beside its tensors


@contextlib.contextmanager
def scratch_folder(*, in_memory: bool = False) -> Iterator[Path]:
    """A folder that is gone afterwards, `in_memory` if there is enough; folders beside it of runs that were killed go too."""
    root = _memory() if in_memory else Path(tempfile.gettempdir())
    for path in root.glob(f"{PREFIX}*/{LOCK}"):
        _remove_if_abandoned(path)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    try:
        with (folder / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            Path(lock.name).rename(folder / LOCK)  # under this name it was never seen unlocked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_room(folder: Path, size: int) -> None:
    """Raises OSError, naming the folder, where no file of `size` bytes can be written to it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(0, size + SLACK_BYTES, SLACK_BYTES):
                file.write(bytes(SLACK_BYTES))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _remove_if_abandoned(lock: Path) -> None:
    with contextlib.suppress(OSError), lock.open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where a living run holds it
        shutil.rmtree(lock.parent, ignore_errors=True)


def _memory() -> Path:
    """Memory, where outputs of hundreds of MB pass between processes; the ordinary temporary folder elsewhere."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > LEAST_FREE_BYTES:
        return memory
    return Path(tempfile.gettempdir())
