"""What a measurement was taken on: hardware, versions, commit, and the GPU's state while it ran."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockmoe.bench.schema import Solution

if TYPE_CHECKING:
    import torch

# distributions whose version can change a result, as far as they are installed
_LIBRARIES = (
    "blockmoe", "torch", "triton", "numpy", "sglang-kernel", "sgl-kernel", "sgl-deep-gemm", "deep-gemm", "flashinfer-python",
    "cupti-python", "apache-tvm-ffi",
)  # fmt: skip
_GPU_QUERY = {
    "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem", "temperature_c": "temperature.gpu", "power_w": "power.draw",
    "throttle": "clocks_throttle_reasons.active",
}  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """What decides whether a solution can run here; `name` is the device's, `sm` its compute capability (90) or 0."""

    kind: str  # cpu or cuda
    name: str
    sm: int = 0

    def lacks(self, solution: Solution) -> str | None:
        """Why this machine can't run a solution, or None."""
        targets = [target.lower() for target in solution.spec.target_hardware]
        if not any(self._is(target) for target in targets):
            return f"runs on {', '.join(solution.spec.target_hardware)}; this is {self.name}"
        if solution.spec.language not in ("python", "triton"):
            return f"written in {solution.spec.language}; this bench runs python and triton"
        missing = [name for name in solution.spec.dependencies if not _installed(name)]
        if missing:
            return f"needs the package {' and '.join(missing)}, which is not installed"
        return None

    def _is(self, target: str) -> bool:
        if target in ("cpu", "cuda", "gpu"):
            return self.kind == ("cpu" if target == "cpu" else "cuda")
        if target.startswith("sm") and target.strip("sm_a").isdigit():
            return self.sm == int(target.strip("sm_a"))
        wanted, words = (re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") for text in (target.replace("nvidia", ""), self.name))
        return self.kind == "cuda" and (not wanted or f"_{wanted}_" in f"_{words}_")


def _installed(package: str) -> bool:
    """Whether a requirement's package is here, by the name of its distribution or of its module; versions are not compared."""
    found = re.match(r"[A-Za-z0-9_.-]+", package.strip())
    name = found.group(0) if found else package
    try:
        return _version(name) is not None or find_spec(name.replace("-", "_").split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def worker_environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and memory as the worker sees them."""
    import torch

    libs = {"python": platform.python_version()} | {name: found for name in _LIBRARIES if (found := _version(name))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        libs["cuda"] = torch.version.cuda or ""
        name, sm = properties.name, properties.major * 10 + properties.minor
        extra = {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        uuid = str(getattr(properties, "uuid", ""))
    else:
        name, sm, (free, total) = cpu_name(), 0, host_memory()
        extra, uuid = {"threads": torch.get_num_threads()}, ""
    extra |= {"platform": platform.platform(), "memory_bytes": total}
    return {"kind": device.type, "name": name, "sm": sm, "libs": libs, "extra": extra, "free_bytes": free, "uuid": uuid}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model} ({usable_cores()} cores)"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> tuple[int, int]:
    """(available, total) bytes, the container's limit counted in."""
    fields = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":", 1)
            fields[name] = int(value.split()[0]) * 1024
    except OSError:
        return 1 << 40, 1 << 40
    available, total = fields.get("MemAvailable", 1 << 40), fields.get("MemTotal", 1 << 40)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - _reclaimable()
        return min(available, limit - used), min(total, limit)
    except (OSError, ValueError):
        return available, total


def _reclaimable() -> int:
    """Bytes that count as the container's but are given up when they are wanted: files that were read some time ago."""
    lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "slab_reclaimable"))


def gpu_state(index: int = 0, uuid: str = "") -> dict[str, Any]:
    """Clocks, temperature, power and throttle reasons by nvidia-smi, which makes no CUDA context; empty where it is missing. By `uuid`
    where that is known: CUDA numbers what CUDA_VISIBLE_DEVICES leaves, nvidia-smi all devices."""
    return (uuid and nvidia_smi(f"GPU-{uuid}")) or nvidia_smi(str(index))


def nvidia_smi(device: str) -> dict[str, Any]:
    """What it says of a device, by number or GPU-UUID; empty where it is missing or knows none."""
    query = ",".join([*_GPU_QUERY.values(), "driver_version"])
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return {name: _number(value) for name, value in zip([*_GPU_QUERY, "driver"], values, strict=False)}


def _number(text: str) -> float | int | str:
    """Numbers as numbers; the throttle reasons are a bit mask in hexadecimal, 0 for none."""
    try:
        return int(text, 16) if text.startswith("0x") else float(text)
    except ValueError:
        return text


def commit() -> str | None:
    """The checkout's commit, with `+` where it has uncommitted changes; BLOCKMOE_COMMIT, or None, where there is no checkout."""
    if named := os.environ.get("BLOCKMOE_COMMIT"):
        return named  # an exported tree on a machine without git
    if not (Path(__file__).parents[3] / ".git").exists():
        return None  # installed, maybe inside somebody else's repository
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
