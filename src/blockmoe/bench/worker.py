"""The process of one contender: `main`, started by `process.py` with FD PARENT FOLDER. Requests and replies are lines of JSON.

FD is a socket, PARENT the process to die with, FOLDER where the solution's sources go.

Each request names a method; a reply carries its result, or `error` with a kind: a guard's verdict, BUILD, or RUNTIME. The
parent reads standard output and standard error apart, so that a solution may print what it likes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    _die_with_parent(int(sys.argv[2]))
    channel = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
    handler = Handler()
    for line in channel:
        reply = handler.answer(json.loads(line))
        channel.write(json.dumps(reply).encode() + b"\n")
        channel.flush()


def _die_with_parent(parent: int) -> None:
    """So that no worker outlives a parent killed by -9. Linux only; elsewhere the closed socket ends the loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


class Handler:
    """Answers requests with one Session."""

    def __init__(self) -> None:
        self.session: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, "do_" + request.pop("do"))(**request) or {}
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return {"error": _describe(error)}

    def do_start(self, definition: str, root: str, device: str, mode: str, seed: int, use_cupti: bool) -> dict[str, Any]:
        from blockmoe.bench.agreement import events_offset_us
        from blockmoe.bench.environment import worker_environment
        from blockmoe.bench.schema import Definition
        from blockmoe.bench.session import Session

        task = Definition.model_validate_json(definition)
        self.session = Session(task, Path(root), device, mode, seed, use_cupti)
        self.session.watch.add([sys.modules[__name__]], [])
        found = worker_environment(self.session.device) | {"key": self.session.key}
        offset = events_offset_us(self.session.timer)
        if offset is not None:
            found["extra"]["events_offset_us"] = offset
        if self.session.timer.releases_l2 is not None:
            found["extra"]["releases_l2"] = self.session.timer.releases_l2
        return found

    def do_build(self, solution: str) -> None:
        from blockmoe.bench.schema import Solution

        self.session.build(Solution.model_validate_json(solution), Path(sys.argv[3]))

    def do_open(self, workload: str) -> dict[str, Any]:
        from blockmoe.bench.schema import Workload

        return {"inputs": self.session.open(Workload.model_validate_json(workload))}

    def do_check(self, calls: list[int], folder: str) -> dict[str, Any]:
        return self.session.check(calls, folder)

    def do_warm(self, calls: list[int]) -> dict[str, Any]:
        return self.session.warm(calls)

    def do_block(self, calls: list[int], lead_in: int | None) -> dict[str, Any]:
        return self.session.block(calls, lead_in)

    def do_keep(self, call: int, path: str | None) -> None:
        self.session.keep(call, path)

    def do_graph(self, calls: list[int], path: str) -> dict[str, Any]:
        return self.session.graph(calls, path)

    def do_remember(self, calls: list[int]) -> dict[str, Any]:
        return self.session.remember(calls)

    def do_forget(self) -> None:
        self.session.forget()

    def do_judge(self, files: dict[str, str], key: int, tolerance: dict[str, float]) -> dict[str, Any]:
        from blockmoe.bench.correctness import Tolerance

        judgement, outputs = self.session.judge({int(call): path for call, path in files.items()}, key, Tolerance(**tolerance))
        correctness = judgement.correctness()
        return {
            "status": judgement.status.value,
            "message": judgement.message,
            "outputs": outputs,
            "correctness": json.loads(correctness.to_json()) if correctness else None,
        }

    def do_floors(self) -> dict[str, Any]:
        from blockmoe.bench.roofline import measured_floors

        return measured_floors(self.session)


def _describe(error: BaseException) -> dict[str, Any]:
    """Kind and message, which is cut: a compiler's output can be longer than a reply may be. The log has its end."""
    from blockmoe.bench.session import SENT_CHARACTERS

    traceback.print_exc()
    kind, message = _kind_and_message(error)
    return {"kind": kind, "message": message[:SENT_CHARACTERS]}


def _kind_and_message(error: BaseException) -> tuple[str, str]:
    from blockmoe.bench.guards import Tripped
    from blockmoe.bench.session import BuildError, first_line

    if isinstance(error, Tripped):
        return error.verdict.value, error.message
    if isinstance(error, BuildError):
        return "BUILD", str(error).strip()
    if isinstance(error, SystemExit):
        return "RUNTIME", f"the solution called sys.exit({error.code!r})"
    return "RUNTIME", first_line(error)


if __name__ == "__main__":
    main()
