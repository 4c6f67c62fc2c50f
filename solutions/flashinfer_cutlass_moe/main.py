"""flashinfer.fused_moe.cutlass_fused_moe with DeepSeek's FP8 block scales: FlashInfer's fused layer for Hopper.

It takes bfloat16 activations and quantises them itself, so that the definition's e4m3 tokens are dequantised first (one
Triton kernel) and rounded twice. Experts are given as one of NUM_EXPERTS / L ranks of expert parallelism, which computes the
local pairs alone. Routing is FlashInfer's own for DeepSeek-V3. The output comes last.
"""

import torch
import triton
import triton.language as tl
from flashinfer.fused_moe import cutlass_fused_moe, fused_topk_deepseek

TOP_K, GROUPS, TOP_GROUPS = 8, 8, 4
BLOCK = 128  # one scale stands for 1x128 of an activation row
COLUMNS = 1024


@triton.jit(do_not_specialize=["tokens"])
def dequantise_kernel(hidden, hidden_scale, out, tokens, H: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """hidden [T, H] e4m3 times hidden_scale [H/128, T] -> out [T, H] bfloat16."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(hidden_scale + (column // BLOCK).to(tl.int64) * tokens + token)
    value = tl.load(hidden + token * H + column).to(tl.float32) * scale
    tl.store(out + token * H + column, value.to(tl.bfloat16))


def run(logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor, output):
    """Inputs in the definition's order, then the bfloat16 output [T, H]."""
    tokens, size = hidden.shape
    if tokens == 0:
        return
    ranks = logits.shape[1] // len(w1)
    rank, rest = divmod(int(offset), len(w1))
    if rest:
        raise ValueError(f"local_expert_offset: expected a multiple of {len(w1)} local experts, got {int(offset)}")
    weights = torch.empty(tokens, TOP_K, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(tokens, TOP_K, dtype=torch.int32, device=hidden.device)
    fused_topk_deepseek(logits, bias.float(), GROUPS, TOP_GROUPS, TOP_K, float(factor), weights, ids)
    x = torch.empty(tokens, size, dtype=torch.bfloat16, device=hidden.device)
    grid = (tokens, size // COLUMNS)
    dequantise_kernel[grid](hidden, hidden_scale, x, tokens, H=size, COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=4)
    cutlass_fused_moe(
        x, ids, weights, w1, w2, torch.bfloat16, quant_scales=[w1_scale, w2_scale],
        ep_size=ranks, ep_rank=rank, output=output, use_deepseek_fp8_block_scale=True,
    )  # fmt: skip
