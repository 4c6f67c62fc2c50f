"""The report as Markdown, in the shape of the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockmoe.report.model import Report, Section
from blockmoe.report.sentences import cliff_sentences, dispatcher_sentence, leader_sentence, scenario_sentence
from blockmoe.report.tables import (
    Cell,
    Table,
    plain,
    section_tables,
)


@dataclass
class SavedPicture:
    """A picture of a section in files beside the report; `link` is relative to it."""

    section: Section
    title: str
    caption: str
    files: list[Path]
    link: Path


def render(report: Report, pictures: Sequence[SavedPicture] = (), against: Sequence[Table] = ()) -> str:
    """The whole report; `against` are the tables of a comparison with an earlier run."""
    parts = ["# Benchmark report", *_notes(report)]
    for section in report.sections:
        parts += list(_section(section, [picture for picture in pictures if picture.section is section]))
    for item in against:
        parts += [f"## {escape(item.title)}", table(item) if item.rows else "Nothing.", _lines(item.notes)]
    parts += list(_runs(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(table: Table) -> str:
    """A pipe table; numbers aligned right, winners bold."""
    aligns = ["---" if column < table.text_columns else "---:" for column in range(len(table.columns))]
    lines = [_line([escape(column) for column in table.columns]), _line(aligns)]
    lines += [_line([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines)


def escape(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def prose(text: str) -> str:
    """Escaped, but for code spans, in which everything stands for itself."""
    return "`".join(part if place % 2 else _spaced(part) for place, part in enumerate(text.split("`")))


def _spaced(text: str) -> str:
    begin, end = " " * text.startswith(" "), " " * (text.endswith(" ") and len(text) > 1)
    return begin + escape(text) + end


def _section(section: Section, pictures: Sequence[SavedPicture]) -> Iterator[str]:
    yield f"## `{section.definition}` on {escape(section.hardware)}"
    yield from _conclusion(section)
    yield from (f"![{picture.title}. {picture.caption}]({picture.link.as_posix()})" for picture in pictures)
    for item in section_tables(section):
        yield f"### {item.title}"
        yield table(item)
        yield _lines(item.notes)
        if item.key == "averages" and section.leaders:
            yield f"Leaders by geometric mean: {escape(leader_sentence(section))}."
        if item.key == "averages" and section.cliffs:
            yield "### Cliffs"
            yield "\n".join(f"- {escape(sentence)}" for sentence in cliff_sentences(section))
    if section.doubts:
        yield "### Where the numbers are uncertain"
        yield "\n".join(f"- {escape(doubt)}" for doubt in section.doubts)
    if section.facts:
        yield "### Settings, versions, machine"
        yield "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in section.facts.items())


def _conclusion(section: Section) -> Iterator[str]:
    conclusion = section.conclusion
    if not any(contender.overall.count for contender in section.contenders):
        return
    lines = [scenario_sentence(scenario, conclusion.unit) for scenario in conclusion.scenarios]
    lines += [dispatcher_sentence(section)]
    yield "### Conclusion"
    yield "\n".join(f"- {prose(line)}" for line in lines if line)
    yield "Rules:"
    yield "\n".join(f"{number}. {escape(rule)}" for number, rule in enumerate(conclusion.rules, 1))


def _notes(report: Report) -> Iterator[str]:
    if report.notes:
        yield "\n".join(f"> {escape(note)}  " for note in report.notes).rstrip()


def _runs(report: Report) -> Iterator[str]:
    for run in report.runs:
        lines = []
        if run["command"]:
            lines += ["```", run["command"].replace("```", ""), "```"]
        if run["started"]:
            lines.append(f"- started {escape(run['started'])}" + (f", finished {escape(run['finished'])}" if run["finished"] else ""))
        for name in ("settings", "environment"):
            lines += [f"- {escape(key)}: {escape(plain(value))}" for key, value in run[name].items()]
        if lines:
            yield "## Command"
            yield "\n".join(lines)


def _lines(sentences: Sequence[str]) -> str:
    """Sentences on lines of their own."""
    return "\n".join(f"{escape(sentence)}  " for sentence in sentences).rstrip()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    return f"**{text}**" if cell.bold else text
