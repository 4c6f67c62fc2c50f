"""FP8 block-scale mixture-of-experts layer in plain PyTorch, over the local pairs alone.

Sizes come from the tensors; how routing chooses is not among the inputs, so it stands in GEOMETRY.
"""

import torch

GEOMETRY = {"num_experts": 256, "num_local_experts": 32, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048, "routing": "deepseek_v3", "n_group": 8, "topk_group": 4}  # fmt: skip # noqa: E501

BLOCK = 128  # one scale stands for 1x128 of an activation row and 128x128 of a weight
_scratch = {}  # buffers by purpose: contents never outlive a call


@torch.no_grad()
def run_deepseek_v3(
    routing_logits,
    routing_bias,
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    local_expert_offset,
    routed_scaling_factor,
):
    """The inputs of the definitions that have such routing; returns bfloat16 [T, H]."""
    expert_ids, weights = route(routing_logits.float(), routing_bias)
    order, counts = sort_pairs(expert_ids - int(local_expert_offset), len(gemm1_weights))
    tokens = order // GEOMETRY["top_k"]  # of each pair, ascending within an expert
    weights = (weights * float(routed_scaling_factor)).flatten()[order]

    dtype = matmul_dtype(hidden_states.device)
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            chosen = tokens[rows]
            result = one_expert(
                activations(hidden_states, hidden_states_scale, chosen, dtype),
                dequantised("w1", gemm1_weights[expert], gemm1_weights_scale[expert], dtype),
                dequantised("w2", gemm2_weights[expert], gemm2_weights_scale[expert], dtype),
            )
            # An expert has a token once at most, so that the order of the sums is fixed even where this uses atomics.
            output.index_add_(0, chosen, result * weights[rows, None])
            start += count
    return output.to(torch.bfloat16)


def run_renormalize(
    routing_logits,
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    local_expert_offset,
    routed_scaling_factor,
):
    """The inputs of the definitions that have no routing bias; returns bfloat16 [T, H]."""
    return run_deepseek_v3(
        routing_logits,
        None,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        local_expert_offset,
        routed_scaling_factor,
    )


run = run_deepseek_v3 if GEOMETRY["routing"] == "deepseek_v3" else run_renormalize


def route(logits, bias):
    """Expert ids and weights before scaling, [T, top_k] each. Ties go to the lower index."""
    if bias is None:
        limits = torch.finfo(torch.float32)
        logits = logits.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
        expert_ids = largest(logits, GEOMETRY["top_k"])
        return expert_ids, torch.softmax(logits.gather(1, expert_ids), dim=1)
    scores = torch.sigmoid(logits.masked_fill(logits.isnan(), -torch.inf))
    biased = scores + bias.float()
    if GEOMETRY["topk_group"] < GEOMETRY["n_group"]:
        groups = biased.unflatten(1, (GEOMETRY["n_group"], -1))
        best_two = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(dim=2)
        dropped = torch.ones_like(best_two, dtype=torch.bool)
        dropped.scatter_(1, largest(best_two, GEOMETRY["topk_group"]), False)
        biased = groups.masked_fill(dropped.unsqueeze(2), -torch.inf).flatten(1)
    expert_ids = largest(biased, GEOMETRY["top_k"])
    weights = scores.gather(1, expert_ids)
    return expert_ids, weights / (weights.sum(dim=1, keepdim=True) + 1e-20)


def largest(values, count):
    """Indices of each row's largest values; unlike topk, a stable sort promises the lower index for equal values."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def sort_pairs(local_ids, experts):
    """Flat (token, slot) indices of the local pairs sorted by expert, and each expert's count as a list.

    local_ids [T, top_k] are outside 0 .. experts - 1 for experts elsewhere. Reading the counts is the only host
    synchronisation of a call.
    """
    flat = local_ids.flatten()
    flat = flat.masked_fill((flat < 0) | (flat >= experts), experts)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    counts = counts.tolist()[:experts]
    return flat.sort(stable=True).indices[: sum(counts)], counts


def one_expert(hidden, w1, w2):
    """float32 [rows, H] from hidden [rows, H], w1 [2I, H] (up, then gate) and w2 [H, I].

    Weights stand on the left: with few rows both BLAS libraries are faster so (4 rows on 2 AVX2 cores: 5.6 ms, not 15.4).
    """
    up, gate = (w1 @ hidden.t()).chunk(2, dim=0)  # [I, rows] each
    return (w2 @ torch.nn.functional.silu(gate.float()).mul_(up).to(w2.dtype)).t().float()


def activations(hidden, scale, tokens, dtype):
    """Dequantised rows [rows, H] of the given tokens; hidden e4m3 [T, H], scale [H/128, T]."""
    codes = hidden.view(torch.uint8)[tokens].view(torch.float8_e4m3fn)  # indexing e4m3 itself is not there everywhere
    rows = codes.to(torch.float32).view(len(tokens), -1, BLOCK)
    return rows.mul_(scale[:, tokens].t().unsqueeze(2)).flatten(1).to(dtype)


def dequantised(purpose, weight, scale, dtype):
    """One expert's weight, e4m3 [N, K] times its scales [N/128, K/128], in a buffer that the next expert overwrites."""
    result = scratch(purpose, weight.shape, dtype, weight.device)
    if weight.device.type == "cpu":
        return dequantise_on_cpu(weight, scale, result)
    result.copy_(weight)
    result.view(scale.shape[0], BLOCK, scale.shape[1], BLOCK).mul_(scale[:, None, :, None])
    return result


def dequantise_on_cpu(weight, scale, result):
    """As above, through float16: 10 ms for [4096, 7168] on 2 AVX2 cores where torch's own cast takes 64 ms.

    An e4m3 code with its sign moved to bit 15 and the rest shifted by 7 is a float16 of 1/256 of its value, subnormals
    included (the NaN code alone reads as 480). A block of 128 rows at a time stays in the cache.
    """
    codes = weight.view(torch.int8)
    shifted = scratch("shifted", (BLOCK, weight.shape[1]), torch.int16, weight.device)
    scale = scale * 256.0
    for block in range(scale.shape[0]):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        shifted.copy_(codes[rows]).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign also spilled into bit 14
        result[rows] = shifted.view(torch.float16)
        result[rows].view(BLOCK, -1, BLOCK).mul_(scale[block, :, None])
    return result


def matmul_dtype(device):
    """bfloat16 where the hardware multiplies it; AVX2 takes 170 ms for [4096, 7168] by 64 rows and 25 in float32."""
    if device.type != "cpu":
        return torch.bfloat16
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not in every torch
    in_hardware = any(hasattr(torch.cpu, check) and getattr(torch.cpu, check)() for check in checks)
    return torch.bfloat16 if in_hardware else torch.float32


def scratch(purpose, shape, dtype, device):
    """A buffer of at least this shape's size, kept for the next call: fresh pages cost more than the work in them."""
    size = torch.Size(shape).numel()
    key = (purpose, dtype, device)
    if key not in _scratch or _scratch[key].numel() < size:
        _scratch[key] = torch.empty(size, dtype=dtype, device=device)
    return _scratch[key][:size].view(shape)
