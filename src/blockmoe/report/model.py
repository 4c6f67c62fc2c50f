"""The report's model: plain values that every output renders. Computed by `summary.py` and `conclusion.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockmoe.bench.stats import Ratio
from blockmoe.report.load import Record
from blockmoe.report.regimes import Regime

CLIFF = 0.5  # a speedup that falls below this share of its neighbour's


@dataclass
class Row:
    """One workload: its sizes, what every contender did, and who won."""

    workload: str
    tokens: int | None
    offset: int | None
    pairs: int | None
    active_experts: int | None
    reference_latency: float | None
    floor: float | None
    cells: dict[str, Record]
    winners: list[str] = field(default_factory=list)  # more than one where speedups are equal
    runner_up: str | None = None
    margin: float | None = None  # winner's speedup over the runner-up's, minus 1
    duel: Ratio | None = None  # winner against runner-up from their samples
    paired: bool = True  # whether these were measured side by side


@dataclass
class Spread:
    """Statistics of a set of speedups; empty sets have no numbers."""

    count: int
    arithmetic: float | None = None
    geometric: float | None = None
    median: float | None = None
    low: float | None = None
    low_at: int | None = None
    high: float | None = None
    high_at: int | None = None
    deviation: float | None = None  # sample standard deviation
    variation: float | None = None  # its share of the arithmetic mean


@dataclass
class Failure:
    workload: str
    tokens: int | None
    what: str
    message: str


@dataclass
class Contender:
    """One solution over all workloads of a section."""

    name: str
    description: str
    overall: Spread
    regimes: dict[str, Spread]
    evaluated: int
    wins: int
    ties: int
    clear_wins: int  # of the wins, those that the samples call FASTER
    shared_geometric: float | None  # over the workloads that every ranked contender passed
    rank: int | None
    floor_share: Spread
    failures: list[Failure]
    errors: dict[str, float]  # the worst of each error measure
    digest: str = ""  # of its sources; all where there are several versions


@dataclass
class Pair:
    """One solution over another, workload by workload where both passed."""

    first: str
    second: str
    count: int
    of_averages: float
    arithmetic: float
    geometric: float
    low: float
    low_at: int | None
    high: float
    high_at: int | None
    wins: int
    losses: int
    ties: int
    overall: Ratio | None  # geometric mean with interval, from samples
    unpaired: int  # of the workloads, those whose samples are of different runs or rounds
    words: dict[str, int]


@dataclass
class Cliff:
    """A speedup that falls by more than half from one size to the next."""

    solution: str
    tokens: int
    next_tokens: int
    before: float
    after: float
    others: dict[str, float]  # what is left of each other solution's speedup over the same step

    @property
    def kept(self) -> float:
        return self.after / self.before

    @property
    def against(self) -> list[str]:
        """Those against whom it lost more than half over this step: the reference's own cost cancels out there."""
        return [name for name, kept in self.others.items() if self.kept < CLIFF * kept]


@dataclass
class Scenario:
    """The choice for one kind of traffic. Costs are per call: ms, or 1/speedup where times are unknown."""

    name: str
    mix: list[tuple[Regime, float]]
    workloads: int
    costs: dict[str, float]  # candidates, cheapest first
    excluded: dict[str, str]  # the others, and why
    choice: str | None = None
    lead: float | None = None  # runner-up's cost over the choice's
    clear: bool = False
    why: str = ""

    @property
    def label(self) -> str:
        """The choice; both where the runner-up is as good."""
        if self.choice is None:
            return "no choice"
        return self.choice if self.clear else " or ".join(list(self.costs)[:2])

    @property
    def marked(self) -> str:
        return " or ".join(f"`{name}`" for name in self.label.split(" or "))


@dataclass
class Dispatcher:
    """One solution up to a size, another above it; `bound` chooses anew for every workload."""

    below: str
    above: str
    last_below: int | None
    first_above: int | None
    gain: float  # cost of the best single solution over the dispatcher's
    bound: float
    doubt: str = ""  # what the samples have against the gain


@dataclass
class Conclusion:
    scenarios: list[Scenario]
    dispatcher: Dispatcher | None
    unit: str
    rules: list[str]


@dataclass
class Section:
    """All that is known of one definition on one kind of hardware."""

    definition: str
    hardware: str
    rows: list[Row]
    contenders: list[Contender]  # best first
    regimes: list[Regime]
    leaders: dict[str, str]
    pairs: list[Pair]
    lead: Pair | None  # the first of the ranking over the second, on the workloads that the ranking is over
    cliffs: list[Cliff]
    conclusion: Conclusion
    shared: int  # workloads that every ranked contender passed
    skipped: list[dict[str, Any]]
    facts: dict[str, str]  # settings, versions and machine, as the traces agree on them
    doubts: list[str]
    baseline: str | None
    reference: dict[str, Record]
    has_times: bool

    @property
    def has_intervals(self) -> bool:
        return any(cell.interval for row in self.rows for cell in row.cells.values())

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.contenders]


@dataclass
class Report:
    sections: list[Section]
    runs: list[dict[str, Any]]
    notes: list[str]


def short(workload: str) -> str:
    """The first part of a UUID; other names stay whole."""
    return workload[:8] if len(workload) == 36 and workload[8] == "-" else workload[:20]


def size_of(item: Row | Failure | Record) -> str:
    """Its T; the workload's name where there is none."""
    return short(item.workload) if item.tokens is None else f"T = {item.tokens}"


def passed_all(rows: Sequence[Row], name: str, regime: Regime) -> bool:
    """Whether a solution passed every workload of a regime, so that its mean there may be set beside another's."""
    return all(name in row.cells and row.cells[name].passed for row in rows if regime.holds(row.tokens))


def spread(values: Sequence[tuple[int | None, float]]) -> Spread:
    """Statistics of (T, value) pairs."""
    if not values:
        return Spread(0)
    numbers = np.array([value for _, value in values])
    (low_at, low), (high_at, high) = (pick(values, key=lambda item: item[1]) for pick in (min, max))
    mean = float(numbers.mean())
    deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
    return Spread(
        count=len(values),
        arithmetic=mean,
        geometric=math.exp(float(np.log(numbers).mean())),
        median=float(np.median(numbers)),
        low=low,
        low_at=low_at,
        high=high,
        high_at=high_at,
        deviation=deviation,
        variation=None if deviation is None else deviation / mean,
    )
