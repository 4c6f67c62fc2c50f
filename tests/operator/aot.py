"""Compile what a plan launches, without a GPU, and read the result's registers and spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from blockmoe.geometry import MoEGeometry
from blockmoe.operator import bound, pipeline, ptx
from blockmoe.operator.launch import Descriptor, Launch
from blockmoe.operator.plan import Plan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Usage:
    kernel: str
    registers: int
    stack: int  # bytes: spills, or arrays in local memory
    shared: int
    sass: str
    ptx: str
    ttgir: str
    tensordesc: list[dict]  # what the host needs to encode each TMA descriptor
    types: tuple[str, ...] | None  # `bound.types_of`


def launches(geometry: MoEGeometry, tokens: int, plan: Plan) -> list[Launch]:
    bias = torch.bfloat16 if geometry.routing == "deepseek_v3" else None
    return pipeline.launches(geometry, tokens, plan, 0, 1.0, bias_dtype=bias)


def described(d: Descriptor) -> str:
    return f"tensordesc<{TYPES[d.kind.dtype][1:]}{list(d.kind.box)},{d.kind.layout!r}>"


def compiled(launch: Launch, capability: int) -> Usage:
    """Triton's cubin of one launch for sm_90a, sm_100a, sm_89 or sm_120a, what a clustered kernel says carried out."""
    kernel = launch.kernel
    types = [described(d) for d in launch.descriptors] + [TYPES[slot.dtype] for slot in launch.slots]
    types += ["i32" if isinstance(n, int) else "fp32" for n in launch.numbers]
    names = kernel.arg_names
    assert len(names) == len(types) + len(launch.constants), f"{names} against {types} and {launch.constants}"
    signature = dict(zip(names, types + ["constexpr"] * len(launch.constants), strict=True))
    constants = dict(zip(names[len(types) :], launch.constants, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.startswith("*")}
    built = triton.compile(
        (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        text, code = built.asm["ptx"], built.asm["cubin"]
        if launch.cluster > 1:
            text = ptx.mended(text)
            code = ptx.assembled(text, capability)
        cubin.write_bytes(code)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    descriptors = list(built.metadata.tensordesc_meta or [])
    types = bound.types_of(SimpleNamespace(src=built.src, run=SimpleNamespace(launch_cooperative_grid=False)))
    counts = int(found[1]), int(found[2]), built.metadata.shared
    return Usage(kernel.__name__, *counts, sass.stdout, text, built.asm["ttgir"], descriptors, types)


def token_layout(usage: Usage) -> tuple[list[int], list[int], list[int], list[int]]:
    """Of the tile of keys [tokens, parts, lanes] that `choose_largest` has: its shape, and what a thread, a warp and a program hold
    side by side."""
    [(shape, name)] = set(re.findall(r"elementwise_inline_asm .* : tensor<([\dx]+)xi32, (#\w+)>", usage.ttgir))
    layout = re.search(rf"^{name} = #ttg.blocked<{{(.*?)}}>", usage.ttgir, re.MULTILINE)[1]
    per = [re.search(rf"{what} = \[([\d, ]+)\]", layout)[1].split(", ") for what in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")]
    return tuple([int(n) for n in numbers] for numbers in (shape.split("x"), *per))
