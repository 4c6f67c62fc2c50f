"""What the traces agree on (settings, versions, machine), and what makes their numbers uncertain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from blockmoe.bench.dataset import listed
from blockmoe.bench.stats import MARGIN
from blockmoe.report.load import REFERENCE, Record
from blockmoe.report.model import Contender, Row, size_of

_SETTINGS = (
    "rtol", "atol", "required_matched_ratio", "warmup_runs", "iterations", "num_trials", "inputs", "seed", "device", "fresh_processes",
)  # fmt: skip
_REASONS = {  # bits of NVML's mask that hold clocks back; idle (1) and chosen application clocks (2) don't count
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_MACHINE = ("driver", "platform", "commit", "flush_bytes", "releases_l2")


def facts(records: Sequence[Record]) -> dict[str, str]:
    """Settings, versions and machine as the traces have them; all values where they differ."""
    found: dict[str, str] = {}
    for name in _SETTINGS:
        _note(found, name, (record.settings.get(name) for record in records))
    _note(found, "timer", (record.timer or None for record in records))
    for name in _MACHINE:
        _note(found, name, (record.environment.get(name) for record in records))
    for library in sorted({name for record in records for name in record.libs}):
        _note(found, library, (record.libs.get(library) for record in records))
    stamps = sorted(record.timestamp for record in records if record.timestamp)
    if stamps:
        found["measured"] = stamps[0] if stamps[0] == stamps[-1] else f"{stamps[0]} to {stamps[-1]}"
    return found


def doubts(rows: Sequence[Row], contenders: Sequence[Contender], records: Sequence[Record]) -> list[str]:
    """One line for each thing that a reader should know before believing the tables."""
    passed = [record for record in records if record.passed]
    lines = [
        *_coverage(rows, contenders),
        *_words(rows),
        *_noise(passed),
        *_mixtures(records),
        *_versions(records),
        *_flushes(records),
        *_machine(records),
    ]
    return lines


def _coverage(rows: Sequence[Row], contenders: Sequence[Contender]) -> Iterable[str]:
    if len(contenders) == 1:
        yield "Only one solution: nothing to compare it with but the reference."
    if not contenders:
        yield "Only the reference was evaluated."
    if contenders and not any(contender.overall.count for contender in contenders):
        yield "No solution passed any workload."
    partial = [contender for contender in contenders if 0 < contender.overall.count < len(rows)]
    for contender in partial:
        ranking = "the ranking is over those that all ranked solutions passed" if contender.rank else "it is not ranked"
        yield f"{contender.name} passed {contender.overall.count} of {len(rows)} workloads: its averages are over these; {ranking}."


def _words(rows: Sequence[Row]) -> Iterable[str]:
    contested = [row for row in rows if row.runner_up]
    if contested and not any(row.duel for row in contested):
        yield "The traces hold no samples: no interval and no verdict word stands behind any winner or ratio."
        return
    unclear = [row for row in contested if row.duel and row.duel.word in ("UNCLEAR", "SLOWER")]
    if unclear:
        yield f"{len(unclear)} of {len(contested)} winners are UNCLEAR: {_sizes(unclear)}."
    same = [row for row in contested if row.duel and row.duel.word == "SAME"]
    if same:
        yield f"{len(same)} of {len(contested)} winners are within {MARGIN:.1%} of the runner-up (SAME): {_sizes(same)}."


def _noise(passed: Sequence[Record]) -> Iterable[str]:
    wide = [r for r in passed if r.interval and r.speedup and (r.interval[1] - r.interval[0]) / 2 / r.speedup > 0.03]
    if wide:
        worst = max(wide, key=lambda r: (r.interval[1] - r.interval[0]) / r.speedup)
        yield (
            f"{len(wide)} speedups have an interval wider than ±3 %; the widest is {worst.solution} at {size_of(worst)}: "
            f"{worst.interval[0]:.3g} to {worst.interval[1]:.3g}."
        )
    single = [record for record in passed if record.blocks and len(record.blocks) == 1]
    if single:
        spread = max(max(r.blocks[0]) / min(r.blocks[0]) - 1 for r in single)
        yield (
            f"{len(single)} evaluations rest on one block of {min(len(r.blocks[0]) for r in single)} samples: no interval. "
            f"The samples of one differ by up to {spread:.0%}."
        )
    drifted = [record for record in passed if record.drifted]
    if drifted:
        worst = max(drifted, key=lambda r: abs(r.drift or 0))
        change = f" by {worst.drift:+.1%}" if worst.drift is not None else ""
        yield f"{len(drifted)} evaluations drifted while they ran; the most: {worst.solution} at {size_of(worst)}{change}."
    beaten = [record for record in passed if record.floor_fraction and record.floor_fraction > 1]
    for record in beaten[:3]:
        yield (
            f"{record.solution} at {size_of(record)} is faster than the floor ({record.latency:.4g} < {record.floor:.4g} "
            "ms): a defect of the measurement or of the solution."
        )


def _mixtures(records: Sequence[Record]) -> Iterable[str]:
    apart = sum(1 for record in records if not record.interleaved)
    if apart:
        yield f"{apart} evaluations were not interleaved with the others (they did not fit together): unpaired samples."
    runs = Counter(record.run for record in records)
    if len(runs) > 1 and len({(record.workload, record.run) for record in records}) == len({record.workload for record in records}):
        yield f"Traces of {len(runs)} runs, each workload of one: clocks and heat may differ from workload to workload, samples are paired."
    elif len(runs) > 1:
        yield f"Traces of {len(runs)} runs: between runs clocks and heat differ, and samples are not paired."
    restated = len({record.workload for record in records if record.restated})
    if restated:
        yield (
            f"On {restated} workloads solutions of several runs meet. Between runs the reference moves: speedups there are the latest "
            "reference's latency over a solution's, without intervals."
        )
    yield from _timers(records)
    for name, values in (
        ("tolerances", {_tolerance(record.settings) for record in records if record.settings}),
        ("input modes", _values(records, "inputs")),
        ("warm-up calls", _values(records, "warmup_runs")),
        ("iterations", _values(records, "iterations")),
        ("trials", _values(records, "num_trials")),
        ("seeds", _values(records, "seed")),
    ):
        if len(values) > 1:
            yield f"Mixed {name}: {', '.join(sorted(values))}."


def _timers(records: Sequence[Record]) -> Iterable[str]:
    timed = [record for record in records if record.timer]
    every = {record.timer for record in timed}
    others = {record.timer for record in timed if record.solution != REFERENCE}
    if len(every) > 1 and len(others) == 1:
        apart = [record for record in timed if record.timer not in others]
        by = ", ".join(sorted({record.timer for record in apart}))
        yield f"Mixed timers: the reference's by {by} on {len({r.workload for r in apart})} workloads, all else by {', '.join(others)}."
    elif len(every) > 1:
        yield f"Mixed timers: {', '.join(sorted(every))}."


def _versions(records: Sequence[Record]) -> Iterable[str]:
    for kind in ("solution", "definition"):
        found: dict[str, set[str]] = {}
        for record in records:
            if digest := record.digests.get(f"{kind}_digest"):
                found.setdefault(getattr(record, kind), set()).add(digest)
        for name, digests in found.items():
            if len(digests) > 1:
                shown = ", ".join(sorted(digest[:12] for digest in digests))
                yield f"{name} is of {len(digests)} versions ({shown}): its figures are of all of them."


def _flushes(records: Sequence[Record]) -> Iterable[str]:
    flushed = [record for record in records if record.environment.get("flush_bytes")]
    kept = sum(1 for record in flushed if not record.environment.get("releases_l2"))
    if kept and kept < len(flushed):
        yield (
            f"In {kept} of {len(flushed)} evaluations lines that a kernel had the L2 keep could outlast the flush; in the others they were "
            "let go before each call."
        )
    elif any(record.environment.get("releases_l2") is False for record in flushed):
        yield "Lines that a kernel had the L2 keep could outlast the flush: the driver did not let them go."


def _machine(records: Sequence[Record]) -> Iterable[str]:
    found = [_throttled(record.environment.get("gpu")) for record in records]
    if any(found):
        reasons = ", ".join(sorted(set().union(*found)))
        yield f"The GPU held its clocks back in {sum(map(bool, found))} of {len(records)} evaluations: {reasons}."


def _throttled(gpu: Any) -> set[str]:
    """Names of the reasons, from NVML's bit masks before and after."""
    masks = gpu.get("throttle") if isinstance(gpu, dict) else None
    found = set()
    for mask in masks if isinstance(masks, list) else [masks]:
        if isinstance(mask, (int, float)) and math.isfinite(mask):
            found |= {name for bit, name in _REASONS.items() if int(mask) & bit}
    return found


def _tolerance(settings: dict[str, Any]) -> str:
    return " / ".join(str(settings.get(name)) for name in ("rtol", "atol", "required_matched_ratio"))


def _values(records: Sequence[Record], setting: str) -> set[str]:
    return {str(record.settings[setting]) for record in records if record.settings.get(setting) not in (None, "")}


def _sizes(rows: Sequence[Row]) -> str:
    return listed([size_of(row) for row in rows])


def _note(found: dict[str, str], name: str, values: Iterable[Any]) -> None:
    distinct = dict.fromkeys(str(value) for value in values if value not in (None, ""))
    if distinct:
        shown = list(distinct)[:4]
        found[name] = " | ".join(shown) + (f" and {len(distinct) - 4} more" if len(distinct) > 4 else "")
