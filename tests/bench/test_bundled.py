"""The committed dataset is what `bundled.py` generates, and its references compute the layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockmoe.bench.bundled import definition_of, reference_source, tree, workloads_of, write_blob
from blockmoe.bench.dataset import Dataset, bundled_root
from blockmoe.bench.inputs import Inputs
from blockmoe.bench.routing_logits import routing_inputs
from blockmoe.bench.schema import Workload
from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY, MoEGeometry
from blockmoe.reference import moe_reference

SMALL = (
    TINY,
    MoEGeometry(24, 6, 4, 256, 128),  # one group
    MoEGeometry(16, 16, 3, 128, 256, "renormalize"),
)


def test_committed_tree_is_the_generated_one():
    generated = dict(tree())
    for relative, text in generated.items():
        assert (bundled_root() / relative).read_text() == text, f"{relative}: run python -m blockmoe.bench.bundled"
    folders = ("definitions", "workloads")
    committed = {path.relative_to(bundled_root()).as_posix() for folder in folders for path in (bundled_root() / folder).rglob("*.json*")}
    assert committed == set(generated)


def test_tree_loads_with_every_workload():
    dataset = Dataset.load([bundled_root()])
    assert set(dataset.definitions) == set(GEOMETRIES)
    assert sum(len(workloads) for workloads in dataset.workloads.values()) == 49
    headline = dataset.workloads[HEADLINE.definition_name]
    assert [workload.axes["seq_len"] for workload in headline][::6] == [1, 52, 58, 14107]
    assert all(workload.inputs["routed_scaling_factor"].value == 2.5 for workload in headline)


def test_headline_inputs_stand_in_the_official_order():
    definition = definition_of(HEADLINE)
    assert definition.shape("gemm1_weights_scale", {"seq_len": 5}) == (32, 32, 56)
    assert definition.shape("hidden_states_scale", {"seq_len": 5}) == (56, 5)
    assert list(definition.inputs) == [
        "routing_logits", "routing_bias", "hidden_states", "hidden_states_scale", "gemm1_weights",
        "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale", "local_expert_offset", "routed_scaling_factor",
    ]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_blobs_are_the_generated_tensors_and_the_same_twice(geometry, tmp_path):
    workload = workloads_of(geometry)[2]
    first, second = (write_blob(tmp_path / name, geometry.definition_name, workload) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first == tmp_path / "a" / workload.inputs["routing_logits"].path
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # no temporary file is left

    recipe, tensors = workload.recipe, load_file(first)
    logits, bias = routing_inputs(
        geometry, workload.axes["seq_len"], workload.inputs["local_expert_offset"].value,
        recipe["pairs"], recipe["active_experts"], recipe["seed"],
    )  # fmt: skip
    assert torch.equal(tensors.pop("routing_logits"), torch.from_numpy(logits))
    if geometry.routing == "deepseek_v3":
        stored = tensors.pop("routing_bias")
        assert stored.dtype == torch.bfloat16 and torch.equal(stored.float(), torch.from_numpy(bias))
    assert not tensors


def test_blob_without_a_recipe_is_refused(tmp_path):
    workload = Workload.model_validate(workloads_of(TINY)[0].model_dump(exclude={"recipe"}))
    with pytest.raises(ValueError, match="no recipe"):
        write_blob(tmp_path, TINY.definition_name, workload)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("tokens", [0, 1, 19])
@pytest.mark.parametrize("geometry", SMALL, ids=lambda geometry: geometry.definition_name)
def test_reference_source_computes_the_layer(geometry, tokens, tmp_path):
    values = random_inputs(geometry, tokens, tmp_path)
    namespace = {}
    exec(reference_source(geometry), namespace)
    output = namespace["run"](*values.values())
    assert output.shape == (tokens, geometry.hidden_size) and output.dtype == torch.bfloat16
    expected = moe_reference(**{"routing_bias": None, **values}, geometry=geometry)
    torch.testing.assert_close(output, expected.bfloat16(), rtol=0.01, atol=1e-3 * float(expected.abs().sum() > 0))


def random_inputs(geometry, tokens, root):
    """Inputs of the trace format's distributions, routing logits included; by name, in order."""
    definition = definition_of(geometry)
    inputs = {name: {"type": "random"} for name in definition.inputs}
    inputs["local_expert_offset"] = {"type": "scalar", "value": 0}
    inputs["routed_scaling_factor"] = {"type": "scalar", "value": 2.5}
    live = Inputs(definition, root, torch.device("cpu"), "trace", seed=tokens)
    live.open(Workload.model_validate({"axes": {"seq_len": tokens}, "inputs": inputs, "uuid": "small"}))
    return live.values
