"""The command line over results: report, compare, best, show, import-csv. Needs neither a GPU nor torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from blockmoe.bench.listing import console
from blockmoe.geometry import HEADLINE
from blockmoe.report import api, terminal
from blockmoe.report import compare as comparing
from blockmoe.report.importing import import_csv as import_table
from blockmoe.report.load import ReportError
from blockmoe.report.model import short
from blockmoe.report.tables import DASH, Cell, Table, factor, milliseconds

Folders = Annotated[
    list[Path],
    typer.Argument(help="Result folders, trees in the FlashInfer-Trace layout, or trace files (.jsonl).", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to an application."""
    app.command("report")(_one_line_errors(report))
    app.command("compare")(_one_line_errors(compare))
    app.command("best")(_one_line_errors(best))
    app.command("show")(_one_line_errors(show))
    app.command("import-csv")(_one_line_errors(import_csv))


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except ReportError as error:
            print(f"blockmoe: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return guarded


def report(
    folders: Folders,
    formats: Annotated[
        str, typer.Option("--format", help="Comma-separated: md, html, csv, json, svg, png (the last two are pictures).")
    ] = "md,html",
    output: Annotated[Path | None, typer.Option(help="Folder to write into.", show_default="the first result folder")] = None,
    solutions: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME…", help="Only these, names or patterns; the report says which it leaves out.", show_default="all"),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Solution that the others are compared with in the pairwise table.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier result folder: the report says what moved beyond its noise since.")
    ] = None,
    regimes: Annotated[
        str | None,
        typer.Option(help="Ranges of T to average over: sizes, published, or NAME:LOW-HIGH,… (decode:1-99,prefill:901-)."),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Traffic to decide for, as shares of calls: decode=0.9,prefill=0.1, or ranges: 1-80=0.9,901-=0.1."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Redraw the table while a run writes; Ctrl-C ends.")] = False,
) -> None:
    """Write reports from traces: tables, averages, who wins where, and which solution to deploy.

    Reads traces of blockmoe and of flashinfer-bench. The reference is the scale, never a competitor.
    --solutions takes all words up to the next option: folders stand before it, or after --.
    """
    if watch and solutions:
        raise ReportError("--solutions: not with --watch")
    if watch:
        api.watch(folders, baseline=baseline, regimes=regimes, mix=mix)
        return
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    for path in api.write(folders, output, wanted, baseline, against, regimes, mix, solutions):
        print(path)


def compare(
    first: Annotated[Path, typer.Argument(help="The earlier result folder or trace file.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="The later one.", show_default=False)],
    fail_slower: Annotated[
        str | None,
        typer.Option(help="Exit with 1 if a solution is slower by more than this beyond its noise (3% or 0.03), fails now or is missing."),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="With --fail-slower: what only the first run has is no failure.")
    ] = False,
    by: Annotated[
        Literal["latency", "speedup"] | None,
        typer.Option(help="What to compare. Speedups cancel what moved the reference too.", show_default="latency where known"),
    ] = None,
) -> None:
    """Compare two runs: ratios with intervals, verdicts, rank agreement, and what changed in the environment.

    Above 1 the second run is faster. For CI: blockmoe compare BASE NEW --fail-slower 3%
    """
    if allow_missing and fail_slower is None:
        raise ReportError("--allow-missing: only with --fail-slower")
    threshold = comparing.parse_threshold(fail_slower) if fail_slower is not None else None
    comparison = comparing.compare(first, second, threshold, by, allow_missing=allow_missing)
    shown = console()
    for table in comparing.tables(comparison):
        shown.print(terminal.plain_table(table))
    for failure in comparison.failures:
        shown.print(Text(f"over the threshold: {failure}", style="red"))
    if comparison.failed:
        raise typer.Exit(1)


def best(
    folders: Folders,
    max_relative_l2: Annotated[float | None, typer.Option(help="Only solutions whose relative L2 error is at most this.", min=0)] = None,
) -> None:
    """Name the fastest solution that passed, for every workload."""
    shown, found = console(), [record for _, _, record in api.best(folders, max_relative_l2, _say_notes)]
    if not found:
        bound = f"no solution that passed is known to have a relative L2 error of at most {max_relative_l2}"
        shown.print(bound if api.best(folders) else "no solution passed any workload")
    for (definition, hardware), records in groupby(found, key=lambda record: (record.definition, record.hardware)):
        columns = ["solution", "workload", "T", "ms", "speedup"]
        table = Table("best", f"{definition} on {hardware}", columns, [], text_columns=2)
        for record in records:
            size = DASH if record.tokens is None else str(record.tokens)
            cells = record.solution, short(record.workload), size, milliseconds(record.latency), factor(record.speedup)
            table.rows.append([Cell(text) for text in cells])
        shown.print(terminal.plain_table(table))


def show(
    path: Annotated[Path, typer.Argument(help="A result folder, a trace file, or FILE:LINE.", show_default=False)],
    workload: Annotated[str | None, typer.Option(help="T, or a uuid's first four characters or more.")] = None,
    solution: Annotated[str | None, typer.Option(help="A solution's name.")] = None,
) -> None:
    """Show traces in full: status, times, errors, every sample, and the end of a failure's log."""
    console().print(api.show(path, workload, solution, _say_notes))


def _say_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def import_csv(
    csv: Annotated[Path, typer.Argument(help="Columns: seq_len, one a solution; optionally uuid, local_expert_offset.")],
    output: Annotated[Path, typer.Argument(help="Result folder to write.")],
    definition: Annotated[str, typer.Option(help="The definition that was measured.")] = HEADLINE.definition_name,
    hardware: Annotated[str, typer.Option(help="The GPU that it was measured on.")] = "unknown hardware",
) -> None:
    """Turn a published table of speedups into a result folder that `report` and `compare` read.

    Its latencies are unknown and stay so: reports of it show speedups only.
    """
    print(import_table(csv, output, definition=definition, hardware=hardware))
