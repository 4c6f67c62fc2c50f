"""Whole peers on a small layer: their Triton kernels in the interpreter, their libraries' operators in PyTorch."""

import importlib.util
import inspect
import sys

import pytest
import torch

from blockmoe.bench.dataset import bundled_solutions
from blockmoe.geometry import MoEGeometry
from blockmoe.reference import moe_reference, route

SMALL = MoEGeometry(256, 32, 8, 1024, 512, "deepseek_v3", 8, 4)
EIGHT_ROWS = ("sglang_fp8_blockwise_moe_v1", "sglang_fp8_blockwise_moe_v2", "triton_fused_moe_v1", "triton_fused_moe_v2")
CASES = [(name, {}) for name in (*EIGHT_ROWS, "triton_fused_moe_v3", "sglang_triton_moe")]
CASES += [("deepgemm_moe", {"masked": True}), ("deepgemm_moe", {"masked": False})]
TOKENS = 6
OFFSET = 64


def load(name):
    folder = bundled_solutions() / name
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    for helper in ("swiglu_quantise", "steps_v3"):
        if helper in sys.modules and hasattr(sys.modules[helper], "BLOCKS"):
            sys.modules[helper].BLOCKS = 4  # a whole row of 16 blocks is 2,048 columns
    return module


@pytest.fixture(scope="module")
def layer():
    """Inputs in the definition's order, scales of either sign; the last token has no pair here."""
    torch.manual_seed(0)
    g = SMALL

    def codes(*shape):
        return torch.randn(shape).clamp_(-2, 2).to(torch.float8_e4m3fn)

    logits = torch.randn(TOKENS, g.num_experts)
    logits[: TOKENS - 1, OFFSET : OFFSET + g.num_local_experts] += 1.5
    logits[-1, OFFSET : OFFSET + g.num_local_experts] = -50.0
    experts, h, i = g.num_local_experts, g.hidden_size, g.intermediate_size
    return (
        logits, (0.01 * torch.randn(g.num_experts)).bfloat16(), codes(TOKENS, h), torch.randn(h // 128, TOKENS),
        codes(experts, 2 * i, h), torch.randn(experts, 2 * i // 128, h // 128),
        codes(experts, h, i), torch.randn(experts, h // 128, i // 128), OFFSET, 2.5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(layer):
    result = moe_reference(*layer, geometry=SMALL)
    assert (result[-1] == 0).all() and result[:-1].any(1).all()
    return result


def call(module, layer, **override):
    tokens = len(layer[0])
    if "output" not in inspect.signature(module.run).parameters:
        return module.run(*layer)
    output = torch.full((tokens, SMALL.hidden_size), float("nan"), dtype=torch.bfloat16)
    assert module.run(*layer, output, **override) is None
    return output


def prefix(layer, tokens):
    return (layer[0][:tokens], layer[1], layer[2][:tokens], layer[3][:, :tokens].contiguous(), *layer[4:])


@pytest.mark.parametrize(("name", "override"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_against_the_reference(name, override, layer, reference):
    module = load(name)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in layer]
    for tokens in (TOKENS, 1):  # smaller after larger: views of kept buffers
        output = call(module, prefix(layer, tokens), **override)
        wanted = reference[:tokens]
        assert output.dtype == torch.bfloat16 and output.shape == wanted.shape
        assert ((output.float() - wanted).norm() / wanted.norm()).item() < 0.035
        assert not output[(wanted == 0).all(1)].any()
    for value, copy in zip(layer, before, strict=True):
        assert value is copy or not isinstance(value, torch.Tensor) or torch.equal(value.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.parametrize(("name", "override"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_no_tokens(name, override, layer):
    assert call(load(name), prefix(layer, 0), **override).shape == (0, SMALL.hidden_size)


@pytest.mark.parametrize("sizes", [(64, 128, 8, 4, 4), (128, 128, 2, 8, 4)], ids=str)
def test_tiles_of_the_grouped_product(sizes, layer, reference):
    module = load("sglang_triton_moe")
    output = call(module, layer, tile=module.Tile(*sizes))
    assert ((output.float() - reference).norm() / reference.norm()).item() < 0.035


@pytest.mark.parametrize("kind", ["random", "ties", "not finite"])
def test_deepgemm_routing(kind):
    steps = load("deepgemm_moe") and sys.modules["deepgemm_steps"]
    torch.manual_seed(1)
    tokens, local, top_k = 40, 32, 8
    logits, bias = torch.randn(tokens, 256), (0.1 * torch.randn(256)).bfloat16()
    if kind == "ties":
        logits = torch.randint(0, 3, (tokens, 256)).float()
        bias.zero_()
    if kind == "not finite":
        logits[0, ::2], logits[1, ::3], logits[2, 5], logits[3] = float("nan"), float("-inf"), float("inf"), float("nan")

    class Places:
        experts = torch.full((tokens, top_k), -7, dtype=torch.int32)
        positions = torch.full((tokens, top_k), -7, dtype=torch.int32)
        weights = torch.full((tokens, top_k), float("nan"))
        counts = torch.full((local,), 99, dtype=torch.int32)

    steps.route(logits, bias, OFFSET, 2.5, Places, 8, 4)
    ids, weights = route(logits, bias, SMALL, 2.5)
    here = (ids >= OFFSET) & (ids < OFFSET + local)
    assert torch.equal(Places.experts.long(), torch.where(here, ids - OFFSET, -1))
    torch.testing.assert_close(Places.weights, weights, rtol=1e-5, atol=1e-7)
    chosen = Places.experts[here]
    assert torch.equal(Places.counts.long(), torch.bincount(chosen.long(), minlength=local))
    for expert in range(local):
        assert Places.positions[here][chosen == expert].sort().values.tolist() == list(range(int(Places.counts[expert])))
