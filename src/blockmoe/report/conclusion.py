"""Which solution to deploy: chosen by rules that are printed with the choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blockmoe.bench.stats import MARGIN, Ratio, weighted_mean
from blockmoe.report.load import Record
from blockmoe.report.model import Conclusion, Dispatcher, Row, Scenario
from blockmoe.report.regimes import DECODE, PREFILL, Regime

Duel = Callable[[Record, Record], Ratio | None]
Mix = list[tuple[Regime, float]]

ITSELF = Ratio(1.0, 1.0, 1.0, "SAME")  # what an evaluation is beside itself, whatever its noise
NO_INTERVAL = "the samples give no interval"


def conclude(names: list[str], rows: list[Row], mix: Mix, duel: Duel) -> Conclusion:
    """Choices for pure decode, pure prefill and the mix, and what choosing by T would gain over the mix's choice."""
    cells = [cell for row in rows for cell in row.cells.values() if cell.passed]
    timed = bool(cells) and all(cell.latency for cell in cells)
    scenarios = [
        _scenario(name, shares, names, rows, timed, duel)
        for name, shares in (("decode", [(DECODE, 1.0)]), ("prefill", [(PREFILL, 1.0)]), ("mixed", mix))
    ]
    dispatcher = _dispatcher(scenarios[-1], rows, timed, duel) if len(scenarios[-1].costs) > 1 else None
    return Conclusion(scenarios, dispatcher, "ms" if timed else "1/speedup", _rules(mix, timed))


def _rules(mix: Mix, timed: bool) -> list[str]:
    cost = (
        "The cost of a solution is the mean latency of a call"
        if timed
        else "Latencies are not known, so the cost of a solution is the mean of 1/speedup (the reference's time counts as "
        "equal at every size)"
    )
    shares = ", ".join(f"{share:.0%} {regime.label}" for regime, share in mix)
    return [
        f"Decode is {DECODE.span}, prefill is {PREFILL.span}; mixed traffic is {shares} (shares of calls).",
        f"{cost}; within a phase every workload is equally likely.",
        "Only a solution that passed every workload of the traffic is a candidate; the lowest cost is chosen.",
        f"The choice is clear where it leads the runner-up by more than {MARGIN:.1%} and, where samples are known, the "
        "interval of their ratio over the traffic's workloads excludes 1.",
        "The dispatcher runs one solution up to some T and another above it, the best such pair; its gain is the cost of "
        "the best single solution over its own, clear as a choice is. The bound chooses the best solution for every workload.",
    ]


def _weights(rows: list[Row], mix: Mix) -> tuple[np.ndarray, list[str]]:
    """Each row's share of calls, and the phases that no workload represents (their share is lost to the others)."""
    weights, absent = np.zeros(len(rows)), []
    for regime, share in mix:
        holds = np.array([row.tokens is not None and regime.holds(row.tokens) for row in rows], dtype=float)
        if holds.sum():
            weights += share * holds / holds.sum()
        else:
            absent.append(regime.label)
    return (weights / weights.sum() if weights.sum() else weights), absent


def _cost(cell: Record, timed: bool) -> float:
    return cell.latency if timed else 1 / cell.speedup


def _scenario(name: str, mix: Mix, names: list[str], rows: list[Row], timed: bool, duel: Duel) -> Scenario:
    weights, absent = _weights(rows, mix)
    wanted = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0]
    scenario = Scenario(name, mix, len(wanted), {}, {})
    if absent:
        scenario.why = f"no workload of {' or of '.join(absent)} was measured"
    if not wanted or (absent and len(mix) > 1):
        return scenario
    costs = {}
    for solution in names:
        missing = sum(1 for row, _ in wanted if not (solution in row.cells and row.cells[solution].passed))
        if missing:
            scenario.excluded[solution] = f"did not pass {missing} of {len(wanted)} workloads"
        else:
            costs[solution] = float(sum(weight * _cost(row.cells[solution], timed) for row, weight in wanted))
    scenario.costs = dict(sorted(costs.items(), key=lambda item: item[1]))
    if not costs:
        scenario.why = "no solution passed every workload"
        return scenario
    scenario.choice, *rest = scenario.costs
    if not rest:
        scenario.clear, scenario.why = True, "the only candidate"
        return scenario
    scenario.lead = scenario.costs[rest[0]] / scenario.costs[scenario.choice]
    _judge(scenario, rest[0], wanted, timed, duel)
    return scenario


def _judge(scenario: Scenario, runner_up: str, rows: list[tuple[Row, float]], timed: bool, duel: Duel) -> None:
    """Whether the choice is clear, given the workloads and their weights: by the interval of the costs' ratio, in which each workload
    counts as much as it costs."""
    ahead = f"{runner_up} costs {scenario.lead:.3f} times as much"
    if scenario.lead <= 1 + MARGIN:
        scenario.why = f"not clear: {ahead}"
        return
    doubt = _doubt([(row.cells[scenario.choice], row.cells[runner_up], weight) for row, weight in rows], timed, duel)
    scenario.clear, scenario.why = not doubt, f"not clear: {ahead}, but {doubt}" if doubt else ahead


def _doubt(calls: list[tuple[Record, Record, float]], timed: bool, duel: Duel) -> str:
    """What the samples have against a ratio of two total costs; empty where it holds, or there are no samples.

    `calls` are a workload's evaluation on the cheaper side, on the dearer side, and its weight.
    """
    sampled = [duel(cheap, dear) for cheap, dear, _ in calls if cheap is not dear]
    if not any(sampled):
        return ""
    if not all(sampled):
        return NO_INTERVAL
    ratios = [ITSELF if cheap is dear else duel(cheap, dear) for cheap, dear, _ in calls]
    ratio = weighted_mean(ratios, [weight * _cost(cheap, timed) for cheap, _, weight in calls])
    if ratio.low is None:
        return NO_INTERVAL
    return f"with the errors of measurement {ratio.low:.3f} to {ratio.high:.3f} times" if ratio.low <= 1 else ""


def _dispatcher(scenario: Scenario, rows: list[Row], timed: bool, duel: Duel) -> Dispatcher:
    """The best cut between two sizes, from running sums of every candidate's weighted costs."""
    weights, _ = _weights(rows, scenario.mix)
    used = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0]
    names = list(scenario.costs)
    costs = np.array([[weight * _cost(row.cells[name], timed) for row, weight in used] for name in names])
    sums = np.concatenate([np.zeros((len(names), 1)), costs.cumsum(axis=1)], axis=1)  # [solution, workloads below]
    tokens = [row.tokens for row, _ in used]
    cuts = [cut for cut in range(len(used) + 1) if cut in (0, len(used)) or tokens[cut - 1] < tokens[cut]]
    best = sums[0, -1]
    below, above = sums.min(axis=0), (sums[:, -1:] - sums).min(axis=0)
    cut = min(cuts, key=lambda place: below[place] + above[place])
    lower = names[int(sums[:, cut].argmin())] if cut else ""
    upper = names[int((sums[:, -1] - sums[:, cut]).argmin())] if cut < len(used) else ""
    chosen = [lower] * cut + [upper] * (len(used) - cut)
    calls = [(row.cells[name], row.cells[names[0]], weight) for (row, weight), name in zip(used, chosen, strict=True)]
    return Dispatcher(
        below=lower,
        above=upper,
        last_below=tokens[cut - 1] if cut else None,
        first_above=tokens[cut] if cut < len(used) else None,
        gain=float(best / (below[cut] + above[cut])),
        bound=float(best / costs.min(axis=0).sum()),
        doubt=_doubt(calls, timed, duel),
    )
