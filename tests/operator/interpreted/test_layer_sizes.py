"""The whole layer in more shapes: other workspaces, rounds, chosen plans, any routing. Apart, so that two cores share the work."""

from dataclasses import replace

import layer
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer import PLANS, TINY, check

from blockmoe.geometry import MoEGeometry
from blockmoe.operator import api, workspace
from blockmoe.operator.workspace import layout
from blockmoe.reference import moe_reference


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
