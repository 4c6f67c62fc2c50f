"""FP8 block-scale mixture-of-experts on sgl_kernel's operators, with the steps between them in Triton; third version.

What the reports of the second version name as next steps, as far as Hopper allows: no transpose is materialised, rows and
their scales are gathered by one kernel, SwiGLU and quantisation are one kernel, the clamping is one kernel, and the
combination skips the rows whose weight is zero. All 8 rows of every token still go through both matrix products: ids of
experts elsewhere are clamped into the local range. Buffers live at module level and grow with the largest T seen; their
contents never outlive a call. For T tokens and R = 8 T rows: hidden [T, H], GEMM1 out [R, 2I], GEMM2 out [R, H].
"""

import sgl_kernel  # noqa: F401  (registers torch.ops.sgl_kernel)
import torch
from steps_v3 import combine, gather, localise, swiglu_quantise

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
    b.bias.copy_(bias)
    weights, ids = OPS.moe_fused_gate.default(logits, b.bias, GROUPS, TOP_GROUPS, TOP_K, 0, float(factor), True)
    local_ids, count = b.local_ids[:tokens], tokens * TOP_K
    localise(ids, int(offset), b.experts, local_ids)
    token_of_row, row_of_pair = b.token_of_row[:count], b.row_of_pair[:count]
    OPS.prepare_moe_input.default(local_ids, b.offsets, None, b.sizes1, b.sizes2, token_of_row, row_of_pair, b.experts, b.middle, b.hidden)

    rows, scales = b.rows[:count], b.row_scales[:count]
    gather(hidden, hidden_scale, token_of_row, rows, scales)
    gate_up = matmul(b, b.gate_up[:count], rows, scales, w1, w1_scale, b.sizes1, b.stride_hidden, b.stride_gate_up)
    codes, scales = b.codes[:count], b.code_scales[:count]
    swiglu_quantise(gate_up, codes, scales)
    result = matmul(b, b.result[:count], codes, scales, w2, w2_scale, b.sizes2, b.stride_middle, b.stride_hidden)
    combine(result, row_of_pair, ids, weights, int(offset), b.experts, output)


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
        self.local_ids = empty(tokens, TOP_K, dtype=torch.int32)
        self.token_of_row, self.row_of_pair = empty(rows, dtype=torch.int32), empty(rows, dtype=torch.int32)
        self.offsets = empty(experts + 1, dtype=torch.int32)
        self.sizes1, self.sizes2 = empty(experts, 3, dtype=torch.int32), empty(experts, 3, dtype=torch.int32)
        self.pointers = [empty(experts, dtype=torch.int64) for _ in range(5)]
        self.layouts = [empty(experts, 5, dtype=torch.int32) for _ in range(2)]
        self.stride_hidden, self.stride_middle, self.stride_gate_up = filled(hidden), filled(middle), filled(2 * middle)
        self.workspace = empty(WORKSPACE_BYTES, dtype=torch.uint8)
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
