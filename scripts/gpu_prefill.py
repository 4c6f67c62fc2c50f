"""Plans for large T beside each other on a GPU: python scripts/gpu_prefill.py [--tokens 14107,11948,4096,2048] [--rounds 14]

Stages in their real order (so that what waits for the stage before does wait), and the whole call; cold L2 before each. The
plans take turns at random, round by round: under its power limit the GPU's clocks drift by more than two plans differ. Medians of event
times without the first two rounds. JSONL goes to $OUT (default results/tmp); the table is printed last.
"""

from __future__ import annotations

import argparse
import random
import statistics

import gpu_operator as operator
import torch

from blockmoe.geometry import HEADLINE
from blockmoe.operator.launch import Prepared
from blockmoe.operator.machine import of_gpu
from blockmoe.operator.pipeline import stages
from blockmoe.operator.plan import Plan, PrefillTile, choose_plan
from blockmoe.operator.workspace import layout


def variants(tokens: int) -> dict[str, Plan]:
    base = choose_plan(HEADLINE, tokens, of_gpu(0))
    found = {"default": base}
    for cluster in (1, 2):
        for flight in (2, 3):
            found[f"clusters of {cluster}, {flight} in flight"] = Plan("prefill", base.route, PrefillTile(4, cluster, flight))
    if tokens <= 5000:
        found["stream"] = Plan("stream", base.route, choose_plan(HEADLINE, 80, of_gpu(0)).gate_up)
    return {label: plan for i, (label, plan) in enumerate(found.items()) if i == 0 or plan != base}


class Variant:
    """A plan's launches by stage, ready to run on memory of their own."""

    def __init__(self, inputs: tuple, offset: int, plan: Plan) -> None:
        tokens = len(inputs[0])
        out = torch.empty(tokens, HEADLINE.hidden_size, dtype=torch.bfloat16, device="cuda")
        memory = torch.empty(layout(HEADLINE, tokens, plan)[1], dtype=torch.uint8, device="cuda")
        self.tensors = [*inputs, out, memory]
        self.addresses = tuple(t.data_ptr() for t in self.tensors)
        found = stages(HEADLINE, tokens, plan, offset, 2.5, sm_count=of_gpu(0).sm_count)
        order = list(found.items())
        self.names = [name for name, _ in order]
        self.ready = [Prepared(launches, 0) for _, launches in order]
        for stage in self.ready:
            stage.run(self.addresses)

    def events(self, timer, apart: bool) -> list:
        """Of one cold call: around every stage, or around all."""
        marks = [torch.cuda.Event(enable_timing=True)]
        timer.flush()
        marks[0].record()
        for i, stage in enumerate(self.ready):
            stage.run(self.addresses)
            if apart or i == len(self.ready) - 1:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
        return marks


def measure(timer, weights: tuple, tokens: int, rounds: int) -> list[str]:
    inputs, offset = operator.workload(HEADLINE, tokens)
    inputs = (*inputs, *weights)
    pairs, active = operator.counts(inputs, HEADLINE, offset)
    made = {}
    for label, plan in variants(tokens).items():
        variant = operator.attempt(f"T={tokens} {label}", lambda plan=plan: Variant(inputs, offset, plan))
        if variant:
            made[label] = (plan, variant)
    apart: dict[str, list] = {label: [] for label in made}
    whole: dict[str, list] = {label: [] for label in made}
    turns = list(made.items())
    for _ in range(rounds):
        torch.cuda._sleep(6_000_000)  # the host runs ahead
        random.shuffle(turns)
        for label, (_, variant) in turns:
            apart[label].append(variant.events(timer, True))
            whole[label].append(variant.events(timer, False))
        torch.cuda.synchronize()
    lines = []
    for label, (plan, variant) in made.items():
        us = statistics.median(1000 * a.elapsed_time(b) for a, b in whole[label][2:])
        parts = {}
        for name in dict.fromkeys(variant.names):
            here = [i for i, other in enumerate(variant.names) if other == name]
            parts[name] = statistics.median(sum(1000 * m[i].elapsed_time(m[i + 1]) for i in here) for m in apart[label][2:])
        operator.say("plan", tokens=tokens, pairs=pairs, active=active, label=label, us=us, plan=str(plan), **parts)
        stages_us = ", ".join(f"{name} {value:.0f}" for name, value in parts.items())
        lines.append(f"{tokens} | {label} | {us:.0f} | {stages_us} | {pairs * HEADLINE.pair_flops / us / 1e6:.0f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="14107,11948,4096,2048", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=14)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weights, timer, lines = operator.weights(HEADLINE), operator.Timer(), []
    for tokens in map(int, arguments.tokens.split(",")):
        lines += operator.attempt(f"T={tokens}", lambda tokens=tokens: measure(timer, weights, tokens, arguments.rounds)) or []
        torch.cuda.empty_cache()
    print("T | plan | whole call, us | stages in order, us | useful TFLOPS")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
