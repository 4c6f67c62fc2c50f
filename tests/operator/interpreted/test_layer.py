"""The whole layer through every path, against the float32 reference and an oracle with the same rounding."""

import layer
import pytest
import torch
from layer import PLANS, RENORMALIZE, TINY, UNGROUPED, check


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
