"""Floors of a workload: from its own routing where all calls have the same, none where they don't."""

import json
from types import SimpleNamespace

import pytest
import torch
import toy_tree as toy

from blockmoe.bench import roofline
from blockmoe.bench.bundled import definition_of, workloads_of, write_blob
from blockmoe.bench.inputs import Inputs
from blockmoe.bench.schema import Definition, Workload
from blockmoe.geometry import TINY

DEFINITION = definition_of(TINY)
WORKLOAD = next(one for one in workloads_of(TINY) if one.axes["seq_len"] == 1)


@pytest.fixture
def floors(tmp_path, monkeypatch):
    """Of a workload whose `drawn` inputs are random; at a GB and a GFLOP a ms."""
    monkeypatch.setattr(roofline, "streaming_ms", lambda size, session: size / 1e9)
    monkeypatch.setattr(roofline, "_rate", lambda device: 1e12)
    write_blob(tmp_path, DEFINITION.name, WORKLOAD)

    def measure(*drawn, definition=DEFINITION, workload=WORKLOAD):
        fields = json.loads(workload.to_json())
        fields["recipe"] = None
        fields["inputs"] |= {name: {"type": "random"} for name in drawn}
        session = SimpleNamespace(definition=definition, device=torch.device("cpu"))
        session.inputs = Inputs(definition, tmp_path, session.device, "trace", 0)
        session.inputs.open(Workload.model_validate(fields))
        return roofline.measured_floors(session)

    return measure


def test_routing_from_files_gives_the_recipes_counts(floors):
    found, recipe = floors(), WORKLOAD.recipe
    assert (found["pairs"], found["active_experts"], found["tokens_with_pairs"]) == (recipe["pairs"], recipe["active_experts"], 1)
    size, flops = roofline.workload_cost(TINY, 1, 1, recipe["pairs"], recipe["active_experts"])
    assert (found["bytes"], found["flops"], found["floor_ms"]) == (size, flops, max(size / 1e9, flops / 1e9))


@pytest.mark.parametrize("drawn", [("routing_logits",), ("routing_bias",), ("routing_logits", "routing_bias")])
def test_routing_that_is_drawn_has_no_floor(floors, drawn):
    """Call 0 can have more pairs than most timed calls: an honest solution would be called IMPOSSIBLE."""
    assert floors(*drawn) == {}


def test_another_family_has_no_floor(floors):
    definition, workload = Definition.model_validate(toy.definition()), Workload.model_validate(toy.workload(8, "u")["workload"])
    assert floors(definition=definition, workload=workload) == {}
