"""Published tables of speedups, as a result folder: traces whose times are unknown and whose speedups are known."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

from blockmoe.files import write_whole
from blockmoe.geometry import HEADLINE
from blockmoe.report.load import ReportError, as_name

COMMAND = "blockmoe import-csv"
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
    `performance.extra.speedup_only` is true, which every report here honours. Returns the trace file. Raises ReportError for a table
    that is not one, and for an `output` that holds anything but an earlier import.
    """
    if not re.fullmatch(r"\w[\w.-]*", definition):
        raise ReportError(f"--definition {definition!r}: expected a name of letters, digits, '_', '-' and '.'")
    _require_free(output)
    rows = _read(source)
    solutions = [name for name in rows[0][1] if name not in _SIZES]
    if not solutions:
        raise ReportError(f"{source}: expected a column for at least one solution beside {', '.join(_SIZES)}")
    lines, seen = [], set()
    for number, row in rows:
        workload = _workload(row, source, number)
        if workload["uuid"] in seen:
            raise ReportError(f"{source} line {number}: expected a workload a line, got {workload['uuid']} again")
        seen.add(workload["uuid"])
        for solution in solutions:
            if (row[solution] or "").strip():
                speedup = _value(row[solution], solution, source, number)
                lines.append(json.dumps(_trace(workload, solution, speedup, definition, hardware, timestamp)))
    if not lines:
        raise ReportError(f"{source}: expected at least one speedup, got empty cells")
    path = output / "traces" / "moe" / f"{definition}.jsonl"
    run = {"command": f"{COMMAND} {source.name}", "settings": {}, "environment": {"hardware": hardware}}
    run |= {"contenders": [{"name": name} for name in solutions], "skipped": []}
    try:
        write_whole(output / "run.json", json.dumps(run, indent=1) + "\n")  # first: by it the next import knows that the folder is its own
        write_whole(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise ReportError(f"{output}: not writable ({error.strerror})") from None
    return path


def _require_free(output: Path) -> None:
    """That nothing is lost: a run's traces may have the names that are written here."""
    about = output / "run.json"
    try:
        imported = str(json.loads(about.read_text(encoding="utf-8"))["command"]).startswith(COMMAND) if about.exists() else False
    except (OSError, ValueError, KeyError, TypeError):
        imported = False
    if not imported and (about.exists() or any(output.glob("traces/**/*.jsonl"))):
        raise ReportError(f"{output}: expected a new folder or that of an earlier import, got one with the results of a run")


def _read(source: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows with the number of their line, by columns named as a report names them."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = columns = [as_name(column) for column in reader.fieldnames or ()]
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{source}: not readable as CSV ({getattr(error, 'strerror', None) or error})") from None
    if not rows or "seq_len" not in columns:
        raise ReportError(f"{source}: expected a header with seq_len and at least one row")
    if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        raise ReportError(f"{source}: expected columns of different names, got {twice[0]!r} {columns.count(twice[0])} times")
    for number, row in rows:
        if None in row or None in row.values():
            raise ReportError(f"{source} line {number}: expected {len(columns)} fields")
    return rows


def _workload(row: dict[str, str], source: Path, number: int) -> dict[str, Any]:
    tokens = _whole(row["seq_len"], "seq_len", source, number)
    inputs = {}
    if (offset := (row.get("local_expert_offset") or "").strip()) != "":
        inputs["local_expert_offset"] = {"type": "scalar", "value": _whole(offset, "local_expert_offset", source, number, zero=True)}
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


def _whole(text: str, column: str, source: Path, number: int, zero: bool = False) -> int:
    value = _value(text, column, source, number, zero)
    if value != int(value):
        raise ReportError(f"{source} line {number}: {column}: expected a whole number, got {text!r}")
    return int(value)


def _value(text: str, column: str, source: Path, number: int, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ReportError(f"{source} line {number}: {column}: expected a positive number, got {text!r}")
    return value
