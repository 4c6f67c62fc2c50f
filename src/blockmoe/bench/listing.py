"""What `blockmoe list` and `blockmoe doctor` show: tables of a dataset and of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockmoe.bench.dataset import Dataset
from blockmoe.bench.doctor import Check, local_hardware

PIPE_COLUMNS = 200


def console() -> Console:
    """Standard output: a terminal of its own width, a pipe wide enough that no name is cut into two lines."""
    made = Console(highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPE_COLUMNS
    return made


def definitions_table(dataset: Dataset, names: Iterable[str]) -> Table:
    table = _table("definition", "type", "workloads", "solutions")
    for name in names:
        counts = len(dataset.workloads.get(name, [])), len(dataset.solutions_of(name))
        _add(table, name, dataset.definitions[name].op_type, *map(str, counts))
    return table


def workloads_table(dataset: Dataset, definition: str) -> Table:
    table = _table("workload", "axes", "scalars", "pairs", "active experts")
    table.title, table.title_justify, table.title_style = Text(definition), "left", ""
    for workload in dataset.workloads.get(definition, []):
        scalars = " ".join(f"{name}={spec.value:g}" for name, spec in workload.inputs.items() if spec.type == "scalar")
        axes = " ".join(f"{name}={value}" for name, value in workload.axes.items())
        recipe = (workload.model_extra or {}).get("recipe")
        counted = (str(recipe.get(name, "")) for name in ("pairs", "active_experts")) if isinstance(recipe, dict) else ("", "")
        _add(table, workload.uuid[:8], axes, scalars, *counted)
    return table


def solutions_table(dataset: Dataset, definitions: Iterable[str]) -> Table:
    hardware, wanted = local_hardware(), set(definitions)
    table = _table("solution", "language", "here", "definitions")
    for name in dict.fromkeys(name for definition, name in dataset.solutions if definition in wanted):
        packed = [solution for (definition, other), solution in dataset.solutions.items() if other == name and definition in wanted]
        _add(table, name, packed[0].spec.language, hardware.lacks(packed[0]) or "runs", str(len(packed)))
    return table


def checks_table(checks: Iterable[Check]) -> Table:
    table = _table("", "what", "found", "what to do")
    for check in checks:
        mark = {"ok": Text("ok", "green"), "missing": Text("--", "yellow"), "broken": Text("!!", "red")}[check.state]
        _add(table, mark, check.what, check.found, check.remedy)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """A row as it stands: names of a tree are no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
