"""A contender as the parent sees it: its worker, its time budget, and what it has shown so far on the open workload."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockmoe.bench.dataset import REFERENCE
from blockmoe.bench.process import WorkerLost, WorkerProcess, WorkerTimeout
from blockmoe.bench.replies import is_one
from blockmoe.bench.schema import Definition, Solution, Status, Workload
from blockmoe.bench.settings import Settings
from blockmoe.bench.verdicts import Verdict, status_of

START_TIMEOUT = 600.0  # imports and input generation: the bench's own time, not charged to the solution
MESSAGE_CHARACTERS = 500
DTYPE_BYTES = {"float32": 4, "int32": 4, "int64": 8, "bfloat16": 2, "float16": 2, "int16": 2}  # 1 for all others
ERRORS = {"BUILD", "RUNTIME", *(verdict.value for verdict in Verdict)}  # kinds that a worker reports


class Failed(Exception):
    """A contender is out for this workload; `message` is one line. `whose` is the contender whose worker failed, if one did."""

    def __init__(self, status: Status, message: str, verdict: Verdict | None = None, whose: Contender | None = None) -> None:
        message = " ".join(message.split())[:MESSAGE_CHARACTERS]
        super().__init__(message)
        self.status, self.message, self.verdict, self.whose = status, message, verdict, whose


def reference_solution(definition: Definition) -> Solution:
    """The definition's reference as a solution."""
    return Solution.model_validate(
        {
            "name": REFERENCE,
            "definition": definition.name,
            "author": "definition",
            "description": "The definition's own reference, float32.",
            "spec": {
                "language": "python",
                "target_hardware": ["cpu", "cuda"],
                "entry_point": "reference.py::run",
                "dependencies": ["torch"],
                "destination_passing_style": False,
            },
            "sources": [{"path": "reference.py", "content": definition.reference}],
        }
    )


@dataclass
class Findings:
    """What a contender has shown on one workload."""

    failure: Failed | None = None
    correctness: dict[str, Any] | None = None
    samples: list[list[float]] = field(default_factory=list)  # by block, ms
    events: list[list[float]] = field(default_factory=list)
    block_inputs: list[str] = field(default_factory=list)  # digest of the inputs after each block
    outputs: dict[int, str] = field(default_factory=dict)  # digest of each call's output
    timer: str = ""
    host_us: float | None = None
    graph: dict[str, Any] = field(default_factory=dict)
    rechecked: int = 0
    log: str = ""


class Contender:
    """Starts its worker when first asked; a worker that died or hung is replaced when the next workload begins."""

    def __init__(self, definition: Definition, solution: Solution, root: str, settings: Settings, sources: Path) -> None:
        self.definition, self.solution, self.root, self.settings, self.sources = definition, solution, root, settings, sources
        self.name = solution.name
        self.worker: WorkerProcess | None = None
        self.environment: dict[str, Any] = {}
        self.opened: str | None = None  # uuid of the workload whose inputs the worker holds
        self.inputs_digest: str | None = None
        self.uncapturable: str | None = None  # why a CUDA graph could not capture it
        self.unbuildable: tuple[Failed, str] | None = None  # how its import failed, and its log: it is not tried again
        self.warmed: str | None = None  # uuid of the workload that this process is warm for
        self.spent = 0.0
        self.findings = Findings()
        self._starting = self._built = False
        self._unread: list[str] = []  # requests whose reply has not been read, in order

    @property
    def is_reference(self) -> bool:
        return self.name == REFERENCE

    def begin(self) -> None:
        """Forget the workload before: a fresh budget, no findings, no reply that is still to come."""
        if self._unread and not self._starting:
            self.close()
        self.spent, self.findings = 0.0, Findings()

    # the worker's life

    def start(self) -> None:
        """Start the worker and ask it to bind its timers; `finish_start` waits for it, so that several start at once."""
        if self.unbuildable:
            failure, self.findings.log = self.unbuildable
            raise failure
        if self.worker is None:
            self.worker = WorkerProcess(self.sources)
            settings = self.settings
            self._send(
                "start", definition=self.definition.to_json(), root=self.root, device=settings.device, mode=settings.inputs,
                seed=settings.seed, use_cupti=settings.cupti,
            )  # fmt: skip
            self._starting = True

    def finish_start(self) -> None:
        """Wait until the worker stands and has imported the solution. Raises Failed."""
        if self._starting:
            self._starting = False
            self.environment = self._receive(START_TIMEOUT)
            try:
                self.ask("build", solution=self.solution.to_json())
            except Failed as failure:
                self.unbuildable = None if self._built else (failure, self.findings.log)
                raise
            self._built = True

    def send_open(self, workload: Workload) -> bool:
        """Ask the worker to make a workload's inputs, unless it holds them; True where an answer is to be awaited."""
        if self.opened == workload.uuid:
            return False
        self._send("open", workload=workload.to_json())
        return True

    def finish_open(self, workload: Workload) -> None:
        self.inputs_digest = self._receive(START_TIMEOUT)["inputs"]
        self.opened = workload.uuid

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        if self.worker is not None:
            worker, self.worker, self.opened, self.warmed = self.worker, None, None, None
            self._starting, self._unread = False, []
            worker.close()
            self.findings.log = worker.log()

    # asking it

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request, charged against the timeout of this evaluation. Raises Failed, and ends a worker that is no good."""
        left = self.settings.timeout if self.is_reference else self.settings.timeout - self.spent
        start = time.monotonic()
        try:
            self._send(do, **arguments)
            return self._receive(max(left, 0.0), self.settings.timeout)
        finally:
            self.spent += time.monotonic() - start

    def _send(self, do: str, **arguments: Any) -> None:
        try:
            self.worker.send(do, **arguments)
        except WorkerLost as error:
            self._lost(str(error))
        self._unread.append(do)

    def _receive(self, timeout: float, limit: float | None = None) -> dict[str, Any]:
        """Wait `timeout` seconds for a reply; `limit` is what to call the timeout where less of it was left."""
        try:
            reply = self.worker.receive(timeout)
        except WorkerTimeout:
            self.close()
            raise Failed(Status.TIMEOUT, f"no result within the timeout of {limit or timeout:g} s", whose=self) from None
        except WorkerLost as error:
            self._lost(str(error))
        asked = self._unread.pop(0)
        self.findings.log = self.worker.log()
        if error := reply.get("error"):
            self._raise(error)
        if not is_one(asked, reply):
            self._tampered()
        return reply

    def _lost(self, ending: str) -> None:
        self.close()
        raise Failed(Status.RUNTIME_ERROR, ending, whose=self) from None

    def _tampered(self) -> None:
        self.close()
        message = "the process wrote to the bench's own socket: a reply that is none of the bench's"
        raise Failed(status_of(Verdict.BENCH_TAMPERED), message, Verdict.BENCH_TAMPERED, whose=self)

    def _raise(self, error: Any) -> None:
        """An error that the worker reported. Its process is replaced: CUDA errors stick, and modules stay half imported."""
        if not (isinstance(error, dict) and error.keys() == {"kind", "message"} and str(error["kind"]) in ERRORS):
            self._tampered()
        kind, message = str(error["kind"]), str(error["message"])
        self.close()
        if kind == "BUILD":
            raise Failed(Status.COMPILE_ERROR, message, whose=self)
        if kind == "RUNTIME":
            raise Failed(Status.RUNTIME_ERROR, message, whose=self)
        verdict = Verdict(kind)
        raise Failed(status_of(verdict), message, verdict, whose=self)

    # memory

    def needed_bytes(self, workload: Workload) -> int:
        """Estimate of what the worker holds at its fullest: inputs, plus float32 weights for the reference, plus slack."""
        inputs = weights = 0
        for name, spec in self.definition.inputs.items():
            elements = 1
            for size in self.definition.shape(name, workload.axes) or ():
                elements *= size
            inputs += elements * DTYPE_BYTES.get(spec.dtype, 1)
            weights += elements if spec.dtype.startswith("float8") else 0
        slack = (4 << 30) if self.settings.on_cuda else (1 << 30)
        work = 4 * weights if self.is_reference else weights // 2
        return inputs + work + slack
