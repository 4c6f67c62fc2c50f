"""Inputs are a function of (seed, definition, workload, call): the same everywhere, other at every call, and reversible."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_tree as toy

from blockmoe.bench.bundled import definition_of, workloads_of
from blockmoe.bench.inputs import Inputs, digest_tensors
from blockmoe.bench.schema import Definition, Workload
from blockmoe.geometry import TINY
from blockmoe.reference import moe_reference, route

DEFINITION = definition_of(TINY)
WORKLOADS = workloads_of(TINY)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("dataset")


def live(root, mode="trace", seed=0, workload=WORKLOADS[2]):
    inputs = Inputs(DEFINITION, root, CPU, mode, seed)
    inputs.open(workload)
    return inputs


def contents(inputs):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.values.items()}


@pytest.mark.parametrize("mode", ["trace", "realistic"])
def test_another_process_makes_the_same(root, mode):
    program = f"""
import torch
from pathlib import Path
from blockmoe.bench.bundled import definition_of, workloads_of
from blockmoe.bench.inputs import Inputs
from blockmoe.geometry import TINY
inputs = Inputs(definition_of(TINY), Path({str(root)!r}), torch.device("cpu"), {mode!r}, 3)
for workload in workloads_of(TINY)[1:3]:
    inputs.open(workload)
    for call in (0, 1007):
        inputs.load(call)
        print(inputs.digest())
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = []
    for workload in WORKLOADS[2:0:-1]:  # in another order, each in a fresh object
        inputs = live(root, mode, 3, workload)
        digests = []
        for call in (1007, 0):
            inputs.load(call)
            digests.insert(0, inputs.digest())
        expected = digests + expected
    assert answer.stdout.split() == expected and len(set(expected)) == 4


@pytest.mark.parametrize("mode", ["trace", "realistic"])
def test_every_tensor_changes_with_the_call_and_call_0_comes_back(root, mode):
    inputs = live(root, mode)
    first, digest = contents(inputs), inputs.digest()
    inputs.load(5)
    for name, value in contents(inputs).items():
        same = torch.equal(value.float(), first[name].float()) if isinstance(value, torch.Tensor) else value == first[name]
        assert same == (name in ("local_expert_offset", "routed_scaling_factor", "routing_bias")), name
    inputs.load(-3)
    inputs.load(0)
    assert inputs.digest() == digest == live(root, mode).digest()
    assert digest_tensors(first) == digest


def test_seed_and_workload_count_and_weights_are_shared(root):
    assert live(root).digest() != live(root, seed=1).digest()
    inputs = live(root)
    weights = inputs.values["gemm1_weights"]
    before = weights.clone()
    inputs.load(4)
    inputs.open(WORKLOADS[3])
    assert inputs.values["gemm1_weights"] is weights and torch.equal(weights.view(torch.uint8), before.view(torch.uint8))
    assert inputs.digest() == live(root, workload=WORKLOADS[3]).digest()


def test_weights_change_by_the_signs_of_whole_experts(root):
    inputs = live(root)
    before = inputs.values["gemm2_weights"].view(torch.uint8).clone()
    inputs.load(9)
    changed = before ^ inputs.values["gemm2_weights"].view(torch.uint8)
    flips = {tuple(expert.unique().tolist()) for expert in changed}
    assert flips == {(0,), (0x80,)}


def test_tokens_are_permuted_so_that_pairs_stay(root):
    inputs = live(root)
    in_file = inputs.values["routing_logits"].clone()
    inputs.load(12)
    permuted = inputs.values["routing_logits"]
    assert sorted(map(tuple, permuted.tolist())) == sorted(map(tuple, in_file.tolist())) and not torch.equal(permuted, in_file)
    first, recipe = inputs.values["local_expert_offset"], inputs.workload.recipe
    ids, _ = route(permuted, inputs.values["routing_bias"].float(), TINY, 2.5)
    local = (ids >= first) & (ids < first + TINY.num_local_experts)
    assert int(local.sum()) == recipe["pairs"] and len(ids[local].unique()) == recipe["active_experts"]


def test_trace_mode_is_the_formats(root):
    values = live(root, workload=WORKLOADS[3]).values
    for name in ("hidden_states_scale", "gemm1_weights_scale"):
        assert -0.3 < values[name].mean() < 0.3 and 0.7 < values[name].std() < 1.3 and (values[name] < 0).any()
    for name in ("hidden_states", "gemm1_weights"):
        assert values[name].dtype == torch.float8_e4m3fn and values[name].float().abs().max() == 2.0


def test_realistic_mode_is_as_quantising_gives(root):
    values = live(root, "realistic", workload=WORKLOADS[3]).values
    for name, value in values.items():
        if name.endswith("_scale"):
            assert (value > 0).all() and value.isfinite().all(), name
    rows = values["hidden_states"].float().view(64, -1, 128)
    assert (rows.abs().amax(2) == 448).all()  # each 1x128 uses the whole range
    dequantised = rows * values["hidden_states_scale"].T.unsqueeze(2)
    assert 0.9 < dequantised.std() < 3  # N(0,1), and a few channels 16 times larger
    output = moe_reference(**values, geometry=TINY)
    assert output.isfinite().all()
    rows_with_pairs = output[(output != 0).any(1)]
    assert 0.01 < rows_with_pairs.square().mean().sqrt() < 10


@pytest.mark.parametrize("mode", ["trace", "realistic"])
def test_no_tokens(root, mode):
    fields = WORKLOADS[0].model_dump() | {"axes": {"seq_len": 0}, "uuid": "none"}
    fields["inputs"]["routing_logits"] = fields["inputs"]["routing_bias"] = {"type": "random"}
    inputs = live(root, mode, workload=Workload.model_validate(fields))
    inputs.load(1)
    assert inputs.values["hidden_states"].shape == (0, 256) and inputs.values["hidden_states_scale"].shape == (2, 0)
    assert len(inputs.digest()) == 16


def test_random_integers_booleans_and_scalars():
    shape = {"shape": ["n"], "dtype": "int32"}
    inputs = {"i": shape, "b": shape | {"dtype": "bool"}, "k": {"shape": None, "dtype": "int64"}, "f": {"shape": None, "dtype": "float32"}}
    definition = Definition.model_validate(toy.definition(inputs=inputs, reference="def run(i, b, k, f):\n    return i\n"))
    random = {name: {"type": "random"} for name in inputs}
    live = Inputs(definition, Path("."), CPU, "trace", 0)
    live.open(Workload.model_validate({"axes": {"n": 4096}, "inputs": random, "uuid": "u"}))
    values = live.values
    assert values["i"].dtype == torch.int32 and values["i"].min() < -500 and values["i"].max() > 500
    assert 1800 < int(values["b"].sum()) < 2300
    assert isinstance(values["k"], int) and isinstance(values["f"], float)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["trace", "realistic", "of bool"])
def test_torchs_defaults_make_no_difference(root, mode, dtype):
    """A solution may set them, at import or in a call, and the bench draws in its process."""

    def digests():
        inputs = Inputs(definition, root, CPU, "realistic" if mode == "realistic" else "trace", 0)
        inputs.open(workload)
        found = [inputs.digest()]
        inputs.load(1000)
        return [*found, inputs.digest()]

    definition, workload = DEFINITION, WORKLOADS[2]
    if mode == "of bool":
        definition = Definition.model_validate(toy.definition(inputs={"x": {"shape": ["n", "w"], "dtype": "bool"}}))
        workload = Workload.model_validate(toy.workload(64, "u")["workload"])
    expected = digests()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        assert digests() == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_unknown_mode_and_realistic_for_another_family():
    definition = Definition.model_validate(toy.definition())
    with pytest.raises(ValueError, match="expected one of trace, realistic, got 'other'"):
        Inputs(definition, Path("."), CPU, "other", 0)
    with pytest.raises(ValueError, match="not for scale_w64"):
        Inputs(definition, Path("."), CPU, "realistic", 0)


def test_digest_sees_one_element_a_swap_a_name_and_a_shape():
    base = torch.arange(100_003, dtype=torch.float32)
    digests = {digest_tensors({"x": base})}
    for change in (0, 50_000, 100_002):
        other = base.clone()
        other[change] += 1
        digests.add(digest_tensors({"x": other}))
    swapped = base.clone()
    swapped[[10, 60_000]] = swapped[[60_000, 10]]
    others = ({"x": swapped}, {"y": base}, {"x": base.view(-1, 1)}, {"x": 1.0})
    digests |= {digest_tensors(other) for other in others}
    assert len(digests) == 8
    odd = torch.zeros(9, dtype=torch.uint8)[1:]
    assert digest_tensors({"x": odd}) == digest_tensors({"x": torch.zeros(8, dtype=torch.uint8)})
