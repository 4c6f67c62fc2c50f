"""The parts of scripts/gpu_sustained.py that need no GPU: its table, what counts as failed, what it refuses."""

import sys

import gpu_sustained
import pytest


def line(peer: str, rested: float, sustained: float, watts: float | None = 690.0) -> dict:
    return dict(kind="stretch", peer=peer, tokens=901, round=0, rested_us=rested, sustained_us=sustained, mhz=1500.0, watts=watts, calls=9)


def test_table():
    lines = [
        dict(kind="device", name="a GPU"), line("ours", 100.0, 110.0), line("other", 120.0, 121.0, None), line("other", 130.0, 143.0),
        line("ours", 100.0, 110.0), dict(kind="failed", label="broken T=901 stretch", error="RuntimeError"),
    ]  # fmt: skip
    _, ours, other = gpu_sustained.table(lines, ["ours", "other"]).splitlines()
    assert ours == "901 | ours | 100.0 | 110.0 | 1500 | 690 | -"
    assert other == "901 | other | 125.0 | 132.0 | 1500 | - | 1.250, 1.200"
    assert len(gpu_sustained.table(lines[2:4], ["ours", "other"]).splitlines()) == 2


def test_failed():
    right, wrong, broken = dict(kind="check", ok=True), dict(kind="check", ok=False), dict(kind="failed", label="x", error="y")
    assert not gpu_sustained.failed([right, line("ours", 1.0, 1.0)])
    assert gpu_sustained.failed([right, wrong]) and gpu_sustained.failed([right, broken])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tokens", "901,900"], "argument --tokens: expected some of 1,7,14,15,16,32,"),
        (["--tokens", "few"], "argument --tokens: expected numbers and commas, got 'few'"),
        (["--peers", "blockmoe,nobody"], "got nobody"),
        (["--rounds", "0"], "--seconds, --rounds: expected more than 0 and at least 1, got 1.0 and 0"),
    ],
)
def test_refused(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_sustained.py", *given])
    with pytest.raises(SystemExit) as ended:
        gpu_sustained.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
