"""The call: what it refuses and how it says so, the path without a GPU, torch.compile, the adapter, imports."""

import subprocess
import sys

import layer
import pytest
import torch
from layer import RENORMALIZE, TINY, call, make, relative

import blockmoe
from blockmoe.operator import api
from blockmoe.reference import moe_reference

NAMES = (
    "routing_logits", "routing_bias", "hidden_states", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale",
    "gemm2_weights", "gemm2_weights_scale",
)  # fmt: skip


@pytest.mark.parametrize("g", [TINY, RENORMALIZE], ids=["deepseek_v3", "renormalize"])
def test_without_a_gpu(g):
    inputs = make(g, 9)
    out = call(inputs, g)
    assert out.dtype == torch.bfloat16
    assert relative(out, moe_reference(*inputs, 0, 2.5, geometry=g)) < 3e-3


def test_no_tokens():
    assert call(make(TINY, 0), TINY).shape == (0, TINY.hidden_size)


@pytest.mark.parametrize("i", range(8), ids=NAMES)
def test_refuses_a_wrong_dtype_shape_stride_or_type(i):
    inputs = make(TINY, 6)
    good = inputs[i]
    inputs[i] = good.double() if good.dtype != torch.float8_e4m3fn else good.float()
    with pytest.raises(TypeError, match=rf"^{NAMES[i]}: expected .*, got torch"):
        call(inputs, TINY)
    inputs[i] = "text"
    with pytest.raises(TypeError, match=rf"^{NAMES[i]}: expected a tensor, got str"):
        call(inputs, TINY)
    inputs[i] = torch.zeros((*good.shape[:-1], good.shape[-1] + 1)).to(good.dtype)
    with pytest.raises(ValueError, match=r"^\w+: expected .*, got "):
        call(inputs, TINY)
    inputs[i] = torch.zeros((*good.shape, 2)).to(good.dtype)[..., 0]
    with pytest.raises(ValueError, match=rf"^{NAMES[i]}: expected contiguous strides, got"):
        call(inputs, TINY)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"local_expert_offset": 25}, ValueError, "local_expert_offset"),
        ({"local_expert_offset": -1}, ValueError, "local_expert_offset"),
        ({"local_expert_offset": 1.5}, TypeError, "local_expert_offset"),
        ({"routed_scaling_factor": "2"}, TypeError, "routed_scaling_factor"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"n_group": 5}, ValueError, "n_group"),
        ({"routing": "softmax"}, ValueError, "routing"),
        ({"out": torch.empty(6, 255, dtype=torch.bfloat16)}, ValueError, "out"),
        ({"out": torch.empty(6, 256)}, TypeError, "out"),
        ({"plan": "stream"}, TypeError, "plan"),
    ],
)
def test_refuses_wrong_values(change, error, name):
    values = dict(local_expert_offset=0, routed_scaling_factor=2.5, routing="deepseek_v3", top_k=4, n_group=4, topk_group=2)
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        blockmoe.fused_moe(*make(TINY, 6), **(values | change))


def test_under_torch_compile():
    inputs = make(TINY, 5)
    compiled = torch.compile(lambda *tensors: call(tensors, TINY) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), call(inputs, TINY) * 2)


def test_as_a_custom_operator():
    import blockmoe.operator.api  # noqa: F401  (registers it)

    inputs = make(TINY, 5)
    arguments = (*inputs, 0, 2.5, "deepseek_v3", 4, 4, 2)
    torch.library.opcheck(torch.ops.blockmoe.fused_moe.default, arguments, test_utils="test_faketensor")
    out = torch.empty(5, TINY.hidden_size, dtype=torch.bfloat16)
    torch.ops.blockmoe.fused_moe_out(*arguments, out)
    assert torch.equal(out, torch.ops.blockmoe.fused_moe(*arguments))


def test_under_flashinfers_names():
    inputs = make(TINY, 5)
    sizes = dict(
        num_experts=32, top_k=4, n_group=4, topk_group=2, intermediate_size=128, local_expert_offset=8,
        local_num_experts=8, routed_scaling_factor=2.5,
    )  # fmt: skip
    out = blockmoe.trtllm_fp8_block_scale_moe(*inputs, **sizes, routing_method_type=2)
    assert torch.equal(out, layer.call(inputs, TINY, 8))
    with pytest.raises(ValueError, match="^routing_method_type: expected"):
        blockmoe.trtllm_fp8_block_scale_moe(*inputs, **sizes)
    into = torch.empty_like(out)
    sizes |= {"routing_method_type": 2}
    assert blockmoe.trtllm_fp8_block_scale_moe(*inputs, **sizes, output=into, tune_max_num_tokens=8192) is into and torch.equal(into, out)
    for odd in ({"weight_layout": 2}, {"do_finalize": False}, {"use_shuffled_weight": True}, {"num_experts": 16}):
        with pytest.raises(ValueError, match=f"^{next(iter(odd))}: expected"):
            blockmoe.trtllm_fp8_block_scale_moe(*inputs, **sizes | odd)
    with pytest.raises(TypeError, match="norm_topk_prob"):
        blockmoe.trtllm_fp8_block_scale_moe(*inputs, **sizes, norm_topk_prob=True)
    with pytest.raises(ValueError, match="^routing_logits: expected 2 dimensions"):
        blockmoe.trtllm_fp8_block_scale_moe(inputs[0][0], *inputs[1:], **sizes)


def test_numbers_of_another_type_are_refused_before_and_after_a_call_of_their_values():
    inputs = make(TINY, 6)
    factor = 1.0  # of this test alone: calls are kept
    options = dict(local_expert_offset=1, routed_scaling_factor=factor, top_k=4, n_group=4, topk_group=2)
    for _ in range(2):
        for odd in ({"top_k": 4.0}, {"top_k": True}, {"topk_group": 2.0}, {"local_expert_offset": 1.0}, {"local_expert_offset": True}):
            with pytest.raises(TypeError, match="expected an integer, got"):
                blockmoe.fused_moe(*inputs, **options | odd)
        with pytest.raises(TypeError, match="^routed_scaling_factor: expected a number, got bool"):
            blockmoe.fused_moe(*inputs, **options | dict(routed_scaling_factor=True))
        out = blockmoe.fused_moe(*inputs, **options)
        assert out.any() and torch.equal(out, layer.call(inputs, TINY, 1, factor))
    with pytest.raises(TypeError, match="^out: expected a tensor, got list"):
        blockmoe.fused_moe(*inputs, **options, out=[1])


def test_what_runs_without_a_gpu_is_explained(monkeypatch, capsys):
    monkeypatch.setenv("BLOCKMOE_EXPLAIN", "1")
    monkeypatch.setattr(api, "_calls", {})
    call(make(TINY, 3), TINY)
    assert capsys.readouterr().out == f"blockmoe: {TINY.definition_name} T=3: on a CPU, the float32 reference\n"


def test_nothing_is_recorded_for_gradients():
    inputs = make(TINY, 6)
    inputs[3].requires_grad_()
    assert not layer.call(inputs, TINY, 8).requires_grad


def test_autocast_changes_nothing():
    """Of the reference, which is the path without a GPU, as of kernels."""
    inputs = make(TINY, 9)
    expected = call(inputs, TINY)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(inputs, TINY), expected)


def test_who_saved_the_output_is_told_that_it_changed(monkeypatch):
    counted = []
    monkeypatch.setattr(torch.autograd.graph, "increment_version", counted.append)
    out = torch.zeros(9, TINY.hidden_size, dtype=torch.bfloat16)
    call(make(TINY, 9), TINY, out=out)
    call(make(TINY, 9), TINY)
    assert len(counted) == 1 and counted[0] is out
    with torch.inference_mode():
        call(make(TINY, 9), TINY, out=torch.zeros_like(out))  # whose tensors have no version
    assert len(counted) == 1


def test_other_devices_are_named():
    with pytest.raises(ValueError, match="^hidden_states: expected a tensor of a CPU or a CUDA device, got one on meta$"):
        call([None if t is None else t.to("meta") for t in make(TINY, 9)], TINY)


@pytest.mark.parametrize("off", ["0", "false", "no", ""])
def test_the_interpreter_is_on_where_triton_says_so(monkeypatch, off):
    monkeypatch.setenv("TRITON_INTERPRET", off)
    monkeypatch.setattr(api, "_calls", {})
    assert call(make(TINY, 7), TINY).isfinite().all()


def test_importing_the_package_imports_neither_torch_nor_triton():
    code = "import sys, blockmoe; assert not {'torch', 'triton'} & set(sys.modules); assert 'fused_moe' in dir(blockmoe)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_documentation_names_is_there_once_the_package_is_imported():
    code = "import blockmoe; assert callable(blockmoe.operator.warmup) and callable(blockmoe.reference.moe_oracle)"
    subprocess.run([sys.executable, "-c", code], check=True)
