"""The launches of one call, in order: a pure function of sizes."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import torch

from blockmoe.geometry import MoEGeometry
from blockmoe.operator import down, gate_up
from blockmoe.operator.combine import combine
from blockmoe.operator.launch import (
    BIAS,
    HIDDEN,
    HIDDEN_SCALE,
    LOGITS,
    OUT,
    W1,
    W1_SCALE,
    W2,
    W2_SCALE,
    Launch,
    Slot,
    compile_only,
    interpreted,
)  # fmt: skip
from blockmoe.operator.machine import of_gpu
from blockmoe.operator.plan import Plan, plans
from blockmoe.operator.route import route
from blockmoe.operator.versions import gluon, known, require_triton
from blockmoe.operator.workspace import Round, sizes, slots

PROGRAMS_PER_SM = 8  # bound on a grid: more tiles than that a multiprocessor are walked in a loop
E4M3 = torch.float8_e4m3fn


def stages(
    geometry: MoEGeometry,
    tokens: int,
    plan: Plan,
    offset: int,
    factor: float,
    *,
    sm_count: int = 132,
    logits_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = torch.bfloat16,
) -> dict[str, list[Launch]]:
    """The launches of a round of `tokens` tokens by stage: route and layer, where one kernel does all after routing; else route, gate_up,
    down and combine, of which the last two take turns where the columns come in blocks.

    `bias_dtype` is None where there is no bias.
    """
    if interpreted():
        plan = replace(plan, pdl=False)  # which the interpreter does not know
    bound = sizes(geometry, tokens, plan)
    this = Round(geometry, plan, bound, slots(geometry, tokens, plan), PROGRAMS_PER_SM * sm_count, sm_count)
    logits = Slot(LOGITS, logits_dtype)
    bias = logits if bias_dtype is None else Slot(BIAS, bias_dtype)  # renormalize reads no bias
    x, x_scale, out = Slot(HIDDEN, E4M3), Slot(HIDDEN_SCALE, torch.float32), Slot(OUT, torch.bfloat16)
    w1, w1_scale, w2, w2_scale = Slot(W1, E4M3), Slot(W1_SCALE, torch.float32), Slot(W2, E4M3), Slot(W2_SCALE, torch.float32)
    found = {"route": route(logits, bias, offset, factor, this)}
    if plan.down is None:
        if plan.path == "stream":
            from blockmoe.operator.stream.layer import layer  # need Triton's Gluon
        elif plan.path == "prefill":
            from blockmoe.operator.prefill.layer import layer
        else:
            from blockmoe.operator.either import layer

        return found | {"layer": layer(x, x_scale, w1, w1_scale, w2, w2_scale, out, this)}
    found |= {"gate_up": gate_up.gate_up(x, x_scale, w1, w1_scale, this), "down": [], "combine": []}
    for first_block in range(0, geometry.hidden_blocks, bound.blocks):
        found["down"] += down.down(w2, w2_scale, out, first_block, this)
        found["combine"] += combine(out, first_block, this)
    return found


def launches(*arguments, **options) -> list[Launch]:
    """`stages` in the order of launching."""
    found = stages(*arguments, **options)
    turns = [launch for pair in zip_longest(found.pop("down", ()), found.pop("combine", ())) for launch in pair if launch]
    return [launch for stage in found.values() for launch in stage] + turns


def compile_all(geometry: MoEGeometry, device: int | None, logits_dtype: torch.dtype | None, bias_dtype: torch.dtype | None) -> int:
    """See `blockmoe.operator.warmup`."""
    if not torch.cuda.is_available():
        raise RuntimeError("warmup: expected a CUDA device, found none")
    require_triton()
    with torch.cuda.device(torch.cuda.current_device() if device is None else device):
        machine = of_gpu(torch.cuda.current_device(), "device")
        found, options = {}, {"sm_count": machine.sm_count, "logits_dtype": logits_dtype or torch.float32}
        options["bias_dtype"] = (bias_dtype or torch.bfloat16) if geometry.routing == "deepseek_v3" else None
        for plan in plans(geometry, machine, clusters=known(), tma=gluon()):
            for launch in launches(geometry, 1, plan, 0, 1.0, **options):
                found[launch.key] = launch
        for launch in found.values():
            compile_only(launch)
    return len(found)
