"""The streaming kernels compile for Hopper without a GPU: no spills, within shared memory, wgmmas of a K block unbroken."""

import os
import re
import subprocess

import pytest

pytest.importorskip("triton.experimental.gluon")

import aot  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from blockmoe.operator import stream  # noqa: E402

SHARED_LIMIT = 232_448
TYPES = {
    "x": "*fp8e4nv", "middle": "*fp8e4nv", "rows": "*bf16", "pair_token": "*i32", "tile_count": "*i32", "tile_expert": "*i32",
    "tile_begin": "*i32", "tile_end": "*i32", "tokens": "i32", "first_block": "i32", "blocks": "i32",
}  # fmt: skip
TYPES |= dict.fromkeys(("x_scale", "w_scale", "middle_scale", "pair_weight"), "*fp32")
CASES = [("gate_up", tile, 128) for tile in stream.CANDIDATES] + [("down", tile, 128) for tile in stream.CANDIDATES]
CASES += [("down", tile, 64) for tile in stream.CANDIDATES if tile.block_n <= 32]


def compiled(kernel, tile, group):
    weights = f"tensordesc<fp8e4nv[{tile.rows},128],{stream.WEIGHT_LAYOUT!r}>"
    names = kernel.arg_names
    signature = {n: weights if n == "w" else TYPES.get(n, "constexpr") for n in names}
    shape = (7168, 2048) if kernel is stream.gate_up_stream_kernel else (7168, 2048, group)
    constants = dict(zip([n for n in names if signature[n] == "constexpr"], (*shape, *tile.constants, True), strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    options = dict(num_warps=tile.num_warps, launch_pdl=True)
    return triton.compile(GluonASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(("which", "tile", "group"), CASES, ids=lambda value: str(value))
def test_hopper(which, tile, group, tmp_path):
    built = compiled(getattr(stream, f"{which}_stream_kernel"), tile, group)
    assert built.metadata.shared <= SHARED_LIMIT
    ptx, cubin = tmp_path / "k.ptx", tmp_path / "k.cubin"
    ptx.write_text(built.asm["ptx"])
    ptxas = [os.environ.get("TRITON_PTXAS_PATH", aot.TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
    log = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    assert not re.search(r"\(C75\d\d\)", log)
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run([aot.TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage, usage
    sass = subprocess.run([aot.TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b[HI]G?MMA", sass)
    order = "".join(found[0] for found in re.findall(r"QGMMA|WARPGROUP\.DEPBAR", sass))
    parts = 128 // group if which == "down" else 1
    assert order == ("Q" * (8 // parts) + "W") * parts
