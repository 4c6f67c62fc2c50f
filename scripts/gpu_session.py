"""What the scripts for a GPU share: flushed lines, failures passed over; of gpu_stress.py and gpu_curve.py also the time budget and
the table at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/operator"))  # `layer`: the call and the oracle as the tests have them


class Journal:
    """Lines for the terminal and, as JSONL, for NAME.jsonl in $OUT (default results/tmp)."""

    def __init__(self, name: str, mode: str = "a") -> None:
        self.start = time.time()
        folder = Path(os.environ.get("OUT", "results/tmp"))
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / f"{name}.jsonl").open(mode)

    def say(self, kind: str, **fields: Any) -> None:
        fields = {"kind": kind, "at_s": round(time.time() - self.start, 1), **fields}
        self.write(fields)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()), flush=True)

    def write(self, fields: dict) -> None:
        self._log.write(json.dumps(fields, default=str) + "\n")
        self._log.flush()

    def attempt(self, label: str, work: Callable[[], Any]) -> Any:
        """Do `work`; an error is said, and the script goes on unless the GPU's context is gone."""
        try:
            return work()
        except Exception as error:
            self.say("failed", label=label, error=f"{type(error).__name__}: {str(error)[:400]}")
            self.write({"kind": "traceback", "text": traceback.format_exc()})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return None


class Session(Journal):
    """Results by section; `finish` prints them and gives the exit code."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name, "w")
        self._seconds = seconds
        self._section, self._begun = "start", 0.0
        self._counts: dict[str, dict[str, float]] = {}

    def section(self, name: str) -> dict[str, float]:
        """Begin a section, or go on with it; its numbers."""
        now = time.time()
        if self._section in self._counts:
            self._counts[self._section]["seconds"] += now - self._begun
        self._section, self._begun = name, now
        return self._counts.setdefault(name, {"checks": 0, "failed": 0, "cut": 0, "seconds": 0.0})

    def check(self, label: str, ok: bool, worst: dict[str, float] | None = None, **fields: Any) -> bool:
        """Count one check; `worst` are numbers of which the section's table keeps the largest."""
        counts = self._counts[self._section]
        counts["checks"] += 1
        counts["failed"] += not ok
        for name, value in (worst or {}).items():
            # "not less" keeps a NaN
            counts[name] = value if not value < counts.get(name, -1.0) else counts[name]
        self.say("check" if ok else "FAILED", section=self._section, label=label, ok=bool(ok), **(worst or {}), **fields)
        return ok

    def attempt(self, label: str, work: Callable[[], Any]) -> Any:
        """Do `work`, unless time is up; an error is a failed check, and the session goes on."""
        if time.time() - self.start > self._seconds:
            self._counts[self._section]["cut"] += 1
            self.say("cut", section=self._section, label=label)
            return None
        try:
            result = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result
        except Exception as error:
            self.check(label, False, error=f"{type(error).__name__}: {str(error)[:300]}")
            self.write({"kind": "traceback", "text": traceback.format_exc()})
            return None

    def finish(self) -> int:
        """Print the table; 1 where a check failed or was cut off."""
        self.section("end")
        del self._counts["end"]
        names = list(dict.fromkeys(name for counts in self._counts.values() for name in counts))
        print(" | ".join(["section", *names]), flush=True)
        for section, counts in self._counts.items():
            self.write({"kind": "section", "section": section, **counts})
            print(" | ".join([section, *(f"{counts[n]:.3g}" if n in counts else "-" for n in names)]), flush=True)
        bad = sum(counts["failed"] + counts["cut"] for counts in self._counts.values())
        checks = sum(counts["checks"] for counts in self._counts.values())
        self.say("PASSED" if checks and not bad else "NOT PASSED", checks=int(checks), failed_or_cut=int(bad))
        return int(bad > 0 or checks == 0)
