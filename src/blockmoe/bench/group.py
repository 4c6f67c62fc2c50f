"""All contenders of one workload: opened, checked against the reference, and timed in interleaved blocks.

The order of a trial: for each block, every contender in an order drawn anew, each over the same calls (same inputs). Where
the contenders don't fit into memory together, each does its blocks of a trial in one go, and its process makes room after.
"""

from __future__ import annotations

import contextlib
import math
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockmoe.bench.contender import DTYPE_BYTES, Contender, Failed
from blockmoe.bench.environment import gpu_state
from blockmoe.bench.schema import Status, Workload
from blockmoe.bench.scratch import require_room
from blockmoe.bench.settings import Settings
from blockmoe.bench.verdicts import Verdict, status_of

# Call numbers: which inputs a call gets. Each purpose has a range of its own, so that no two calls share contents.
TIMED, WARM, LEAD_IN, REPLAY = 1_000, 100_000, 200_000, 300_000
REPLAYS = 10
FEW_ELEMENTS = 64  # outputs of fewer can be equal by chance, and are not called cached


@dataclass
class Residency:
    """Which workers may stay in memory together. `together` is false once something had to make room."""

    capacity: int
    together: bool = True
    _seated: list[Contender] = field(default_factory=list)

    def seat(self, contender: Contender, workload: Workload) -> None:
        """Close the least recently used workers until this one fits; then have it started and opened. Raises Failed."""
        self._make_room(contender, workload)
        contender.start()
        contender.finish_start()
        if contender.send_open(workload):
            contender.finish_open(workload)

    def fits(self, contenders: list[Contender], workload: Workload) -> bool:
        return sum(contender.needed_bytes(workload) for contender in contenders) <= self.capacity

    def _make_room(self, contender: Contender, workload: Workload) -> None:
        self._seated = [other for other in self._seated if other.worker is not None and other is not contender]
        while self._seated and not self.fits([*self._seated, contender], workload):
            self._seated.pop(0).close()
        self._seated.append(contender)


class Group:
    """One workload's contenders through all phases. Findings are left in each contender; a failure never stops the others.

    Methods raise OSError where what looks like a contender's failure is a scratch folder that is full.
    """

    def __init__(
        self, workload: Workload, reference: Contender, contenders: list[Contender], settings: Settings, residency: Residency,
        folder: Path, stage: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.workload, self.reference, self.contenders = workload, reference, contenders
        self.settings, self.residency, self.folder, self.stage = settings, residency, folder, stage
        self.everyone = [reference, *contenders]
        self.floors: dict[str, Any] = {}
        self.gpu: list[dict[str, Any]] = []
        self._order = random.Random(f"{settings.seed} {workload.uuid}")
        definition = reference.definition
        elements = {name: math.prod(definition.shape(name, workload.axes) or ()) for name in definition.outputs}
        self._elements = sum(elements.values())  # of a call's outputs
        self._output_bytes = sum(count * DTYPE_BYTES.get(definition.outputs[name].dtype, 1) for name, count in elements.items())

    @property
    def standing(self) -> list[Contender]:
        return [contender for contender in self.contenders if contender.findings.failure is None]

    @property
    def _running(self) -> list[Contender]:
        """Who is measured: with nobody to compare it with, the reference isn't either."""
        return [self.reference, *self.standing] if self.standing else []

    def run(self) -> None:
        """Everything. The reference's own failure ends the workload for all."""
        for contender in self.everyone:
            if self.settings.fresh_processes:
                contender.close()
            contender.begin()
        try:
            self._open()
            self._check()
            for trial in range(self.settings.num_trials):
                if trial and self.settings.fresh_processes:
                    self._renew()
                if self.residency.together and (trial == 0 or self.settings.fresh_processes):
                    self._warm_all()
                self._trial(trial)
            self._note_gpu()
            if self.settings.on_cuda and self.settings.cuda_graph:
                self._replay()
        except Failed as failure:  # the reference's
            self._require_room(failure)
            message = f"the reference failed: {failure.message}"
            for contender in self.standing:
                contender.findings.failure = Failed(Status.RUNTIME_ERROR, message, Verdict.REFERENCE_FAILED)
            self.reference.findings.failure = failure

    @contextlib.contextmanager
    def _or_out(self, contender: Contender) -> Iterator[None]:
        """A solution that fails is out; the reference's failure goes up."""
        try:
            yield
        except Failed as failure:
            if contender.is_reference or failure.whose is self.reference:
                raise
            self._require_room(failure)
            contender.findings.failure = failure

    # phases

    def _open(self) -> None:
        self.stage("making inputs")
        self.residency.together = self.residency.fits(self.everyone, self.workload)
        if self.residency.together:
            self._start_all()
        self.residency.seat(self.reference, self.workload)
        self.floors = self.reference.ask("floors")
        self._note_gpu()

    def _start_all(self) -> None:
        """Side by side."""
        for phase in (Contender.start, Contender.finish_start, self._send_open, self._finish_open):
            for contender in [self.reference, *self.standing]:
                with self._or_out(contender):
                    phase(contender)

    def _renew(self) -> None:
        """Everyone in a process that has measured nothing yet, with all of its time before it: it imports and compiles anew."""
        self.stage("new processes")
        for contender in self._running:
            contender.close()
            contender.spent = 0.0
        if self.residency.together:
            self._start_all()

    def _warm_all(self) -> None:
        for contender in self._running:
            with self._or_out(contender):
                self._seat_warm(contender)

    def _send_open(self, contender: Contender) -> None:
        contender.send_open(self.workload)

    def _finish_open(self, contender: Contender) -> None:
        if contender.opened != self.workload.uuid:
            contender.finish_open(self.workload)

    def _seat(self, contender: Contender) -> None:
        self.residency.seat(contender, self.workload)
        if contender.inputs_digest != self.reference.inputs_digest:
            message = f"inputs differ between processes: {contender.inputs_digest} and the reference's {self.reference.inputs_digest}"
            raise Failed(Status.RUNTIME_ERROR, message, Verdict.INPUTS_DIFFER)

    def _check(self) -> None:
        calls = list(range(self.settings.num_trials))
        for contender in self.standing:
            self.stage(f"checking {contender.name}")
            with self._or_out(contender):
                self._seat(contender)
                contender.findings.outputs |= _by_call(contender.ask("check", calls=calls, folder=str(self._folder(contender))))
        if not self.standing:
            return
        self.stage("reference outputs")
        self._remember(calls)
        for contender in self.standing:
            with self._or_out(contender):
                answer = self._judge(contender, calls)
                contender.findings.correctness = answer["correctness"]
                self._require_fresh(contender)
                if answer["status"] != Status.PASSED.value:
                    raise Failed(Status(answer["status"]), answer["message"])
        self.reference.ask("forget")

    def _seat_warm(self, contender: Contender) -> None:
        """Ready to be timed: a process that had to make room and came back is warmed up again."""
        self._seat(contender)
        if contender.warmed != self.workload.uuid:
            self.stage(f"warming up {contender.name}")
            calls = list(range(WARM, WARM + self.settings.warmup_runs))
            contender.findings.host_us = contender.ask("warm", calls=calls)["host_us"]
            contender.warmed = self.workload.uuid

    def _trial(self, trial: int) -> None:
        """One trial of every contender, then a second look at one timed output of each."""
        first = TIMED + trial * self.settings.iterations
        blocks, start = [], first
        for length in self.settings.blocks():
            blocks.append(list(range(start, start + length)))
            start += length
        keep = first + secrets.randbelow(self.settings.iterations)  # not from the seed, which a solution can know
        names = ", ".join(contender.name for contender in self._running)
        self.stage(f"trial {trial + 1} of {self.settings.num_trials}: {names}")
        rounds = [[block] for block in blocks] if self.residency.together else [blocks]
        for round_blocks in rounds:
            order = self._running
            self._order.shuffle(order)
            for contender in order:
                with self._or_out(contender):
                    self._seat_warm(contender)
                    for block in round_blocks:
                        self._block(contender, block, keep)
        if self.standing:
            self._recheck(keep)

    def _block(self, contender: Contender, calls: list[int], keep: int) -> None:
        lead_in = LEAD_IN + calls[0] if self.settings.on_cuda and self.settings.warmup_runs else None
        answer = contender.ask("block", calls=calls, lead_in=lead_in)
        findings = contender.findings
        findings.samples.append([sample["ms"] for sample in answer["samples"]])
        findings.events.append([sample["events_ms"] for sample in answer["samples"] if sample["events_ms"] is not None])
        findings.block_inputs.append(answer["inputs"])
        findings.outputs |= _by_call(answer)
        findings.timer = answer["timer"]
        if keep in calls:  # said only now: a call that knew it would be looked at could be the only honest one
            path = None if contender.is_reference else str(self._folder(contender) / f"{keep}.safetensors")
            contender.ask("keep", call=keep, path=path)

    def _recheck(self, keep: int) -> None:
        """Judge the kept output, and compare digests of all inputs and outputs with the reference's."""
        self._seat(self.reference)
        self._remember([keep])
        expected = self.reference.findings
        for contender in self.standing:
            with self._or_out(contender):
                findings = contender.findings
                if findings.block_inputs != expected.block_inputs:
                    raise _tripped(Verdict.INPUT_MUTATED, "after a timed block the inputs are not what they should be")
                answer = self._judge(contender, [keep])
                findings.rechecked += 1
                if answer["status"] != Status.PASSED.value:
                    findings.correctness = answer["correctness"] or findings.correctness
                self._require_fresh(contender)
                if answer["status"] != Status.PASSED.value:
                    raise _tripped(Verdict.TIMED_OUTPUT_WRONG, f"passed while checked, but a timed call's output: {answer['message']}")
        self.reference.ask("forget")

    def _replay(self) -> None:
        """CUDA-graph replays, a figure beside the span: a solution that can't be captured loses nothing but that figure."""
        calls = list(range(REPLAY, REPLAY + REPLAYS))
        for contender in self.standing:
            if contender.uncapturable:
                contender.findings.graph = {"graph_error": contender.uncapturable}
                continue
            self.stage(f"graph replay of {contender.name}")
            path = self._folder(contender) / f"{calls[-1]}.safetensors"
            try:
                self._seat(contender)
                answer = contender.ask("graph", calls=calls, path=str(path))
                if "graph_ms" in answer:
                    self._seat(self.reference)
                    self._remember(calls[-1:])
                    judged = self._judge(contender, calls[-1:])
                    if judged["status"] != Status.PASSED.value:
                        answer = {"graph_error": f"the replay's output is wrong: {judged['message']}"}
                    self.reference.ask("forget")
                else:  # a failed capture can leave stream and allocator in a bad state: a new process, and no second try
                    contender.uncapturable = answer["graph_error"]
                    contender.close()
                contender.findings.graph = answer
            except Failed as failure:
                if failure.whose is self.reference:
                    raise
                self._require_room(failure)
                contender.findings.graph = {"graph_error": failure.message}

    # pieces

    def _require_room(self, failure: Failed) -> None:
        """A worker that could not leave its sources or an output is not to blame. Looked at from here: what it says may be untrue."""
        if failure.whose:
            require_room(failure.whose.sources, sum(len(source.content) for source in failure.whose.solution.sources))
            require_room(self.folder, self._output_bytes)

    def _remember(self, calls: list[int]) -> None:
        """Have the reference's outputs of these calls in its own process."""
        self._seat(self.reference)
        self.reference.findings.outputs |= _by_call(self.reference.ask("remember", calls=calls))

    def _require_fresh(self, contender: Contender) -> None:
        if self._elements < FEW_ELEMENTS:
            return
        if pair := _repeated(contender.findings.outputs, self.reference.findings.outputs):
            raise _tripped(Verdict.OUTPUT_CACHED, f"calls {pair[0]} and {pair[1]} had other inputs and gave the same output")

    def _judge(self, contender: Contender, calls: list[int]) -> dict[str, Any]:
        files = {call: self._folder(contender) / f"{call}.safetensors" for call in calls}
        settings, told = self.settings, contender.findings.outputs
        tolerance = {"rtol": settings.rtol, "atol": settings.atol, "required_matched_ratio": settings.required_matched_ratio}
        try:
            paths = {call: str(path) for call, path in files.items()}
            answer = self.reference.ask("judge", files=paths, key=contender.environment["key"], tolerance=tolerance)
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)
        for call, judged in _by_call(answer).items():
            if told.get(call, judged) != judged:
                raise _tripped(Verdict.BENCH_TAMPERED, f"the output of call {call} is not the one that was there when it returned")
        return answer

    def _folder(self, contender: Contender) -> Path:
        folder = self.folder / f"{self.everyone.index(contender)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _note_gpu(self) -> None:
        if self.settings.on_cuda:
            self.gpu.append(gpu_state(self.settings.device_index, self.reference.environment.get("uuid", "")))


def _by_call(answer: dict[str, Any]) -> dict[int, str]:
    return {int(call): digest for call, digest in answer["outputs"].items()}


def _repeated(outputs: dict[int, str], expected: dict[int, str]) -> tuple[int, int] | None:
    """Two calls with equal outputs where the reference's differ (or aren't known and can't all be equal)."""
    seen: dict[str, int] = {}
    for call, digest in outputs.items():
        earlier = seen.setdefault(digest, call)
        if earlier != call and expected.get(earlier) != expected.get(call):
            return earlier, call
    return None


def _tripped(verdict: Verdict, message: str) -> Failed:
    return Failed(status_of(verdict), message, verdict)
