"""How a run shows itself: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from blockmoe.bench.dataset import size
from blockmoe.bench.schema import Status, Trace, Workload

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class TerminalObserver:
    """Prints to standard error, so that standard output keeps the tables. Stages show on a terminal, or with DEBUG."""

    def __init__(self, level: str = "INFO") -> None:
        self.console = Console(stderr=True, highlight=False)
        self._level = LEVELS.index(level)
        self._progress: Progress | None = None
        self._task = None
        self._where = ""
        self._start = time.monotonic()

    def __enter__(self) -> TerminalObserver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            with suppress(OSError):  # a terminal that is gone
                self._progress.stop()

    def begin(self, evaluations: int) -> None:
        if self.console.is_terminal and self._level <= 1:
            where = TextColumn("{task.description}", markup=False)
            columns = (SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), where)
            self._progress = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self._task = self._progress.add_task("starting", total=evaluations)
            self._progress.start()
        elif self._level <= 1:
            self._line(f"{evaluations} evaluations")

    def workload(self, definition: str, workload: Workload, number: int, total: int) -> None:
        self._where = f"{workload.uuid[:8]} T={size(workload)} ({number}/{total})"
        self.stage("starting")

    def stage(self, text: str) -> None:
        if self._progress:
            self._progress.update(self._task, description=f"{self._where} {text}"[: max(20, self.console.width - 46)])
        elif self._level == 0:
            self._line(f"{self._where} {text}")

    def note(self, text: str) -> None:
        if self._level <= 2:
            self._line(text, "yellow")

    def finished(self, trace: Trace) -> None:
        if self._progress:
            self._progress.advance(self._task)
        evaluation = trace.evaluation
        if evaluation.status is Status.PASSED:
            performance = evaluation.performance
            what = f"PASSED  {performance.latency_ms:.4g} ms, {performance.speedup_factor:.2f}x"
            style = "green"
        else:
            what, style = f"{evaluation.verdict}  {(evaluation.extra or {}).get('message', '')}", "red"
        if self._level <= 1 or evaluation.status is not Status.PASSED:
            self._line(f"{trace.workload.uuid[:8]} T={size(trace.workload):<6} {trace.solution}: {what}", style)

    def _line(self, text: str, style: str = "") -> None:
        seconds = time.monotonic() - self._start
        self.console.print(f"[{int(seconds // 60):02d}:{seconds % 60:04.1f}] {text}", style=style, markup=False, soft_wrap=True)
