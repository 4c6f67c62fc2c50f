"""The report in a terminal: fits 80 columns, is cut off at the right where there are fewer, and reads as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from blockmoe.report.load import Record
from blockmoe.report.model import Contender, Report, Row, Section, size_of
from blockmoe.report.sentences import cliff_sentences, dispatcher_sentence, scenario_sentence
from blockmoe.report.tables import (
    DASH,
    Table,
    factor,
    interval_cells,
    milliseconds,
    percent,
    time_lines,
    won,
    word_of,
)

MOST_COLUMNS = 6  # solutions side by side in 80 columns; beyond it only the summary is shown
MOST_ROWS = 60
LEAST_WIDTH = 80  # that tables are laid out for: squeezed further, rich gives the column of names no width at all
NAME_WIDTH = 16  # a longer name is folded, but never into narrower pieces


def render(report: Report) -> Group:
    """Summary, workloads and conclusion of every section."""
    parts: list[RenderableType] = []
    for section in report.sections:
        parts += [Text(), Text(f"{section.definition} on {section.hardware}", style="bold")]
        parts += list(_section(section))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _section(section: Section) -> Iterator[RenderableType]:
    letters = {name: _letter(place) for place, name in enumerate(section.names)}
    yield _summary(section, letters)
    if len(section.names) <= MOST_COLUMNS and section.rows:
        yield _workloads(section, letters)
        if len(section.rows) > MOST_ROWS:
            yield Text(f"… and {len(section.rows) - MOST_ROWS} more workloads")
    yield from _failures(section)
    if any(contender.overall.count for contender in section.contenders) and len(section.contenders) > 1:
        for scenario in section.conclusion.scenarios:
            if scenario.choice:
                yield _plain(scenario_sentence(scenario, section.conclusion.unit))
        yield _plain(dispatcher_sentence(section))
    for sentence in [*cliff_sentences(section), *section.doubts]:
        yield Text(f"note: {sentence}", style="yellow")


def _summary(section: Section, letters: dict[str, str]) -> RichTable:
    table = _table()
    table.add_column("", style="bold")
    table.add_column("solution", overflow="fold", ratio=1, min_width=NAME_WIDTH)
    for title in ("passed", "geo mean", "min", "max", "wins"):
        table.add_column(title, justify="right", no_wrap=True)
    floored = any(contender.floor_share.count for contender in section.contenders)
    if floored:
        table.add_column("floor", justify="right", no_wrap=True)
    for contender in section.contenders:
        table.add_row(*_summary_cells(contender, letters[contender.name], len(section.rows), floored))
    return table


def _summary_cells(contender: Contender, letter: str, workloads: int, floored: bool) -> list[str | Text]:
    overall = contender.overall
    means = [factor(overall.geometric), factor(overall.low), factor(overall.high), str(contender.wins)]
    floor = [percent(contender.floor_share.median, 0)] if floored else []
    return [letter, Text(contender.name), f"{overall.count}/{workloads}", *means, *floor]


def _workloads(section: Section, letters: dict[str, str]) -> RichTable:
    """Latency and speedup of up to three solutions side by side, speedups alone for more."""
    timed = section.has_times and len(section.names) <= 3
    worded = any(row.duel for row in section.rows)
    table = _table()
    table.add_column("T", justify="right", no_wrap=True)
    if any(row.active_experts is not None for row in section.rows):
        table.add_column("experts", justify="right", no_wrap=True)
    if section.has_times:
        table.add_column("reference", justify="right", no_wrap=True)
    for name in section.names:
        table.add_column(Text(letters[name] if len(section.names) > 1 else name), justify="right", overflow="fold")
    alone = section.names[0] if len(section.names) == 1 and section.has_intervals else None
    if alone:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    if worded or alone:
        table.add_column("verdict", no_wrap=True)
    for row in section.rows[:MOST_ROWS]:
        cells: list[str | Text] = [DASH if row.tokens is None else str(row.tokens)]
        if any(other.active_experts is not None for other in section.rows):
            cells.append(DASH if row.active_experts is None else str(row.active_experts))
        cells += [_ms(row.reference_latency)] if section.has_times else []
        cells += [_cell(row, name, timed) for name in section.names]
        cells += [f"{letters.get(row.winners[0], '') if row.winners else ''} {word_of(row)}".strip()] if worded else []
        cells += [cell.text for cell in interval_cells(row.cells.get(alone))] if alone else []
        table.add_row(*cells)
    return table


def _cell(row: Row, name: str, timed: bool) -> Text:
    cell = row.cells.get(name)
    if cell is None:
        return Text(DASH)
    if not cell.passed:
        return Text(cell.failure or cell.status, style="red")
    text = f"{_ms(cell.latency)} {factor(cell.speedup)}" if timed and cell.latency else factor(cell.speedup)
    best = won(row, name)
    mark = "*" if best else " " * (len(row.cells) > 1)
    return Text(text + mark, style="bold green" if best else "")


def _failures(section: Section) -> Iterator[RenderableType]:
    for contender in section.contenders:
        shown = {(failure.what, failure.message): failure for failure in contender.failures}
        for failure in list(shown.values())[:3]:
            same = sum(1 for other in contender.failures if (other.what, other.message) == (failure.what, failure.message))
            place = size_of(failure) if same == 1 else f"{same} workloads"
            yield Text(f"{contender.name}, {place}: {failure.what} {failure.message}".rstrip(), style="red")
    for item in section.skipped:
        yield Text(f"{item.get('solution')}: SKIPPED, {item.get('reason')}", style="yellow")


def show(record: Record) -> RenderableType:
    """One trace in full, its samples block by block; of a failure's log the end."""
    table = RichTable(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    lines = {
        "solution": record.solution,
        "definition": record.definition,
        "workload": record.workload,
        "axes": ", ".join(f"{name} {value}" for name, value in record.axes.items()),
        "routing": "" if record.pairs is None else f"{record.pairs} pairs, {record.active_experts} active experts",
        "status": record.failure or record.status,
        "message": record.message,
        "log": "" if record.passed else record.log,
        "times": "\n".join(time_lines(record)),
        "errors": ", ".join(f"{name} {value:.4g}" for name, value in record.errors.items()),
        "stages": ", ".join(f"{name} {milliseconds(value)} ms" for name, value in record.stages.items()),
        "hardware": record.hardware,
        "timer": record.timer,
        "versions": ", ".join(f"{name} {version}" for name, version in record.libs.items()),
        "settings": ", ".join(f"{name} {value}" for name, value in record.settings.items()),
        "measured": record.timestamp,
        "trace": record.source,
    }
    for name, value in lines.items():
        if value:
            table.add_row(name, Text(value))
    for number, block in enumerate(record.blocks[:40], 1):
        table.add_row(f"block {number}", Text(" ".join(milliseconds(sample) for sample in block) + " ms"))
    return table


def plain_table(table: Table) -> Group:
    """Any of the report's tables, with its title and notes."""
    drawn = _table()
    for place, column in enumerate(table.columns):
        words, lists = place < table.text_columns, any(", " in row[place].text for row in table.rows)
        drawn.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words and not lists)
    drawn.columns[0].min_width = min(NAME_WIDTH, max(len(row[0].text) for row in table.rows)) if table.rows else None
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style="bold" if cell.bold else "") for cell in row))
    notes = [Text(note) for note in table.notes]
    return Group(Text(table.title, style="bold"), *([drawn] if table.rows else [Text("nothing")]), *notes, Text())


class _Table(RichTable):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return super().__rich_console__(console, options.update(max_width=max(options.max_width, LEAST_WIDTH)))


def _table() -> RichTable:
    return _Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))


def _plain(text: str) -> Text:
    """A sentence without its Markdown marks: of asterisks, those of its first word, since names may hold some."""
    return Text(text.replace("**", "", 2).replace("`", ""))


def _ms(value: float | None) -> str:
    return f"{milliseconds(value)} ms" if value is not None else DASH


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else str(place + 1)
