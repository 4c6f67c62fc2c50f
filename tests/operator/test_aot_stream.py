"""The persistent kernels compile for Hopper without a GPU: within shared memory, no warnings of wgmma, wgmmas of a K block unbroken."""

import os
import re
import subprocess
from dataclasses import replace

import pytest

pytest.importorskip("triton.experimental.gluon")

import aot  # noqa: E402
from layer import SHARED_LIMIT  # noqa: E402

from blockmoe.geometry import HEADLINE  # noqa: E402
from blockmoe.operator import pipeline  # noqa: E402
from blockmoe.operator.ahead import loops  # noqa: E402
from blockmoe.operator.machine import H100, H200  # noqa: E402
from blockmoe.operator.plan import PrefillTile, StreamTile, choose_plan, plans  # noqa: E402

CHOSEN = [plan.gate_up for machine in (H100, H200) for plan in plans(HEADLINE, machine) if plan.path == "stream"]
# candidates of scripts/gpu_operator.py
TILES = dict.fromkeys((*CHOSEN, StreamTile(64, 16, 10, dense=True), StreamTile(128, 16, 6)))


def warnings(ptx: str, folder) -> str:
    """What ptxas says of wgmma that it could not leave asynchronous."""
    path = folder / "k.ptx"
    path.write_text(ptx)
    ptxas = [os.environ.get("TRITON_PTXAS_PATH", aot.TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", path, "-o", folder / "k.cubin"]
    said = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    return "\n".join(re.findall(r".*\(C75\d\d\).*", said))


def products(sass: str) -> list[str]:
    """How many wgmmas each group that is waited for has."""
    order = "".join(found[0] for found in re.findall(r"QGMMA|WARPGROUP\.DEPBAR", sass))
    return re.findall(r"Q+(?=W)", order)


def turns(sass: str) -> list[str]:
    """What consumers do from taking a turn (T) to their product's end: its instructions (Q), giving one (G), waiting for each other (S)
    and for a stage (P)."""
    names = {"QGMMA": "Q", "BAR.ARV": "G", "BAR.SYNC": "S", "WARPGROUP.DEPBAR": "D", "SYNCS.PHASECHK": "P"}
    order = ""
    for found in re.finditer(r"(BAR\.SYNC)\S* (?:0xe|0xf), 0x100|(QGMMA|BAR\.ARV|BAR\.SYNC|WARPGROUP\.DEPBAR|SYNCS\.PHASECHK)", sass):
        order += "T" if found[1] else names[found[2]]
    return re.findall(r"T[^TGD]*Q[^TGD]*G[^TGD]*", order)


ACCESS = r"\b(ld|st|red|atom)\.(shared|global|relaxed|acquire|release)|\b(ld|st)matrix|cp\.async\.c|wgmma|^\$L__BB"


def uncovered(ptx: str) -> list[str]:
    """Arrivals at an mbarrier by one thread which what its role's other threads did may follow: no barrier since. The emulator takes an
    arrival to cover the role. Raises AssertionError where there is none to look at."""
    found, seen, covered = [], 0, False
    for line in ptx.split("\n"):
        if re.search(r"\bbar(rier)?(\.warp)?\.sync\b", line) and "@p bar" not in line:  # nor where only some turn is taken
            covered = True
        elif re.search(r"@%p\d+ mbarrier\.arrive(\.release\.cta)?\.shared", line):
            seen += 1
            found += [] if covered else [line]
        elif re.search(ACCESS, line):
            covered = False
    assert seen
    return found


def barriers_of_nobody(ttgir: str) -> set[str]:
    """Mbarriers that no role has: the compiler would give their memory to a buffer, too, where they aren't memory like any other."""
    made = set(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\d+x1xi64", ttgir))
    assert len(made) > 5
    return made - {name for roles in re.findall(r"ttg\.warp_specialize\((.*?)\)", ttgir) for name in roles.split(", ")}


@pytest.mark.parametrize("tile", [  # an H200's, and slow the others
    pytest.param(tile, id=str(tile), marks=[] if tile.promotion == 128 else pytest.mark.slow) for tile in TILES
])  # fmt: skip
def test_stream(tile, tmp_path):
    plan = replace(choose_plan(HEADLINE, 8 if tile.dense else 80), gate_up=tile)
    (launch,) = pipeline.stages(HEADLINE, 8, plan, 0, 1.0)["layer"]
    usage = aot.compiled(launch, 90)
    assert usage.shared <= SHARED_LIMIT and usage.stack <= 8
    assert not barriers_of_nobody(usage.ttgir)
    assert not uncovered(usage.ptx) and len(uncovered(re.sub(r"bar\.(warp\.)?sync", "nothing", usage.ptx))) > 4
    assert not warnings(usage.ptx, tmp_path) and not re.search(r"\b[HI]G?MMA", usage.sass)
    # GEMM1: two accumulators by four steps of 32; GEMM2 likewise, or all four products of a dense stage
    # twice: of two consumers, or for tiles of few pairs and of more
    assert products(usage.sass) == ["Q" * 8] * len(tile.ways) * (4 if tile.dense or tile.block_n > 16 else 2)
    assert all(meta["block_size"] == [tile.rows, 128] and meta["elem_size"] == 1 for meta in usage.tensordesc)
    assert len(usage.tensordesc) == 2
    # what a kernel has the L2 keep outlasts it: it lets that go again; where all is summed in the accumulator nothing is kept
    kept = 0 if tile.dense else HEADLINE.top_k + HEADLINE.top_k // 2 + 1  # a line of each of a token's rows, of few; the intermediate
    found = usage.ptx.count("applypriority.global.L2::evict_normal")
    assert ("evict_last" in usage.ptx) == (not tile.dense) and found == kept * len(tile.ways)


def test_either(tmp_path):
    """Both ways in the shared memory of the larger, and each with its products unbroken."""
    (launch,) = pipeline.stages(HEADLINE, 8, choose_plan(HEADLINE, 901, H200), 0, 1.0)["layer"]
    usage = aot.compiled(launch, 90)
    # registers that prefill's consumers spill, and three of what adds its rows; of stream's, a few more cost 2 to 7 us of a call (kernel
    # log, section 26)
    assert len(re.findall(r"\bSTL\b", usage.sass)) <= 15
    assert usage.shared <= SHARED_LIMIT and usage.stack <= 64
    assert not barriers_of_nobody(usage.ttgir)
    assert not uncovered(usage.ptx) and not warnings(usage.ptx, tmp_path) and not re.search(r"\b[HI]G?MMA", usage.sass)
    found = products(usage.sass)
    assert sorted(found) == ["Q" * 4] * 8 + ["Q" * 8] * 4, found
    assert usage.ptx.count("multicast::cluster") == 4 and usage.ptx.count("mapa.shared::cluster") == 8  # prefill's, as in `test_prefill`
    assert len(loops(usage.ptx.splitlines())) == 4  # of it too: stream's own stay


@pytest.mark.parametrize(("cluster", "many", "apart", "hidden", "spills"), [
    pytest.param(1, 0, 0, 7168, 13, marks=pytest.mark.slow), (1, 72, 56, 7168, 25), (2, 72, 56, 7168, 26),
    (1, 72, 56, 1792, 28),  # K blocks that are no whole rounds of stages: `gather` has the code of one
])  # fmt: skip
def test_prefill(cluster, many, apart, hidden, spills, tmp_path):
    geometry = replace(HEADLINE, hidden_size=hidden)
    plan = replace(choose_plan(geometry, 4096), gate_up=PrefillTile(4, cluster, 3, many, apart))
    (launch,) = pipeline.stages(geometry, 4096, plan, 0, 1.0)["layer"]
    usage = aot.compiled(launch, 90)
    assert len(re.findall(r"\bSTL\b", usage.sass)) <= spills  # one more than there are
    assert usage.shared <= SHARED_LIMIT and not warnings(usage.ptx, tmp_path) and not uncovered(usage.ptx)
    assert not barriers_of_nobody(usage.ttgir)
    assert set(products(usage.sass)) == {"Q" * 4} and len(products(usage.sass)) == 8  # two halves, two GEMMs, two consumers
    found = turns(usage.sass)  # the next stage beside the second product; warps for each other without clusters, whose PTX is Triton's
    assert [turn.replace("S", "") for turn in found] == ["TQQQQG", "TQQQQGP"] * 4
    assert {turn.count("S") for turn in found} == ({1} if cluster == 1 else {0})
    assert usage.ptx.count("cp.async.bulk.tensor.2d.global") == 2 + 7  # two consumers' codes; a row of zeros in pages of 1,024, or of 256
    assert len(loops(usage.ptx.splitlines())) == 4  # which `ahead` looks at
    assert usage.ptx.count("multicast::cluster") == (4 if cluster == 2 else 0)  # weights of both GEMMs, GEMM2's pairs
    assert usage.ptx.count("mapa.shared::cluster") == (8 if cluster == 2 else 0)  # a stage freed: two halves, two GEMMs, two consumers
