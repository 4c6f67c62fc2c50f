"""The one place that makes the bundled dataset: definitions, workloads, and the tensors that workloads name.

    python -m blockmoe.bench.bundled [--root dataset] [--blobs]

rewrites ROOT/definitions/moe and ROOT/workloads/moe, which are committed, and with --blobs also ROOT/blob, which is
not: every workload carries the recipe of its blob, in a field that other readers of the format skip.
"""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from blockmoe.bench.routing_logits import routing_inputs
from blockmoe.bench.schema import Definition, Trace, Workload
from blockmoe.files import write_whole
from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY, MoEGeometry

OP_TYPE = "moe"
LOGITS, BIAS = "routing_logits", "routing_bias"


# --- definitions ----------------------------------------------------------------------------------------------------


def definition_of(geometry: MoEGeometry) -> Definition:
    """The definition of a geometry; `renormalize` routing has no `routing_bias` input."""
    return Definition.model_validate(
        {
            "name": geometry.definition_name,
            "op_type": OP_TYPE,
            "description": _description(geometry),
            "tags": _tags(geometry),
            "axes": _axes(geometry),
            "constraints": [
                "gemm1_out_size == 2 * intermediate_size",
                "num_hidden_blocks * 128 == hidden_size",
                "num_intermediate_blocks * 128 == intermediate_size",
                "num_gemm1_out_blocks * 128 == gemm1_out_size",
            ],
            "inputs": _inputs(geometry),
            "outputs": {
                "output": _tensor(
                    ["seq_len", "hidden_size"],
                    "bfloat16",
                    "Weighted sum over a token's local experts; zeros for a token with none.",
                )
            },
            "reference": reference_source(geometry),
        }
    )


def reference_source(geometry: MoEGeometry) -> str:
    """Self-contained Python source of the reference, with the geometry's constants filled in."""
    folder = files("blockmoe.bench") / "reference_source"
    has_bias = geometry.routing == "deepseek_v3"
    return Template((folder / "layer.py.txt").read_text(encoding="utf-8")).substitute(
        num_experts=geometry.num_experts,
        top_k=geometry.top_k,
        n_group=geometry.n_group,
        topk_group=geometry.topk_group,
        route=(folder / f"route_{geometry.routing}.py.txt").read_text(encoding="utf-8"),
        bias_parameter="    routing_bias,  # [NUM_EXPERTS]\n" if has_bias else "",
        bias_argument="routing_bias, " if has_bias else "",
    )


def _description(geometry: MoEGeometry) -> str:
    routing = f"the {geometry.top_k} largest logits, weighted by their softmax"
    if geometry.routing == "deepseek_v3":
        groups = f" of the best {geometry.topk_group} of {geometry.n_group} groups" if geometry.n_group > 1 else ""
        routing = f"the {geometry.top_k} best experts{groups} by sigmoid plus bias, weighted by their normalised sigmoid"
    return (
        f"FP8 block-scale mixture-of-experts layer, routing included: {routing}. {geometry.num_local_experts} of "
        f"{geometry.num_experts} experts are local; each is silu(gate) * up followed by a down projection. Scales stand "
        "for 1x128 of an activation row and 128x128 of a weight, and may be negative."
    )


def _tags(geometry: MoEGeometry) -> list[str]:
    model = {256: "deepseek-v3", 384: "kimi-k2", 128: "qwen3-moe", 512: "qwen3-next"}.get(geometry.num_experts)
    return ["quantization:float8_e4m3fn", f"routing:{geometry.routing}"] + ([f"model:{model}"] if model else ["test"])


def _axes(geometry: MoEGeometry) -> dict[str, dict]:
    constants = {
        "num_experts": (geometry.num_experts, "Experts that routing chooses from."),
        "num_local_experts": (geometry.num_local_experts, "Experts whose weights are here."),
        "hidden_size": (geometry.hidden_size, "Width of a token."),
        "intermediate_size": (geometry.intermediate_size, "Width between an expert's projections."),
        "gemm1_out_size": (2 * geometry.intermediate_size, "Rows of gemm1_weights: up, then gate."),
        "num_hidden_blocks": (geometry.hidden_blocks, "Scales along hidden_size."),
        "num_intermediate_blocks": (geometry.intermediate_blocks, "Scales along intermediate_size."),
        "num_gemm1_out_blocks": (2 * geometry.intermediate_blocks, "Scales along gemm1_out_size."),
    }
    axes: dict[str, dict] = {"seq_len": {"type": "var", "description": "Tokens."}}
    for name, (value, description) in constants.items():
        axes[name] = {"type": "const", "value": value, "description": description}
    return axes


def _inputs(geometry: MoEGeometry) -> dict[str, dict]:
    inputs = {
        LOGITS: _tensor(["seq_len", "num_experts"], "float32", "Router logits."),
        BIAS: _tensor(["num_experts"], "bfloat16", "Added to the sigmoid for choosing, not for weighting."),
        "hidden_states": _tensor(["seq_len", "hidden_size"], "float8_e4m3fn", "Quantised tokens."),
        "hidden_states_scale": _tensor(["num_hidden_blocks", "seq_len"], "float32", "Scales of the tokens, block-major."),
        "gemm1_weights": _tensor(["num_local_experts", "gemm1_out_size", "hidden_size"], "float8_e4m3fn", "Up and gate projections."),
        "gemm1_weights_scale": _tensor(
            ["num_local_experts", "num_gemm1_out_blocks", "num_hidden_blocks"], "float32", "Scales of gemm1_weights."
        ),
        "gemm2_weights": _tensor(["num_local_experts", "hidden_size", "intermediate_size"], "float8_e4m3fn", "Down projections."),
        "gemm2_weights_scale": _tensor(
            ["num_local_experts", "num_hidden_blocks", "num_intermediate_blocks"], "float32", "Scales of gemm2_weights."
        ),
        "local_expert_offset": _tensor(None, "int32", "Index of the first local expert."),
        "routed_scaling_factor": _tensor(None, "float32", "Multiplies the routing weights."),
    }
    if geometry.routing == "renormalize":
        del inputs[BIAS]
    return inputs


def _tensor(shape: list[str] | None, dtype: str, description: str) -> dict:
    return {"shape": shape, "dtype": dtype, "description": description}


# --- workloads ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One workload: T, the first local expert, and what routing makes of it."""

    seq_len: int
    offset: int
    pairs: int
    active_experts: int
    uuid: str = ""  # made from the rest where there is no official one


# UUIDs, T and offsets of the official dataset; pairs and active experts as counted and inferred on its real logits.
_HEADLINE_ROWS = (
    _Row(1, 32, 3, 3, "e05c6c03-5603-4a1c-b34c-dcce0ecaeea4"),
    _Row(7, 192, 7, 6, "b8f4f012-a32e-4356-b4e1-7665b3d598af"),
    _Row(14, 0, 15, 11, "8cba5890-4288-448a-93b8-42c14c6b9420"),
    _Row(15, 32, 10, 5, "2e69caee-ae5c-473b-aa99-5dc6659829d4"),
    _Row(16, 224, 17, 12, "a7c2bcfd-a2f4-479e-8d32-200115df89cf"),
    _Row(32, 32, 36, 20, "6230e838-67ca-41dd-a9d6-6f36b7676c6b"),
    _Row(52, 160, 26, 16, "f7d6ac7c-24ec-47e4-aefc-4863a5e3e1d9"),
    _Row(53, 32, 53, 24, "fc378037-e8fa-4305-b00f-4af47933fd53"),
    _Row(54, 128, 43, 22, "76010cb4-f73c-4145-8365-8642a2ce99de"),
    _Row(55, 128, 55, 23, "81955b1e-086f-49c1-9f40-a18a5aaf509d"),
    _Row(56, 64, 72, 26, "4822167c-dae5-4bb1-bb53-e4adb256245b"),
    _Row(57, 96, 63, 26, "74d7ff04-0365-4cf8-a824-ce61b7131dea"),
    _Row(58, 64, 77, 28, "e626d3e6-6c29-4fd8-bb7c-5b09eec61702"),
    _Row(59, 160, 41, 18, "eedc63b2-c03b-4cf2-8d16-1f46566e3af7"),
    _Row(62, 96, 59, 19, "5eadab1e-a0e3-4966-b0fd-1115cd77497c"),
    _Row(80, 96, 109, 32, "8f1ff9f1-6747-41d1-a1d8-2868cdacf893"),
    _Row(901, 96, 1331, 32, "1a4c6ba1-3cd2-4d7d-b716-84f2d52b69fc"),
    _Row(11948, 128, 10416, 32, "58a34f27-7995-4155-8b46-f60a7225e20e"),
    _Row(14107, 32, 16099, 32, "5e8dc11c-f2a9-42d5-8dce-9419cbf34d5d"),
)

# Ours: pairs near T * top_k * local / all, active experts near what a skewed load leaves.
_ALL_OF_384 = (_Row(1, 0, 8, 8), _Row(16, 0, 128, 100), _Row(128, 0, 1024, 330), _Row(2048, 0, 16384, 384))
_48_OF_384 = (_Row(1, 144, 1, 1), _Row(16, 0, 15, 12), _Row(128, 336, 133, 42), _Row(2048, 144, 2011, 48),
              _Row(8192, 48, 8307, 48))  # fmt: skip
_ALL_OF_128 = (_Row(1, 0, 8, 8), _Row(16, 0, 128, 74), _Row(128, 0, 1024, 127), _Row(2048, 0, 16384, 128),
               _Row(8192, 0, 65536, 128))  # fmt: skip
_128_OF_512 = (_Row(1, 256, 3, 3), _Row(16, 0, 38, 31), _Row(128, 384, 322, 108), _Row(2048, 128, 5163, 128),
               _Row(8192, 256, 20391, 128))  # fmt: skip
# The last two: no pair at all, and every pair on one expert.
_TINY_ROWS = (_Row(1, 8, 2, 2), _Row(3, 0, 4, 3), _Row(17, 24, 18, 7), _Row(64, 16, 70, 8), _Row(16, 8, 0, 0),
              _Row(24, 24, 20, 1))  # fmt: skip


def _rows_and_factor(geometry: MoEGeometry) -> tuple[tuple[_Row, ...], float]:
    """The workloads of a geometry, and the routed_scaling_factor of the model it comes from."""
    if geometry == HEADLINE:
        return _HEADLINE_ROWS, 2.5
    if geometry == TINY:
        return _TINY_ROWS, 2.5
    by_experts = {
        (384, 384): (_ALL_OF_384, 2.827),
        (384, 48): (_48_OF_384, 2.827),
        (128, 128): (_ALL_OF_128, 1.0),
        (512, 128): (_128_OF_512, 1.0),
    }
    return by_experts[geometry.num_experts, geometry.num_local_experts]


def workloads_of(geometry: MoEGeometry) -> list[Workload]:
    """The bundled workloads of a geometry; each carries the recipe of its blob."""
    rows, factor = _rows_and_factor(geometry)
    return [_workload(geometry, row, factor, seed) for seed, row in enumerate(rows, start=1)]


def _workload(geometry: MoEGeometry, row: _Row, factor: float, seed: int) -> Workload:
    name = geometry.definition_name
    numbers = f"{row.seq_len}/{row.offset}/{row.pairs}/{row.active_experts}"
    identity = row.uuid or str(uuid.uuid5(uuid.NAMESPACE_URL, f"blockmoe/{name}/{numbers}"))
    blob = f"./blob/workloads/{OP_TYPE}/{name}/{name}_{identity}.safetensors"
    inputs: dict[str, dict] = {}
    for key in _inputs(geometry):
        in_blob = key in (LOGITS, BIAS)
        inputs[key] = {"type": "safetensors", "path": blob, "tensor_key": key} if in_blob else {"type": "random"}
    inputs["local_expert_offset"] = {"type": "scalar", "value": row.offset}
    inputs["routed_scaling_factor"] = {"type": "scalar", "value": factor}
    recipe = {"generator": "routing", "pairs": row.pairs, "active_experts": row.active_experts, "seed": seed}
    return Workload.model_validate({"axes": {"seq_len": row.seq_len}, "inputs": inputs, "uuid": identity, "recipe": recipe})


# --- blobs ----------------------------------------------------------------------------------------------------------


def write_blob(root: Path, definition_name: str, workload: Workload) -> Path:
    """Generate a workload's safetensors file below `root` and return its path.

    Keys: `routing_logits` float32 and, where the definition has it, `routing_bias` bfloat16. The file appears whole or
    not at all. Raises ValueError for a definition or recipe that is not of this dataset.
    """
    geometry = MoEGeometry.from_definition(definition_name)
    recipe = (workload.model_extra or {}).get("recipe")
    if geometry is None or not isinstance(recipe, dict) or recipe.get("generator") != "routing":
        raise ValueError(f"workload {workload.uuid} of {definition_name}: no recipe of a routing blob, got {recipe!r}")
    logits, bias = routing_inputs(
        geometry,
        workload.axes["seq_len"],
        int(workload.inputs["local_expert_offset"].value),
        recipe["pairs"],
        recipe["active_experts"],
        recipe["seed"],
    )
    tensors = {LOGITS: ("F32", logits.astype("<f4"))}
    if BIAS in workload.inputs:
        tensors[BIAS] = ("BF16", (bias.view(np.uint32) >> 16).astype("<u2"))  # exact: the lower half is zero
    path = root / workload.inputs[LOGITS].path
    return write_whole(path, _safetensors(tensors))


def _safetensors(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    """The safetensors format, by hand: its Python package cannot write bfloat16 without torch."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for _, array in tensors.values())])


# --- the tree -------------------------------------------------------------------------------------------------------


def tree() -> Iterator[tuple[str, str]]:
    """(relative path, text) of every committed file of the dataset."""
    for name, geometry in GEOMETRIES.items():
        definition = definition_of(geometry).model_dump(exclude_unset=True)
        yield f"definitions/{OP_TYPE}/{name}.json", json.dumps(definition, indent=2) + "\n"
        traces = [Trace(definition=name, workload=workload) for workload in workloads_of(geometry)]
        yield f"workloads/{OP_TYPE}/{name}.jsonl", "".join(trace.to_json() + "\n" for trace in traces)


def main() -> None:
    """Rewrite the bundled tree."""
    parser = argparse.ArgumentParser(prog="python -m blockmoe.bench.bundled", description=main.__doc__)
    parser.add_argument("--root", type=Path, default=Path("dataset"), help="the dataset's folder (default: dataset)")
    parser.add_argument("--blobs", action="store_true", help="also generate every workload's safetensors file")
    arguments = parser.parse_args()
    for relative, text in tree():
        write_whole(arguments.root / relative, text)
    if arguments.blobs:
        for name, geometry in GEOMETRIES.items():
            for workload in workloads_of(geometry):
                print(write_blob(arguments.root, name, workload))


if __name__ == "__main__":
    main()
