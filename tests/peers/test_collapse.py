"""scripts/gpu_collapse.py without a GPU: kernels to stages, rows of stages, the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import gpu_collapse  # noqa: E402

GROUPED = ["get_group_gemm_starts<...>", "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>"]
PREPARE = ["compute_problem_sizes", "compute_expert_offsets", "compute_arg_sorts"]
SGLANG_V1 = [
    "elementwise bias.float()", "moe_fused_gate_kernel", "elementwise clamp", "FillFunctor<long>", *PREPARE, "shuffle_rows_kernel",
    "elementwise transpose", "shuffle_rows_kernel", GROUPED[0], "Memset (Device)", GROUPED[1], "CatArrayBatchedCopy",
    "act_and_mul_kernel", "reduce_kernel amax", *GROUPED, "apply_shuffle_mul_sum_kernel",
]  # fmt: skip


def stages(names):
    found = gpu_collapse.stages_of(names)
    assert len(found) == len(names)
    return found


def test_published_pipeline():
    assert stages(SGLANG_V1) == (
        ["routing"] * 3 + ["other"] + ["permute"] * 6 + ["GEMM1", "other", "GEMM1"] + ["activation"] * 3 + ["GEMM2"] * 2 + ["combine"]
    )


def test_pipelines_over_local_pairs():
    deepgemm = ["Memset (Device)", "route_kernel", "gather_kernel", "deep_gemm::sm90_fp8_gemm_1d2d_impl<4096>", "swiglu_quantise_kernel"]
    deepgemm += ["deep_gemm::sm90_fp8_gemm_1d2d_impl<7168>", "combine_kernel"]
    assert stages(deepgemm) == ["other", "routing", "permute", "GEMM1", "activation", "GEMM2", "combine"]
    triton = ["moe_fused_gate", "localise_kernel", "moe_align_block_size_kernel", "count_and_sort_expert_tokens_kernel"]
    triton += ["grouped_gemm_kernel", "swiglu_quantise_kernel", "grouped_gemm_kernel", "moe_sum_reduce_kernel"]
    assert stages(triton) == ["routing"] * 2 + ["permute"] * 2 + ["GEMM1", "activation", "GEMM2", "combine"]


def test_operator_whose_products_and_combines_take_turns():
    turns = ["down_wide_kernel", "combine_kernel"]
    names = ["choose_kernel", "place_kernel", "gate_up_wide_kernel", *turns, *turns]
    assert stages(names) == ["routing", "permute", "GEMM1", "GEMM2", "combine", "GEMM2", "combine"]
    assert stages(["route_kernel", "gate_up_kernel", "down_dense_kernel"]) == ["routing", "GEMM1", "GEMM2"]
    assert stages(["choose_kernel", "place_kernel", "prefill_kernel"]) == ["routing", "permute", "both GEMMs"]
    assert stages(["something", "else"]) == ["other", "other"]


def test_calls_are_what_stands_between_marks():
    kernels = [("flush", 0, 5), ("nextafter", 6, 7), ("b", 9, 12), ("a", 8, 9), ("nextafter", 13, 14), ("flush", 15, 16)]
    kernels += [("nextafter", 20, 21), ("c", 22, 23), ("nextafter", 30, 31)]
    assert [[name for name, _, _ in call] for call in gpu_collapse.calls_of(kernels)] == [["a", "b"], ["c"]]


def test_time_is_counted_once_where_kernels_overlap():
    call = [("route_kernel", 0, 4000), ("gate_up_kernel", 3000, 9000), ("down_kernel", 5000, 8000), ("combine_kernel", 11000, 12000)]
    times, gaps, span = gpu_collapse.spent(call)
    assert times["routing"] == 4 and times["GEMM1"] == 5 and times["GEMM2"] == 0 and times["combine"] == 1
    assert gaps == 2 and span == 12 and sum(times.values()) + gaps == span


def test_rows():
    counts = [3, 0, 130]
    published = gpu_collapse.rows_of("triton_fused_moe_v2", 100, counts)
    assert set(published.values()) == {(800, None)}
    assert gpu_collapse.rows_of("triton_fused_moe_v3", 100, counts)["combine"] == (133, None)
    local = gpu_collapse.rows_of("deepgemm_moe", 100, counts, tile=128)
    assert local["GEMM1"] == (133, 384) and local["combine"] == (133, None)
    triton = gpu_collapse.rows_of("sglang_triton_moe", 100, counts, tile=16)
    assert triton["GEMM2"] == (133, 160) and triton["activation"] == (800, None)


def test_work_counts_a_pair_as_the_geometry_does():
    from blockmoe.geometry import HEADLINE

    assert gpu_collapse.work_of("GEMM1", 7)[0] + gpu_collapse.work_of("GEMM2", 7)[0] == 7 * HEADLINE.pair_flops
    assert gpu_collapse.work_of("routing", 7) == (0.0, 0.0)


@pytest.mark.parametrize("needed", [40, 0])
def test_table(needed):
    call = {"kind": "call", "peer": "deepgemm_moe", "tokens": 1, "span_us": 90.0, "gaps_us": 1.5}
    stage = {"kind": "stage", "peer": "deepgemm_moe", "tokens": 1, "stage": "GEMM1", "us": 50.0, "rows": 80, "needed": needed}
    text = gpu_collapse.table([call, stage, {"kind": "failed", "label": "x", "error": "y"}])
    assert "'label': 'x'" in text and ("50.0 (2.00)" in text) == bool(needed)
