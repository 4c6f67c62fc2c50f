"""What this machine has for a run, without making a CUDA context or importing torch."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from blockmoe.bench.dataset import bundled_root, cache_root
from blockmoe.bench.environment import Hardware, cpu_name, host_memory
from blockmoe.bench.settings import default_device, gpus, torch_build

PEERS = "pip install 'blockmoe[peers]'"  # of versions that go together
# module, distribution, what for, how to get it
OPTIONAL = (
    ("triton", "triton", "Triton solutions, and the streaming floor's kernel", "comes with torch's CUDA builds"),
    ("cupti", "cupti-python", "spans by CUPTI instead of events", "pip install cupti-python"),
    ("sgl_kernel", "sglang-kernel", "peers on sgl_kernel", PEERS),
    ("deep_gemm", "sgl-deep-gemm", "peers on DeepGEMM", PEERS),
    ("flashinfer", "flashinfer-python", "peers on FlashInfer", PEERS),
)


@dataclass(frozen=True)
class Check:
    """`broken` stops `blockmoe run`; `missing` costs only what it says."""

    state: Literal["ok", "missing", "broken"]
    what: str
    found: str
    remedy: str = ""


def local_hardware() -> Hardware:
    """The device that `run` would take, as far as it can be known from outside."""
    if default_device() != "cuda":
        return Hardware("cpu", cpu_name())
    return Hardware("cuda", gpus()[0], _compute_capability())


def checks() -> list[Check]:
    """Everything, most important first."""
    found = [Check("ok", "python", platform.python_version()), _torch(), _gpu(), _memory(), _dataset()]
    for module, distribution, purpose, remedy in OPTIONAL:
        if find_spec(module) is None:
            found.append(Check("missing", distribution, "not installed", f"{purpose}: {remedy}"))
        else:
            found.append(Check("ok", distribution, _version(distribution)))
    return found


def timers_lack() -> str | None:
    """Why CUDA's two timers can't be compared here, or None."""
    if not gpus():
        reason = "this machine has no NVIDIA GPU"
    elif not torch_build():
        reason = "this Python's torch is built without CUDA" if torch_build() == "" else "torch is not installed"
    elif find_spec("cupti") is None:
        reason = "cupti-python is not installed (pip install cupti-python)"
    else:
        return None
    return f"comparing the timers needs CUDA and CUPTI: {reason}"


def _torch() -> Check:
    build = torch_build()
    if build is None:
        return Check("broken", "torch", "not installed", "pip install 'blockmoe[torch]', or torch's build for your GPU")
    return Check("ok", "torch", f"{_version('torch')}, {'CUDA ' + build if build else 'CPU build'}")


def _gpu() -> Check:
    names = gpus()
    if not names:
        return Check("missing", "NVIDIA GPU", "none", f"runs on {cpu_name()} work, and take seconds a call")
    if not torch_build():
        return Check("missing", "NVIDIA GPU", ", ".join(names), "this Python's torch can't use it: install torch's CUDA build")
    return Check("ok", "NVIDIA GPU", f"{', '.join(names)}, sm_{_compute_capability()}")


def _memory() -> Check:
    available, total = host_memory()
    text = f"{available / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    if default_device() == "cpu" and available < 13 << 30:
        return Check("missing", "memory", text, "the headline reference needs about 12 GiB on a CPU; tiny definitions run")
    return Check("ok", "memory", text)


def _dataset() -> Check:
    root = bundled_root()
    if os.access(root, os.W_OK):
        return Check("ok", "dataset", f"{root}; blobs are made there on first use")
    return Check("ok", "dataset", f"{root}, read-only; blobs go to {cache_root()}")


def _compute_capability() -> int:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        return int(answer.strip().replace(".", ""))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "installed"
