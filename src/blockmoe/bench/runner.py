"""A run: which evaluations there are, each workload's group in turn, and nothing finished ever lost.

The parent process imports no torch and touches no CUDA. Traces are appended and synced one by one as soon as a workload's
group is done, so that Ctrl-C, a crash or a full disk costs the workload under way and no more.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from blockmoe.bench.contender import Contender, Failed, reference_solution
from blockmoe.bench.dataset import REFERENCE, Dataset, append_trace, read_traces
from blockmoe.bench.environment import Hardware, commit, host_memory
from blockmoe.bench.group import Group, Residency
from blockmoe.bench.interrupts import held
from blockmoe.bench.record import resume_key, traces_of
from blockmoe.bench.schema import Definition, Solution, Status, Trace, Workload
from blockmoe.bench.scratch import scratch_folder
from blockmoe.bench.settings import LEFT_OUT, Settings
from blockmoe.files import write_whole

HEADROOM_BYTES = 1 << 30  # left free beside the contenders' estimates


class RunError(Exception):
    """A run can't go on; one line for the user."""


class Observer(Protocol):
    """Who watches a run (the terminal, a test)."""

    def begin(self, evaluations: int) -> None: ...
    def workload(self, definition: str, workload: Workload, number: int, total: int) -> None: ...
    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, trace: Trace) -> None: ...


@dataclass
class Plan:
    """What was asked for: solutions and workloads by definition. `named` solutions must run: skipping one is a failure."""

    dataset: Dataset
    workloads: dict[str, list[Workload]]
    solutions: dict[str, list[Solution]]
    settings: Settings
    output: Path | None  # None: keep nothing
    resume: bool = False
    retry_failed: bool = False
    named: bool = False
    command: str = ""


@dataclass
class Outcome:
    """What came of it."""

    traces: list[Trace] = field(default_factory=list)
    resumed: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False
    error: str = ""

    def complete(self, named: bool) -> bool:
        """Whether all that was asked for ran and passed."""
        passed = all(trace.evaluation.status is Status.PASSED for trace in self.traces)
        return passed and bool(self.traces) and not self.interrupted and not self.error and not (named and self.skipped)


class Run:
    """One run of a plan. `outcome` and the result folder grow as it goes."""

    def __init__(self, plan: Plan, observer: Observer) -> None:
        self.plan, self.observer, self.settings = plan, observer, plan.settings
        self.outcome = Outcome()
        self.identifier = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self._commit = commit()
        self._started = _now()
        self._hardware: Hardware | None = None
        self._environment: dict[str, Any] = {}
        self._kept: dict[str, Trace] = {}
        self._contenders: list[dict[str, str]] = []

    def execute(self) -> Outcome:
        """Run everything; KeyboardInterrupt ends it early with `outcome.interrupted`, a full disk, say, with `outcome.error`."""
        if self.plan.resume and self.plan.output:
            self._read_earlier()
        try:
            # apart: a solution knows where its sources lie, and may build there what memory would not let it load (noexec)
            with scratch_folder(in_memory=True) as scratch, scratch_folder() as sources:
                for name in self.plan.workloads:
                    self._definition(self.plan.dataset.definitions[name], scratch, sources)
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            self.outcome.error = f"{place}{error.strerror or error}"
        except RunError as error:
            self.outcome.error = str(error)
        except Exception as error:  # a defect of the bench: what has been found stands, and the manifest says that more was to come
            self.outcome.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._write_manifest(finished=_now())
        return self.outcome

    def _definition(self, definition: Definition, scratch: Path, sources: Path) -> None:
        root = str(self.plan.dataset.roots[definition.name].resolve())  # a solution may change the folder it runs in
        reference = Contender(definition, reference_solution(definition), root, self.settings, sources)
        contenders = [Contender(definition, solution, root, self.settings, sources) for solution in self.plan.solutions[definition.name]]
        try:
            first = self._hardware is None
            self._learn_hardware(reference)
            if first:
                self.observer.begin(self._evaluations())
            contenders = self._able(contenders)
            self._write_manifest()
            residency = Residency(self._capacity(reference))
            workloads = self.plan.workloads[definition.name] if contenders else []
            for number, workload in enumerate(workloads, start=1):
                left = [contender for contender in contenders if not self._done_before(contender, workload)]
                if not left:
                    continue
                self.observer.workload(definition.name, workload, number, len(workloads))
                group = Group(workload, reference, left, self.settings, residency, scratch, self.observer.stage)
                self._note_rounds(residency, group)
                group.run()
                self._save(definition, group)
        finally:
            for contender in (reference, *contenders):
                contender.close()

    # what can run here

    def _learn_hardware(self, reference: Contender) -> None:
        """From the reference's worker: the parent can't ask CUDA itself. Raises RunError where no worker stands."""
        try:
            reference.start()
            reference.finish_start()
        except Failed as failure:
            if not reference.environment:  # else it stood, and what failed is the reference's import: the traces will say it
                raise RunError(f"a worker on {self.settings.device} did not start: {failure.message}") from None
        seen = reference.environment
        self._hardware = Hardware(seen["kind"], seen["name"], seen["sm"])
        self._environment = {"hardware": seen["name"], "libs": seen["libs"], "commit": self._commit} | seen["extra"]

    def _evaluations(self) -> int:
        """How many there are to be: of solutions that can run here."""
        lacks, plan = self._hardware.lacks, self.plan
        able = {name: sum(lacks(solution) is None for solution in solutions) for name, solutions in plan.solutions.items()}
        return sum(able[name] * len(workloads) for name, workloads in plan.workloads.items())

    def _able(self, contenders: list[Contender]) -> list[Contender]:
        able = []
        for contender in contenders:
            reason = self._hardware.lacks(contender.solution)
            if reason is None:
                able.append(contender)
                self._contenders.append(
                    {
                        "name": contender.name,
                        "definition": contender.definition.name,
                        "description": contender.solution.description or "",
                        "digest": contender.solution.digest,
                    }
                )
            else:
                skipped = {"solution": contender.name, "definition": contender.definition.name, "reason": reason}
                self.outcome.skipped.append(skipped)
                self.observer.note(f"SKIPPED {contender.name}: {reason}")
        return able

    def _capacity(self, reference: Contender) -> int:
        free = reference.environment["free_bytes"] if self.settings.on_cuda else host_memory()[0]
        return free - HEADROOM_BYTES

    def _note_rounds(self, residency: Residency, group: Group) -> None:
        if not residency.fits(group.everyone, group.workload):
            needed = sum(contender.needed_bytes(group.workload) for contender in group.everyone)
            self.observer.note(
                f"contenders need about {needed / 2**30:.0f} GiB together and {residency.capacity / 2**30:.0f} GiB are free: "
                "they are measured in rounds, one process at a time, not interleaved"
            )

    # keeping results

    def _read_earlier(self) -> None:
        traces, faults = read_traces(self.plan.output)
        for fault in faults:
            self.observer.note(f"ignored: {fault}")
        for trace in traces:
            key = (trace.evaluation.extra or {}).get("key") if trace.evaluation else None
            if isinstance(key, str):
                self._kept[key] = trace
        if self._kept and (changed := self._settings_that_differ()):
            self.observer.note(f"the earlier run had {changed}: its evaluations are kept beside this run's, and are not of it")

    def _settings_that_differ(self) -> str:
        """Of every earlier evaluation that names its settings; empty where one was made with this run's."""
        now = self.settings.identity()
        found = []
        for trace in self._kept.values():
            before = trace.evaluation.extra.get("settings")
            if not isinstance(before, dict):
                continue
            names = [name for name in dict.fromkeys([*now, *before]) if name != "timeout"]
            values = {name: [side.get(name, LEFT_OUT.get(name)) for side in (before, now)] for name in names}
            found.append([f"{name} {old} (now {new})" for name, (old, new) in values.items() if old != new])
        return ", ".join(min(found, key=len, default=[]))

    def _done_before(self, contender: Contender, workload: Workload) -> bool:
        trace = self._kept.get(resume_key(contender, workload.to_json(), self.settings, self._hardware.name))
        if trace is None or (self.plan.retry_failed and trace.evaluation.status is not Status.PASSED):
            return False
        self.outcome.traces.append(trace)
        self.outcome.resumed += 1
        self.observer.finished(trace)
        return True

    def _save(self, definition: Definition, group: Group) -> None:
        traces = traces_of(group, self.identifier, self._commit)
        with held():  # all of a group that is done, and what is said to be kept is
            for trace in traces:
                if self.plan.output:
                    append_trace(self.plan.output, definition.op_type, trace)
                self.outcome.traces.append(trace)
        for trace in traces:
            if trace.solution != REFERENCE or trace.evaluation.status is not Status.PASSED:
                self.observer.finished(trace)

    def _write_manifest(self, finished: str | None = None) -> None:
        """run.json, replaced in one step."""
        if not self.plan.output:
            return
        manifest = {
            "run": self.identifier, "command": self.plan.command, "settings": self.settings.identity() | {"timeout": self.settings.timeout},
            "environment": self._environment, "contenders": self._contenders, "skipped": self.outcome.skipped,
            "started": self._started, "finished": finished, "interrupted": self.outcome.interrupted, "error": self.outcome.error,
        }  # fmt: skip
        path = self.plan.output / "run.json"
        try:
            write_whole(path, json.dumps(manifest, indent=2) + "\n")
        except OSError as error:
            self.outcome.error = self.outcome.error or f"{path}: {error.strerror}"


def prepare_output(folder: Path) -> None:
    """Make the result folder and prove that it can be written, as another run may do beside this one; raises OSError."""
    write_whole(folder / ".write-probe", "").unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
