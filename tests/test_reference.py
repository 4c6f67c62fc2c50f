"""Routing against a scan in Python, the reference against a sum over pairs in float64, the oracle against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockmoe.geometry import TINY, MoEGeometry
from blockmoe.reference import block_scaled_matmul, moe_oracle, moe_reference, quantise_rows, route

ONE_GROUP = MoEGeometry(24, 6, 4, 256, 128)
RENORMALIZE = MoEGeometry(24, 6, 4, 256, 128, "renormalize")
GEOMETRIES = pytest.mark.parametrize("geometry", [TINY, ONE_GROUP, RENORMALIZE], ids=["groups", "one_group", "renormalize"])


def layer_inputs(geometry, tokens, offset=0, seed=0):
    """Random inputs by name, scales of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def e4m3(*shape):
        return normal(*shape).clamp(-2, 2).to(torch.float8_e4m3fn)

    local, hidden, intermediate = geometry.num_local_experts, geometry.hidden_size, geometry.intermediate_size
    hidden_blocks, blocks = geometry.hidden_blocks, geometry.intermediate_blocks
    return {
        "routing_logits": normal(tokens, geometry.num_experts),
        "routing_bias": normal(geometry.num_experts).mul(0.1).bfloat16(),
        "hidden_states": e4m3(tokens, hidden),
        "hidden_states_scale": normal(hidden_blocks, tokens),
        "gemm1_weights": e4m3(local, 2 * intermediate, hidden),
        "gemm1_weights_scale": normal(local, 2 * blocks, hidden_blocks),
        "gemm2_weights": e4m3(local, hidden, intermediate),
        "gemm2_weights_scale": normal(local, hidden_blocks, blocks),
        "local_expert_offset": offset,
        "routed_scaling_factor": 2.5,
    }


def scan(logits, bias, geometry):
    """Chosen experts of one token, by sorting Python floats: (-score, index) puts ties at the lower index."""
    scores = logits if geometry.routing == "renormalize" else (torch.sigmoid(logits) + bias)
    scores = scores.tolist()
    size = geometry.experts_per_group
    groups = [torch.tensor(sorted(scores[g * size : (g + 1) * size])[-2:]).sum().item() for g in range(geometry.n_group)]
    kept = sorted(range(geometry.n_group), key=lambda g: (-groups[g], g))[: geometry.topk_group]
    experts = [expert for expert in range(len(scores)) if expert // size in kept]
    return sorted(experts, key=lambda expert: (-scores[expert], expert))[: geometry.top_k]


@GEOMETRIES
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.25, 1.0, 1e-3]))
def test_route_chooses_as_a_scan_does(geometry, seed, step):
    """Coarse steps make ties common."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, geometry.num_experts, generator=generator) / step).round() * step
    bias = (torch.randn(geometry.num_experts, generator=generator) * 4).round() / 32
    expert_ids, weights = route(logits, bias, geometry, 2.5)
    assert expert_ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert expert_ids.tolist() == [scan(row, bias, geometry) for row in logits]
    torch.testing.assert_close(weights.sum(1), torch.full((5,), 2.5))


def test_weights_are_sigmoids_without_bias_over_their_sum():
    logits, bias = torch.zeros(1, 32), torch.zeros(32)
    logits[0, [8, 9, 25, 26]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    bias[26] = -0.2  # changes the order, not the weight
    expert_ids, weights = route(logits, bias, TINY, 2.0)
    assert expert_ids.tolist() == [[25, 9, 26, 8]]
    scores = torch.sigmoid(torch.tensor([3.0, 2.0, 4.0, 1.0]))
    torch.testing.assert_close(weights[0], 2.0 * scores / scores.sum())


def test_renormalize_is_softmax_over_the_chosen():
    logits = torch.arange(24.0)[None]
    expert_ids, weights = route(logits, None, RENORMALIZE, 1.0)
    assert expert_ids.tolist() == [[23, 22, 21, 20]]
    torch.testing.assert_close(weights, torch.softmax(logits[:, [23, 22, 21, 20]], 1))


@GEOMETRIES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_nan_and_infinite_logits_give_finite_weights(geometry, value, share):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, geometry.num_experts, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < share] = value
    expert_ids, weights = route(logits, torch.zeros(geometry.num_experts), geometry, 1.0)
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    assert all(len(set(row)) == geometry.top_k for row in expert_ids.tolist())
    if torch.isnan(torch.tensor(value)) and share < 1.0:
        assert (weights[logits.gather(1, expert_ids).isnan()] == 0).all()


def test_deepseek_routing_needs_a_bias():
    with pytest.raises(ValueError, match="bias"):
        route(torch.zeros(1, 32), None, TINY, 1.0)


@GEOMETRIES
def test_reference_is_the_sum_over_pairs(geometry):
    inputs = layer_inputs(geometry, 7, offset=2)
    expert_ids, weights = route(inputs["routing_logits"], inputs["routing_bias"], geometry, 2.5)
    expected = torch.zeros(7, geometry.hidden_size, dtype=torch.float64)
    pairs = 0
    for token in range(7):
        for expert, weight in zip((expert_ids[token] - 2).tolist(), weights[token].double(), strict=True):
            if 0 <= expert < geometry.num_local_experts:
                expected[token] += weight * one_pair(inputs, token, expert)
                pairs += 1
    assert pairs > 3
    output = moe_reference(**inputs, geometry=geometry)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def one_pair(inputs, token, expert):
    """O of one (token, expert), float64 [H]."""

    def expand(scale, *sizes):
        for dim, size in enumerate(sizes):
            scale = scale.repeat_interleave(size, dim)
        return scale.double()

    row = inputs["hidden_states"][token].double() * expand(inputs["hidden_states_scale"][:, token], 128)
    w1 = inputs["gemm1_weights"][expert].double() * expand(inputs["gemm1_weights_scale"][expert], 128, 128)
    w2 = inputs["gemm2_weights"][expert].double() * expand(inputs["gemm2_weights_scale"][expert], 128, 128)
    up, gate = (w1 @ row).chunk(2)
    return w2 @ (gate / (1 + torch.exp(-gate)) * up)


@GEOMETRIES
def test_oracle_differs_from_the_reference_by_its_rounding_alone(geometry):
    inputs = layer_inputs(geometry, 40)
    reference = moe_reference(**inputs, geometry=geometry)
    errors = {}
    for intermediate in ("e4m3", "bf16"):
        output = moe_oracle(**inputs, geometry=geometry, intermediate=intermediate)
        assert output.dtype == torch.bfloat16
        assert ((output == 0).all(1) == (reference == 0).all(1)).all()
        errors[intermediate] = ((output.float() - reference).norm() / reference.norm()).item()
    assert 0.015 < errors["e4m3"] < 0.03  # one rounding to 3 mantissa bits
    assert errors["bf16"] < 0.005


@pytest.mark.parametrize("layer", [moe_reference, moe_oracle])
def test_empty_and_lopsided_batches(layer):
    empty = layer(**layer_inputs(TINY, 0), geometry=TINY)
    assert empty.shape == (0, TINY.hidden_size)

    inputs = layer_inputs(TINY, 9, offset=8)
    inputs["routing_bias"].zero_()
    inputs["routing_logits"][:, 8:16] = -9.0
    assert (layer(**inputs, geometry=TINY) == 0).all()

    inputs["routing_logits"][:, 9] = 9.0
    inputs["routing_logits"][:, 15] = 8.0  # the group's second, so that it is kept; it is chosen too
    assert (layer(**inputs, geometry=TINY) != 0).any(1).all()


def test_unknown_intermediate_is_refused():
    with pytest.raises(ValueError, match="intermediate"):
        moe_oracle(**layer_inputs(TINY, 1), geometry=TINY, intermediate="fp16")


def test_quantised_rows_keep_zeros_small_values_and_signs():
    c = torch.zeros(2, 256)
    c[0, :128] = torch.linspace(-3, 3, 128)
    c[1, 2] = 1e-20  # a group of small values keeps them
    c[1, 130] = 1e-42  # far below the floor: becomes zero, not NaN
    values, scale = quantise_rows(c)
    restored = values.float() * scale.repeat_interleave(128, 1)
    assert scale.shape == (2, 2) and (scale > 0).all()
    assert (restored[1, 128:] == 0).all() and (restored[0, 128:] == 0).all()
    assert restored[1, 2] == pytest.approx(1e-20, rel=0.07)
    assert ((restored[0, :128] - c[0, :128]).abs() <= c[0, :128].abs() / 16 + 3 / 448 / 1024).all()
    assert values[0, 127].float() == 448.0 and values[0, 0].float() == -448.0


def test_block_scaled_matmul_scales_each_block_apart():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(3, 256, generator=generator), torch.randn(128, 256, generator=generator).to(torch.float8_e4m3fn)
    a_scale, b_scale = torch.randn(3, 2, generator=generator), torch.randn(1, 2, generator=generator)
    expected = (a * a_scale.repeat_interleave(128, 1)) @ (b.float() * b_scale.repeat_interleave(128, 1)).t()
    torch.testing.assert_close(block_scaled_matmul(a, a_scale, b, b_scale), expected, rtol=1e-4, atol=1e-3)
