"""Lines of the L2 that kernels had it keep: let go before each timed call and each replay."""

from types import SimpleNamespace

import pytest

from blockmoe.bench import timing


@pytest.mark.parametrize(("code", "worked"), [(0, True), (801, False)])
def test_the_drivers_answer(monkeypatch, code, worked):
    library = SimpleNamespace(cuCtxResetPersistingL2Cache=lambda: code)
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda name: library)
    assert timing.release_kept_lines()() is worked


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(timing.ctypes, "CDLL", missing)
    assert timing.release_kept_lines()() is False
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda name: object())  # a driver from before that call
    assert timing.release_kept_lines()() is False


@pytest.fixture
def timer():
    """A DeviceTimer that writes down what it does instead of doing it on a GPU."""
    made = object.__new__(timing.DeviceTimer)
    made.said = []

    def say(word):
        return lambda *_, **__: made.said.append(word)

    made.release_l2, made.flush, made.synchronize = say("release"), say("flush"), say("synchronize")
    made._spin, made._record, made._event = say("spin"), say("record"), say("event")
    made._stream, made._elapsed = lambda _: None, lambda *_: 1.0
    made._hold_us, made.device, made._cupti = 1.0, None, None
    return made


def test_before_the_device_is_held(timer):
    timer.hold()
    assert timer.said.index("release") < timer.said.index("spin")


def test_before_each_replay(timer):
    timer.replay_ms(lambda number: timer.said.append("prepare"), SimpleNamespace(replay=lambda: timer.said.append("replay")), [1, 2])
    order = [word for word in timer.said if word in ("release", "prepare", "flush", "replay", "synchronize")]
    assert order == ["release", "prepare", "flush", "replay", "synchronize"] * 2
