"""The part of scripts/gpu_sustained.py that needs no GPU: its table."""

import gpu_sustained


def line(peer: str, rested: float, sustained: float, watts: float | None = 690.0) -> dict:
    return dict(kind="stretch", peer=peer, tokens=901, round=0, rested_us=rested, sustained_us=sustained, mhz=1500.0, watts=watts, calls=9)


def test_table():
    lines = [
        dict(kind="device", name="a GPU"), line("ours", 100.0, 110.0), line("other", 120.0, 121.0, None), line("other", 130.0, 143.0),
        line("ours", 100.0, 110.0), dict(kind="stretch", peer="broken", tokens=901, round=0),
    ]  # fmt: skip
    _, ours, other = gpu_sustained.table(lines, ["ours", "other"]).splitlines()
    assert ours == "901 | ours | 100.0 | 110.0 | 1500 | 690 | -"
    assert other == "901 | other | 125.0 | 132.0 | 1500 | - | 1.250, 1.200"
    assert len(gpu_sustained.table(lines[2:4], ["ours", "other"]).splitlines()) == 2
