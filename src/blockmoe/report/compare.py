"""Two result folders joined by definition, workload and solution: what moved beyond its noise, and what changed around it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from blockmoe.bench.settings import LEFT_OUT
from blockmoe.bench.stats import MARGIN, Ratio, geometric_mean, rank_agreement, unpaired_ratio, word_for
from blockmoe.report.cut import matching
from blockmoe.report.doubts import facts
from blockmoe.report.load import REFERENCE, Record, ReportError, load
from blockmoe.report.model import short, size_of
from blockmoe.report.tables import DASH, Cell, Table

Measure = Literal["latency", "speedup"]
MOST_MOVES = 60


class Group(NamedTuple):
    """What is averaged together: nothing is across definitions or kinds of hardware."""

    definition: str
    hardware: str
    solution: str


@dataclass
class Move:
    """One workload of one solution in both runs; the ratio is how many times faster the second run is."""

    before: Record
    after: Record
    ratio: Ratio

    @property
    def group(self) -> Group:
        return Group(self.before.definition, self.before.hardware, self.before.solution)

    @property
    def unknown(self) -> bool:
        """Whether there are samples, and they say nothing of their own noise."""
        return self.ratio.low is None and bool(self.before.blocks and self.after.blocks)

    @property
    def moved(self) -> bool:
        """Beyond the noise where that is known, else beyond the margin."""
        if self.ratio.low is not None:
            return self.ratio.word in ("FASTER", "SLOWER")
        return abs(math.log(self.ratio.ratio)) > math.log1p(MARGIN)


@dataclass
class Comparison:
    first: str
    second: str
    measure: Measure
    moves: list[Move]
    solutions: dict[Group, Ratio]  # geometric mean over the workloads in both
    agreement: dict[tuple[str, str], float | None]  # Kendall's tau of the ranking, by definition and hardware
    now_failing: list[Record]
    now_passing: list[Record]
    only_first: Counter[str]
    only_second: Counter[str]
    changes: list[str]
    notes: list[str]
    failures: list[str] = field(default_factory=list)  # what breaks the threshold

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    @property
    def several(self) -> list[str]:
        """Which of definition and hardware must be named, since more than one is compared."""
        return [name for name in ("definition", "hardware") if len({getattr(group, name) for group in self.solutions}) > 1]

    def place(self, record: Record) -> str:
        named = "".join(f", {getattr(record, name)}" for name in self.several)
        return f"{record.solution} at {size_of(record)}{named}"


def compare(
    a: Path,
    b: Path,
    fail_slower: float | None = None,
    by: Measure | None = None,
    solutions: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> Comparison:
    """Compare two runs, or what both have of some solutions. `fail_slower=0.03` fills `failures` with what is over 3 % slower in `b`, what
    fails there, and, unless `allow_missing`, what passed in `a` and is not in `b`.

    Latencies are compared unless some are unknown or `by="speedup"` asks for speedups: these cancel what moved the
    reference too, latencies show what a caller will feel. Raises ReportError where nothing can be joined.
    """
    first, second = load([a]), load([b])
    if solutions:
        kept = matching({record.solution for record in first.records + second.records}, solutions) | {REFERENCE}
        first, second = (replace(run, records=[r for r in run.records if r.solution in kept]) for run in (first, second))
    pairs, missing, only_second, notes = _join(first.records, second.records)
    if not pairs:
        raise ReportError(f"{a} and {b}: no (definition, workload, solution) is in both")
    both = [(x, y) for x, y in pairs if x.passed and y.passed]
    known = all(x.latency and y.latency for x, y in both)
    if by == "latency" and not known:
        raise ReportError("--by latency: some traces know only speedups")
    measure: Measure = by or ("latency" if known else "speedup")
    moves = [Move(x, y, _ratio(x, y, measure)) for x, y in both]
    moves = [move for move in moves if measure == "latency" or move.before.solution != REFERENCE]
    comparison = Comparison(
        first=str(a),
        second=str(b),
        measure=measure,
        moves=moves,
        solutions=_by_solution(moves),
        agreement=_agreement(moves),
        now_failing=[y for x, y in pairs if x.passed and not y.passed],
        now_passing=[y for x, y in pairs if y.passed and not x.passed],
        only_first=Counter(record.solution for record in missing),
        only_second=Counter(record.solution for record in only_second),
        changes=_changes(pairs),
        notes=[*first.notes, *second.notes, *notes],
    )
    if fail_slower is not None:
        comparison.failures = _failures(comparison, fail_slower) + ([] if allow_missing else _missing(missing))
    return comparison


def parse_threshold(text: str) -> float:
    """`3%` or `0.03`."""
    number = text.strip()
    try:
        value = float(number.rstrip("% ")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ReportError(f"--fail-slower {text}: expected a share below 1, as in 3% or 0.03")
    return value


def tables(comparison: Comparison) -> list[Table]:
    """A line a solution, and a line for each workload that moved."""
    title = f"{comparison.second} against {comparison.first}"
    columns = ["solution", *comparison.several, "times as fast", "95 % interval", "verdict", "by workload"]
    overall = Table("against", title, columns, [], text_columns=1 + len(comparison.several))
    for group, ratio in comparison.solutions.items():
        words = Counter(move.ratio.word for move in comparison.moves if move.group == group)
        interval = f"{ratio.low:.3f}–{ratio.high:.3f}" if ratio.low is not None else DASH
        counts = ", ".join(f"{number} {word}" for word, number in words.most_common())
        cells = [*_names(comparison, group), Cell(f"{ratio.ratio:.3f}x", ratio.ratio), Cell(interval, ratio.low)]
        overall.rows.append([*cells, Cell(ratio.word, ratio.word), Cell(counts, words.total())])
    overall.notes = _sentences(comparison)
    return [overall, _moved_table(comparison)]


def _names(comparison: Comparison, group: Group) -> list[Cell]:
    names = [group.solution, *(getattr(group, name) for name in comparison.several)]
    return [Cell(name, name) for name in names]


def _moved_table(comparison: Comparison) -> Table:
    moved = sorted((move for move in comparison.moves if move.moved), key=lambda move: move.ratio.ratio)
    table = Table("moved", "What moved", ["solution", *comparison.several, "workload"], [], text_columns=2 + len(comparison.several))
    table.columns += ["T", "before", "after", "times as fast", "verdict"]
    for move in moved[:MOST_MOVES]:
        x, y, ratio = move.before, move.after, move.ratio
        before, after = (x.latency, y.latency) if comparison.measure == "latency" else (x.speedup, y.speedup)
        unit = " ms" if comparison.measure == "latency" else "x"
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}" if ratio.low is not None else "no samples"
        table.rows.append(
            [
                *_names(comparison, move.group),
                Cell(short(x.workload), x.workload, hover=x.workload),
                Cell(DASH if x.tokens is None else str(x.tokens), x.tokens),
                Cell(f"{before:.4g}{unit}", before),
                Cell(f"{after:.4g}{unit}", after),
                Cell(f"{ratio.ratio:.3f}x", ratio.ratio, hover=interval),
                Cell(ratio.word, ratio.word),
            ]
        )
    if len(moved) > MOST_MOVES:
        table.notes.append(f"… and {len(moved) - MOST_MOVES} more.")
    return table


def _sentences(comparison: Comparison) -> list[str]:
    moved = sum(1 for move in comparison.moves if move.moved)
    what = "Latencies" if comparison.measure == "latency" else "Speedups"
    lines = [
        f"{what} of {len(comparison.moves)} evaluations in both; {moved} moved beyond noise (or, without an interval, "
        f"beyond {MARGIN:.1%}). Above 1 the second run is faster."
    ]
    if unknown := sum(1 for move in comparison.moves if move.unknown):
        lines.append(f"{unknown} of them have samples but no interval (one block gives none): no threshold fails on these.")
    for (definition, hardware), tau in comparison.agreement.items():
        where = definition + (f", {hardware}" if "hardware" in comparison.several else "")
        agrees = "cannot be compared (fewer than two solutions)" if tau is None else f"agrees with Kendall's tau = {tau:.2f}"
        lines.append(f"Ranking of solutions on {where} {agrees}.")
    for label, found in (("in the first", comparison.only_first), ("in the second", comparison.only_second)):
        if found:
            names = ", ".join(f"{name} ({number})" for name, number in found.items())
            lines.append(f"Only {label}: {names}.")
    for record in comparison.now_failing:
        lines.append(f"{comparison.place(record)} passed before and is {record.failure or record.status} now.")
    for record in comparison.now_passing:
        lines.append(f"{comparison.place(record)} passes now.")
    return [*lines, *(f"Changed: {change}." for change in comparison.changes), *comparison.notes]


def _join(first: Sequence[Record], second: Sequence[Record]) -> tuple[list[tuple[Record, Record]], list[Record], list[Record], list[str]]:
    """Evaluations in both, those in the first only, those in the second only, and notes on how they were joined."""
    notes = []
    same_machine = {r.hardware for r in first} & {r.hardware for r in second}
    if not same_machine:
        notes.append("The two ran on different hardware: the ratios compare machines as much as code.")
    by_uuid = {r.workload for r in first} & {r.workload for r in second}
    if not by_uuid:
        notes.append("The two name their workloads differently: joined by T and local_expert_offset.")

    def key(record: Record) -> tuple:
        workload = record.workload if by_uuid else (record.tokens, record.offset)
        return (record.definition, record.hardware if same_machine else "", workload, record.solution)

    old, new = {key(record): record for record in first}, {key(record): record for record in second}
    if len(old) < len(first) or len(new) < len(second):
        notes.append("Several evaluations stand for one workload and solution: the last one is compared.")
    pairs = [(old[k], new[k]) for k in old if k in new]
    only_first = [record for k, record in old.items() if k not in new]
    return pairs, only_first, [record for k, record in new.items() if k not in old], notes


def _ratio(before: Record, after: Record, measure: Measure) -> Ratio:
    if measure == "latency":
        if before.blocks and after.blocks:
            processes = before.processes, after.processes
            return unpaired_ratio(before.blocks, after.blocks, processes=processes, resamples=1000)
        return Ratio(before.latency / after.latency, None, None, "UNCLEAR")
    ratio = after.speedup / before.speedup
    if not before.interval or not after.interval:
        return Ratio(ratio, None, None, "UNCLEAR")
    # Two independent intervals: their half-widths add in squares on the log scale.
    below = math.hypot(math.log(after.speedup / after.interval[0]), math.log(before.interval[1] / before.speedup))
    above = math.hypot(math.log(after.interval[1] / after.speedup), math.log(before.speedup / before.interval[0]))
    low, high = ratio * math.exp(-below), ratio * math.exp(above)
    return Ratio(ratio, low, high, word_for(ratio, low, high))


def _by_solution(moves: Sequence[Move]) -> dict[Group, Ratio]:
    grouped: dict[Group, list[Ratio]] = defaultdict(list)
    for move in moves:
        grouped[move.group].append(move.ratio)
    return {group: geometric_mean(ratios) for group, ratios in sorted(grouped.items())}


def _agreement(moves: Sequence[Move]) -> dict[tuple[str, str], float | None]:
    """Kendall's tau of the solutions' geometric-mean speedups, over what both runs have."""
    scores: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for move in moves:
        if move.before.solution != REFERENCE:
            logs = (math.log(move.before.speedup), math.log(move.after.speedup))
            scores[move.group[:2]][move.before.solution].append(logs)
    agreement = {}
    for place, solutions in scores.items():
        means = [[sum(side) / len(side) for side in zip(*logs, strict=True)] for logs in solutions.values()]
        agreement[place] = rank_agreement([mean[0] for mean in means], [mean[1] for mean in means])
    return agreement


def _changes(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """Settings, versions, machine, and sources of solutions that differ."""
    old, new = facts([x for x, _ in pairs]), facts([y for _, y in pairs])
    names = [name for name in dict.fromkeys([*old, *new]) if name != "measured"]
    values = {name: [side.get(name, str(LEFT_OUT.get(name, "unknown"))) for side in (old, new)] for name in names}
    changes = [f"{name}: {before} → {after}" for name, (before, after) in values.items() if before != after]
    hardware = sorted({x.hardware for x, _ in pairs}), sorted({y.hardware for _, y in pairs})
    if hardware[0] != hardware[1]:
        changes.insert(0, f"hardware: {', '.join(hardware[0])} → {', '.join(hardware[1])}")
    for what in ("solution_digest", "definition_digest"):
        differing = {
            x.solution if what == "solution_digest" else x.definition
            for x, y in pairs
            if x.digests.get(what) and y.digests.get(what) and x.digests[what] != y.digests[what]
        }
        changes += [f"sources of {name}" for name in sorted(differing)]
    return changes


def _failures(comparison: Comparison, threshold: float) -> list[str]:
    failures = []
    for move in comparison.moves:
        ratio = move.ratio
        slower = ratio.ratio < 1 / (1 + threshold) and (ratio.high is None or ratio.high < 1)
        if slower and not move.unknown and move.before.solution != REFERENCE:
            failures.append(f"{comparison.place(move.before)}: {1 / ratio.ratio - 1:.1%} slower")
    for record in comparison.now_failing:
        failures.append(f"{comparison.place(record)}: {record.failure or record.status}")
    return failures


def _missing(only_first: Sequence[Record]) -> list[str]:
    """What passed in the first run and is not in the second: nobody knows how fast it is now."""
    passed = Counter(record.solution for record in only_first if record.passed and record.solution != REFERENCE)
    return [f"{name}: {number} evaluation(s) that passed before are missing" for name, number in sorted(passed.items())]
