"""sgl_kernel's and deep_gemm's operators in plain PyTorch, for running the peers' solutions on a CPU.

`install()` registers torch.ops.sgl_kernel with the schemas of sglang-kernel 0.4.2.post2 and puts stand-ins for both modules
into sys.modules. What an operator leaves unwritten stays unwritten here too (poison, where a caller made it so).
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from blockmoe.geometry import BLOCK, MoEGeometry
from blockmoe.reference import route

SCHEMAS = {
    "moe_fused_gate": "(Tensor input, Tensor bias, int num_expert_group, int topk_group, int topk, int num_fused_shared_experts,"
    " float routed_scaling_factor, bool apply_routed_scaling_factor_on_output) -> (Tensor[])",
    "prepare_moe_input": "(Tensor topk_ids, Tensor expert_offsets, Tensor? blockscale_offsets, Tensor problem_sizes1,"
    " Tensor problem_sizes2, Tensor input_permutation, Tensor output_permutation, int num_experts, int n, int k) -> ()",
    "shuffle_rows": "(Tensor input, Tensor dst2src_map, Tensor output) -> ()",
    "fp8_blockwise_scaled_grouped_mm": "(Tensor output, Tensor a_ptrs, Tensor b_ptrs, Tensor out_ptrs, Tensor a_scales_ptrs,"
    " Tensor b_scales_ptrs, Tensor a, Tensor b, Tensor scales_a, Tensor scales_b, Tensor stride_a, Tensor stride_b,"
    " Tensor stride_c, Tensor layout_sfa, Tensor layout_sfb, Tensor problem_sizes, Tensor expert_offsets, Tensor workspace) -> ()",
    "silu_and_mul": "(Tensor! out, Tensor input) -> ()",
    "apply_shuffle_mul_sum": "(Tensor input, Tensor output, Tensor permutation, Tensor? factors) -> ()",
    "moe_align_block_size": "(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids,"
    " Tensor! num_tokens_post_pad, Tensor! cumsum_buffer, bool pad_sorted_token_ids) -> ()",
    "moe_sum_reduce": "(Tensor input, Tensor output, float routed_scaling_factor) -> ()",
    "sgl_per_token_group_quant_8bit": "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min,"
    " float fp8_max, bool scale_ue8m0) -> ()",
}


def dequantised(codes, scales, height):
    """codes [R, K] e4m3, scales [R / height, K / BLOCK]."""
    return codes.float() * scales.repeat_interleave(height, 0)[: len(codes)].repeat_interleave(BLOCK, 1)


def moe_fused_gate(logits, bias, groups, top_groups, top_k, shared, factor, scaled):
    assert bias.dtype == logits.dtype == torch.float32 and shared == 0
    geometry = MoEGeometry(logits.shape[1], logits.shape[1], top_k, BLOCK, BLOCK, "deepseek_v3", groups, top_groups)
    ids, weights = route(logits, bias, geometry, factor if scaled else 1.0)
    return [weights, ids.to(torch.int32)]


def prepare_moe_input(ids, offsets, _, sizes1, sizes2, token_of_row, row_of_pair, experts, middle, hidden):
    assert ids.is_contiguous() and ids.dtype == torch.int32
    flat = ids.flatten()
    counts = torch.bincount(flat[flat >= 0], minlength=experts)[:experts]
    offsets[0] = 0
    offsets[1:] = counts.cumsum(0)
    sizes1.copy_(torch.stack([counts, counts * 0 + 2 * middle, counts * 0 + hidden], 1))
    sizes2.copy_(torch.stack([counts, counts * 0 + hidden, counts * 0 + middle], 1))
    order = flat.sort(stable=True).indices
    token_of_row.copy_(order // ids.shape[1])
    row_of_pair[order] = torch.arange(len(flat), dtype=torch.int32)


def shuffle_rows(source, row_map, out):
    assert source.is_contiguous() and out.is_contiguous() and source.dtype == out.dtype
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[source.itemsize]
    out.view(width).copy_(source.view(width)[row_map.long()])


def fp8_blockwise_scaled_grouped_mm(
    out, a_ptrs, b_ptrs, out_ptrs, a_scales_ptrs, b_scales_ptrs, a, b, scales_a, scales_b, stride_a, stride_b, stride_c,
    layout_a, layout_b, sizes, offsets, workspace,
):  # fmt: skip
    assert a.is_contiguous() and scales_a.is_contiguous() and b.mT.is_contiguous() and scales_b.mT.is_contiguous()
    assert stride_a.dtype == stride_b.dtype == stride_c.dtype == torch.int64
    assert (stride_a == a.shape[1]).all() and (stride_b == a.shape[1]).all() and (stride_c == out.shape[1]).all()
    assert len(sizes) == len(offsets) == len(b) and workspace.numel() >= 90_000
    for expert, (count, n, k) in enumerate(sizes.tolist()):
        assert (n, k) == (out.shape[1], a.shape[1])
        rows = slice(int(offsets[expert]), int(offsets[expert]) + count)
        if count:
            weight = dequantised(b[expert].t(), scales_b[expert].t(), BLOCK)
            out[rows] = (dequantised(a[rows], scales_a[rows], 1) @ weight.t()).to(out.dtype)


def silu_and_mul(out, x):
    gate, up = x.float().chunk(2, 1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def apply_shuffle_mul_sum(rows, out, permutation, factors):
    assert factors.dtype == out.dtype == rows.dtype and permutation.dim() == 1
    gathered = rows[permutation.long()].view(len(out), -1, rows.shape[1]).float()
    out.copy_((gathered * factors.float().view(len(out), -1, 1)).sum(1))


def moe_align_block_size(ids, experts, block, sorted_ids, tile_expert, total, running, pad):
    """Id -1 is an expert of its own and comes first, in tiles of expert -1."""
    flat = (ids + 1).flatten().long()
    assert pad and len(running) == experts + 1
    sorted_ids.fill_(len(flat))
    start = 0
    for expert in range(experts):
        pairs = (flat == expert).nonzero().flatten().int()
        padded = -(-len(pairs) // block) * block
        sorted_ids[start : start + len(pairs)] = pairs
        tile_expert[start // block : (start + padded) // block] = expert - 1
        start += padded
    total.fill_(start)


def moe_sum_reduce(rows, out, factor):
    out.copy_(rows.float().sum(1) * factor)


def sgl_per_token_group_quant_8bit(x, codes, scales, size, eps, low, high, ue8m0=False):
    assert x.is_contiguous() and not ue8m0
    blocks = x.float().view(len(x), -1, size)
    amax = blocks.abs().amax(2).clamp(min=eps)
    scales.copy_(amax / high)
    codes.copy_((blocks * (high / amax).unsqueeze(2)).clamp(low, high).flatten(1))


def aligned_scales(scales, rows, groups=None):
    """DeepGEMM's demand on the row side's scales, so that it copies nothing: rows contiguous."""
    assert rows % 4 == 0 and scales.stride()[-2:] == (1, rows)
    assert groups is None or scales.stride(0) == rows * scales.shape[2]
    return scales


def fp8_m_grouped_gemm_nt_masked(a, b, out, counts, expected):
    (x, x_scales), (w, w_scales) = a, b
    assert counts.dtype == torch.int32 and expected > 0 and x.shape[1] % 128 == 0
    aligned_scales(x_scales, x.shape[1], len(x))
    for expert, count in enumerate(counts.tolist()):
        rows = dequantised(x[expert, :count], x_scales[expert, :count], 1)
        out[expert, :count] = (rows @ dequantised(w[expert], w_scales[expert], BLOCK).t()).to(out.dtype)


def m_grouped_fp8_gemm_nt_contiguous(a, b, out, layout, use_psum_layout=False, expected_m_for_psum_layout=None):
    (x, x_scales), (w, w_scales) = a, b
    assert use_psum_layout and layout.dtype == torch.int32 and layout.shape == (len(w),)
    aligned_scales(x_scales, len(x))
    start = 0
    for expert, end in enumerate(layout.tolist()):
        rows = dequantised(x[start:end], x_scales[start:end], 1)
        out[start:end] = (rows @ dequantised(w[expert], w_scales[expert], BLOCK).t()).to(out.dtype)
        start = -(-end // 128) * 128


def install() -> None:
    library = torch.library.Library("sgl_kernel", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, globals()[name], "CPU")
    sgl_kernel, deep_gemm = ModuleType("sgl_kernel"), ModuleType("deep_gemm")
    sgl_kernel.library = library  # kept alive
    sgl_kernel.sgl_per_token_group_quant_8bit = sgl_per_token_group_quant_8bit
    deep_gemm.fp8_m_grouped_gemm_nt_masked = fp8_m_grouped_gemm_nt_masked
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
    sys.modules.update(sgl_kernel=sgl_kernel, deep_gemm=deep_gemm)
