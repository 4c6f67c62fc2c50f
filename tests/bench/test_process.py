"""What a worker's socket may bring, and where a worker's modules come from."""

import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from blockmoe.bench.contender import Contender, Failed
from blockmoe.bench.process import REPLY_BYTES, WorkerLost, WorkerProcess, WorkerTimeout
from blockmoe.bench.replies import is_one


@pytest.fixture
def worker():
    """A worker whose process is a socket here."""
    found = WorkerProcess.__new__(WorkerProcess)
    found._socket, other = socket.socketpair()
    found._buffer, found._process = bytearray(), SimpleNamespace(poll=lambda: None)
    yield found, other
    found._socket.close()
    other.close()


def flood(other, until):
    try:
        while not until.is_set():
            other.sendall(b"x" * 1000)
            time.sleep(0.001)
    except OSError:
        pass


def test_who_never_ends_a_line_runs_out_of_time(worker):
    found, other = worker
    until = threading.Event()
    writer = threading.Thread(target=flood, args=(other, until))
    writer.start()
    try:
        begin = time.monotonic()
        with pytest.raises(WorkerTimeout):
            found.receive(0.3)
        assert time.monotonic() - begin < 10
    finally:
        until.set()
        other.close()
        writer.join()


@pytest.mark.parametrize("sent", [b"x" * (REPLY_BYTES + 100), b'{"a":' + b"[" * 200_000 + b"\n", b"[1]\n", b"no json\n"])
def test_what_is_no_reply(worker, sent):
    found, other = worker
    writer = threading.Thread(target=other.sendall, args=(sent,))
    writer.start()
    with pytest.raises(WorkerLost, match="wrote to the bench's own socket"):
        found.receive(20.0)
    found._socket.close()
    writer.join()


def test_text_that_no_file_would_hold(worker):
    """A lone surrogate, as os.listdir gives for a name that is not UTF-8."""
    found, other = worker
    other.sendall(b'{"graph_error": "cannot read caf\\udce9", "outputs": {"\\ud800": 0.5}}\n')
    assert found.receive(20.0) == {"graph_error": "cannot read caf?", "outputs": {"?": 0.5}}


SAMPLE = {"call": 1000, "ms": 1.5, "events_ms": None}
BLOCK = {"samples": [SAMPLE], "outputs": {"1000": "d"}, "inputs": "d", "timer": "host_clock"}


@pytest.mark.parametrize(
    ("do", "reply", "good"),
    [
        ("block", BLOCK, True),
        ("block", BLOCK | {"samples": []}, False),
        ("block", BLOCK | {"samples": [SAMPLE | {"ms": "1.5"}]}, False),
        ("block", BLOCK | {"samples": [SAMPLE | {"ms": float("nan")}]}, False),
        ("block", BLOCK | {"samples": [SAMPLE | {"ms": 0.0}]}, False),
        ("check", {"outputs": {"-3": "d"}}, True),
        ("check", {"outputs": {"1.0": "d"}}, False),
        ("check", {}, False),
        ("graph", {"graph_error": "no"}, True),
        ("graph", {}, False),
        ("judge", {"status": "PASSED", "message": "", "outputs": {}, "correctness": None}, True),
        ("judge", {"status": "FINE", "message": "", "outputs": {}, "correctness": None}, False),
        ("keep", {}, True),
    ],
)
def test_replies(do, reply, good):
    assert is_one(do, reply) == good


@pytest.mark.parametrize("error", [{"kind": [], "message": ""}, {"kind": "RUNTIME"}, 5, {"kind": "NONE", "message": ""}])
def test_errors_that_are_none(error):
    contender = Contender.__new__(Contender)
    contender.close = lambda: None
    with pytest.raises(Failed) as caught:
        contender._raise(error)
    assert caught.value.verdict.value == "BENCH_TAMPERED"


def test_the_current_folder_holds_no_modules_of_a_worker(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    found = WorkerProcess(tmp_path)
    try:
        found.send("floors")
        assert found.receive(60.0)["error"]["kind"] == "RUNTIME", found.log()  # it runs, and has no session yet
    finally:
        found.close()
    assert not os.path.exists(found._folder)
