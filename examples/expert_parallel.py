"""Expert parallelism, each process with its share of the experts: python examples/expert_parallel.py [cpu|cuda] [--ranks 2]

The module of `deepseek_moe_layer.py`. Every process routes all tokens, computes the pairs of its own experts (`local_expert_offset`), and
their outputs are summed; the result is compared with that of one process that has all experts. On GPUs process n has GPU n and NCCL
sums; on the CPU gloo does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from deepseek_moe_layer import QUANTISED, DeepSeekMoE, quantise_activations
from torch import Tensor, nn

import blockmoe

TOKENS, HIDDEN = 64, 512


class ParallelMoE(nn.Module):
    """A process's part of a DeepSeekMoE that has its experts quantised."""

    def __init__(self, whole: DeepSeekMoE, rank: int, ranks: int) -> None:
        super().__init__()
        self.whole = whole
        self.local = len(whole.up_gate) // ranks
        self.first = rank * self.local
        for name, w in zip(QUANTISED, whole.quantised, strict=True):
            self.register_buffer(name, w[self.first : self.first + self.local].clone())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden], the same in every process, as is what comes out."""
        whole, weights = self.whole, (getattr(self, name) for name in QUANTISED)
        logits = x.float() @ whole.router.t().float()
        routed = blockmoe.fused_moe(
            logits, whole.bias.bfloat16(), *quantise_activations(x), *weights,
            local_expert_offset=self.first, routed_scaling_factor=whole.factor,
            top_k=whole.top_k, n_group=whole.groups, topk_group=whole.kept,
        ).float()  # fmt: skip
        dist.all_reduce(routed)
        up, gate = whole.shared_up_gate(x).chunk(2, dim=1)
        return whole.shared_down(nn.functional.silu(gate) * up) + routed.to(x.dtype)


def work(rank: int, ranks: int, device: str, meeting: str) -> None:
    on = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(on)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(0)  # the same module and tokens everywhere; a server would load only its experts
    whole = DeepSeekMoE(HIDDEN).to(on).use_blockmoe()
    x = torch.randn(TOKENS, HIDDEN, device=on)
    parallel, alone = ParallelMoE(whole, rank, ranks)(x), whole(x)
    error = ((parallel - alone).norm() / alone.norm()).item()
    print(f"{on}, experts {rank * len(whole.router) // ranks} on: relative L2 to one process with all experts: {error:.4f}", flush=True)
    dist.destroy_process_group()
    assert error < 0.02, "only the order of sums, in bfloat16, differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4, 8), help="processes: default 2")
    asked = parser.parse_args()
    if asked.device == "cuda" and torch.cuda.device_count() < asked.ranks:
        sys.exit(f"--ranks: expected at most {torch.cuda.device_count()}, as many as there are GPUs, got {asked.ranks}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (asked.ranks, asked.device, str(Path(folder) / "meeting")), nprocs=asked.ranks)


if __name__ == "__main__":
    main()
