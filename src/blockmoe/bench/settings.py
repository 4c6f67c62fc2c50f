"""How an evaluation is done: tolerances, repeats, inputs, device. Part of the resume key."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

MOST_CALLS = 90_000  # of a kind: each has inputs of its own, by its number (`group.py`)
BLOCK_CALLS = 5  # timed calls between two changes of contender: short against drift, long against the change's own cost
LEFT_OUT = {"fresh_processes": False}  # of `identity`, where they have these values: newer than traces that are kept


@dataclass(frozen=True)
class Settings:
    """Defaults are the published comparison's. Times in seconds."""

    rtol: float = 0.2
    atol: float = 0.1
    required_matched_ratio: float = 0.85
    warmup_runs: int = 5
    iterations: int = 20
    num_trials: int = 3
    timeout: float = 300.0
    inputs: Literal["trace", "realistic"] = "trace"
    seed: int = 0
    device: str = "cpu"
    cuda_graph: bool = True
    cupti: bool = True
    fresh_processes: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"--timeout: expected a number above 0, got {self.timeout:g}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name}: expected a number of at least 0, got {value:g}")
        if not 0 < self.required_matched_ratio <= 1:
            raise ValueError(f"--required-matched-ratio: expected a number in (0, 1], got {self.required_matched_ratio:g}")
        for name, least in (("warmup_runs", 0), ("iterations", 1), ("num_trials", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")
        for name, most, got in (("warmup-runs", MOST_CALLS, self.warmup_runs), ("num-trials", 1000, self.num_trials)):
            if got > most:
                raise ValueError(f"--{name}: expected at most {most}, got {got}")
        if (timed := self.num_trials * self.iterations) > MOST_CALLS:  # each has inputs of its own
            raise ValueError(f"--iterations: expected at most {MOST_CALLS} in all trials, got {timed}")
        if self.fresh_processes and self.num_trials < 2:
            raise ValueError(f"--fresh-processes: expected --num-trials of at least 2, got {self.num_trials}")
        if self.inputs not in ("trace", "realistic"):
            raise ValueError(f"--inputs: expected trace or realistic, got {self.inputs!r}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {self.device!r}")

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def device_index(self) -> int:
        return int(self.device.partition(":")[2] or 0)

    def identity(self) -> dict[str, Any]:
        """What makes two evaluations comparable: everything but the timeout, the device's number, and LEFT_OUT."""
        fields = {name: value for name, value in asdict(self).items() if name not in LEFT_OUT or value != LEFT_OUT[name]}
        del fields["timeout"]
        return fields | {"device": self.device.partition(":")[0]}

    def blocks(self) -> list[int]:
        """Timed calls in each block of one trial."""
        full, rest = divmod(self.iterations, BLOCK_CALLS)
        return [BLOCK_CALLS] * full + ([rest] if rest else [])


def preset(name: str, device: str) -> Settings:
    """`full`: the published settings. `quick`: fewer calls, for a first look (on a CPU one call takes seconds)."""
    full = Settings(device=device)
    if name == "full":
        return full
    if device == "cpu":
        return replace(full, warmup_runs=1, iterations=3, num_trials=1)
    return replace(full, warmup_runs=2, iterations=10, num_trials=1)


def torch_build() -> str | None:
    """The CUDA version that torch was built for, '' for a CPU build, None without torch; torch is not imported."""
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda\b[^=]*= *'([^']+)'", text, re.MULTILINE)
    return found.group(1) if found else ""


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver lists; no CUDA context is made."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(":", 1)[1].split("(")[0].strip() for line in answer.stdout.splitlines() if line.startswith("GPU ")]


def default_device() -> str:
    """cuda where there are both a GPU and a torch that can use it."""
    return "cuda" if torch_build() and gpus() else "cpu"
