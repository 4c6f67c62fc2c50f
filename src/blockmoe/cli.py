"""The `blockmoe` command: arguments in, one call, result out."""

from __future__ import annotations

import sys

import typer

from blockmoe import __version__
from blockmoe.bench import commands as bench_commands
from blockmoe.operator import commands as operator_commands
from blockmoe.report import commands as report_commands

# flashinfer-bench takes several values after these; click takes one, so that each value gets its flag
_MANY = ("--local", "--definitions", "--solutions", "--workloads")

_ParserError = typer.BadParameter.__mro__[2]  # click's ClickException, of which newer typers carry their own copy

app = typer.Typer(
    name="blockmoe",
    help="FP8 block-scale mixture-of-experts: run solutions against a reference, and report who wins where.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"blockmoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version.")) -> None:
    pass


bench_commands.register(app)
report_commands.register(app)
operator_commands.register(app)


def expand(arguments: list[str]) -> list[str]:
    """`--solutions A B` as `--solutions A --solutions B`."""
    expanded, flag = [], None
    for argument in arguments:
        if argument in _MANY:
            flag, fresh = argument, True
            expanded.append(argument)
        elif argument.startswith("-"):
            flag = None
            expanded.append(argument)
        elif flag:
            expanded += [argument] if fresh else [flag, argument]
            fresh = False
        else:
            expanded.append(argument)
    return expanded


def _given(error: _ParserError) -> str:
    """What came for the option that the parser refuses; empty where it refuses something else."""
    flags = [name for name in getattr(getattr(error, "param", None), "opts", []) if name.startswith("-")]
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in flags:
            return value if equals else following
    return ""


def main() -> None:
    """Entry point of the console script and of `python -m blockmoe`. What the parser refuses is one line, and exit code 2."""
    try:
        code = app(args=expand(sys.argv[1:]) or ["--help"], prog_name="blockmoe", standalone_mode=False)
    except _ParserError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "blockmoe"
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        if (given := _given(error)) and repr(given) not in message:
            message = f"{message.rstrip('.')}, got {given!r}"
        taker = next((argument for argument in sys.argv if argument in _MANY), None)
        if taker and message.startswith("Missing argument"):
            message += f" {bench_commands.greedy(taker)}"
        print(f"blockmoe: {message} (see {command} --help)", file=sys.stderr)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
