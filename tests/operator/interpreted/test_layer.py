"""The whole layer through every path, against the float32 reference and an oracle with the same rounding."""

from dataclasses import replace

import layer
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer import PLANS, RENORMALIZE, TINY, UNGROUPED

from blockmoe.geometry import MoEGeometry
from blockmoe.operator import api, workspace
from blockmoe.operator.workspace import layout
from blockmoe.reference import moe_reference


def check(inputs, g, offset, plan, factor=2.5, **memory) -> torch.Tensor:
    tokens = len(inputs[0])
    out = torch.full((tokens, g.hidden_size), float("nan"), dtype=torch.bfloat16)
    poisoned = torch.full((layout(g, tokens, plan)[1],), 255, dtype=torch.uint8) if not memory else memory["workspace"]
    assert layer.call(inputs, g, offset, factor, plan, out=out, workspace=poisoned) is out
    reference = moe_reference(*inputs, offset, factor, geometry=g)
    assert layer.relative(out, reference) < 0.03
    assert layer.relative(out, layer.oracle(inputs, g, offset, factor, plan)) < 2e-3
    assert not out[(reference == 0).all(1)].any()
    return out


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("g", [TINY, UNGROUPED, RENORMALIZE], ids=["grouped", "ungrouped", "renormalize"])
def test_layer(g, name):
    tokens = {"dense 32": 13, "dense 128 split": 40}.get(name, 70)
    offset = g.num_experts - g.num_local_experts
    out = check(layer.make(g, tokens), g, offset, PLANS[name])
    assert out.any()


@pytest.mark.parametrize("name", PLANS)
def test_no_local_pair_gives_zeros(name):
    inputs = layer.make(TINY, 9)
    inputs[0][:, 8:16] = -50.0  # the second group's scores are all but zero
    assert not check(inputs, TINY, 8, PLANS[name]).any()


@pytest.mark.parametrize("name", PLANS)
def test_all_tokens_on_one_expert(name):
    tokens = 16 if name == "dense 32" else 60
    inputs = layer.make(TINY, tokens)
    inputs[0][:, 8:16] = -50.0
    inputs[0][:, [9, 10]] = 20.0
    inputs[1].zero_()
    check(inputs, TINY, 8, PLANS[name])


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["zero", "tiny", "negative", "huge"])
def test_scales(name, kind):
    inputs = layer.make(TINY, 12)
    for i in (3, 5, 7):
        inputs[i] = {
            "zero": torch.where(torch.rand(inputs[i].shape) < 0.3, 0.0, inputs[i]),
            "tiny": inputs[i] * 1e-8,
            "negative": -inputs[i].abs(),
            "huge": inputs[i] * 1e4,
        }[kind]
    check(inputs, TINY, 0, PLANS[name])


def test_a_workspace_of_the_caller_and_repeated_calls():
    inputs = layer.make(TINY, 21)
    for plan in (PLANS["dense 128 split"], PLANS["sorted 64"]):
        memory = torch.full((layout(TINY, 21, plan)[1] + 512,), 255, dtype=torch.uint8)
        first = check(inputs, TINY, 0, plan, workspace=memory)
        again = check(inputs, TINY, 0, plan, workspace=memory)
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


def forget() -> None:
    for cached in (workspace.sizes, workspace.layout, workspace.slots):
        cached.cache_clear()
    api._calls.clear()


@pytest.mark.parametrize("name", ["sorted 64", "sorted 128", "wide"])
def test_columns_in_blocks(name):
    """Worst-case routing of many tokens bounds how many columns GEMM2 keeps at a time."""
    plan = replace(PLANS[name], row_buffer=1)
    assert workspace.sizes(TINY, 20, plan).blocks == 1
    check(layer.make(TINY, 20), TINY, 0, plan)


@pytest.mark.parametrize("name", ["sorted 64", "sorted 128", "wide"])
def test_more_columns_than_one_program_of_combine_takes(name):
    g = MoEGeometry(8, 4, 2, 1152, 128)
    check(layer.make(g, 7), g, 2, PLANS[name])


def test_rounds(monkeypatch):
    """More tokens than one round holds."""
    monkeypatch.setattr(workspace, "TOKEN_CHUNK", 16)
    forget()
    check(layer.make(TINY, 37), TINY, 8, PLANS["sorted 64"])
    forget()


@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 64, 65])
def test_chosen_plans(tokens):
    inputs = layer.make(TINY, tokens, seed=tokens)
    out = layer.call(inputs, TINY, 16)
    assert layer.relative(out, moe_reference(*inputs, 16, 2.5, geometry=TINY)) < 0.03


def test_no_tokens():
    assert layer.call(layer.make(TINY, 0), TINY).shape == (0, TINY.hidden_size)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(PLANS)), st.integers(1, 40), st.integers(0, 24), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([1e-8, 1.0, 1e4]),
)  # fmt: skip
def test_any_routing_offset_and_scales(name, tokens, offset, seed, spread, magnitude):
    """Ragged and empty experts: a spread of 0 sends every token to the same experts."""
    plan = PLANS[name]
    tokens = min(tokens, plan.gate_up.block_n) if plan.path == "dense" else tokens
    inputs = layer.make(TINY, tokens, seed)
    inputs[0] *= spread
    inputs[3] *= magnitude
    check(inputs, TINY, offset, plan)
