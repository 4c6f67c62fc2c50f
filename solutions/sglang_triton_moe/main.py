"""FP8 block-scale mixture-of-experts the way SGLang and vLLM run it: a Triton grouped product between sgl_kernel's operators.

The grouped product is this project's own writing of the algorithm of their `fused_moe_kernel`, which needs the whole server
package to import. As there under expert parallelism, the alignment step sends pairs whose expert lives elsewhere to tiles
of expert -1, which compute nothing; SwiGLU, quantisation and the reduction still go over all 8 rows of every token, so that
the second product has to write zeros for those pairs. The routing weight is applied by the second product. No host
synchronisation and no shape that depends on contents: a call can be captured in a CUDA graph. Buffers live at module level;
their contents never outlive a call. The output comes last.
"""

from dataclasses import dataclass

import sgl_kernel  # noqa: F401  (registers torch.ops.sgl_kernel)
import torch
from grouped_gemm import BLOCK, grouped_gemm, localise, swiglu_quantise

OPS = torch.ops.sgl_kernel
TOP_K, GROUPS, TOP_GROUPS = 8, 8, 4
E4M3 = torch.float8_e4m3fn
_buffers = {}  # by device


@dataclass(frozen=True)
class Tile:
    block_m: int  # pairs; both products of a call share it, since sorting pads to it
    block_n: int
    group_m: int
    num_warps: int
    num_stages: int


# H100, both products: 16 x 64 reaches 95 % of the read bandwidth at T <= 80, 128 x 128 is the best above 10,000
SMALL = Tile(16, 64, 1, 4, 4)
MEDIUM = Tile(64, 128, 8, 4, 4)
LARGE = Tile(128, 128, 16, 8, 4)


def choose_tile(tokens):
    if tokens <= 256:
        return SMALL
    return MEDIUM if tokens <= 2048 else LARGE


def run(logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor, output, tile=None):
    """Inputs in the definition's order, then the bfloat16 output [T, H]; `tile` overrides the choice."""
    tokens, pairs = len(hidden), len(hidden) * TOP_K
    if tokens == 0:
        return
    tile = tile or choose_tile(tokens)
    b = buffers(tokens, len(w1), w2.shape[2], hidden.shape[1], hidden.device)
    b.bias.copy_(bias)
    weights, ids = OPS.moe_fused_gate.default(logits, b.bias, GROUPS, TOP_GROUPS, TOP_K, 0, float(factor), True)
    local_ids = b.local_ids[:tokens]
    localise(ids, int(offset), b.experts, local_ids)
    tiles = align(local_ids, tile.block_m, b)

    gate_up = b.gate_up[:pairs]
    grouped_gemm(hidden, hidden_scale, (1, tokens), w1, w1_scale, gate_up, tiles, tile, None, TOP_K, zero_others=False)
    codes, scales = b.codes[:pairs], b.code_scales[:pairs]
    swiglu_quantise(gate_up, codes, scales)
    result = b.result[:pairs]
    grouped_gemm(codes, scales, (b.middle // BLOCK, 1), w2, w2_scale, result, tiles, tile, weights, 1, zero_others=True)
    OPS.moe_sum_reduce.default(result.view(tokens, TOP_K, -1), output, 1.0)


def align(local_ids, height, b):
    """(sorted_pairs, tile_expert, padded_total): pairs by expert, each expert's padded to `height`; -1 is an expert of its own."""
    pairs = local_ids.numel()
    most = pairs + min(pairs, b.experts + 1) * (height - 1)
    sorted_pairs, tile_expert = b.sorted_pairs[:most], b.tile_expert[: -(-most // height)]
    OPS.moe_align_block_size.default(local_ids, b.experts + 1, height, sorted_pairs, tile_expert, b.padded_total, b.running_total, True)
    return sorted_pairs, tile_expert, b.padded_total


class Buffers:
    """Everything a call of up to `tokens` tokens writes before its output."""

    def __init__(self, tokens, experts, middle, hidden, device):
        def empty(*shape, dtype):
            return torch.empty(shape, dtype=dtype, device=device)

        pairs = tokens * TOP_K
        self.tokens, self.experts, self.middle, self.hidden = tokens, experts, middle, hidden
        self.bias = empty(256, dtype=torch.float32)
        self.local_ids = empty(tokens, TOP_K, dtype=torch.int32)
        most = pairs + (experts + 1) * (LARGE.block_m - 1)
        self.sorted_pairs = empty(most + 4, dtype=torch.int32)  # the operator fills it 4 at a time
        self.tile_expert = empty(most // SMALL.block_m + 1, dtype=torch.int32)
        self.padded_total, self.running_total = empty(1, dtype=torch.int32), empty(experts + 2, dtype=torch.int32)
        self.gate_up = empty(pairs, 2 * middle, dtype=torch.bfloat16)
        self.codes, self.code_scales = empty(pairs, middle, dtype=E4M3), empty(pairs, middle // BLOCK, dtype=torch.float32)
        self.result = empty(pairs, hidden, dtype=torch.bfloat16)


def buffers(tokens, experts, middle, hidden, device):
    found = _buffers.get(device)
    if found is None or found.tokens < tokens or (found.experts, found.middle, found.hidden) != (experts, middle, hidden):
        _buffers.pop(device, None)
        found = _buffers[device] = Buffers(tokens, experts, middle, hidden, device)
    return found
