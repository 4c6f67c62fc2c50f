"""The launches of one call, in order. More than TOKEN_CHUNK tokens run as rounds over runs of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from blockmoe.geometry import MoEGeometry
from blockmoe.operator.combine import combine
from blockmoe.operator.down import down
from blockmoe.operator.gate_up import gate_up
from blockmoe.operator.launch import Buffer, interpreted
from blockmoe.operator.plan import TOKEN_CHUNK, Plan
from blockmoe.operator.route import route
from blockmoe.operator.workspace import Round, buffers, sizes, views

PROGRAMS_PER_SM = 8  # bound on a grid: more tiles than that a multiprocessor are walked in a loop


def run(inputs, offset: int, factor: float, geometry: MoEGeometry, plans: list[Plan], sm_count: int, out, workspace) -> None:
    """Launch everything for validated `inputs` (the eight tensors of `fused_moe`, in its order); a plan a round."""
    logits, bias, x, x_scale, *weights = inputs
    if len(plans) == 1:
        run_round((logits, bias, x, x_scale, *weights, out), offset, factor, geometry, plans[0], sm_count, workspace)
        return
    for i, plan in enumerate(plans):
        part = slice(i * TOKEN_CHUNK, min((i + 1) * TOKEN_CHUNK, out.shape[0]))
        tensors = (logits[part], bias, x[part], x_scale[:, part].contiguous(), *weights, out[part])
        run_round(tensors, offset, factor, geometry, plan, sm_count, workspace)


def begin_round(tensors: tuple, geometry: MoEGeometry, plan: Plan, sm_count: int, workspace: torch.Tensor) -> tuple[tuple, Round]:
    """The eight inputs and the output as launches want them, and what every stage knows."""
    tokens, device = tensors[2].shape[0], workspace.device
    bound = sizes(geometry, tokens, plan)
    tensors = tuple(tensors[0] if t is None else t for t in tensors)  # renormalize reads no bias
    programs = PROGRAMS_PER_SM * sm_count
    if interpreted():
        plan = replace(plan, pdl=False)  # which the interpreter does not know
        return tensors, Round(geometry, plan, bound, views(workspace, geometry, tokens, plan), (), programs)
    pointers = tuple(Buffer.of(t) for t in tensors)
    aligned = all(p.address % 16 == 0 for p in pointers)
    variant = (device.index, aligned, pointers[0].dtype, pointers[1].dtype)
    return pointers, Round(geometry, plan, bound, buffers(workspace, geometry, tokens, plan), variant, programs)


def run_round(
    tensors: tuple, offset: int, factor: float, geometry: MoEGeometry, plan: Plan, sm_count: int, workspace: torch.Tensor
) -> None:
    pointers, this = begin_round(tensors, geometry, plan, sm_count, workspace)
    logits, bias, x, x_scale, w1, w1_scale, w2, w2_scale, out = pointers
    route(logits, bias, offset, factor, this)
    gate_up(x, x_scale, w1, w1_scale, this)
    for first_block in range(0, geometry.hidden_blocks, this.sizes.blocks):
        down(w2, w2_scale, out, first_block, this)
        combine(out, first_block, this)
