"""Traces from folders and files, read for a report: nothing in them may stop it.

The schema refuses what a bench must not write; a report must also read what others wrote, and what future versions will.
So fields are picked one by one, anything unusable becomes None, and what was wrong becomes a note for the reader.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from blockmoe.geometry import MoEGeometry

REFERENCE = "reference"  # its traces are the scale of all speedups, not a competitor
MOST_TOKENS = 1 << 53
LOG_LINES, LOG_CHARACTERS = 40, 8000  # of a failure's log, its end
JUDGED_BY = ("rtol", "atol", "required_matched_ratio", "inputs")  # settings that make a PASSED another one
TOKEN_AXES = ("seq_len", "num_tokens", "total_tokens", "batch_size")


class ReportError(Exception):
    """One line for the user: what was asked for can't be reported."""


class NoTraces(ReportError):
    """Nothing to read there, or not yet."""


@dataclass
class Record:
    """One evaluation, with everything optional that a trace may lack. Times in ms."""

    definition: str
    workload: str
    solution: str
    status: str
    hardware: str
    tokens: int | None = None
    offset: int | None = None
    verdict: str = ""
    message: str = ""
    log: str = ""  # its end
    speedup: float | None = None
    latency: float | None = None
    reference_latency: float | None = None
    restated: bool = False  # the speedup is over another run's reference than it was measured beside
    interval: tuple[float, float] | None = None
    blocks: list[list[float]] = field(default_factory=list)
    processes: list[int] | None = None  # of each block, where they are known to differ
    pairs: int | None = None
    active_experts: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    floor_kind: str = ""
    streaming_floor: float | None = None
    compute_floor: float | None = None
    bytes: float | None = None
    flops: float | None = None
    host_us: float | None = None
    graph: float | None = None
    events: float | None = None  # the span by events, as graph replays are timed
    stages: dict[str, float] = field(default_factory=dict)
    drift: float | None = None
    drifted: bool = False
    timer: str = ""
    run: str = ""
    interleaved: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    libs: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    timestamp: str = ""
    when: float = -math.inf
    axes: dict[str, int] = field(default_factory=dict)
    source: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "PASSED"

    @property
    def failure(self) -> str:
        """The guard that was tripped, or the status; empty where the evaluation stands."""
        if self.verdict and self.verdict not in ("PASSED", self.status):
            return self.verdict
        return "" if self.passed else self.status

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the latest evaluation counts of."""
        return self.definition, self.hardware, self.workload, self.solution

    def beside(self, other: Record) -> bool:
        """Whether block i of both was measured side by side."""
        return self.interleaved and other.interleaved and self.run == other.run and len(self.blocks) == len(other.blocks)

    @property
    def floor_fraction(self) -> float | None:
        return self.floor / self.latency if self.floor and self.latency else None


@dataclass
class Loaded:
    """All evaluations (the latest of each definition, hardware, workload and solution), runs, and what was odd."""

    records: list[Record]
    runs: list[dict[str, Any]]
    notes: list[str]


def read_line(file: Path, number: int) -> Record:
    """The evaluation in a line of a trace file, be it the latest or not; raises ReportError where there is none."""
    notes: list[str] = []
    for record in _read_file(file, notes):
        if record.source == f"{file.name}:{number}":
            return record
    raise ReportError(f"{file}:{number}: expected the line of an evaluation{f' ({notes[0]})' if notes else ''}")


def load(paths: Sequence[Path]) -> Loaded:
    """Read trace files and result folders; raises NoTraces where there is nothing to read at all."""
    records: list[Record] = []
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    read: set[str] = set()  # a file counts once, however many of the paths lead to it
    for path in paths:
        for file in _unread(_trace_files(path), read):
            records.extend(_read_file(file, notes))
        for file in _unread(sorted(path.rglob("run.json")) if path.is_dir() else [], read):
            if run := _read_run(file, notes):
                runs.append(run)
    if not records and not any(run.get("skipped") for run in runs):
        tried = ", ".join(str(path) for path in paths) or "no folder given"
        detail = f" ({notes[0]})" if notes else ""
        raise NoTraces(f"{tried}: no evaluated traces found{detail}; expected traces/OP_TYPE/DEFINITION.jsonl")
    return Loaded(_latest(records, notes), runs, notes)


def _unread(files: Sequence[Path], read: set[str]) -> Iterator[Path]:
    for file in files:
        if (itself := os.path.realpath(file)) not in read:
            read.add(itself)
            yield file


def _trace_files(path: Path) -> list[Path]:
    if not path.exists():
        raise NoTraces(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    root = path / "traces" if (path / "traces").is_dir() else path
    return sorted(file for file in root.rglob("*.jsonl") if file.is_file())


def _read_file(file: Path, notes: list[str]) -> Iterator[Record]:
    bad: list[str] = []
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = _record(json.loads(line), f"{file.name}:{number}")
                except (ValueError, TypeError, RecursionError, OverflowError) as error:
                    bad.append(f"line {number}: {str(error)[:120]}")
                    continue
                if record:
                    yield record
    except OSError as error:
        notes.append(f"{file}: not readable ({error.strerror})")
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        notes.append(f"{file.name}: {len(bad)} malformed line(s) left out ({bad[0]}{more})")


def _read_run(file: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        run = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file.name}: not readable as JSON, left out ({str(error)[:80]})")
        return None
    if not isinstance(run, dict):
        notes.append(f"{file.name}: expected an object, got {type(run).__name__}; left out")
        return None
    clean = {"command": _text(run.get("command")), "started": _text(run.get("started"))}
    clean["finished"] = _text(run.get("finished"))
    clean["settings"], clean["environment"] = _table(run.get("settings")), _table(run.get("environment"))
    for key in ("contenders", "skipped"):
        items = run.get(key)
        clean[key] = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return clean


def _record(trace: Any, source: str) -> Record | None:
    """One line of a trace file; None for a line that is a workload only."""
    if not isinstance(trace, dict):
        raise ValueError(f"expected an object, got {type(trace).__name__}")
    evaluation, solution = trace.get("evaluation"), trace.get("solution")
    if solution is None or evaluation is None:
        return None
    if not isinstance(evaluation, dict) or not isinstance(trace.get("workload"), dict):
        raise ValueError("evaluation, workload: expected objects")
    workload, environment = trace["workload"], _table(evaluation.get("environment"))
    correctness, performance = _table(evaluation.get("correctness")), _table(evaluation.get("performance"))
    extra, timing, accuracy = (_table(part.get("extra")) for part in (evaluation, performance, correctness))
    axes = {str(name): int(value) for name, value in _table(workload.get("axes")).items() if _number(value) is not None}
    offset = _number(_table(_table(workload.get("inputs")).get("local_expert_offset")).get("value"))
    record = Record(
        definition=as_name(trace.get("definition")) or "unnamed definition",
        workload=_text(workload.get("uuid")) or json.dumps(axes, sort_keys=True),
        solution=as_name(solution) or "unnamed solution",
        status=_text(evaluation.get("status")) or "UNKNOWN",
        hardware=as_name(environment.get("hardware")) or "unknown hardware",
        tokens=_tokens(axes),
        offset=None if offset is None else int(offset),
        axes=axes,
        verdict=_text(extra.get("verdict")),
        message=_text(extra.get("message")) or _last_line(_text(evaluation.get("log"))),
        log="\n".join(_text(evaluation.get("log"))[-LOG_CHARACTERS:].rstrip().splitlines()[-LOG_LINES:]),
        pairs=_count(extra.get("pairs")),
        active_experts=_count(extra.get("active_experts")),
        run=_text(extra.get("run")),
        interleaved=extra.get("interleaved") is not False,
        settings=_table(extra.get("settings")),
        libs={str(name): _text(version) for name, version in _table(environment.get("libs")).items()},
        environment=_table(environment.get("extra")),
        digests={key: _text(extra[key]) for key in ("solution_digest", "definition_digest") if extra.get(key)},
        timestamp=_text(evaluation.get("timestamp")).replace("unknown", ""),
        when=_seconds(_text(evaluation.get("timestamp"))),
        source=source,
    )
    _add_times(record, performance, timing)
    measured = {} if timing.get("speedup_only") is True else {**correctness, **accuracy}  # an imported zero is no error
    for name, value in measured.items():
        if (number := _number(value, infinite=True)) is not None:
            record.errors[str(name)] = number
    return record


def _add_times(record: Record, performance: dict[str, Any], timing: dict[str, Any]) -> None:
    speedup_only = timing.get("speedup_only") is True  # imported tables know no times
    record.latency = None if speedup_only else _positive(performance.get("latency_ms"))
    record.reference_latency = None if speedup_only else _positive(performance.get("reference_latency_ms"))
    record.speedup = _positive(performance.get("speedup_factor"))
    if record.speedup is None and record.latency and record.reference_latency:
        record.speedup = record.reference_latency / record.latency
    interval = timing.get("speedup_interval")
    if isinstance(interval, list) and len(interval) == 2 and all(_positive(end) for end in interval):
        record.interval = (float(interval[0]), float(interval[1]))
    record.blocks = _blocks(timing.get("samples_ms"))
    trials = timing.get("block_trial")
    fresh = record.settings.get("fresh_processes") is True and isinstance(trials, list) and len(trials) == len(record.blocks)
    if fresh and all(type(trial) is int and 0 <= trial < len(trials) for trial in trials):
        record.processes = trials
    record.floor, record.floor_kind = _positive(timing.get("floor_ms")), _text(timing.get("floor_kind"))
    record.streaming_floor = _positive(timing.get("streaming_floor_ms"))
    record.compute_floor = _positive(timing.get("compute_floor_ms"))
    record.bytes, record.flops = _positive(timing.get("bytes")), _positive(timing.get("flops"))
    record.host_us, record.graph = _positive(timing.get("host_us")), _positive(timing.get("graph_ms"))
    record.events = _positive(timing.get("events_ms"))
    record.drift, record.drifted = _number(timing.get("drift")), timing.get("drifted") is True
    if isinstance(timing.get("drift"), dict):
        record.drift = _number(timing["drift"].get("change"))
        record.drifted = timing["drift"].get("drifted") is True
    record.timer = _text(timing.get("timer")) or _text(record.environment.get("timer"))
    _add_work(record)
    stages = {str(name): _positive(value) for name, value in _table(timing.get("stages_ms")).items()}
    record.stages = {name: value for name, value in stages.items() if value}


def _add_work(record: Record) -> None:
    """Bytes and FLOPs from the geometry, for traces that know their routing but not its cost."""
    geometry = MoEGeometry.from_definition(record.definition)
    if geometry and record.pairs and record.active_experts:
        record.bytes = record.bytes or float(record.active_experts * geometry.expert_bytes)
        record.flops = record.flops or float(record.pairs * geometry.pair_flops)


def _latest(records: list[Record], notes: list[str]) -> list[Record]:
    """The newest evaluation of each (definition, hardware, workload, solution); of equally old ones, the last read."""
    newest: dict[tuple[str, str, str, str], Record] = {}
    for record in records:
        if record.key not in newest or record.when >= newest[record.key].when:
            newest[record.key] = record
    if superseded := len(records) - len(newest):
        notes.append(f"{superseded} older evaluation(s) of the same workload and solution left out: the latest counts")
    otherwise = Counter(_otherwise(record, newest[record.key]) for record in records)
    for change, count in sorted(otherwise.items()):
        if change:
            notes.append(f"{count} of the evaluations left out were judged otherwise than what counts: {change}")
    kept = list(newest.values())
    unusable = Counter(r.solution for r in kept if r.passed and r.speedup is None)
    for solution, count in sorted(unusable.items()):
        notes.append(f"{solution}: {count} passed evaluation(s) without a usable speedup (NaN, zero or missing)")
    unsized = Counter(r.solution for r in kept if r.axes and r.tokens is None)
    for solution, count in sorted(unsized.items()):
        notes.append(f"{solution}: {count} evaluation(s) of a T below 0 or above 2**53, which counts as unknown")
    for record in kept:
        if record.passed and record.speedup is None:
            record.status = "NO_SPEEDUP"
    return kept


def _otherwise(older: Record, newer: Record) -> str:
    """What differs in how two evaluations were judged, or in what they were fed; empty where nothing is known to."""
    known = [name for name in JUDGED_BY if name in older.settings and name in newer.settings]
    differ = [name for name in known if older.settings[name] != newer.settings[name]]
    return _text(", ".join(f"{name} {older.settings[name]} → {newer.settings[name]}" for name in differ))


def _tokens(axes: dict[str, int]) -> int | None:
    """T, or None for what no number of tokens can be."""
    size = next((axes[name] for name in TOKEN_AXES if name in axes), next(iter(axes.values()), None))
    return size if size is not None and 0 <= size <= MOST_TOKENS else None


def _blocks(value: Any) -> list[list[float]]:
    """Samples as a list of blocks; a flat list is one block, and anything else is no samples."""
    if not isinstance(value, list) or not value:
        return []
    blocks = value if all(isinstance(block, list) for block in value) else [value]
    clean = [[number for number in map(_positive, block) if number is not None] for block in blocks]
    return clean if all(clean) else []


def _number(value: Any, infinite: bool = False) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) or (infinite and math.isinf(number)) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 else None


def _text(value: Any) -> str:
    """A scalar as text that can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    text = "" if value is None or isinstance(value, (dict, list)) else str(value)
    return text.encode("utf-8", "replace").decode("utf-8")


def as_name(value: Any) -> str:
    """A name on one line; backticks would end the code spans that names stand in."""
    return " ".join(_text(value).replace("`", "'").split())


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _seconds(timestamp: str) -> float:
    try:
        moment = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    except ValueError:
        return -math.inf
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
