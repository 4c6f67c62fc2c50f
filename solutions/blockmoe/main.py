"""blockmoe.fused_moe under the definitions' argument order; the output tensor comes last."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the packed form carries the operator beside this file

from blockmoe.operator.api import fused_moe  # noqa: E402

GEOMETRY = {"num_experts": 256, "num_local_experts": 32, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048, "routing": "deepseek_v3", "n_group": 8, "topk_group": 4}  # fmt: skip # noqa: E501


def run(routing_logits, *arguments):
    """Inputs in the definition's order (routing_bias only where routing has one), then the output [T, H] to fill."""
    *inputs, output = arguments
    routing_bias, *inputs = inputs if GEOMETRY["routing"] == "deepseek_v3" else (None, *inputs)
    hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor = inputs
    fused_moe(
        routing_logits,
        routing_bias,
        hidden,
        hidden_scale,
        w1,
        w1_scale,
        w2,
        w2_scale,
        local_expert_offset=int(offset),
        routed_scaling_factor=float(factor),
        routing=GEOMETRY["routing"],
        top_k=GEOMETRY["top_k"],
        n_group=GEOMETRY["n_group"],
        topk_group=GEOMETRY["topk_group"],
        out=output,
    )
