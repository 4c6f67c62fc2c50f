"""The report as one self-contained HTML file: no network, and every table readable without JavaScript."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from blockmoe.report import canvas, plots
from blockmoe.report.model import Pair, Report, Row, Section
from blockmoe.report.sentences import cliff_sentences, dispatcher_sentence, leader_sentence
from blockmoe.report.tables import (
    Table,
    factor,
    milliseconds,
    plain,
    section_tables,
)

MOST_PICTURED = 6  # sections; more would be a page of megabytes
MOST_SAMPLED = 1500  # cells that carry their samples for hovering


def render(report: Report, against: Sequence[Table] = ()) -> str:
    """One page for the whole report."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"ms": milliseconds, "plain": plain}
    environment.filters |= {"marked": _marked, "breakable": _breakable, "script_json": _script_json}
    sampled = sum(1 for section in report.sections for row in section.rows for _ in row.cells) <= MOST_SAMPLED
    page = environment.from_string(_asset("report.html.j2"))
    return page.render(
        title=_title(report),
        sections=[_section(section, number, sampled) for number, section in enumerate(report.sections)],
        notes=report.notes,
        runs=report.runs,
        against=against,
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
    )


def _section(section: Section, number: int, sampled: bool) -> dict[str, Any]:
    pictures = plots.pictures(section) if number < MOST_PICTURED else []
    for picture in pictures:
        picture.key = f"s{number}-{picture.key}"
    return {
        "anchor": f"section-{number}",
        "section": section,
        "headline": _headline(section),
        "dispatcher": dispatcher_sentence(section),
        "leaders": leader_sentence(section),
        "cliffs": cliff_sentences(section),
        "pictures": [(picture, Markup(canvas.svg(picture, inline=True))) for picture in pictures],
        "tables": section_tables(section),
        "samples": _samples(section) if sampled else {},
        "passed_any": any(contender.overall.count for contender in section.contenders),
    }


def _title(report: Report) -> str:
    if not report.sections:
        return "Benchmark report"
    first = report.sections[0]
    more = f" and {len(report.sections) - 1} more" if len(report.sections) > 1 else ""
    return f"{first.definition} on {first.hardware}{more}"


def _headline(section: Section) -> str:
    """The one sentence to remember, from the ranking."""
    ranked = [contender for contender in section.contenders if contender.rank]
    if not ranked:
        passed = any(contender.overall.count for contender in section.contenders)
        return "No workload was passed by all: nothing is ranked." if passed else "Nothing passed."
    best, lead = ranked[0], section.lead
    led = f"{factor(best.shared_geometric)} the reference"
    size = f"{section.shared} workloads"
    if lead is None:
        return f"{best.name}: {led} (geometric mean over {size})."
    word = f", {lead.overall.word}" if lead.overall else ""
    wins = f"fastest on {best.wins} of {len(section.rows)}"
    if any(row.duel for row in section.rows):
        wins += f", beyond noise on {best.clear_wins}"
    ahead = f"{best.name} leads with {led}, {lead.geometric:.3f} times {lead.second}{word} (geometric means over {size})."
    return f"{ahead}{_otherwise(section, lead)} It is {wins}."


def _otherwise(section: Section, lead: Pair) -> str:
    """Where the leader is behind the second over all workloads that both passed: the ranking is over fewer."""
    pair = next((p for p in section.pairs if {p.first, p.second} == {lead.first, lead.second}), None)
    if pair is None:
        return ""
    ratio = pair.geometric if pair.first == lead.first else 1 / pair.geometric
    return f" Over all {pair.count} that both passed it is {ratio:.3f} times {lead.second}." if ratio < 1 else ""


def _samples(section: Section) -> dict[str, list[list[float]]]:
    """Samples by `workload|solution`, to four digits, for the strip that hovering draws."""
    return {
        f"{row.workload}|{name}": [[float(f"{sample:.4g}") for sample in block] for block in cell.blocks]
        for row in section.rows
        for name, cell in _sampled_cells(row)
    }


def _sampled_cells(row: Row) -> list[tuple[str, Any]]:
    return [(name, cell) for name, cell in row.cells.items() if cell.blocks]


def _marked(text: str) -> Markup:
    """`**bold**` and backticks of the shared sentences, as HTML."""
    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{part}</code>" if place % 2 else _bold(part) for place, part in enumerate(parts)))


def _bold(text: str) -> str:
    return "".join(f"<b>{part}</b>" if place % 2 else part for place, part in enumerate(text.split("**")))


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after an underscore or a hyphen."""
    return Markup(str(escape(name)).replace("_", "_<wbr>").replace("-", "-<wbr>"))


def _asset(name: str) -> str:
    return files("blockmoe.report").joinpath("assets", name).read_text(encoding="utf-8")


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))
