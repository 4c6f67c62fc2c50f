"""The peers' solutions: manifests, where they are skipped and why, whole layers in the interpreter, compiled for Hopper."""

import ast
import importlib.util
from pathlib import Path

import pytest

from blockmoe.bench import environment
from blockmoe.bench.dataset import bundled_solutions
from blockmoe.bench.environment import Hardware
from blockmoe.bench.pack import pack, read_manifest
from blockmoe.geometry import HEADLINE

PUBLISHED = ("sglang_fp8_blockwise_moe_v1", "sglang_fp8_blockwise_moe_v2", "triton_fused_moe_v1", "triton_fused_moe_v2")
LIBRARY = {
    **dict.fromkeys((*PUBLISHED, "triton_fused_moe_v3", "sglang_triton_moe"), "sgl_kernel"),
    "deepgemm_moe": "deep_gemm",
    "flashinfer_moe": "flashinfer",
    "flashinfer_cutlass_moe": "flashinfer",
}
CPU = Hardware("cpu", "some CPU")
HOPPER = Hardware("cuda", "NVIDIA H100 80GB HBM3", 90)
BLACKWELL = Hardware("cuda", "NVIDIA B200", 100)


@pytest.fixture(params=LIBRARY)
def name(request):
    return request.param


@pytest.fixture
def solution(name):
    return pack(bundled_solutions() / name, HEADLINE.definition_name)


def with_packages(monkeypatch, missing=()):
    monkeypatch.setattr(environment, "_installed", lambda package: package not in missing)


def test_stands_alone(name, solution):
    files = {source.path.removesuffix(".py") for source in solution.sources}
    allowed = {"torch", "triton", "dataclasses", *(package.split(".")[0] for package in solution.spec.dependencies)} | files
    for source in solution.sources:
        for node in ast.walk(ast.parse(source.content)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {found.split(".")[0] for found in names} <= allowed
    assert LIBRARY[name] in solution.spec.dependencies
    assert solution.name == name


def test_run_takes_what_the_manifest_says(solution):
    main = next(source.content for source in solution.sources if source.path == "main.py")
    run = next(node for node in ast.parse(main).body if isinstance(node, ast.FunctionDef) and node.name == "run")
    required = len(run.args.args) - len(run.args.defaults)
    assert required == 10 + solution.spec.destination_passing_style


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_ones_say_that_they_compute_all_rows(published):
    assert "All 8 rows of every token are computed" in read_manifest(bundled_solutions() / published).description


def test_skipped_without_a_gpu(monkeypatch, solution):
    with_packages(monkeypatch)
    reason = CPU.lacks(solution)
    assert reason.startswith("runs on ") and reason.endswith("this is some CPU")


def test_skipped_without_the_library(monkeypatch, name, solution):
    with_packages(monkeypatch, missing=[LIBRARY[name]])
    machine = BLACKWELL if name == "flashinfer_moe" else HOPPER
    assert machine.lacks(solution) == f"needs the package {LIBRARY[name]}, which is not installed"


def test_on_hopper(monkeypatch, name, solution):
    with_packages(monkeypatch)
    if name == "flashinfer_moe":
        assert HOPPER.lacks(solution) == "runs on sm_100, sm_103, B200, GB200, B300; this is NVIDIA H100 80GB HBM3"
        assert BLACKWELL.lacks(solution) is None
    else:
        assert HOPPER.lacks(solution) is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "interpreted").glob("test_*.py")), ids=lambda file: file.stem)
def test_interpreted(file, interpreted):
    interpreted(file)


TILES = {"small": (16, 64, 1, 4), "medium": (64, 128, 8, 4), "large": (128, 128, 16, 8)}


@pytest.mark.parametrize("tile", TILES)
def test_grouped_product_compiles_for_hopper(tile):
    """To wgmma, without spills, within an H100's shared memory."""
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location("grouped_gemm", bundled_solutions() / "sglang_triton_moe" / "grouped_gemm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = module.grouped_gemm_kernel
    block_m, block_n, group_m, warps = TILES[tile]
    constants = dict(
        N=4096, K=7168, PAIRS_PER_ROW=8, WEIGHTED=True, ZERO_OTHERS=True, BLOCK=128, BLOCK_M=block_m, BLOCK_N=block_n,
        GROUP_M=group_m, SWAP=block_m < 64,
    )  # fmt: skip
    types = dict(x="*fp8e4nv", w="*fp8e4nv", out="*bf16", sorted_pairs="*i32", tile_expert="*i32", padded_total="*i32")
    types |= dict(x_scale="*fp32", w_scale="*fp32", weights="*fp32", tokens_stride="i32", block_stride="i32", pairs="i32")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=4))
    assert "wgmma.mma_async" in built.asm["ptx"] and "mma.sync" not in built.asm["ptx"]
    assert built.metadata.shared <= 232_448
