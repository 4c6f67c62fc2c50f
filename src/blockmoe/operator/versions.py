"""Which Triton is installed, and which of the kernels it is known to make right."""

from __future__ import annotations

OLDEST, LAST_GLUON = (3, 6), (3, 8)


def release() -> tuple[int, int]:
    import triton  # not with this module: sizes and the CPU path need none

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def known() -> bool:
    """Whether it is one whose kernels ran on a GPU with what Triton itself does not promise: PTX rewritten for clusters (`ptx.py`,
    `ahead.py`), a warp that has all of a token's experts (`largest.py`), which later ones spread over several, and a lane an expert
    (`ballots.py`)."""
    import triton

    return triton.__version__.startswith("3.6.0")


def gluon() -> bool:
    """Whether it compiles the Gluon kernels; 3.9 took from Gluon what they call. Without them plans are those that need no TMA."""
    return release() <= LAST_GLUON


def require_triton() -> None:
    """Raises RuntimeError where no kernel compiles."""
    if release() < OLDEST:
        raise RuntimeError(f"triton: expected {OLDEST[0]}.{OLDEST[1]} or newer, got {release()[0]}.{release()[1]}")
