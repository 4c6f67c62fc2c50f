"""flashinfer.fused_moe.trtllm_fp8_block_scale_moe, the one-call operator that this definition describes. SM100 only."""

import torch
from flashinfer.fused_moe import trtllm_fp8_block_scale_moe

NUM_EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 256, 8, 8, 4
DEEPSEEK_V3 = 2  # routing method: sigmoid, bias, 4 best of 8 groups, 8 best experts, normalised and scaled


def run(logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor):
    """Inputs in the definition's order; returns bfloat16 [T, H]."""
    if len(hidden) == 0:  # the library's launch does not end for no tokens
        return torch.empty(hidden.shape, dtype=torch.bfloat16, device=hidden.device)
    result = trtllm_fp8_block_scale_moe(
        logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale,
        NUM_EXPERTS, TOP_K, GROUPS, TOP_GROUPS, w2.shape[2], int(offset), len(w1), float(factor),
        routing_method_type=DEEPSEEK_V3, use_shuffled_weight=False,
    )  # fmt: skip
    return result[0] if isinstance(result, (list, tuple)) else result
