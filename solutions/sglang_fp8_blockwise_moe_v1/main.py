"""FP8 block-scale mixture-of-experts on sgl_kernel's operators, over all 8 rows of every token.

Ids of experts elsewhere are clamped into the local range and get weight 0, so that their rows are computed and then
multiplied away. Every buffer is allocated in the call; SwiGLU runs on a copy with the halves swapped, and the
quantisation is plain PyTorch. Shapes, for T tokens and R = 8 T rows: hidden [T, H], GEMM1 out [R, 2I], GEMM2 out [R, H].
"""

import sgl_kernel  # noqa: F401  (registers torch.ops.sgl_kernel)
import torch

OPS = torch.ops.sgl_kernel
TOP_K, GROUPS, TOP_GROUPS = 8, 8, 4
BLOCK = 128  # one scale stands for 1x128 of an activation row
E4M3_MAX = 448.0
WORKSPACE_BYTES = 1 << 30


def run(logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor):
    """Inputs in the definition's order; returns bfloat16 [T, H]."""
    tokens, hidden_size = hidden.shape
    output = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, device=hidden.device)
    if tokens == 0:
        return output
    local_ids, weights = route(logits, bias, int(offset), float(factor), len(w1))
    groups = Groups(local_ids, len(w1), w2.shape[2], hidden_size)

    rows = shuffled(hidden, groups.token_of_row)
    scales = shuffled(hidden_scale.t().contiguous(), groups.token_of_row)  # [R, H/128]
    gate_up = groups.matmul(rows, scales, w1, w1_scale, groups.sizes1, groups.stride_hidden, groups.stride_gate_up)
    middle = silu_and_mul(gate_up)  # [R, I]
    rows, scales = quantised(middle)
    result = groups.matmul(rows, scales, w2, w2_scale, groups.sizes2, groups.stride_middle, groups.stride_hidden)
    OPS.apply_shuffle_mul_sum.default(result, output, groups.row_of_pair, weights)
    return output


def route(logits, bias, offset, factor, experts):
    """Local expert of each (token, slot), int32 [T, 8] in 0 .. experts - 1, and its weight, bfloat16 [T, 8], 0 if elsewhere."""
    weights, ids = OPS.moe_fused_gate.default(logits, bias.float(), GROUPS, TOP_GROUPS, TOP_K, 0, factor, True)
    local = ids - offset
    clamped = local.clamp(0, experts - 1)
    return clamped, (weights * (local == clamped)).to(torch.bfloat16)


class Groups:
    """Rows sorted by expert, and what the grouped matrix product wants to know about them."""

    def __init__(self, local_ids, experts, middle, hidden):
        device, pairs = local_ids.device, local_ids.numel()
        int32, int64 = {"dtype": torch.int32, "device": device}, {"dtype": torch.int64, "device": device}
        self.token_of_row, self.row_of_pair = torch.empty(pairs, **int32), torch.empty(pairs, **int32)
        self.offsets = torch.empty(experts + 1, **int32)
        self.sizes1, self.sizes2 = torch.empty(experts, 3, **int32), torch.empty(experts, 3, **int32)
        self.pointers = [torch.empty(experts, **int64) for _ in range(5)]
        self.layouts = [torch.empty(experts, 5, **int32) for _ in range(2)]
        self.stride_hidden = torch.full((experts,), hidden, **int64)
        self.stride_middle = torch.full((experts,), middle, **int64)
        self.stride_gate_up = torch.full((experts,), 2 * middle, **int64)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        OPS.prepare_moe_input.default(
            local_ids, self.offsets, None, self.sizes1, self.sizes2, self.token_of_row, self.row_of_pair, experts, middle, hidden
        )

    def matmul(self, rows, scales, weights, weight_scales, sizes, stride_in, stride_out):
        """[R, N] from rows [R, K] and weights [experts, N, K]; the transposes are views."""
        out = torch.empty(len(rows), weights.shape[1], dtype=torch.bfloat16, device=rows.device)
        OPS.fp8_blockwise_scaled_grouped_mm.default(
            out, *self.pointers, rows, weights.transpose(1, 2), scales, weight_scales.transpose(1, 2),
            stride_in, stride_in, stride_out, *self.layouts, sizes, self.offsets[:-1], self.workspace,
        )  # fmt: skip
        return out


def shuffled(source, row_map):
    """Rows of a matrix in the order of an int32 map."""
    out = torch.empty(len(row_map), source.shape[1], dtype=source.dtype, device=source.device)
    OPS.shuffle_rows.default(source, row_map, out)
    return out


def silu_and_mul(gate_up):
    """silu(second half) * first half: the operator wants the gate first, so that the halves are swapped by a copy."""
    up, gate = gate_up.chunk(2, dim=1)
    out = torch.empty(up.shape, dtype=gate_up.dtype, device=gate_up.device)
    OPS.silu_and_mul.default(out, torch.cat((gate, up), dim=1))
    return out


def quantised(x):
    """e4m3 codes [R, I] and scales [R, I/128] of bfloat16 rows."""
    blocks = x.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=2).clamp_(min=1e-10).div_(E4M3_MAX)
    codes = blocks.div_(scales.unsqueeze(2)).clamp_(-E4M3_MAX, E4M3_MAX).flatten(1).to(torch.float8_e4m3fn)
    return codes, scales
