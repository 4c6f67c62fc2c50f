"""What the command line calls: each function reads traces, builds the model once, and renders it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from blockmoe.bench.dataset import listed
from blockmoe.files import write_whole
from blockmoe.report import compare, export, markdown, terminal
from blockmoe.report.cut import only
from blockmoe.report.load import REFERENCE, Loaded, NoTraces, Record, ReportError, load, read_line
from blockmoe.report.markdown import SavedPicture
from blockmoe.report.model import Report
from blockmoe.report.regimes import parse_mix, parse_regimes
from blockmoe.report.scale import on_one_scale
from blockmoe.report.summary import summarise
from blockmoe.report.tables import Table

MOST_PICTURED = 6  # sections
FORMATS = ("md", "html", "csv", "json", "svg", "png")
Tell = Callable[[list[str]], None]


def read(
    folders: Sequence[Path],
    baseline: str | None = None,
    regimes: str | None = None,
    mix: str | None = None,
    solutions: Sequence[str] | None = None,
) -> Report:
    """The model of what these result folders and trace files have of all solutions, or of some; raises ReportError."""
    loaded = only(load(folders), solutions) if solutions else load(folders)
    solutions = {record.solution for record in loaded.records} - {REFERENCE}
    if baseline == REFERENCE:
        raise ReportError(f"--baseline {REFERENCE}: every speedup is over it already; expected one of {listed(sorted(solutions))}")
    if baseline is not None and baseline not in solutions:
        raise ReportError(f"--baseline {baseline}: no such solution in these traces, which have {listed(sorted(solutions))}")
    return summarise(loaded, parse_regimes(regimes), parse_mix(mix), baseline)


def write(
    folders: Sequence[Path],
    output: Path | None = None,
    formats: Sequence[str] = ("md", "html"),
    baseline: str | None = None,
    against: Path | None = None,
    regimes: str | None = None,
    mix: str | None = None,
    solutions: Sequence[str] | None = None,
) -> list[Path]:
    """Write `report.FORMAT` into `output` (the first folder, unless told), and pictures into `output/pictures`.

    Returns the files written. Raises ReportError, with one line to show, for anything that can't be reported.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ReportError(f"--format {','.join(unknown) or '(empty)'}: expected some of {', '.join(FORMATS)}")
    report = read(folders, baseline, regimes, mix, solutions)
    earlier = compare.tables(_against(against, folders, solutions)) if against else []
    folder = output or (folders[0] if folders[0].is_dir() else folders[0].parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _save_pictures(report, folder, formats)
        renderers = {
            "md": lambda: markdown.render(report, pictures, earlier),
            "html": lambda: _html(report, earlier),
            "csv": lambda: export.to_csv(report),
            "json": lambda: export.to_json(report, earlier),
        }
        texts = [write_whole(folder / f"report.{name}", draw()) for name, draw in renderers.items() if name in formats]
    except OSError as error:
        raise ReportError(f"{folder}: not writable ({error.strerror})") from None
    return texts + [path for picture in pictures for path in picture.files]


def terminal_table(folders: Sequence[Path], baseline: str | None = None, regimes: str | None = None, mix: str | None = None) -> Group:
    """Summary tables and conclusion as rich renderables, for the end of a run."""
    return terminal.render(read(folders, baseline, regimes, mix))


def best(folders: Sequence[Path], max_relative_l2: float | None = None, tell: Tell | None = None) -> list[tuple[str, str, Record]]:
    """The fastest solution that passed each (definition, workload), optionally with an error bound; sorted by T. `tell` gets what is odd
    about the traces: lines that can't be read, say."""
    found, loaded = {}, load(folders)
    if tell:
        tell(loaded.notes)
    for record in on_one_scale(loaded.records):
        if not record.passed or record.solution == REFERENCE:
            continue
        if max_relative_l2 is not None and not record.errors.get("relative_l2", float("inf")) <= max_relative_l2:
            continue
        key = (record.definition, record.hardware, record.workload)
        if key not in found or record.speedup > found[key].speedup:
            found[key] = record
    ordered = sorted(found.values(), key=lambda r: (r.definition, r.hardware, r.tokens or 0, r.workload))
    return [(record.definition, record.workload, record) for record in ordered]


def show(path: Path, workload: str | None = None, solution: str | None = None, tell: Tell | None = None) -> RenderableType:
    """Traces of a folder, a file or FILE:LINE in full: those of a workload (T, or a uuid's first four characters) and a solution. `tell`
    gets what is odd about the others, as in `best`."""
    name, _, line = str(path).rpartition(":")
    numbered = not path.exists() and Path(name).is_file() and line.isdecimal()
    loaded = Loaded([read_line(Path(name), int(line))], [], []) if numbered else load([path])
    records = loaded.records
    if tell:
        tell(loaded.notes)
    chosen = [record for record in _of_workload(records, workload) if solution in (None, record.solution)]
    if not chosen:
        has = listed(sorted({record.solution for record in records}))
        sizes = ", ".join(map(str, sorted({record.tokens for record in records if record.tokens is not None})))
        wanted = f"workload {workload or 'any'}, solution {solution or 'any'}"
        raise ReportError(f"{path}: no trace of {wanted}; solutions: {has}; T: {sizes or 'unknown'}")
    return Group(*(part for record in chosen[:20] for part in (terminal.show(record), Text())), _cut(len(chosen), 20))


def watch(
    folders: Sequence[Path],
    console: Console | None = None,
    seconds: float = 2.0,
    rounds: int | None = None,
    baseline: str | None = None,
    regimes: str | None = None,
    mix: str | None = None,
) -> None:
    """Redraw the terminal table while traces are being written, until interrupted. Raises ReportError for all but traces yet to come."""
    parse_regimes(regimes), parse_mix(mix)  # before there are traces: what is wrong here no trace will mend
    console = console or Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        done = 0
        while rounds is None or done < rounds:
            try:
                live.update(terminal_table(folders, baseline, regimes, mix), refresh=True)
            except NoTraces as error:
                live.update(Text(f"waiting: {error}"), refresh=True)
            done += 1
            time.sleep(seconds if done != rounds else 0)


def _against(against: Path, folders: Sequence[Path], solutions: Sequence[str] | None) -> compare.Comparison:
    if len(folders) > 1:
        raise ReportError("--against: expected one result folder to compare with the earlier one, got several")
    return compare.compare(against, folders[0], solutions=solutions)


def _html(report: Report, earlier: Sequence[Table]) -> str:
    from blockmoe.report import html  # with its pictures: matplotlib takes a second to import

    return html.render(report, earlier)


def _save_pictures(report: Report, folder: Path, formats: Sequence[str]) -> list[SavedPicture]:
    """Pictures of every section, the first one's under plain names."""
    kinds = [name for name in ("svg", "png") if name in formats]
    if not kinds and "md" in formats and (folder / "pictures").is_dir():
        kinds = ["svg"]  # pictures drawn before stay in the report, and current
    if not kinds:
        return []
    from blockmoe.report import canvas, plots

    (folder / "pictures").mkdir(exist_ok=True)
    saved = []
    for number, section in enumerate(report.sections[:MOST_PICTURED]):
        for picture in plots.pictures(section):
            stem = folder / "pictures" / (f"{picture.key}-{number + 1}" if number else picture.key)
            files = []
            if "svg" in kinds:
                files.append(write_whole(stem.with_suffix(".svg"), canvas.svg(picture)))
            if "png" in kinds:
                files.append(write_whole(stem.with_suffix(".png"), canvas.png(picture)))
            saved.append(SavedPicture(section, picture.title, picture.caption, files, files[0].relative_to(folder)))
    return saved


def _of_workload(records: list[Record], workload: str | None) -> list[Record]:
    """Those of that T; where there are none, of that uuid or one that begins so, in four characters or more."""
    if workload is None:
        return records
    sized = [record for record in records if str(record.tokens) == workload]
    return sized or [r for r in records if r.workload == workload or (len(workload) >= 4 and r.workload.startswith(workload))]


def _cut(total: int, shown: int) -> Text:
    return Text(f"… and {total - shown} more; narrow by workload and solution") if total > shown else Text()
