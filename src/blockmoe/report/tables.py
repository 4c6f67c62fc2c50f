"""The report's tables, built once from the model; Markdown and HTML only lay them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockmoe.bench.stats import MARGIN, word_for
from blockmoe.report.load import Record
from blockmoe.report.model import Contender, Pair, Row, Section, Spread, passed_all, short, size_of
from blockmoe.report.regimes import ALL, Regime

DASH = "–"
MOST_ROWS = 500  # of a table; a page of thousands of rows is for programs, which have the CSV


@dataclass
class Cell:
    """A table cell: what is read, what it sorts by, whether it wins, and what hovering tells."""

    text: str
    value: float | str | None = None
    bold: bool = False
    hover: str = ""
    bad: bool = False


@dataclass
class Table:
    key: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    text_columns: int = 1  # leading columns that hold words; the others are numbers, aligned right


def factor(value: float | None) -> str:
    """Two decimals, halves rounded up: 3.725 is binary 3.72499… and still reads 3.73."""
    return DASH if value is None else f"{value + 1e-9:.2f}x"


def milliseconds(value: float | None) -> str:
    """Four significant digits, never an exponent."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}" if value >= 0.001 else f"{value:.6f}"


def percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{value:.{digits}%}"


def section_tables(section: Section) -> list[Table]:
    """Every table of a section that has something to say, in reading order."""
    tables = [
        workload_table(section),
        latency_table(section),
        host_table(section),
        average_table(section),
        ranking_table(section),
        pair_table(section),
        stage_table(section),
        error_table(section),
        failure_table(section),
        contender_table(section),
    ]
    return [table for table in tables if table and table.rows]


def workload_table(section: Section) -> Table:
    """A row a workload, a column a solution with its speedup, the winner in bold."""
    sized = any(row.pairs is not None for row in section.rows)
    worded = any(row.duel for row in section.rows)
    several = len(section.names) > 1
    columns = ["workload", "T", "offset"] + ["pairs", "active experts"] * sized + section.names
    alone = section.names[0] if len(section.names) == 1 and section.has_intervals else None
    columns += ["margin"] * several + ["verdict"] * worded + ["95 % interval", "against the reference"] * bool(alone)
    table = Table("speedups", "Speedup over the reference", columns, [], _cut(section))
    for row in section.rows[:MOST_ROWS]:
        cells = [Cell(short(row.workload), row.workload, hover=row.workload), _whole(row.tokens), _whole(row.offset)]
        cells += [_whole(row.pairs), _whole(row.active_experts)] if sized else []
        cells += [_speedup_cell(row, name) for name in section.names]
        cells += [_margin_cell(row)] if several else []
        cells += [_word_cell(row)] if worded else []
        cells += interval_cells(row.cells.get(alone)) if alone else []
        table.rows.append(cells)
    if several:
        table.notes.append("Margin: the winner's speedup over the runner-up's.")
    if worded or alone:
        judged = [row for row in section.rows if row.duel]
        unpaired = sum(1 for row in judged if not row.paired)
        pair = "winner against runner-up, " if worded else ""
        samples = f"samples, unpaired on {unpaired} of {len(judged)} workloads" if unpaired else "paired samples"
        table.notes.append(
            f"Verdict, {pair}from {samples}: FASTER where the 95 % interval of their ratio lies "
            f"above 1 and the ratio above {1 + MARGIN}; SAME where the interval lies within ±{MARGIN:.1%}; else UNCLEAR."
        )
    return table


def latency_table(section: Section) -> Table | None:
    if not section.has_times:
        return None
    floored = any(row.floor for row in section.rows)
    columns = ["workload", "T", "reference"] + ["floor"] * floored + section.names
    notes = ["The share of the floor that a latency reaches stands in brackets."] if floored else []
    if any(cell.blocks for row in section.rows for cell in row.cells.values()):
        notes.append("A speedup is the median of its blocks' ratios (docs/measuring.md), so not quite the quotient of two latencies.")
    table = Table("latencies", "Latency, ms", columns, [], _cut(section) + notes)
    for row in section.rows[:MOST_ROWS]:
        cells = [Cell(short(row.workload), row.workload, hover=row.workload), _whole(row.tokens)]
        cells += [Cell(milliseconds(row.reference_latency), row.reference_latency)]
        cells += [Cell(milliseconds(row.floor), row.floor)] if floored else []
        cells += [_latency_cell(row, name) for name in section.names]
        table.rows.append(cells)
    return table


def host_table(section: Section) -> Table | None:
    """What a caller meets who can't let the host run ahead, which the spans leave out."""
    if not any(cell.passed and (cell.graph or cell.host_us) for row in section.rows for cell in row.cells.values()):
        return None
    notes = [
        "A latency is the device's span of an eager call, with the host ahead. In brackets, in us, what the host took until such a call "
        "returned, on an idle device: who can't run ahead sees at least the larger of the two. Before it the span of the same call's CUDA "
        "graph, replayed, by events (docs/measuring.md)."
    ]
    table = Table("hosts", "CUDA-graph replay, ms, and host time, us", ["workload", "T", *section.names], [], _cut(section) + notes)
    for row in section.rows[:MOST_ROWS]:
        cells = [Cell(short(row.workload), row.workload, hover=row.workload), _whole(row.tokens)]
        table.rows.append(cells + [_host_cell(row.cells.get(name)) for name in section.names])
    return table


def average_table(section: Section) -> Table:
    """Statistics down, solutions across; in bold the best of each line, of those that passed all workloads which the line is over."""
    contenders = section.contenders
    table = Table("averages", "Averages", ["statistic", *section.names], [])
    regimes = [(ALL, lambda c: c.overall)] + [(r, _in_regime(r)) for r in section.regimes]
    regimes = [(regime, get) for regime, get in regimes if any(get(c).count for c in contenders)]

    def line(
        name: str, get: Callable[[Contender], float | None], show: Callable, best: Callable | None = max, over: Regime | None = ALL
    ) -> None:
        values = [get(contender) for contender in contenders]
        if all(value is None for value in values):
            return
        whole = [over is None or passed_all(section.rows, contender.name, over) for contender in contenders]
        known = [value for value, able in zip(values, whole, strict=True) if able and value is not None]
        top = best(known) if best and known and min(known) < max(known) else None
        leads = [able and top is not None and value == top for value, able in zip(values, whole, strict=True)]
        cells = [Cell(show(value), value, bold=bold) for value, bold in zip(values, leads, strict=True)]
        table.rows.append([Cell(name), *cells])

    for kind in ("arithmetic", "geometric"):
        for regime, get in regimes:
            line(f"{kind} mean, {regime.label}", lambda c, get=get, kind=kind: getattr(get(c), kind), factor, over=regime)
    line("median", lambda c: c.overall.median, factor)
    line("min", lambda c: c.overall.low, factor)
    line("max", lambda c: c.overall.high, factor)
    line("standard deviation", lambda c: c.overall.deviation, lambda v: DASH if v is None else f"{v:.2f}", None)
    line("coefficient of variation", lambda c: c.overall.variation, percent, min)
    if len(contenders) > 1:
        line("wins", lambda c: c.wins, str, over=None)
    if any(contender.ties for contender in contenders):
        line("tied for best", lambda c: c.ties, str, None)
    if any(row.duel for row in section.rows):
        line("wins called FASTER", lambda c: c.clear_wins, str, over=None)
    line("passed", lambda c: c.overall.count, lambda v: f"{v} of {len(section.rows)}", None)
    line("share of the floor, median", lambda c: c.floor_share.median, percent)
    line("share of the floor, worst", lambda c: c.floor_share.low, percent)
    return table


def ranking_table(section: Section) -> Table | None:
    if len(section.contenders) < 2 or not section.shared:
        return None
    table = Table("ranking", "Ranking", ["rank", "solution", "geometric mean", "worst", "at T", "consistency", "wins"], [])
    table.text_columns = 2
    for contender in section.contenders:
        if contender.rank is not None:
            overall = contender.overall
            table.rows.append(
                [
                    Cell(str(contender.rank), contender.rank),
                    Cell(contender.name, contender.name),
                    Cell(factor(contender.shared_geometric), contender.shared_geometric),
                    Cell(factor(overall.low), overall.low),
                    _whole(overall.low_at),
                    Cell(percent(overall.variation), overall.variation),
                    Cell(str(contender.wins), contender.wins),
                ]
            )
    table.notes.append(
        f"By the geometric mean over the {section.shared} workloads that all ranked solutions passed. Consistency is the "
        "coefficient of variation of the speedups: lower is steadier."
    )
    return table


def pair_table(section: Section) -> Table | None:
    if not section.pairs:
        return None
    worded = any(pair.overall for pair in section.pairs)
    columns = ["solution", "against", "geometric mean", "mean of ratios", "ratio of means", "range", "wins"]
    table = Table("pairs", "Against each other", columns + ["verdict"] * worded, [], text_columns=2)
    for pair in section.pairs:
        table.rows.append(_pair_cells(pair, worded))
    table.notes.append("Wins: won, lost, tied.")
    if worded:
        apart = " but where it says unpaired" if any(pair.unpaired for pair in section.pairs) else ""
        table.notes.append(f"The verdict's ratio and interval are of the geometric mean, from paired samples{apart}.")
    return table


def stage_table(section: Section) -> Table | None:
    """Stages of the largest and smallest workloads, for solutions that expose them."""
    table = Table("stages", "Where the time goes", ["solution", "T", "stages, ms"], [])
    for name in section.names:
        staged = [row for row in section.rows if name in row.cells and row.cells[name].stages]
        for row in _ends(staged):
            stages = row.cells[name].stages
            total = sum(stages.values())
            text = ", ".join(f"{stage} {milliseconds(ms)} ({ms / total:.0%})" for stage, ms in stages.items())
            table.rows.append([Cell(name, name), _whole(row.tokens), Cell(text)])
    return table


def error_table(section: Section) -> Table | None:
    """Worst of each error measure over all workloads."""
    measures = list(dict.fromkeys(measure for c in section.contenders for measure in c.errors))
    if not measures:
        return None
    wanted = [m for m in _MEASURES if m in measures] + [m for m in measures if m not in _MEASURES][:4]
    columns = ["solution", *(measure.replace("_", " ") for measure in wanted)]
    table = Table("errors", "Errors, the worst over all workloads", columns, [])
    for contender in section.contenders:
        values = [contender.errors.get(measure) for measure in wanted]
        cells = [Cell(DASH if value is None else f"{value:.4g}", value) for value in values]
        table.rows.append([Cell(contender.name, contender.name), *cells])
    return table


_MEASURES = (
    "max_absolute_error",
    "max_relative_error",
    "relative_l2",
    "cosine",
    "matched_ratio",
    "matched_ratio_nonzero_rows",
    "worst_row_relative_l2",
)


def failure_table(section: Section) -> Table | None:
    table = Table("failures", "Failed and skipped", ["solution", "T", "workload", "verdict", "reason"], [])
    table.text_columns = 5
    for contender in section.contenders:
        if len(contender.failures) > MOST_ROWS:
            table.notes.append(f"The first {MOST_ROWS} of {len(contender.failures)} failures of {contender.name}.")
        for failure in contender.failures[:MOST_ROWS]:
            name, what = Cell(contender.name, contender.name), Cell(failure.what, failure.what, bad=True)
            place = [_whole(failure.tokens), Cell(short(failure.workload), hover=failure.workload)]
            table.rows.append([name, *place, what, Cell(failure.message or DASH)])
    for item in section.skipped:
        name = str(item.get("solution") or "unnamed")
        reason = Cell(str(item.get("reason") or "no reason given"))
        table.rows.append([Cell(name, name), Cell("all"), Cell("all"), Cell("SKIPPED", bad=True), reason])
    return table


def contender_table(section: Section) -> Table | None:
    if not any(contender.description or contender.digest for contender in section.contenders):
        return None
    table = Table("contenders", "Solutions", ["solution", "description", "digest"], [], text_columns=3)
    for contender in section.contenders:
        digest = Cell(contender.digest or DASH)
        table.rows.append([Cell(contender.name, contender.name), Cell(contender.description or DASH), digest])
    return table


def word_of(row: Row) -> str:
    """The verdict on the winner; where its own samples say slower, the two figures disagree and nothing is clear."""
    if not row.duel:
        return DASH
    return "UNCLEAR" if row.duel.word == "SLOWER" else row.duel.word


def hover_text(cell: Record) -> str:
    """Everything known of one measurement, a line each."""
    what = f"{cell.failure}: {cell.message}" if cell.message else cell.failure
    return "\n".join([f"{cell.solution}, {size_of(cell)}", *([what] if cell.failure else []), *time_lines(cell)])


def time_lines(cell: Record) -> list[str]:
    """What was measured of its times, a line each."""
    lines = []
    if cell.latency:
        lines.append(f"latency {milliseconds(cell.latency)} ms")
    if cell.speedup:
        interval = f", 95 % interval {cell.interval[0]:.3f} to {cell.interval[1]:.3f}" if cell.interval else ""
        lines.append(f"speedup {cell.speedup:.3f}x{interval}")
    if cell.floor_fraction:
        lines.append(f"{cell.floor_fraction:.1%} of the {cell.floor_kind or ''} floor ({milliseconds(cell.floor)} ms)")
    if cell.host_us:
        lines.append(f"host {cell.host_us:.1f} us a call")
    if cell.graph:
        lines.append(f"CUDA graph {milliseconds(cell.graph)} ms")
    if cell.drifted and cell.drift is not None:
        lines.append(f"drifted {cell.drift:+.1%}")
    if cell.blocks:
        flat = sorted(sample for block in cell.blocks for sample in block)
        low, high = milliseconds(flat[0]), milliseconds(flat[-1])
        lines.append(f"{len(flat)} samples in {len(cell.blocks)} blocks, {low} to {high} ms")
    return lines


def _cut(section: Section) -> list[str]:
    left_out = len(section.rows) - MOST_ROWS
    return [f"The first {MOST_ROWS} of {len(section.rows)} workloads; all are in report.csv."] if left_out > 0 else []


def won(row: Row, name: str) -> bool:
    """Whether a solution is the best of several."""
    return name in row.winners and len(row.cells) > 1


def _speedup_cell(row: Row, name: str) -> Cell:
    cell = row.cells.get(name)
    if cell is None:
        return Cell(DASH, None, hover="not evaluated")
    if not cell.passed:
        return Cell(cell.failure or cell.status, None, hover=hover_text(cell), bad=True)
    return Cell(factor(cell.speedup), cell.speedup, bold=won(row, name), hover=hover_text(cell))


def interval_cells(cell: Record | None) -> list[Cell]:
    """For the only solution: how sure its speedup over the reference is."""
    if cell is None or not cell.interval or not cell.speedup:
        return [Cell(DASH, None), Cell(DASH, None)]
    low, high = cell.interval
    word = word_for(cell.speedup, low, high)
    return [Cell(f"{low:.3g}–{high:.3g}", low), Cell(word, word)]


def _latency_cell(row: Row, name: str) -> Cell:
    cell = row.cells.get(name)
    if cell is None or not cell.passed or cell.latency is None:
        return Cell(DASH, None)
    share = f" ({cell.floor_fraction:.0%})" if cell.floor_fraction else ""
    return Cell(milliseconds(cell.latency) + share, cell.latency, bold=won(row, name), hover=hover_text(cell))


def _host_cell(cell: Record | None) -> Cell:
    if cell is None or not cell.passed or not (cell.graph or cell.host_us):
        return Cell(DASH, None)
    host = f" ({cell.host_us:,.0f})" if cell.host_us else ""
    return Cell(milliseconds(cell.graph) + host, cell.graph, hover=hover_text(cell))


def _margin_cell(row: Row) -> Cell:
    if row.margin is None:
        return Cell(DASH, None)
    return Cell("tie" if row.margin == 0 else f"{row.margin:+.1%}", row.margin, hover=f"over {row.runner_up}")


def _word_cell(row: Row) -> Cell:
    if not row.duel:
        return Cell(DASH, None)
    word = word_of(row)
    interval = f"{row.duel.low:.3f} to {row.duel.high:.3f}" if row.duel.low is not None else "no interval: one block"
    return Cell(word, word, hover=f"{row.winners[0]} over {row.runner_up}: {row.duel.ratio:.3f} ({interval})")


def _pair_cells(pair: Pair, worded: bool) -> list[Cell]:
    span = f"{pair.low:.2f}–{pair.high:.2f}"
    where = f"lowest at T = {_whole(pair.low_at).text}, highest at T = {_whole(pair.high_at).text}"
    cells = [
        Cell(pair.first, pair.first),
        Cell(pair.second, pair.second),
        Cell(factor(pair.geometric), pair.geometric),
        Cell(factor(pair.arithmetic), pair.arithmetic),
        Cell(factor(pair.of_averages), pair.of_averages),
        Cell(span, pair.low, hover=where),
        Cell(f"{pair.wins}, {pair.losses}, {pair.ties}", pair.wins),
    ]
    if worded:
        words = ", ".join(f"{number} {word}" for word, number in pair.words.items())
        cells.append(Cell(_pair_word(pair), pair.overall and pair.overall.word, hover=words))
    return cells


def _pair_word(pair: Pair) -> str:
    """The verdict with the samples' own ratio, which its interval is about."""
    if not pair.overall:
        return DASH
    ratio, low, high, word = pair.overall
    interval = f" ({low:.3f}–{high:.3f})" if low is not None else ""
    apart = "" if not pair.unpaired else ", unpaired" if pair.unpaired == pair.count else f", {pair.unpaired} of {pair.count} unpaired"
    return f"{word}, {ratio:.3f}{interval}{apart}"


def _in_regime(regime: Regime) -> Callable[[Contender], Spread]:
    return lambda contender: contender.regimes[regime.name]


def _ends(rows: list[Row]) -> list[Row]:
    return rows if len(rows) < 3 else [rows[0], rows[-1]]


def _whole(value: int | None) -> Cell:
    return Cell(DASH if value is None else str(value), value)


def plain(value: Any) -> str:
    """Settings and versions as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return "none" if value is None else str(value)
