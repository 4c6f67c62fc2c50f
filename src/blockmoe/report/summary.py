"""Every statistic of a report, computed once: Markdown, HTML, CSV, JSON and the terminal all render this model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from blockmoe.bench.stats import Ratio, geometric_mean, paired_ratio, unpaired_ratio
from blockmoe.report.conclusion import conclude
from blockmoe.report.doubts import doubts, facts
from blockmoe.report.load import REFERENCE, Loaded, Record
from blockmoe.report.model import CLIFF, Cliff, Contender, Failure, Pair, Report, Row, Section, passed_all, spread
from blockmoe.report.regimes import ALL, Regime
from blockmoe.report.scale import on_one_scale

ALL_PAIRS_UP_TO = 6  # contenders, and evaluations; beyond it the pairwise table has the leader and the baseline only
ALL_PAIRS_EVALUATIONS = 2000
NO_ERRORS = ("worst_row", "nonzero_rows", "rechecked")  # beside the errors in a trace: a row's number, and counts


def summarise(loaded: Loaded, regimes: Sequence[Regime], mix: Sequence[tuple[Regime, float]], baseline: str | None = None) -> Report:
    """Statistics of everything loaded, a section for each definition and hardware, the largest first."""
    grouped: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in on_one_scale(loaded.records):
        grouped[record.definition, record.hardware].append(record)
    duels = _Duels(sum(1 for record in loaded.records if record.blocks))
    sections = [
        _section(key, records, loaded.runs, list(regimes), list(mix), baseline, duels)
        for key, records in sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    notes = list(loaded.notes)
    if len({definition for definition, _ in grouped}) > 1:
        notes.append(f"{len({definition for definition, _ in grouped})} definitions: nothing is averaged across them")
    if len({hardware for _, hardware in grouped}) > 1:
        names = ", ".join(sorted({hardware for _, hardware in grouped}))
        notes.append(f"several kinds of hardware ({names}): nothing is averaged or compared across them")
    if not sections:
        notes.append("no contender was evaluated")
    notes += _skipped_elsewhere(loaded.runs, grouped)
    return Report(sections, loaded.runs, notes)


def _skipped(runs: Sequence[dict[str, Any]], definition: str, hardware: str) -> list[dict[str, Any]]:
    """What runs of this definition on this hardware skipped; where a run doesn't say on which, it may have been this."""
    return [
        item
        for run in runs
        if run["environment"].get("hardware") in (None, "", hardware)
        for item in run["skipped"]
        if item.get("definition") in (None, "", definition)
    ]


def _skipped_elsewhere(runs: Sequence[dict[str, Any]], sections: Iterable[tuple[str, str]]) -> list[str]:
    """Those of no section, since nothing of their definition was evaluated on their hardware."""
    listed = {id(item) for section in sections for item in _skipped(runs, *section)}
    items = [item for run in runs for item in run["skipped"] if id(item) not in listed]
    return [f"{item.get('solution') or 'unnamed'}: SKIPPED, {item.get('reason') or 'no reason given'}" for item in items]


class _Duels:
    """Ratios from samples, each computed once; fewer resamples where there are thousands, to stay within seconds."""

    def __init__(self, sampled: int) -> None:
        self.resamples = int(np.clip(200_000 / max(sampled, 1), 200, 2000))
        self.known: dict[tuple[int, int], Ratio | None] = {}

    def __call__(self, first: Record, second: Record) -> Ratio | None:
        """How many times faster `first` is than `second`; None without samples of both."""
        key = (id(first), id(second))
        if key not in self.known:
            self.known[key] = self._ratio(first, second)
        return self.known[key]

    def _ratio(self, first: Record, second: Record) -> Ratio | None:
        if not first.blocks or not second.blocks:
            return None
        if first.beside(second):
            return paired_ratio(second.blocks, first.blocks, processes=first.processes, resamples=self.resamples)
        processes = second.processes, first.processes
        return unpaired_ratio(second.blocks, first.blocks, processes=processes, resamples=self.resamples)


def _section(
    key: tuple[str, str],
    records: list[Record],
    runs: list[dict[str, Any]],
    regimes: list[Regime],
    mix: list[tuple[Regime, float]],
    baseline: str | None,
    duel: _Duels,
) -> Section:
    definition, hardware = key
    reference = {record.workload: record for record in records if record.solution == REFERENCE}
    names = list(dict.fromkeys(record.solution for record in records if record.solution != REFERENCE))
    rows = _rows(records, reference, duel)
    contenders = [_contender(name, rows, regimes, runs) for name in names]
    shared = _rank(contenders, rows)
    order = [contender.name for contender in contenders]
    ranked = [contender.name for contender in contenders if contender.rank][:2]
    skipped = [item for item in _skipped(runs, definition, hardware) if item.get("solution") not in names]
    return Section(
        definition=definition,
        hardware=hardware,
        rows=rows,
        contenders=contenders,
        regimes=regimes,
        leaders=_leaders(contenders, regimes, rows),
        pairs=_pairs(order, rows, baseline, duel),
        lead=_pair(*ranked, shared, duel) if len(ranked) == 2 else None,
        cliffs=_cliffs(order, rows),
        conclusion=conclude(order, rows, mix, duel),
        shared=len(shared),
        skipped=skipped,
        facts=facts(records),
        doubts=doubts(rows, contenders, records),
        baseline=baseline if baseline in names else None,
        reference=reference,
        has_times=any(record.latency for record in records),
    )


def _rows(records: list[Record], reference: dict[str, Record], duel: _Duels) -> list[Row]:
    by_workload: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_workload[record.workload].append(record)
    rows = []
    for workload, found in by_workload.items():
        cells = {record.solution: record for record in found if record.solution != REFERENCE}
        row = Row(
            workload=workload,
            tokens=_first(found, lambda r: r.tokens),
            offset=_first(found, lambda r: r.offset),
            pairs=_first(found, lambda r: r.pairs),
            active_experts=_first(found, lambda r: r.active_experts),
            reference_latency=reference[workload].latency if workload in reference else None,
            floor=_first(found, lambda r: r.floor),
            cells=cells,
        )
        if row.reference_latency is None:
            row.reference_latency = _first(found, lambda r: r.reference_latency)
        _decide(row, duel)
        rows.append(row)
    return sorted(rows, key=lambda row: (row.tokens is None, row.tokens or 0, row.offset or 0, row.workload))


def _decide(row: Row, duel: _Duels) -> None:
    """Winner and runner-up by speedup, and the word that their samples give."""
    passed = sorted((record for record in row.cells.values() if record.passed), key=lambda r: -(r.speedup or 0))
    if not passed:
        return
    best = passed[0]
    row.winners = [record.solution for record in passed if record.speedup == best.speedup]
    if len(passed) > 1:
        row.runner_up = passed[1].solution
        row.margin = best.speedup / passed[1].speedup - 1
        row.duel, row.paired = duel(best, passed[1]), best.beside(passed[1])


def _contender(name: str, rows: list[Row], regimes: list[Regime], runs: list[dict[str, Any]]) -> Contender:
    cells = [(row, row.cells[name]) for row in rows if name in row.cells]
    speedups = [(row.tokens, cell.speedup) for row, cell in cells if cell.passed]
    shares = [(row.tokens, cell.floor_fraction) for row, cell in cells if cell.passed and cell.floor_fraction]
    won = [row for row in rows if row.winners == [name]]
    errors: dict[str, float] = {}
    for _, cell in cells:
        for measure, value in cell.errors.items():
            if measure not in NO_ERRORS:
                worst = min if measure.startswith(("matched", "cosine")) else max
                errors[measure] = worst(errors.get(measure, value), value)
    described = [item for run in runs for item in run["contenders"] if item.get("name") == name]
    return Contender(
        name=name,
        description=str(described[-1].get("description") or "") if described else "",
        overall=spread(speedups),
        regimes={regime.name: spread([s for s in speedups if regime.holds(s[0])]) for regime in regimes},
        evaluated=len(cells),
        wins=len(won),
        ties=sum(1 for row in rows if name in row.winners and len(row.winners) > 1),
        clear_wins=sum(1 for row in won if row.duel and row.duel.word == "FASTER"),
        shared_geometric=None,
        rank=None,
        floor_share=spread(shares),
        failures=[Failure(row.workload, row.tokens, cell.failure or cell.status, cell.message) for row, cell in cells if not cell.passed],
        errors=errors,
        digest=" | ".join(dict.fromkeys(cell.digests["solution_digest"] for _, cell in cells if "solution_digest" in cell.digests)),
    )


def _rank(contenders: list[Contender], rows: list[Row]) -> list[Row]:
    """Order contenders by geometric mean over the workloads that all ranked ones passed; returns these.

    Ranked are those that passed at least half as many as the most able one: a solution that passed one workload must
    not reduce the ranking of all others to it.
    """
    most = max((contender.overall.count for contender in contenders), default=0)
    able = [contender for contender in contenders if contender.overall.count and 2 * contender.overall.count >= most]
    shared = [row for row in rows if all(c.name in row.cells and row.cells[c.name].passed for c in able)] if able else []
    for contender in able if shared else []:
        contender.shared_geometric = spread([(row.tokens, row.cells[contender.name].speedup) for row in shared]).geometric
    contenders.sort(key=lambda c: (-(c.shared_geometric or 0), -(c.overall.geometric or 0)))
    for place, contender in enumerate([c for c in contenders if c.shared_geometric], 1):
        contender.rank = place
    return shared


def _leaders(contenders: list[Contender], regimes: list[Regime], rows: list[Row]) -> dict[str, str]:
    """Best geometric mean in each regime, among those that passed all of its workloads."""
    leaders = {}
    for regime in (ALL, *regimes):
        spreads = {c.name: c.overall if regime == ALL else c.regimes[regime.name] for c in contenders}
        able = {name: found.geometric for name, found in spreads.items() if found.count and passed_all(rows, name, regime)}
        if able:
            leaders[regime.name] = max(able, key=able.__getitem__)
    return leaders


def _pairs(names: list[str], rows: list[Row], baseline: str | None, duel: _Duels) -> list[Pair]:
    """Best-ranked against each other; with many contenders only the leader and the baseline against the rest."""
    wanted = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if len(names) > ALL_PAIRS_UP_TO or len(names) * len(rows) > ALL_PAIRS_EVALUATIONS:
        wanted = [(a, b) for a, b in wanted if a == names[0] or baseline in (a, b)]
    if baseline in names:  # the baseline stands on the right, and its pairs come first
        wanted = [(b, a) if a == baseline else (a, b) for a, b in wanted]
        wanted.sort(key=lambda pair: pair[1] != baseline)
    return [pair for a, b in wanted if (pair := _pair(a, b, rows, duel))]


def _pair(first: str, second: str, rows: list[Row], duel: _Duels) -> Pair | None:
    both = [
        (row.tokens, row.cells[first], row.cells[second])
        for row in rows
        if first in row.cells and second in row.cells and row.cells[first].passed and row.cells[second].passed
    ]
    if not both:
        return None
    ratios = spread([(tokens, a.speedup / b.speedup) for tokens, a, b in both])
    sampled = [ratio for _, a, b in both if (ratio := duel(a, b))]
    return Pair(
        first=first,
        second=second,
        count=len(both),
        of_averages=sum(a.speedup for _, a, _ in both) / sum(b.speedup for _, _, b in both),
        arithmetic=ratios.arithmetic,
        geometric=ratios.geometric,
        low=ratios.low,
        low_at=ratios.low_at,
        high=ratios.high,
        high_at=ratios.high_at,
        wins=sum(1 for _, a, b in both if a.speedup > b.speedup),
        losses=sum(1 for _, a, b in both if a.speedup < b.speedup),
        ties=sum(1 for _, a, b in both if a.speedup == b.speedup),
        overall=geometric_mean(sampled) if len(sampled) == len(both) else None,
        unpaired=sum(1 for _, a, b in both if not a.beside(b)),
        words=dict(Counter(ratio.word for ratio in sampled)),
    )


def _cliffs(names: list[str], rows: list[Row]) -> list[Cliff]:
    curves = {name: _curve(name, rows) for name in names}
    cliffs = []
    for name, curve in curves.items():
        sizes = sorted(curve)
        for here, there in zip(sizes, sizes[1:], strict=False):
            if curve[there] < CLIFF * curve[here]:
                others = {
                    other: found[there] / found[here]
                    for other, found in curves.items()
                    if other != name and here in found and there in found
                }
                cliffs.append(Cliff(name, here, there, curve[here], curve[there], others))
    return cliffs


def _curve(name: str, rows: list[Row]) -> dict[int, float]:
    """Speedup by T; workloads of one T count as their geometric mean."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        worked = row.pairs != 0  # without a pair there is nothing to compute, and its speedup is of launches
        if worked and row.tokens is not None and name in row.cells and row.cells[name].passed:
            found[row.tokens].append(row.cells[name].speedup)
    return {tokens: math.exp(sum(map(math.log, values)) / len(values)) for tokens, values in found.items()}


def _first(records: Sequence[Record], get: Callable[[Record], Any]) -> Any:
    return next((value for record in records if (value := get(record)) is not None), None)
