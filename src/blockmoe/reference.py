"""What the operator computes, in plain float32 PyTorch: routing, the mathematical reference, and the kernels' oracle.

Shapes, for a geometry with E experts, L of them local, hidden size H and intermediate size I:

    routing_logits [T, E] float32        gemm1_weights [L, 2I, H] e4m3, rows 0 .. I-1 up, the others gate
    routing_bias [E] bfloat16            gemm1_weights_scale [L, 2I/128, H/128] float32
    hidden_states [T, H] e4m3            gemm2_weights [L, H, I] e4m3
    hidden_states_scale [H/128, T] f32   gemm2_weights_scale [L, H/128, I/128] float32

Scales may have either sign. Everything runs on the device of its inputs, one active expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from blockmoe.geometry import BLOCK, MoEGeometry

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-34  # a group of C smaller than this is scaled as if it were this large: its scale stays a normal float32
Product = Callable[[Tensor, Tensor], Tensor]  # of [M, G] and [N, G]: [M, N]


def route(logits: Tensor, bias: Tensor | None, geometry: MoEGeometry, routed_scaling_factor: float) -> tuple[Tensor, Tensor]:
    """Chosen experts and their weights: (expert_ids int64 [T, top_k], weights float32 [T, top_k]), best first.

    logits [T, E] of any float dtype; bias [E], finite, used by `deepseek_v3` alone. Everything is computed in float32 and
    ties go to the lower index. A NaN logit counts as the lowest there is (-inf), so it is chosen last and has weight
    zero. In `renormalize` infinities count as the largest finite values, so that the softmax stays finite.
    """
    if geometry.routing == "renormalize":
        return _route_renormalize(logits.float(), geometry, routed_scaling_factor)
    if bias is None:
        raise ValueError("bias: expected a tensor [num_experts] for deepseek_v3 routing, got None")
    return _route_deepseek_v3(logits.float(), bias.float(), geometry, routed_scaling_factor)


def _route_deepseek_v3(logits: Tensor, bias: Tensor, geometry: MoEGeometry, factor: float) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits.masked_fill(logits.isnan(), -torch.inf))
    biased = scores + bias  # [T, E]
    if geometry.topk_group < geometry.n_group:
        groups = biased.view(-1, geometry.n_group, geometry.experts_per_group)
        group_score = groups.topk(min(2, geometry.experts_per_group), dim=2).values.sum(2)  # [T, n_group]
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, _largest(group_score, geometry.topk_group), True)
        biased = groups.masked_fill(~kept.unsqueeze(2), -torch.inf).view_as(biased)
    expert_ids = _largest(biased, geometry.top_k)
    weights = scores.gather(1, expert_ids)
    return expert_ids, weights / (weights.sum(1, keepdim=True) + 1e-20) * factor


def _route_renormalize(logits: Tensor, geometry: MoEGeometry, factor: float) -> tuple[Tensor, Tensor]:
    limits = torch.finfo(torch.float32)
    logits = logits.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    expert_ids = _largest(logits, geometry.top_k)
    return expert_ids, torch.softmax(logits.gather(1, expert_ids), dim=1) * factor


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of each row's largest values, best first, ties to the lower index (which torch.topk does not promise)."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def moe_reference(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    geometry: MoEGeometry,
) -> Tensor:
    """The layer over the local experts in float32, nothing rounded on the way: float32 [T, H].

    A token without a pair gets zeros. routing_bias is None for `renormalize`.
    """
    expert_ids, weights = route(routing_logits, routing_bias, geometry, routed_scaling_factor)
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert, tokens, weight in _active_experts(expert_ids, weights, local_expert_offset, len(gemm1_weights)):
        hidden = hidden_states[tokens].float() * hidden_states_scale[:, tokens].t().repeat_interleave(BLOCK, 1)
        up, gate = (hidden @ _dequantised(gemm1_weights[expert], gemm1_weights_scale[expert]).t()).chunk(2, dim=1)
        result = (torch.nn.functional.silu(gate) * up) @ _dequantised(gemm2_weights[expert], gemm2_weights_scale[expert]).t()
        output.index_add_(0, tokens, result * weight)
    return output


def moe_oracle(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    geometry: MoEGeometry,
    intermediate: Literal["e4m3", "bf16"] = "e4m3",
    group: int = BLOCK,
    rows: Literal["float32", "bf16", "running bf16"] = "float32",
    product: Product | None = None,
) -> Tensor:
    """The layer with the rounding of the kernels: bfloat16 [T, H].

    Products are summed over a scale's part of K in float32, or by `product`, multiplied by the product of both scales, and accumulated in
    float32.
    C is rounded once: to e4m3 with a scale of max(amax, AMAX_FLOOR) / 448 for each 1 x `group` (a divisor of 128), or to
    bfloat16. A pair's row, times its weight, is rounded to bfloat16 where `rows` says so. A token's experts are summed in
    float32 in ascending order, and the output is rounded to bfloat16; "running bf16" rounds the sum after every expert.
    A chosen expert of weight 0 counts for nothing.
    """
    if intermediate not in ("e4m3", "bf16"):
        raise ValueError(f"intermediate: expected e4m3 or bf16, got {intermediate!r}")
    expert_ids, weights = route(routing_logits, routing_bias, geometry, routed_scaling_factor)
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert, tokens, weight in _active_experts(expert_ids, weights, local_expert_offset, len(gemm1_weights)):
        hidden, hidden_scale = hidden_states[tokens], hidden_states_scale[:, tokens].t()
        gemm1 = block_scaled_matmul(hidden, hidden_scale, gemm1_weights[expert], gemm1_weights_scale[expert], product)
        up, gate = gemm1.chunk(2, dim=1)
        c = torch.nn.functional.silu(gate) * up  # [rows, I]
        if intermediate == "e4m3":
            values, scale = quantise_rows(c, group)
        else:
            values, scale = c.bfloat16(), c.new_ones(len(c), c.shape[1] // group)
        result = block_scaled_matmul(values, scale, gemm2_weights[expert], gemm2_weights_scale[expert], product) * weight
        result = torch.where(weight == 0, 0.0, result)
        output.index_add_(0, tokens, result if rows == "float32" else result.bfloat16().float())
        if rows == "running bf16":
            output = output.bfloat16().float()
    return output.bfloat16()


def quantise_rows(c: Tensor, group: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Each 1 x group of float32 [rows, K] as e4m3 [rows, K] and its scale, float32 [rows, K/group]; C is divided by the scale."""
    blocks = c.unflatten(1, (-1, group))
    scale = blocks.abs().amax(2).clamp(min=AMAX_FLOOR) / E4M3_MAX
    return (blocks / scale.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1), scale


def block_scaled_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, product: Product | None = None) -> Tensor:
    """a [M, K] by b [N, K] e4m3, each group of K scaled apart and accumulated in float32: float32 [M, N].

    a_scale [M, K/group], where group divides 128; b_scale [N/128, K/128]. `product` of [M, group] and [N, group], float32 [M, N], is
    the float32 one where None.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    group = a.shape[1] // a_scale.shape[1]
    for part in range(a_scale.shape[1]):
        columns = slice(part * group, (part + 1) * group)
        scale = a_scale[:, part, None] * b_scale[:, part * group // BLOCK].repeat_interleave(BLOCK)  # [M, N]
        left, right = a[:, columns], b[:, columns]
        total += (product(left, right) if product else left.float() @ right.float().t()) * scale
    return total


def tensor_core_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, G] by b [N, G], both e4m3 on a GPU that multiplies e4m3, as its tensor cores sum: with fewer bits than float32 on Hopper.

    By cuBLAS with fast accumulation, which like the kernels adds nothing outside the tensor cores within a group.
    """
    one = torch.ones((), dtype=torch.float32, device=a.device)
    return torch._scaled_mm(a.contiguous(), b.contiguous().t(), one, one, out_dtype=torch.float32, use_fast_accum=True)


def _active_experts(expert_ids: Tensor, weights: Tensor, offset: int, local: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(local expert, its tokens [rows], their weights [rows, 1]) of every active expert, ascending."""
    for expert in range(local):
        tokens, slots = (expert_ids == offset + expert).nonzero(as_tuple=True)
        if len(tokens):
            yield expert, tokens, weights[tokens, slots].unsqueeze(1)


def _dequantised(weights: Tensor, scale: Tensor) -> Tensor:
    """One expert's weights [N, K] times their scales [N/128, K/128], float32."""
    values = weights.float()
    blocks = values.view(scale.shape[0], BLOCK, scale.shape[1], BLOCK)
    blocks *= scale[:, None, :, None]
    return values
