"""blockmoe.fused_moe under the definitions' argument names and order; the output tensor [T, H] comes last."""

from blockmoe.operator.api import fused_moe

GEOMETRY = {"num_experts": 256, "num_local_experts": 32, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048, "routing": "deepseek_v3", "n_group": 8, "topk_group": 4}  # fmt: skip # noqa: E501


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
    output,
):
    """The inputs of the definitions that have such routing, and the output to fill."""
    fused_moe(
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        local_expert_offset=int(local_expert_offset),
        routed_scaling_factor=float(routed_scaling_factor),
        routing=GEOMETRY["routing"],
        top_k=GEOMETRY["top_k"],
        n_group=GEOMETRY["n_group"],
        topk_group=GEOMETRY["topk_group"],
        out=output,
    )


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
    output,
):
    """The inputs of the definitions that have no routing bias, and the output to fill."""
    run_deepseek_v3(
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
        output,
    )


run = run_deepseek_v3 if GEOMETRY["routing"] == "deepseek_v3" else run_renormalize
