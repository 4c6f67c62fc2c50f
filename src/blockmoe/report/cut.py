"""Some solutions out of a run: what was measured beside them is left out, and said to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from blockmoe.report.load import REFERENCE, Loaded, Record, ReportError


def only(loaded: Loaded, wanted: Sequence[str]) -> Loaded:
    """Evaluations of the solutions that match a name or pattern, and the reference's; raises ReportError where one matches none."""
    measured = {record.solution for record in loaded.records} - {REFERENCE}
    skipped = {str(item.get("solution")) for run in loaded.runs for item in run["skipped"]} - measured
    for pattern in wanted:
        if not matching(measured | skipped, [pattern]):
            raise ReportError(f"--solutions {pattern}: no such solution here, only {', '.join(sorted(measured | skipped))}")
    kept = matching(measured | skipped, wanted)
    runs = [
        run
        | {
            "contenders": [item for item in run["contenders"] if item.get("name") in kept],
            "skipped": [item for item in run["skipped"] if item.get("solution") in kept],
        }
        for run in loaded.runs
    ]
    records = [record for record in loaded.records if record.solution in kept | {REFERENCE}]
    return replace(loaded, records=records, runs=runs, notes=[*loaded.notes, *_told(loaded.records, measured, kept)])


def _told(records: Sequence[Record], measured: set[str], kept: set[str]) -> list[str]:
    """What the kept solutions were measured with."""
    left_out = sorted(measured - kept)
    if not left_out:
        return []
    shown = [record for record in records if record.solution in measured]
    beside = {(record.workload, record.run) for record in shown if record.solution in left_out and record.interleaved and record.run}
    together = [(record.workload, record.run) in beside and record.interleaved for record in shown if record.solution in kept]
    how = "in the same interleaved session" if all(together) else "in part in the same interleaved session" if any(together) else "apart"
    names = ", ".join(left_out)
    return [f"Cut to {len(measured & kept)} of {len(measured)} solutions. Left out of this report, measured {how}: {names}"]


def matching(names: set[str], patterns: Sequence[str]) -> set[str]:
    """Those that are one of the patterns, or match one."""
    return {name for name in names if any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)}
