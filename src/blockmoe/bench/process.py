"""The parent's end of a worker process: start, ask, wait with a deadline, kill. The parent never imports torch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LOG_BYTES = 1 << 15  # of a worker's output kept: its end
REPLY_BYTES = 1 << 22  # of a reply: the bench's own are far shorter
# Without the current folder on the path: a file there would stand in for a module of that name, in all workers.
WORKER = "import sys; sys.path = [path for path in sys.path if path]; from blockmoe.bench.worker import main; main()"
POLL_SECONDS = 0.5  # how often a worker that does not answer is looked at
TERMINATE_SECONDS = 3.0  # between asking a process to end and killing it


class WorkerLost(Exception):
    """The process died."""


class WorkerTimeout(Exception):
    """No reply in time."""


class WorkerProcess:
    """One worker, in a process group of its own so that its children end with it and Ctrl-C doesn't reach it."""

    def __init__(self, sources: Path) -> None:
        """In `sources` a folder for the solution's is made."""
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._folder = tempfile.mkdtemp(prefix="solution-", dir=sources)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(theirs.fileno()), str(os.getpid()), self._folder],
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
        descriptor = self._process.stdout.fileno()
        while piece := os.read(descriptor, 1 << 16):
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
            left = max(0.0, deadline - time.monotonic())
            gone = self._process.poll() is not None  # asked first: what it sent before it died is then there to be read
            ready, _, _ = select.select([self._socket], [], [], 0.0 if gone else min(left, POLL_SECONDS))
            if ready:
                self._buffer += self._piece()
                if len(self._buffer) > REPLY_BYTES:
                    raise WorkerLost("the process wrote to the bench's own socket")
            elif gone:  # and a child of its own still holds the socket open
                raise WorkerLost(self._ending())
            if left == 0.0 and b"\n" not in self._buffer:
                raise WorkerTimeout(f"no answer within {timeout:.0f} s")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return dict(_writable(json.loads(line)))
        except (TypeError, ValueError, RecursionError):
            raise WorkerLost("the process wrote to the bench's own socket") from None

    def _piece(self) -> bytes:
        try:
            piece = self._socket.recv(1 << 16)
        except OSError:
            piece = b""
        if not piece:
            raise WorkerLost(self._ending())
        return piece

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
        """Terminate, then kill, the whole process group; returns when the worker and its sources are gone."""
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
        shutil.rmtree(self._folder, ignore_errors=True)
        self._reader.join(1.0)
        if not self._reader.is_alive():  # else a process that left the group holds the pipe, and the thread reads on
            self._process.stdout.close()


def _writable(reply: Any) -> Any:
    """With `?` for lone surrogates, as the message of an error may hold where a file's name is not UTF-8: no trace could be written."""
    return json.loads(json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace"))
