"""One scale for the contenders of a workload: between sessions the reference moves more than they do (docs/measuring.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from blockmoe.report.load import REFERENCE, Record


def on_one_scale(records: Sequence[Record]) -> list[Record]:
    """The records; where contenders of several runs meet on a workload, each with a reference of its own, their speedups are restated.

    They become the latest reference's latency over their own, so that they rank as their latencies do. Speedups of one run stand as they
    are measured, and so do those of a workload where a latency is unknown.
    """
    met: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        met[record.definition, record.hardware, record.workload].append(record)
    restated = {id(record): _restated(record, scale) for found in met.values() if (scale := _scale(found)) for record in _passed(found)}
    return [restated.get(id(record), record) for record in records]


def _scale(found: Sequence[Record]) -> float | None:
    """The latency that the speedups of one workload are to be over; None where they have one scale, or can't have one."""
    passed = _passed(found)
    if len({record.run for record in passed}) < 2 or not all(record.latency for record in passed):
        return None
    known = [record.latency for record in found if record.solution == REFERENCE and record.latency]
    latest = max((record for record in passed if record.reference_latency), key=lambda record: record.when, default=None)
    return known[0] if known else latest and latest.reference_latency


def _passed(found: Sequence[Record]) -> list[Record]:
    return [record for record in found if record.passed and record.solution != REFERENCE]


def _restated(record: Record, scale: float) -> Record:
    """Without its interval, which was over the reference of its own run."""
    return replace(record, speedup=scale / record.latency, reference_latency=scale, interval=None, restated=True)
