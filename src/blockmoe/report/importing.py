"""Published tables of speedups, as a result folder: traces whose times are unknown and whose speedups are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from blockmoe.geometry import HEADLINE
from blockmoe.report.load import ReportError

_SIZES = ("uuid", "seq_len", "local_expert_offset")


def import_csv(
    source: Path,
    output: Path,
    *,
    definition: str = HEADLINE.definition_name,
    hardware: str = "unknown hardware",
    timestamp: str = "",
) -> Path:
    """Write traces for a CSV with the columns seq_len, optionally uuid and local_expert_offset, and one a solution.

    An empty cell is a workload that the solution was not run on. Latencies are unknown: `latency_ms` is 0 and
    `performance.extra.speedup_only` is true, which every report here honours. Returns the trace file.
    """
    rows = _read(source)
    solutions = [name for name in rows[0] if name not in _SIZES]
    if not solutions:
        raise ReportError(f"{source}: expected a column for at least one solution beside {', '.join(_SIZES)}")
    lines = []
    for number, row in enumerate(rows, 2):
        for solution in solutions:
            if (row[solution] or "").strip():
                speedup = _value(row[solution], solution, source, number)
                trace = _trace(_workload(row, source, number), solution, speedup, definition, hardware, timestamp)
                lines.append(json.dumps(trace))
    path = output / "traces" / "moe" / f"{definition}.jsonl"
    run = {"command": f"blockmoe import-csv {source.name}", "settings": {}, "environment": {"hardware": hardware}}
    run |= {"contenders": [{"name": name} for name in solutions], "skipped": []}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (output / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{output}: not writable ({error.strerror})") from None
    return path


def _read(source: Path) -> list[dict[str, str]]:
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{source}: not readable as CSV ({getattr(error, 'strerror', None) or error})") from None
    if not rows or "seq_len" not in rows[0]:
        raise ReportError(f"{source}: expected a header with seq_len and at least one row")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ReportError(f"{source} line {number}: expected {len(rows[0])} fields")
    return rows


def _workload(row: dict[str, str], source: Path, number: int) -> dict[str, Any]:
    tokens = int(_value(row["seq_len"], "seq_len", source, number))
    inputs = {}
    if (offset := (row.get("local_expert_offset") or "").strip()) != "":
        inputs["local_expert_offset"] = {"type": "scalar", "value": int(_value(offset, "offset", source, number, zero=True))}
    name = (row.get("uuid") or "").strip() or f"T{tokens}" + (f"-o{offset}" if offset else "")
    return {"axes": {"seq_len": tokens}, "inputs": inputs, "uuid": name}


def _trace(workload: dict[str, Any], solution: str, speedup: float, definition: str, hardware: str, timestamp: str) -> dict[str, Any]:
    performance = {"latency_ms": 0.0, "reference_latency_ms": 0.0, "speedup_factor": speedup}
    return {
        "definition": definition,
        "workload": workload,
        "solution": solution,
        "evaluation": {
            "status": "PASSED",
            "environment": {"hardware": hardware, "libs": {}},
            "timestamp": timestamp or "unknown",
            "log": "",
            "correctness": {"max_relative_error": 0.0, "max_absolute_error": 0.0},
            "performance": performance | {"extra": {"speedup_only": True}},
        },
    }


def _value(text: str, column: str, source: Path, number: int, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ReportError(f"{source} line {number}: {column}: expected a positive number, got {text!r}")
    return value
