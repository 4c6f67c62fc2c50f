"""Inputs and expectations for tests of the operator."""

from __future__ import annotations

from dataclasses import replace

import torch

from blockmoe.geometry import BLOCK, TINY, MoEGeometry
from blockmoe.operator.api import fused_moe
from blockmoe.operator.plan import DownTile, EitherTile, GateUpTile, Plan, PrefillTile, RouteTile, StreamTile
from blockmoe.operator.workspace import layout
from blockmoe.reference import moe_oracle, moe_reference, route, tensor_core_product

UNGROUPED = MoEGeometry(24, 8, 3, 256, 256)
RENORMALIZE = MoEGeometry(24, 24, 3, 256, 128, "renormalize")
GEOMETRIES = [TINY, UNGROUPED, RENORMALIZE]

PLANS = {
    "dense 32": Plan("dense", RouteTile(16, 16, 4, True), GateUpTile(32, 16, 2, 4), DownTile(64, 16, 2, 4)),
    "dense 128 split": Plan("dense", RouteTile(64, 64, 16, True), GateUpTile(128, 64, 2, 8), DownTile(64, 64, 2, 4, split=3)),
    "sorted 64": Plan("sorted", RouteTile(128, 128, 16, True), GateUpTile(64, 16, 2, 4), DownTile(64, 16, 2, 4)),
    "sorted 128": Plan("sorted", RouteTile(4, 16, 4, False), GateUpTile(128, 32, 2, 8), DownTile(128, 32, 2, 4)),
    "wide": Plan("wide", RouteTile(16, 4, 4, False), GateUpTile(128, 128, 2, 8), DownTile(128, 128, 2, 8)),
}

SHARED_LIMIT = 232_448  # bytes of shared memory that a program may have on sm_90

IN_TWO = RouteTile(16, 4, 16, False)
BY_TWOS = StreamTile(128, 32, 6, promotion=128, burst=2)
BOTH = replace(BY_TWOS, block_n=64, stages=5, small=BY_TWOS)
EITHER = EitherTile(replace(BOTH, small=replace(BY_TWOS, stages=5)), PrefillTile(4, 2, flight=3))
PERSISTENT = {  # for the emulator
    "prefill": Plan("prefill", IN_TWO, PrefillTile(4, 1, flight=3)),
    "cluster": Plan("prefill", IN_TWO, PrefillTile(4, 2, flight=3)),
    "cluster, many": Plan("prefill", IN_TWO, PrefillTile(4, 2, flight=3, many=2)),
    "prefill, apart": Plan("prefill", IN_TWO, PrefillTile(4, 1, flight=3, apart=9)),
    "cluster, apart": Plan("prefill", IN_TWO, PrefillTile(4, 2, flight=3, apart=9)),
    "dense": Plan("stream", RouteTile(16, 16, 16, True), StreamTile(64, 16, 10, dense=True, flight=3)),
    "stream 256x32": Plan("stream", IN_TWO, StreamTile(128, 32, 6, flight=3)),
    "stream 256x64": Plan("stream", IN_TWO, replace(BOTH, small=None)),
    "stream, small": Plan("stream", IN_TWO, BOTH),
    "stream, few": Plan("stream", IN_TWO, replace(BOTH, few=8)),
    "stream, large": Plan("stream", IN_TWO, BOTH),
    "either, small": Plan("either", IN_TWO, EITHER),
    "either, few": Plan("either", IN_TWO, replace(EITHER, stream=replace(EITHER.stream, few=8))),
    "either, large": Plan("either", IN_TWO, EITHER),
    "either, prefill": Plan("either", IN_TWO, EITHER),
    "either, alone": Plan("either", IN_TWO, replace(EITHER, prefill=PrefillTile(4, 1, flight=3))),
}
EMULATED_TOKENS = {
    "prefill": 150, "cluster": 280, "cluster, many": 140, "prefill, apart": 150, "cluster, apart": 280,
    "dense": 9, "stream 256x32": 60, "stream 256x64": 70,
    "stream, small": 60, "stream, few": 120, "stream, large": 120,
    "either, small": 60, "either, few": 120, "either, large": 120, "either, prefill": 180, "either, alone": 180,
}  # fmt: skip
SMALL = MoEGeometry(8, 4, 3, 512, 512)
FAR = MoEGeometry(12, 8, 3, 768, 512)  # by 32 * 8 tokens, a tile an expert, some rows wait for tiles under way and others do not


def make(g: MoEGeometry, tokens: int, seed: int = 0) -> list[torch.Tensor | None]:
    """Signed scales, as the trace format draws them; routing near uniform."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def codes(*shape: int) -> torch.Tensor:
        return normal(*shape).clamp(-2, 2).to(torch.float8_e4m3fn)

    experts, hidden, middle = g.num_local_experts, g.hidden_size, g.intermediate_size
    return [
        normal(tokens, g.num_experts),
        (0.1 * normal(g.num_experts)).bfloat16() if g.routing == "deepseek_v3" else None,
        codes(tokens, hidden),
        normal(hidden // BLOCK, tokens),
        codes(experts, 2 * middle, hidden),
        normal(experts, 2 * middle // BLOCK, hidden // BLOCK),
        codes(experts, hidden, middle),
        normal(experts, hidden // BLOCK, middle // BLOCK),
    ]


def call(inputs, g: MoEGeometry, offset: int = 0, factor: float = 2.5, plan: Plan | None = None, **memory):
    return fused_moe(
        *inputs, local_expert_offset=offset, routed_scaling_factor=factor, routing=g.routing, top_k=g.top_k,
        n_group=g.n_group, topk_group=g.topk_group, plan=plan, **memory,
    )  # fmt: skip


def pairs_of(inputs, g: MoEGeometry, offset: int) -> list[int]:
    """Each local expert's, but those of weight 0."""
    experts, weights = route(inputs[0], inputs[1], g, 1.0)
    chosen = experts[weights != 0] - offset
    return torch.bincount(chosen[(chosen >= 0) & (chosen < g.num_local_experts)], minlength=g.num_local_experts).tolist()


def oracle(inputs, g: MoEGeometry, offset: int, factor: float, plan: Plan) -> torch.Tensor:
    """The layer with the rounding of `plan`: only sums of a different order remain. On a GPU its tensor cores sum the products."""
    plan = plan.way(pairs_of(inputs, g, offset))
    rows = "float32" if plan.dense else "running bf16" if plan.path == "prefill" else "bf16"
    product = tensor_core_product if inputs[2].is_cuda else None
    return moe_oracle(*inputs, offset, factor, geometry=g, group=plan.gate_up.block_i, rows=rows, product=product)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected||; both all zeros count as equal."""
    difference = (result.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm else difference


def check(inputs, g, offset, plan, factor=2.5, **memory) -> torch.Tensor:
    """The output of `plan` into poisoned memory, close to the reference and closer to the oracle."""
    tokens = len(inputs[0])
    out = torch.full((tokens, g.hidden_size), float("nan"), dtype=torch.bfloat16)
    poisoned = torch.full((layout(g, tokens, plan)[1],), 255, dtype=torch.uint8) if not memory else memory["workspace"]
    assert call(inputs, g, offset, factor, plan, out=out, workspace=poisoned) is out
    reference = moe_reference(*inputs, offset, factor, geometry=g)
    assert relative(out, reference) < 0.03
    assert relative(out, oracle(inputs, g, offset, factor, plan)) < 2e-3
    assert not out[(reference == 0).all(1)].any()
    return out
