"""The streaming kernels compile for Hopper without a GPU: no spills, within shared memory, wgmmas of a K block unbroken."""

import os
import re
import subprocess
from dataclasses import replace

import pytest

pytest.importorskip("triton.experimental.gluon")

import aot  # noqa: E402

from blockmoe.geometry import HEADLINE  # noqa: E402
from blockmoe.operator import pipeline  # noqa: E402
from blockmoe.operator.plan import StreamTile, choose_plan, plans  # noqa: E402

SHARED_LIMIT = 232_448
CHOSEN = [tile for plan in plans(HEADLINE) if plan.path == "stream" for tile in (plan.gate_up, plan.down)]
# Candidates: as many stages as shared memory holds beside the epilogue's scratch. Bursts change the loads alone.
OTHERS = (StreamTile(128, 16, 6), StreamTile(64, 32, 10), StreamTile(64, 64, 8), StreamTile(128, 64, 5))
TILES = dict.fromkeys((*CHOSEN, *OTHERS))
CASES = [(which, tile, 128) for which in ("gate_up", "down") for tile in TILES]
CASES += [("down", tile, 64) for tile in TILES if tile.block_n <= 32]


@pytest.mark.parametrize(("which", "tile", "group"), CASES, ids=lambda value: str(value))
def test_hopper(which, tile, group, tmp_path):
    gate_up = tile if which == "gate_up" else replace(tile, rows=group, stages=2, burst=1)
    plan = replace(choose_plan(HEADLINE, 80), gate_up=gate_up, down=tile)
    (launch,) = pipeline.stages(HEADLINE, 80, plan, 0, 1.0)[which]
    usage = aot.compiled(launch, 90)
    assert usage.shared <= SHARED_LIMIT and usage.stack == 0
    ptx = tmp_path / "k.ptx"
    ptx.write_text(usage.ptx)
    ptxas = [os.environ.get("TRITON_PTXAS_PATH", aot.TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", ptx, "-o", tmp_path / "k.cubin"]
    assert not re.search(r"\(C75\d\d\)", subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr)
    assert not re.search(r"\b[HI]G?MMA", usage.sass)
    order = "".join(found[0] for found in re.findall(r"QGMMA|WARPGROUP\.DEPBAR", usage.sass))
    parts = 128 // group if which == "down" else 1
    assert order == ("Q" * (8 // parts) + "W") * parts
    (meta,) = usage.tensordesc
    assert meta["block_size"] == [tile.rows, 128] and meta["elem_size"] == 1
