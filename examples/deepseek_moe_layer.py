"""A DeepSeek-style mixture-of-experts module whose expert layer is one call: python examples/deepseek_moe_layer.py [cpu|cuda]

The module first computes its experts in plain PyTorch, then by `blockmoe.fused_moe` from quantised weights; both outputs are
compared. Sizes are small, so that a CPU does it in seconds; there `fused_moe` runs its float32 path.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import blockmoe

BLOCK = 128
QUANTISED = ("up_gate_codes", "up_gate_scale", "down_codes", "down_scale")


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, H] as e4m3 with a scale for each 1 x 128: codes [T, H], scales float32 [H/128, T] (block-major)."""
    blocks = x.float().unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(2).clamp(min=1e-12) / 448
    return (blocks / scale.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1), scale.t().contiguous()


def quantise_weights(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [experts, N, K] as e4m3 with a scale for each 128 x 128: codes [experts, N, K], scales float32 [experts, N/128, K/128]."""
    blocks = w.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # [experts, N/128, 128, K/128, 128]
    scale = blocks.abs().amax((2, 4)).clamp(min=1e-12) / 448
    codes = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(w.shape), scale


class DeepSeekMoE(nn.Module):
    """Sigmoid router with a balancing bias and grouped top-k, one shared expert, and as many routed experts as asked for."""

    def __init__(self, hidden: int = 512, intermediate: int = 256, experts: int = 32, groups: int = 8, kept: int = 4, top_k: int = 8):
        super().__init__()
        self.top_k, self.groups, self.kept, self.factor = top_k, groups, kept, 2.5
        self.router = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5)
        self.bias = nn.Parameter(0.01 * torch.randn(experts), requires_grad=False)
        self.up_gate = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5)  # rows up, then gate
        self.down = nn.Parameter(torch.randn(experts, hidden, intermediate) / intermediate**0.5)
        self.shared_up_gate = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.shared_down = nn.Linear(intermediate, hidden, bias=False)
        for name in QUANTISED:
            self.register_buffer(name, None)

    @torch.no_grad()
    def use_blockmoe(self) -> DeepSeekMoE:
        """Quantise the routed experts; from here on they are one `fused_moe` call. Convert the module before: `.to(dtype)` afterwards would
        convert the codes too."""
        self.up_gate_codes, self.up_gate_scale = quantise_weights(self.up_gate)
        self.down_codes, self.down_scale = quantise_weights(self.down)
        return self

    @property
    def quantised(self) -> tuple[Tensor | None, ...]:
        """Codes and scales of both weights, as `fused_moe` takes them; None before `use_blockmoe`."""
        return tuple(getattr(self, name) for name in QUANTISED)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden]; the same out."""
        up, gate = self.shared_up_gate(x).chunk(2, dim=1)
        shared = self.shared_down(nn.functional.silu(gate) * up)
        logits = x.float() @ self.router.t().float()
        if self.up_gate_codes is None:
            return shared + self._experts(x, logits)
        routed = blockmoe.fused_moe(
            logits, self.bias.bfloat16(), *quantise_activations(x), *self.quantised,
            local_expert_offset=0, routed_scaling_factor=self.factor,
            top_k=self.top_k, n_group=self.groups, topk_group=self.kept,
        )  # fmt: skip
        return shared + routed.to(x.dtype)

    def _experts(self, x: Tensor, logits: Tensor) -> Tensor:
        scores = logits.sigmoid()
        biased = scores + self.bias.bfloat16().float()
        grouped = biased.unflatten(1, (self.groups, -1))
        best = grouped.topk(2, dim=2).values.sum(2).topk(self.kept, dim=1).indices
        dropped = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, best, False)
        chosen = grouped.masked_fill(dropped.unsqueeze(2), -torch.inf).flatten(1).topk(self.top_k, dim=1).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * self.factor
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            up, gate = (x[tokens] @ self.up_gate[expert].t()).chunk(2, dim=1)
            result = (nn.functional.silu(gate) * up) @ self.down[expert].t()
            out.index_add_(0, tokens, result * weights[tokens, slots, None].to(x.dtype))
        return out


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    module = DeepSeekMoE().to(device)
    x = torch.randn(64, 512, device=device)
    plain = module(x)
    fused = module.use_blockmoe()(x)
    error = ((fused - plain).norm() / plain.norm()).item()
    print(f"{device}: relative L2 between plain float32 and fused FP8 experts: {error:.4f}")
    assert error < 0.08, "FP8 weights, activations and intermediate cost about 6 %"


if __name__ == "__main__":
    main()
