"""The command line over the bench: run, list, doctor, pack."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from blockmoe.bench import dataset as trees
from blockmoe.bench.dataset import REFERENCE, Dataset, DatasetError
from blockmoe.bench.doctor import checks, timers_lack
from blockmoe.bench.interrupts import interruptible
from blockmoe.bench.listing import checks_table, console, definitions_table, solutions_table, workloads_table
from blockmoe.bench.pack import add_folders, write_packed
from blockmoe.bench.progress import TerminalObserver
from blockmoe.bench.runner import Outcome, Plan, Run, RunError, prepare_output
from blockmoe.bench.schema import Solution
from blockmoe.bench.scratch import scratch_folder
from blockmoe.bench.settings import Settings, default_device, preset, torch_build
from blockmoe.geometry import HEADLINE

RUNS = Path("runs")
# A first look on a CPU: one row, one expert's few rows, every expert active. The reference takes seconds a call.
QUICK_CPU_TOKENS = (1, 80)

_WORKLOADS = f"all; of the headline, quick on a CPU, those of {', '.join(map(str, QUICK_CPU_TOKENS))} tokens"

_how = partial(typer.Option, rich_help_panel="How to measure")
_result = partial(typer.Option, rich_help_panel="Results")


def _choice(metavar: str, text: str, **more: Any) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel="What to run", **more)


_local = partial(typer.Option, metavar="PATH…", help="FlashInfer-Trace trees, one or more.", show_default="the bundled dataset")
Local = Annotated[list[Path] | None, _local()]


class UsageError(ValueError):
    """What was asked for makes no sense; one line for the user."""


def greedy(flag: str) -> str:
    """What the help and every error say of an option of several values."""
    return f"{flag} takes all words up to the next option: other arguments stand before it, or after --"


def register(app: typer.Typer) -> None:
    """Add the commands of this module to an application."""
    app.command("run")(_one_line_errors(run))
    app.command("list")(_one_line_errors(list_))
    app.command("doctor")(_one_line_errors(doctor))
    app.command("pack")(_one_line_errors(pack))


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except (UsageError, DatasetError) as error:
            print(f"blockmoe: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except RunError as error:
            print(f"blockmoe: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return guarded


# --- run ------------------------------------------------------------------------------------------------------------


def run(
    local: Annotated[list[Path] | None, _local(rich_help_panel="What to run")] = None,
    definitions: Annotated[
        list[str] | None,
        _choice("NAME…", "Definitions to run: names or patterns.", show_default="the headline; all with --local"),
    ] = None,
    solutions: Annotated[
        list[str] | None,
        _choice("NAME…", "Solutions to run: names or patterns. One named here must run.", show_default="all that this machine can run"),
    ] = None,
    workloads: Annotated[
        list[str] | None, _choice("WHICH…", "Workloads: uuid prefixes, sizes (80) or ranges (1-80, 901-).", show_default=_WORKLOADS)
    ] = None,
    device: Annotated[str | None, _choice("cpu|cuda[:N]", "Where solutions run.", show_default="cuda where there is one")] = None,
    preset_name: Annotated[
        Literal["quick", "full"] | None,
        _how("--preset", help="full: the published comparison's settings. quick: a first look.", show_default="full; on a CPU quick"),
    ] = None,
    inputs: Annotated[
        Literal["trace", "realistic"] | None,
        _how(help="trace: the format's random inputs. realistic: as quantising real weights gives.", show_default="trace"),
    ] = None,
    rtol: Annotated[float | None, _how(metavar="X", help="Relative tolerance.", show_default="0.2")] = None,
    atol: Annotated[float | None, _how(metavar="X", help="Absolute tolerance.", show_default="0.1")] = None,
    required_matched_ratio: Annotated[
        float | None, _how(metavar="X", help="Share of elements that must be within one of the tolerances.", show_default="0.85")
    ] = None,
    warmup_runs: Annotated[int | None, _how(metavar="N", help="Untimed calls first.", show_default="5; quick 2, on a CPU 1")] = None,
    iterations: Annotated[int | None, _how(metavar="N", help="Timed calls a trial.", show_default="20; quick 10, on a CPU 3")] = None,
    num_trials: Annotated[int | None, _how(metavar="N", help="Trials.", show_default="3; quick 1")] = None,
    timeout: Annotated[
        float | None, _how(metavar="SECONDS", help="What a solution may take for one workload.", show_default="300")
    ] = None,
    seed: Annotated[int | None, _how(metavar="N", help="Of all random inputs and of the order of measurement.", show_default="0")] = None,
    cuda_graph: Annotated[bool, _how(help="Also time CUDA-graph replays of solutions that can be captured.")] = True,
    cupti: Annotated[bool, _how(help="Time by CUPTI where cupti-python is installed, else by events.")] = True,
    fresh_processes: Annotated[
        bool, _how("--fresh-processes", help="Begin each trial in new processes: intervals then hold what these differ by.")
    ] = False,
    output: Annotated[Path | None, _result(metavar="DIR", help="Result folder.", show_default="runs/DATE-TIME")] = None,
    resume: Annotated[bool, _result("--resume", help="Keep the evaluations that DIR, or this command's newest run, has already.")] = False,
    retry_failed: Annotated[bool, _result("--retry-failed", help="With --resume: do failed evaluations again.")] = False,
    save_results: Annotated[bool, _result(help="Write traces and a report.")] = True,
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], _result(metavar="LEVEL", case_sensitive=False, help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
) -> None:
    """Check and time solutions against the definition's reference; write traces and a report.

    Each contender has a process of its own, and is measured in blocks that are interleaved with the others'.

    Exit codes: 0 all that was asked for ran and passed, 1 something did not, or there is no report, 2 bad usage, 130 interrupted.
    """
    if torch_build() is None:
        raise RunError("run needs torch, which is not installed: pip install 'blockmoe[torch]'")
    changes = {
        "inputs": inputs, "rtol": rtol, "atol": atol, "required_matched_ratio": required_matched_ratio, "warmup_runs": warmup_runs,
        "iterations": iterations, "num_trials": num_trials, "timeout": timeout, "seed": seed, "cuda_graph": cuda_graph, "cupti": cupti,
        "fresh_processes": fresh_processes,
    }  # fmt: skip
    try:
        settings = _settings(device, preset_name, {name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from None
    if resume and not save_results:
        raise UsageError("--resume: expected saved results, got --no-save-results")
    if retry_failed and not resume:
        raise UsageError("--retry-failed: expected --resume beside it")
    first_look = settings.device == "cpu" and preset_name != "full"
    plan = make_plan(local, definitions, solutions, workloads, settings, first_look)
    plan.resume, plan.retry_failed, plan.command = resume, retry_failed, shlex.join(["blockmoe", *sys.argv[1:]])
    with scratch_folder() as unsaved:
        plan.output = _output(output or (_earlier_run(plan.command) if resume else None)) if save_results else unsaved
        outcome = _execute(plan, log_level)
        reported = _summary(plan, outcome, save_results)
    if outcome.interrupted:
        raise typer.Exit(130)
    if not (reported and outcome.complete(plan.named)):
        raise typer.Exit(1)


def _settings(device: str | None, preset_name: str | None, changes: dict) -> Settings:
    device = device or default_device()
    base = Settings(device=device)
    if base.on_cuda and not torch_build():
        raise UsageError(f"--device {device}: this Python's torch is built without CUDA; --device cpu works")
    return replace(preset(preset_name or ("full" if base.on_cuda else "quick"), device), **changes)


def make_plan(
    local: list[Path] | None, definitions: list[str] | None, solutions: list[str] | None, workloads: list[str] | None, settings: Settings,
    first_look: bool,
) -> Plan:  # fmt: skip
    """What to run; for a first look a few of the headline's workloads, unless some are named.

    Raises DatasetError or UsageError for what is unknown, malformed or empty, before anything starts.
    """
    dataset = load_dataset(local)
    if not dataset.definitions:
        raise UsageError("nothing to run: there is no definition")
    wanted = definitions or (["*"] if local else [HEADLINE.definition_name])
    names = trees.select_names("definition", wanted, dataset.definitions)
    if settings.inputs == "realistic":
        for name in names:
            if "hidden_states_scale" not in dataset.definitions[name].inputs:
                raise UsageError(f"--inputs realistic: made for FP8 block-scale MoE definitions, not for {name}")
    chosen = {name: _chosen_solutions(dataset, name, names, solutions) for name in names}
    plan = Plan(dataset, {}, {}, settings, None, named=bool(solutions))
    known = [workload for name in names for workload in dataset.workloads.get(name, [])]
    wanted_workloads = trees.select_workloads(known, workloads) if workloads and known else known  # each pattern somewhere
    for name in names:
        selected = [workload for workload in dataset.workloads.get(name, []) if workload in wanted_workloads]
        if first_look and not workloads and name == HEADLINE.definition_name:
            selected = [workload for workload in selected if trees.size(workload) in QUICK_CPU_TOKENS] or selected
        if selected and chosen[name]:
            plan.workloads[name], plan.solutions[name] = selected, chosen[name]
    if not plan.workloads:
        lacks = [f"definition {name} has {_lack(dataset, name, chosen[name])}" for name in names]
        raise UsageError(f"nothing to run: {'; '.join(lacks)}")
    return plan


def load_dataset(local: list[Path] | None) -> Dataset:
    """The trees asked for, or the bundled one with the bundled solutions."""
    if local:
        return Dataset.load(local)
    dataset = Dataset.load([trees.bundled_root()])
    add_folders(dataset, trees.bundled_solutions())
    return dataset


def _definitions(dataset: Dataset, wanted: list[str]) -> list[str]:
    """Those that `--definitions` names; of several words one may have been meant for another argument."""
    try:
        return trees.select_names("definition", wanted, dataset.definitions)
    except DatasetError as error:
        raise UsageError(f"{error} ({greedy('--definitions')})" if len(wanted) > 1 else str(error)) from None


def _chosen_solutions(dataset: Dataset, name: str, names: list[str], wanted: list[str] | None) -> list[Solution]:
    known = {solution.name: solution for solution in dataset.solutions_of(name)}
    if not wanted:
        return list(known.values())
    if trees.REFERENCE in wanted:
        raise UsageError(f"--solutions {trees.REFERENCE}: it is measured with every run; name the solutions to measure beside it")
    everywhere = [solution.name for other in names for solution in dataset.solutions_of(other)]
    trees.select_names("solution", wanted, everywhere)
    return [solution for name, solution in known.items() if any(trees.matches(name, pattern) for pattern in wanted)]


def _lack(dataset: Dataset, name: str, chosen: list[Solution]) -> str:
    """Why a definition has nothing to run."""
    if not dataset.workloads.get(name):
        return "no workloads"
    if not dataset.solutions_of(name):
        return "no solutions"
    return "none of these workloads" if chosen else "none of these solutions"


def _earlier_run(command: str) -> Path:
    """The newest run in runs/ of this command, that is of the same but for how it is resumed and where its results go."""
    earlier = sorted(RUNS.glob("*/run.json"), key=lambda about: about.stat().st_mtime, reverse=True)
    if not earlier:
        raise UsageError("--resume: expected an earlier run in runs/, found none; name its folder with --output")
    for about in earlier:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if _asked(str(json.loads(about.read_text(encoding="utf-8"))["command"])) == _asked(command):
                return about.parent
    newest = earlier[0].parent
    raise UsageError(f"--resume: expected an earlier run of this command in runs/, found others; to go on in the newest: --output {newest}")


def _asked(command: str) -> list[str]:
    """A command's words without --resume, --retry-failed and --output."""
    words = [word for word in shlex.split(command) if word not in ("--resume", "--retry-failed") and not word.startswith("--output=")]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return words


def _output(output: Path | None) -> Path:
    try:
        output = output or _new_folder()
        prepare_output(output)
    except OSError as error:
        raise UsageError(f"--output {output or RUNS}: not writable ({error.strerror})") from None
    return output


def _new_folder() -> Path:
    """runs/DATE-TIME, with a number behind where another run began in the same second; raises OSError."""
    RUNS.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = RUNS / (f"{datetime.now():%Y%m%d-%H%M%S}" + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _execute(plan: Plan, log_level: str) -> Outcome:
    with interruptible(), TerminalObserver(log_level) as observer:
        return Run(plan, observer).execute()


def _summary(plan: Plan, outcome: Outcome, save_results: bool) -> bool:
    """Tables, reports and what is to be said of the run; False where there should be a report and is none."""
    from blockmoe import report

    shown, reported = console(), True
    traced, written = any(plan.output.glob("traces/**/*.jsonl")), []
    if traced and save_results:  # first: a terminal that has hung up takes nothing any more
        try:
            written = report.write([plan.output], formats=["md", "html"])
        except (report.ReportError, OSError) as error:
            print(f"blockmoe: no report: {error}", file=sys.stderr)
            reported = False
    if plan.resume:
        evaluations = sum(trace.solution != REFERENCE for trace in outcome.traces)
        print(f"blockmoe: {outcome.resumed} of {evaluations} evaluations were in {plan.output} already", file=sys.stderr)
    if traced:
        with contextlib.suppress(report.ReportError, OSError):
            shown.print(report.terminal_table([plan.output]))
        for path in written:
            shown.print(Text(str(path)), soft_wrap=True)
    if outcome.skipped and not (outcome.traces or outcome.interrupted or outcome.error):
        first = outcome.skipped[0]
        number = f"the first of {len(outcome.skipped)}, " if len(outcome.skipped) > 1 else ""
        print(f"blockmoe: no solution can run here: {number}{first['solution']}: {first['reason']}", file=sys.stderr)
    if outcome.error:
        kept = f"; finished evaluations are kept. To go on: {_again(plan)}" if save_results and outcome.traces else ""
        print(f"blockmoe: {outcome.error}{kept}", file=sys.stderr)
    if outcome.interrupted:
        kept = f"{len(outcome.traces)} traces are kept. To go on: {_again(plan)}" if save_results else "nothing is kept"
        print(f"blockmoe: interrupted; {kept}", file=sys.stderr)
    return reported


def _again(plan: Plan) -> str:
    """The command that finishes a run."""
    again = ["--output", str(plan.output), "--resume", *(["--retry-failed"] if plan.retry_failed else [])]
    return shlex.join([*_asked(plan.command), *again])


# --- list, doctor, pack ---------------------------------------------------------------------------------------------


def list_(
    what: Annotated[
        Literal["definitions", "workloads", "solutions", "all"], typer.Argument(help="What to list.")
    ] = "all",
    local: Local = None,
    definitions: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME…", help="Of these definitions only; names or patterns.", show_default="the headline for workloads"),
    ] = None,
) -> None:
    """List definitions, workloads and solutions, and what this machine can run.

    --local and --definitions take all words up to the next option: WHAT stands before them, or after --.
    """
    dataset = load_dataset(local)
    shown = console()
    names = _definitions(dataset, definitions) if definitions else list(dataset.definitions)
    tables = []
    if what in ("definitions", "all"):
        tables.append(definitions_table(dataset, names))
    if what in ("workloads", "all"):
        everyone = definitions or local
        tables += [workloads_table(dataset, name) for name in names if everyone or name == HEADLINE.definition_name]
    if what in ("solutions", "all"):
        tables.append(solutions_table(dataset, names))
    for number, table in enumerate(tables):
        shown.print(*([] if number == 0 else [""]), table, sep="\n")


def doctor(
    timers: Annotated[bool, typer.Option("--timers", help="Instead: CUPTI and events on a known set of kernels (CUDA).")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for what --timers measures.")] = None,
) -> None:
    """Say what this machine has, what is missing, and how to get it. Exit code 1 where `run` can't work, or the timers disagree."""
    if output and not timers:
        raise UsageError("--output: only with --timers")
    if timers:
        if lack := timers_lack():
            raise UsageError(f"--timers: {lack}")
        from blockmoe.bench.agreement import show

        raise typer.Exit(show(output))
    found = checks()
    console().print(checks_table(found))
    if any(check.state == "broken" for check in found):
        raise typer.Exit(1)


def pack(
    solutions: Annotated[list[str] | None, typer.Argument(help="Solutions; names or patterns.", show_default="all")] = None,
    definitions: Annotated[
        list[str] | None, typer.Option(metavar="NAME…", help="Definitions to pack for; names or patterns.", show_default="the headline")
    ] = None,
    output: Annotated[Path, typer.Option(help="FlashInfer-Trace tree to write into.")] = Path("packed"),
) -> None:
    """Pack solution folders into FlashInfer-Trace JSON, in a tree with their definition and its workloads.

    The tree is what flashinfer-bench reads, and `blockmoe run --local`. Blobs are made on first use.
    For other definitions than the headline, the sizes are appended to a solution's name: the format wants names only once.
    --definitions takes all words up to the next option: solutions stand before it, or after --.
    """
    dataset = load_dataset(None)
    names = _definitions(dataset, definitions or [HEADLINE.definition_name])
    chosen = {name: _chosen_solutions(dataset, name, names, solutions) for name in names}
    for name in names:
        op_type = dataset.definitions[name].op_type
        try:
            trees.copy_task(dataset, name, output)
            for solution in chosen[name]:
                print(write_packed(solution, op_type, output))
        except OSError as error:
            raise UsageError(f"--output {output}: not writable ({error.strerror})") from None
