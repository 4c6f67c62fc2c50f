"""FP8 block-scale mixture-of-experts on sgl_kernel's operators and one Triton kernel, every buffer preallocated.

Ids of experts elsewhere are clamped into the local range and get weight 0, so that their rows are computed and then
multiplied away. Buffers live at module level and grow with the largest T seen; their contents never outlive a call.
For T tokens and R = 8 T rows: hidden [T, H], GEMM1 out [R, 2I], GEMM2 out [R, H]; the output comes last, to be filled.
"""

import sgl_kernel  # noqa: F401  (registers torch.ops.sgl_kernel)
import torch
from swiglu_quantise import swiglu_quantise

OPS = torch.ops.sgl_kernel
TOP_K, GROUPS, TOP_GROUPS = 8, 8, 4
BLOCK = 128  # one scale stands for 1x128 of an activation row
WORKSPACE_BYTES = 90_000
E4M3 = torch.float8_e4m3fn
_buffers = {}  # by device


def run(logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor, output):
    """Inputs in the definition's order, then the bfloat16 output [T, H]."""
    tokens = len(hidden)
    if tokens == 0:
        return
    b = buffers(tokens, len(w1), w2.shape[2], hidden.shape[1], hidden.device)
    local_ids, weights = route(logits, bias, int(offset), float(factor), b)
    pairs = b.token_of_row[: tokens * TOP_K], b.row_of_pair[: tokens * TOP_K]
    OPS.prepare_moe_input.default(local_ids, b.offsets, None, b.sizes1, b.sizes2, *pairs, b.experts, b.middle, b.hidden)

    rows, scales = b.rows[: tokens * TOP_K], b.row_scales[: tokens * TOP_K]
    OPS.shuffle_rows.default(hidden, pairs[0], rows)
    b.token_scales[:tokens].copy_(hidden_scale.t())
    OPS.shuffle_rows.default(b.token_scales[:tokens], pairs[0], scales)
    gate_up = matmul(b, b.gate_up[: len(rows)], rows, scales, w1, w1_scale, b.sizes1, b.stride_hidden, b.stride_gate_up)
    codes, scales = b.codes[: len(rows)], b.code_scales[: len(rows)]
    swiglu_quantise(gate_up, codes, scales)
    result = matmul(b, b.result[: len(rows)], codes, scales, w2, w2_scale, b.sizes2, b.stride_middle, b.stride_hidden)
    OPS.apply_shuffle_mul_sum.default(result, output, pairs[1], weights)


def route(logits, bias, offset, factor, b):
    """Local expert of each (token, slot), int32 [T, 8] in 0 .. experts - 1, and its weight, bfloat16 [T, 8], 0 if elsewhere."""
    b.bias.copy_(bias)
    weights, ids = OPS.moe_fused_gate.default(logits, b.bias, GROUPS, TOP_GROUPS, TOP_K, 0, factor, True)
    tokens = len(ids)
    clamped, masked = b.local_ids[:tokens], b.weights[:tokens]
    ids.sub_(offset)
    torch.clamp(ids, 0, b.experts - 1, out=clamped)
    torch.mul(weights, ids == clamped, out=masked)  # rounds to bfloat16
    return clamped, masked


def matmul(b, out, rows, scales, weights, weight_scales, sizes, stride_in, stride_out):
    """out [R, N] from rows [R, K] and weights [experts, N, K]; the transposes are views."""
    OPS.fp8_blockwise_scaled_grouped_mm.default(
        out, *b.pointers, rows, weights.transpose(1, 2), scales, weight_scales.transpose(1, 2),
        stride_in, stride_in, stride_out, *b.layouts, sizes, b.offsets[:-1], b.workspace,
    )  # fmt: skip
    return out


class Buffers:
    """Everything a call of up to `tokens` tokens writes before its output."""

    def __init__(self, tokens, experts, middle, hidden, device):
        def empty(*shape, dtype):
            return torch.empty(shape, dtype=dtype, device=device)

        def filled(value):
            return torch.full((experts,), value, dtype=torch.int64, device=device)

        rows = tokens * TOP_K
        self.tokens, self.experts, self.middle, self.hidden = tokens, experts, middle, hidden
        self.bias = empty(256, dtype=torch.float32)
        self.local_ids, self.weights = empty(tokens, TOP_K, dtype=torch.int32), empty(tokens, TOP_K, dtype=torch.bfloat16)
        self.token_of_row, self.row_of_pair = empty(rows, dtype=torch.int32), empty(rows, dtype=torch.int32)
        self.offsets = empty(experts + 1, dtype=torch.int32)
        self.sizes1, self.sizes2 = empty(experts, 3, dtype=torch.int32), empty(experts, 3, dtype=torch.int32)
        self.pointers = [empty(experts, dtype=torch.int64) for _ in range(5)]
        self.layouts = [empty(experts, 5, dtype=torch.int32) for _ in range(2)]
        self.stride_hidden, self.stride_middle, self.stride_gate_up = filled(hidden), filled(middle), filled(2 * middle)
        self.workspace = empty(WORKSPACE_BYTES, dtype=torch.uint8)
        self.token_scales = empty(tokens, hidden // BLOCK, dtype=torch.float32)
        self.rows, self.row_scales = empty(rows, hidden, dtype=E4M3), empty(rows, hidden // BLOCK, dtype=torch.float32)
        self.gate_up = empty(rows, 2 * middle, dtype=torch.bfloat16)
        self.codes, self.code_scales = empty(rows, middle, dtype=E4M3), empty(rows, middle // BLOCK, dtype=torch.float32)
        self.result = empty(rows, hidden, dtype=torch.bfloat16)


def buffers(tokens, experts, middle, hidden, device):
    found = _buffers.get(device)
    if found is None or found.tokens < tokens or (found.experts, found.middle, found.hidden) != (experts, middle, hidden):
        _buffers.pop(device, None)
        found = _buffers[device] = Buffers(tokens, experts, middle, hidden, device)
    return found
