"""The report for other programs: CSV with a line an evaluation, JSON with every computed statistic."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from blockmoe.report.load import Record
from blockmoe.report.model import Report, Section
from blockmoe.report.tables import Cell, Table, word_of

_LONG = {"blocks", "when"}  # samples stay in the traces
_COLUMNS = (
    "definition",
    "hardware",
    "workload",
    "tokens",
    "offset",
    "pairs",
    "active_experts",
    "solution",
    "status",
    "verdict",
    "speedup",
    "latency",
    "reference_latency",
    "floor",
    "floor_fraction",
    "host_us",
    "graph",
)


def to_csv(report: Report) -> str:
    """Times in ms; empty where a value is unknown. `winner_word` is the verdict on the workload's winner."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, "low", "high", "winner", "winner_word"])
    for section in report.sections:
        for row in section.rows:
            for name in section.names:
                if cell := row.cells.get(name):
                    values = [_blank(getattr(cell, column)) for column in _COLUMNS]
                    interval = [_blank(end) for end in cell.interval or (None, None)]
                    won = name in row.winners
                    writer.writerow([*values, *interval, int(won), word_of(row) if won and row.duel else ""])
    return text.getvalue()


def to_json(report: Report, against: Sequence[Table] = ()) -> str:
    """Every statistic by its name in `model.py`; `against` are the tables of a comparison with an earlier run."""
    document = {"format": "blockmoe report 1", "notes": report.notes, "runs": _plain(report.runs)}
    document["sections"] = [_section(section) for section in report.sections]
    document["against"] = [
        {"title": table.title, "notes": table.notes, "rows": [_named(table, row) for row in table.rows]} for table in against
    ]
    return json.dumps(document, default=str, allow_nan=False) + "\n"


def _named(table: Table, row: list[Cell]) -> dict[str, Any]:
    return {column: cell.text if cell.value is None else cell.value for column, cell in zip(table.columns, row, strict=True)}


def _section(section: Section) -> dict[str, Any]:
    values = _plain(section)
    for cliff, source in zip(values["cliffs"], section.cliffs, strict=True):
        cliff |= {"kept": source.kept, "against": source.against}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name not in _LONG}
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _blank(value: Any) -> Any:
    return "" if value is None else value
