"""The solution torch_grouped against the reference, as `blockmoe pack` packs it."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from blockmoe.bench.bundled import definition_of, workloads_of
from blockmoe.bench.correctness import Tolerance, judge
from blockmoe.bench.dataset import bundled_solutions
from blockmoe.bench.inputs import Inputs
from blockmoe.bench.pack import pack
from blockmoe.bench.schema import Workload
from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY, MoEGeometry
from blockmoe.reference import moe_reference

FOLDER = bundled_solutions() / "torch_grouped"
PUBLISHED = Tolerance(rtol=0.2, atol=0.1, required_matched_ratio=0.85)
OTHERS = (MoEGeometry(24, 6, 4, 256, 128), MoEGeometry(16, 16, 3, 128, 256, "renormalize"))


def solution(geometry, dtype=None):
    """The solution's namespace for a geometry; `dtype` overrides its choice for this machine."""
    source = (FOLDER / "main.py").read_text()
    if geometry in GEOMETRIES.values():
        source = pack(FOLDER, geometry.definition_name).sources[0].content
    namespace = {}
    exec(source, namespace)
    namespace["GEOMETRY"] = asdict(geometry)
    namespace["run"] = namespace[f"run_{geometry.routing}"]
    if dtype:
        namespace["matmul_dtype"] = lambda device: dtype
    return namespace


def random_workload(geometry, tokens):
    inputs = {name: {"type": "random"} for name in definition_of(geometry).inputs}
    inputs["local_expert_offset"] = {"type": "scalar", "value": 0}
    inputs["routed_scaling_factor"] = {"type": "scalar", "value": 1.5}
    return Workload.model_validate({"axes": {"seq_len": tokens}, "inputs": inputs, "uuid": f"random{tokens}"})


def compare(geometry, workload, mode, root, namespace):
    """Judgement of the solution, and how many tokens have a pair."""
    live = Inputs(definition_of(geometry), root, torch.device("cpu"), mode, seed=1)
    live.open(workload)
    output = namespace["run"](*live.values.values())
    reference = moe_reference(**{"routing_bias": None, **live.values}, geometry=geometry)
    if mode == "trace" and workload.axes["seq_len"] > 1:
        assert (live.values["hidden_states_scale"] < 0).any()
    zeros = (reference == 0).all(1)
    assert (output[zeros] == 0).all()
    return judge(output, reference.bfloat16(), PUBLISHED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("mode", ["trace", "realistic"])
@pytest.mark.parametrize("workload", workloads_of(TINY), ids=lambda workload: f"T{workload.axes['seq_len']}")
def test_bundled_workloads(workload, mode, dtype, tmp_path):
    """Among them one with no pair and one with every pair on one expert."""
    judgement = compare(TINY, workload, mode, tmp_path, solution(TINY, dtype))
    assert judgement.passed and judgement.matched_ratio_nonzero_rows > 0.97
    assert judgement.relative_l2 < (0.001 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("geometry", OTHERS, ids=lambda geometry: geometry.definition_name)
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_other_routings(geometry, tokens, tmp_path):
    judgement = compare(geometry, random_workload(geometry, tokens), "trace", tmp_path, solution(geometry))
    assert judgement.passed and judgement.relative_l2 < 0.01


def test_no_tokens(tmp_path):
    assert compare(TINY, random_workload(TINY, 0), "trace", tmp_path, solution(TINY)).passed


def test_calls_do_not_leak_into_each_other(tmp_path):
    namespace = solution(TINY)
    live = Inputs(definition_of(TINY), tmp_path, torch.device("cpu"), "trace", seed=1)
    live.open(workloads_of(TINY)[3])
    first = namespace["run"](*live.values.values())
    kept = first.clone()
    live.load(1)
    assert not torch.equal(namespace["run"](*live.values.values()), kept)
    live.load(0)
    assert torch.equal(namespace["run"](*live.values.values()), kept)
    assert torch.equal(first, kept)  # a returned output stays as it is


def test_cpu_dequantisation_is_exact_for_every_code():
    namespace = solution(TINY)
    codes = torch.arange(256, dtype=torch.uint8).repeat(64).view(128, 128)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN is no weight
    weight, scale = codes.view(torch.float8_e4m3fn), torch.tensor([[-0.37]])
    expected = weight.float() * scale
    assert torch.equal(namespace["dequantise_on_cpu"](weight, scale, torch.empty(128, 128)), expected)


def test_stands_alone():
    text = (Path(FOLDER) / "main.py").read_text()
    assert "blockmoe" not in text
    assert pack(FOLDER, HEADLINE.definition_name).sources[0].path == "main.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path):
    live = Inputs(definition_of(TINY), tmp_path, torch.device("cuda"), "trace", seed=1)
    for workload in workloads_of(TINY):
        live.open(workload)
        output = solution(TINY)["run"](*live.values.values())
        reference = moe_reference(**live.values, geometry=TINY)
        judgement = judge(output, reference.bfloat16(), PUBLISHED)
        assert judgement.passed and judgement.relative_l2 < 0.02
