"""The report's sentences: cliffs, leaders, choices. `**` and backticks mark what a page sets in bold and in code."""

from __future__ import annotations

from blockmoe.bench.stats import MARGIN
from blockmoe.report.model import Cliff, Scenario, Section
from blockmoe.report.regimes import ALL
from blockmoe.report.tables import factor, milliseconds


def cliff_sentences(section: Section) -> list[str]:
    """One sentence for each step between sizes where any solution loses more than half of its speedup."""
    steps: dict[tuple[int, int], list[Cliff]] = {}
    for cliff in section.cliffs:
        steps.setdefault((cliff.tokens, cliff.next_tokens), []).append(cliff)
    return [_step_sentence(cliffs) for _, cliffs in sorted(steps.items())]


def _step_sentence(cliffs: list[Cliff]) -> str:
    first = cliffs[0]
    falls = ", ".join(
        f"{cliff.solution} from {factor(cliff.before)} to {factor(cliff.after)} ({cliff.kept:.0%} is left)" for cliff in cliffs
    )
    sentence = f"From T = {first.tokens:,} to T = {first.next_tokens:,} the speedup falls by more than half: {falls}."
    spared = {name: kept for name, kept in first.others.items() if name not in {cliff.solution for cliff in cliffs}}
    if spared:
        kept = ", ".join(f"{name} keeps {share:.0%}" for name, share in spared.items())
        sentence += f" {kept}."
    elif first.others:
        sentence += " Every solution loses more than half there, so part of it is the reference's own cost."
    for cliff in cliffs:
        if cliff.against:
            sentence += f" {cliff.solution} falls by more than half against {', '.join(cliff.against)} too: a cliff of its own."
    return sentence


def scenario_sentence(scenario: Scenario, unit: str) -> str:
    """The choice for one kind of traffic, its cost, its lead, and who was not considered."""
    if scenario.choice is None:
        return f"**{scenario.name}**: no choice ({scenario.why})."
    cost = scenario.costs[scenario.choice]
    shown = f"{milliseconds(cost)} ms a call" if unit == "ms" else f"mean 1/speedup {cost:.4f}"
    left_out = "; ".join(f"{name} {why}" for name, why in scenario.excluded.items())
    tail = f" Not considered: {left_out}." if left_out else ""
    return f"**{scenario.name}**: {scenario.marked} ({shown}, {scenario.why}; {scenario.workloads} workloads).{tail}"


def dispatcher_sentence(section: Section) -> str:
    dispatcher = section.conclusion.dispatcher
    if dispatcher is None:
        return ""
    bound = f"choosing anew for every workload would gain {dispatcher.bound - 1:.1%}"
    if not dispatcher.below or not dispatcher.above or dispatcher.below == dispatcher.above:
        return f"**dispatcher**: no cut between two solutions gains anything; {bound}."
    if dispatcher.gain < 1 + MARGIN:
        return f"**dispatcher**: not worth it: the best cut between two solutions gains {dispatcher.gain - 1:.1%}; {bound}."
    unclear, doubt = ("not clear: ", f", but {dispatcher.doubt}") if dispatcher.doubt else ("", "")
    return (
        f"**dispatcher**: {unclear}`{dispatcher.below}` up to T = {dispatcher.last_below:,} and `{dispatcher.above}` from T = "
        f"{dispatcher.first_above:,} gains {dispatcher.gain - 1:.1%} over the best single solution{doubt}; {bound}."
    )


def leader_sentence(section: Section) -> str:
    """Who leads each regime, by geometric mean."""
    labels = {regime.name: regime.label for regime in (ALL, *section.regimes)}
    return "; ".join(f"{labels[name]}: {leader}" for name, leader in section.leaders.items())
