"""The parts of scripts/gpu_curve.py that need no GPU: routing families, promises, table and picture."""

import json
import subprocess
import sys
from pathlib import Path

import curve_report
import gpu_curve
import pytest
import torch

from blockmoe.geometry import HEADLINE, TINY
from blockmoe.reference import route

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_curve.py"


@pytest.mark.parametrize("g", [HEADLINE, TINY], ids=["headline", "tiny"])
@pytest.mark.parametrize("family", (*gpu_curve.FAMILIES, "even"))
def test_families_route_as_chosen(g, family):
    offset = g.num_local_experts
    chosen = gpu_curve.choices(family, g, 64, offset, 3, torch.device("cpu"))
    assert (chosen.sum(1) == g.top_k).all()
    experts, _ = route(gpu_curve.logits_of(chosen, g), torch.zeros(g.num_experts), g, 1.0)
    assert torch.equal(torch.zeros_like(chosen).scatter_(1, experts, True), chosen)
    local = chosen[:, offset : 2 * offset]
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        assert local[:tokens].sum() == (g.top_k if family in ("same experts", "all local") else 1) * tokens
    active = int(local.any(0).sum())
    assert {"one expert": active == 1, "same experts": active == g.top_k}.get(family, active > g.num_local_experts // 2)


def test_zipf_is_skewed():
    loads = {
        family: gpu_curve.choices(family, HEADLINE, 4096, 32, 0, torch.device("cpu"))[:, 32:64].sum(0).float()
        for family in ("uniform", "zipf")
    }
    assert loads["uniform"].max() < 1.5 * loads["uniform"].mean() and loads["zipf"].max() > 5 * loads["zipf"].mean()


def test_changes_of_plan():
    assert gpu_curve.changes(lambda t: (t > 3) + (t > 7), 16) == [4, 8]


def point(tokens, us, family="uniform", **neighbours):
    others = {label: {"us": value, "plan": "p"} for label, value in neighbours.items()}
    return dict(
        kind="point", family=family, tokens=tokens, pairs=tokens, active=1, us=us, us_per_pair=us / tokens, graph_us=us, floor_us=us / 2,
        neighbours=others,
    )  # fmt: skip


def test_promises():
    points = [point(1, 10.0), point(4, 30.0), point(2, 12.0, half=11.9), point(8, 49.0), point(2, 99.0, family="zipf", half=90.0)]
    assert [(f["tokens"], f["than_tokens"], round(f["ratio"], 3)) for f in curve_report.rises(points)] == [(4, 2, 1.25)]
    assert [(f["family"], f["tokens"], f["neighbour"]) for f in curve_report.better_plans(points)] == [("zipf", 2, "half")]
    flags = [line.split("|")[-1].strip() for line in curve_report.table(points).splitlines()]
    assert flags == ["flags", "", "", ">", "", "<"]


def test_picture_from_a_file(tmp_path):
    data, picture = tmp_path / "run.jsonl", tmp_path / "a/curve.svg"
    points = [point(1 << n, 50.0 + (1 << n), family) for family in gpu_curve.FAMILIES for n in range(5)]
    data.write_text("\n".join(json.dumps(line) for line in [{"kind": "device"}, *points]))
    command = [sys.executable, str(SCRIPT), "--plot", str(data), "--to", str(picture)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "same experts | 16" in result.stdout, result.stderr
    first = picture.read_text()
    subprocess.run(command, check=True, capture_output=True)
    assert first == picture.read_text() and "uniform" in first
