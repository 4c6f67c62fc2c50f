"""The parent's end of a worker process: start, ask, wait with a deadline, kill. The parent never imports torch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

LOG_BYTES = 1 << 15  # of a worker's output kept: its end
TERMINATE_SECONDS = 3.0  # between asking a process to end and killing it


class WorkerLost(Exception):
    """The process died."""


class WorkerTimeout(Exception):
    """No reply in time."""


class WorkerProcess:
    """One worker, in a process group of its own so that its children end with it and Ctrl-C doesn't reach it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "blockmoe.bench.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )  # fmt: skip
        theirs.close()
        self._socket, self._buffer = ours, bytearray()
        self._log = bytearray()
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        """Read what the worker prints, however much, and keep its end."""
        stream = self._process.stdout
        while piece := os.read(stream.fileno(), 1 << 16):
            self._log += piece
            del self._log[:-LOG_BYTES]

    def send(self, do: str, **arguments: Any) -> None:
        """Send a request; raises WorkerLost."""
        try:
            self._socket.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except OSError:
            raise WorkerLost(self._ending()) from None

    def receive(self, timeout: float) -> dict[str, Any]:
        """The reply to the oldest request; raises WorkerLost or WorkerTimeout."""
        deadline = time.monotonic() + timeout
        while (end := self._buffer.find(b"\n")) < 0:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerTimeout(f"no answer within {timeout:.0f} s")
            try:
                piece = self._socket.recv(1 << 16)
            except OSError:
                piece = b""
            if not piece:
                raise WorkerLost(self._ending())
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return json.loads(line)

    def _ending(self) -> str:
        """How the process ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERMINATE_SECONDS)
        code = self._process.poll()
        if code is None:
            return "the process closed its connection"
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"the process died of {name}{hint}"
        return f"the process exited with code {code}"

    def log(self) -> str:
        """The end of what the worker printed."""
        return bytes(self._log).decode(errors="replace")

    def close(self) -> None:
        """Terminate, then kill, the whole process group; returns when the worker is gone."""
        self._socket.close()
        for number, wait in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that ignored the request
        self._reader.join(1.0)
        self._process.stdout.close()
