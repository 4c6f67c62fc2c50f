"""FP8 block-scale mixture-of-experts on DeepGEMM's grouped products, over the local pairs alone.

route -> gather -> GEMM1 -> SwiGLU and quantisation -> GEMM2 -> combine, in two layouts of the pairs' rows:

- masked, up to MASKED_TOKENS tokens: [experts, max_rows], of which each product looks at an expert's own count;
- contiguous above: experts one after the other, each at a multiple of 128 rows. Where experts end is told by their ends on
  the device (`use_psum_layout`): with a row map instead, the products would load every row up to the bound that the host
  knows, 8 T + 128 per expert, since a -1 there skips the arithmetic and not the loads.

No host synchronisation in either. Buffers live at module level; their contents never outlive a call. The output comes last.
"""

import deep_gemm
import torch
from deepgemm_steps import BLOCK, combine, gather, route, swiglu_quantise

GROUPS, TOP_GROUPS, TOP_K = 8, 4, 8
MASKED_TOKENS = 2048  # kernels alone on an H100: masked 527 us, contiguous 612 us at T = 901; between 901 and 11,948 not measured
ALIGN = 128  # rows: of an expert's segment, and of max_rows, so that a tile never reaches into the next expert
_places = {}  # by device and layout
_arenas = {}  # by device: bytes that the buffers of both layouts share


def run(logits, bias, hidden, hidden_scale, w1, w1_scale, w2, w2_scale, offset, factor, output, masked=None):
    """Inputs in the definition's order, then the bfloat16 output [T, H]; `masked` overrides the choice of the layout."""
    tokens = len(hidden)
    if tokens == 0:
        return
    masked = tokens <= MASKED_TOKENS if masked is None else masked
    p = places(tokens, masked, len(w1), w2.shape[2], hidden.shape[1], hidden.device)
    route(logits, bias, int(offset), float(factor), p, GROUPS, TOP_GROUPS)
    gather(hidden, hidden_scale, p)
    expected = max(1, -(-tokens * TOP_K // logits.shape[1]))  # rows of an expert, were routing uniform
    grouped_product(p, (p.rows, p.row_scales), (w1, w1_scale), p.gate_up, expected)
    swiglu_quantise(tokens, p)
    grouped_product(p, (p.codes, p.code_scales), (w2, w2_scale), p.result, expected)
    combine(output, p)


def grouped_product(p, rows, weights, out, expected):
    if p.masked:
        deep_gemm.fp8_m_grouped_gemm_nt_masked(rows, weights, out, p.counts, expected)
    else:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(rows, weights, out, p.ends, use_psum_layout=True, expected_m_for_psum_layout=expected)


class Places:
    """Views for one T and layout on the arena: pairs [T, 8] and rows [experts, max_rows, ...] or [row_bound, ...]."""

    def __init__(self, tokens, masked, experts, middle, hidden, device):
        self.masked, self.align = masked, ALIGN
        padded = -(-tokens // ALIGN) * ALIGN
        most = tokens * TOP_K + experts * (ALIGN - 1)  # were every pair local and every segment's padding the longest
        lead = (experts, padded) if masked else (-(-most // ALIGN) * ALIGN,)
        self.bound = lead[-1]
        wanted = {
            "experts": ((tokens, TOP_K), torch.int32),
            "positions": ((tokens, TOP_K), torch.int32),
            "weights": ((tokens, TOP_K), torch.float32),
            "counts": ((experts,), torch.int32),
            "ends": ((experts,), torch.int32),
            "rows": ((*lead, hidden), torch.float8_e4m3fn),
            "row_scales": ((*lead[:-1], hidden // BLOCK, self.bound), torch.float32),
            "gate_up": ((*lead, 2 * middle), torch.bfloat16),
            "codes": ((*lead, middle), torch.float8_e4m3fn),
            "code_scales": ((*lead[:-1], middle // BLOCK, self.bound), torch.float32),
            "result": ((*lead, hidden), torch.bfloat16),
        }
        start, spans = 0, {}
        for name, (shape, dtype) in wanted.items():
            spans[name] = (start, start + torch.Size(shape).numel() * dtype.itemsize)
            start = -(-spans[name][1] // 1024) * 1024
        memory = arena(start, device)
        for name, (shape, dtype) in wanted.items():
            begin, end = spans[name]
            setattr(self, name, memory[begin:end].view(dtype).view(shape))
        self.row_scales, self.code_scales = self.row_scales.mT, self.code_scales.mT  # [..., rows, K/128], rows contiguous


def arena(size, device):
    """At least `size` bytes, kept and grown for all T."""
    if device not in _arenas or len(_arenas[device]) < size:
        for key in [key for key in _places if key[0] == device]:
            del _places[key]  # views on the old bytes
        _arenas.pop(device, None)
        _arenas[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return _arenas[device]


def places(tokens, masked, *sizes_and_device):
    key = (sizes_and_device[-1], tokens, masked, *sizes_and_device[:-1])
    found = _places.get(key)
    if found is None:
        found = Places(tokens, masked, *sizes_and_device)
        _places[key] = found
    return found
