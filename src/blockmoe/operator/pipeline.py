"""The launches of one call, in order. More than TOKEN_CHUNK tokens run as rounds over runs of tokens."""

from __future__ import annotations

from dataclasses import replace

from blockmoe.geometry import MoEGeometry
from blockmoe.operator.combine import combine
from blockmoe.operator.down import down
from blockmoe.operator.gate_up import gate_up
from blockmoe.operator.launch import Buffer, interpreted
from blockmoe.operator.plan import TOKEN_CHUNK, Plan
from blockmoe.operator.route import route
from blockmoe.operator.workspace import buffers, sizes, views

PROGRAMS_PER_SM = 8  # bound on a grid: more tiles than that a multiprocessor are walked in a loop


def run(inputs, offset: int, factor: float, geometry: MoEGeometry, plans: list[Plan], sm_count: int, out, workspace) -> None:  # fmt: skip
    """Launch everything for validated `inputs` (the eight tensors of `fused_moe`, in its order); a plan a round."""
    if len(plans) == 1:
        _round(inputs, offset, factor, geometry, plans[0], sm_count, out, workspace)
        return
    logits, bias, x, x_scale, *weights = inputs
    for i, plan in enumerate(plans):
        part = slice(i * TOKEN_CHUNK, min((i + 1) * TOKEN_CHUNK, out.shape[0]))
        taken = (logits[part], bias, x[part], x_scale[:, part].contiguous(), *weights)
        _round(taken, offset, factor, geometry, plan, sm_count, out[part], workspace)


def _round(inputs, offset: int, factor: float, geometry: MoEGeometry, plan: Plan, sm_count: int, out, workspace) -> None:  # fmt: skip
    logits, bias = inputs[0], inputs[1]
    if bias is None:
        bias = logits  # never read
    tensors = (logits, bias, *inputs[2:], out)
    bound = sizes(geometry, out.shape[0], plan)
    if interpreted():
        memory, variant = views(workspace, geometry, out.shape[0], plan), ()
        plan = replace(plan, pdl=False)  # which the interpreter does not know
    else:
        memory = buffers(workspace, geometry, out.shape[0], plan)
        tensors = tuple(Buffer.of(t) for t in tensors)
        aligned = all(t.address % 16 == 0 for t in tensors)
        variant = (out.device.index, aligned, logits.dtype, bias.dtype)
    logits, bias, x, x_scale, w1, w1_scale, w2, w2_scale, out = tensors
    programs = PROGRAMS_PER_SM * sm_count

    route(logits, bias, offset, factor, memory, geometry, plan, bound, variant)
    gate_up(x, x_scale, w1, w1_scale, memory, geometry, plan, bound, variant, programs)
    for first_column in range(0, geometry.hidden_size, bound.columns):
        down(w2, w2_scale, out, first_column, memory, geometry, plan, bound, variant, programs)
        combine(out, first_column, memory, geometry, plan, bound, variant)
