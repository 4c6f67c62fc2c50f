"""Has the operator a cliff? python scripts/gpu_curve.py [--seconds 150] [--families uniform,zipf,...]

Spans of the headline geometry at T = 1, 2, 4 ... 65,536 (uniform routing: also on both sides of every change of plan), cold L2,
by the bench's timer (CUPTI where it is installed), with the graph replay and the floor of the same pairs. Families:

    uniform       a pair a token on average, over all local experts alike
    zipf          the same number of pairs; the n-th favourite expert gets 1/n of the first's
    one expert    every token has one pair, all on one local expert
    same experts  every choice of every token is local, on the same eight experts
    all local     every choice of every token is local, over all local experts alike

At every T the plans of T/2, T - 1, T + 1 and 2T, and each way of a plan of which routing chooses one, run interleaved with
the chosen one where their paths or tiles differ (routing stays); where one seems faster by more than 3 %, both are measured
again. Before a point is measured its call runs for a fifth of a second, or three fifths if it takes more than a millisecond,
so that the clock, which power limits, is one that lasts; it is noted. (The graph's replays come later, few at a time: above
some thousand pairs they meet a higher clock.) Exit code 1 where another plan stays faster by more than 3 %, where time per
pair is more than 5 % above that of a smaller T of the family, or where a point failed or was cut off.

    python scripts/gpu_curve.py --plot RESULT.jsonl --to results/h100/curve/curve.svg      # on any machine; prints the table too
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import curve_report

FAMILIES = ("uniform", "zipf", "one expert", "same experts", "all local")
LOCAL_PAIRS = (1, 1, 0, 2, 1, 0, 1, 2)  # of the tokens in turn: T pairs for every power of two, and tokens without
REPEATS, FEW_REPEATS, LONG_US = 11, 5, 5000.0
WARM_US, HOT_FROM_US, HOT_US = 200_000.0, 1000.0, 600_000.0
FACTOR = 2.5


def choices(family: str, g, tokens: int, offset: int, seed: int, device):
    """Which experts each token chooses, bool [tokens, num_experts]; the local experts must be a group."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    local, group = g.num_local_experts, offset // g.experts_per_group
    chosen = torch.zeros(tokens, g.num_experts, dtype=torch.bool, device=device)
    pairs = torch.tensor(LOCAL_PAIRS, device=device).repeat(-(-tokens // len(LOCAL_PAIRS)))[:tokens]
    if family in ("one expert", "even"):
        pairs = torch.ones_like(pairs)
        picked = torch.full((tokens, 1), local // 3, device=device)
        if family == "even":  # the experts in turn, as many tokens each
            picked = torch.arange(tokens, device=device).unsqueeze(1) % local
    elif family == "same experts":
        pairs = torch.full_like(pairs, g.top_k)
        picked = (torch.arange(g.top_k, device=device) * (local // g.top_k)).expand(tokens, -1)
    else:
        popularity, most = torch.ones(local, device=device), max(LOCAL_PAIRS)
        if family == "zipf":
            order = torch.randperm(local, generator=torch.Generator().manual_seed(seed)).to(device)
            popularity = 1.0 / (order + 1.0)
        elif family == "all local":
            pairs, most = torch.full_like(pairs, g.top_k), g.top_k
        picked = torch.multinomial(popularity.expand(tokens, -1), most, generator=generator)
    row = torch.arange(tokens, device=device).unsqueeze(1).expand_as(picked)
    taken = torch.arange(picked.shape[1], device=device) < pairs.unsqueeze(1)
    chosen[row[taken], offset + picked[taken]] = True

    lots = torch.rand(tokens, g.n_group, device=device, generator=generator)
    lots[:, group] = -1.0
    others = torch.zeros_like(lots, dtype=torch.bool).scatter_(1, lots.topk(g.topk_group - 1, dim=1).indices, True)
    lots = torch.rand(tokens, g.num_experts, device=device, generator=generator)
    lots = lots.masked_fill(~others.repeat_interleave(g.experts_per_group, 1), -1.0)
    rank = lots.argsort(dim=1, descending=True).argsort(dim=1)
    return chosen | (rank < (g.top_k - pairs).unsqueeze(1))


def logits_of(chosen, g):
    """Logits float32 that route to `chosen` under a bias of zero: clear margins between chosen, others of their groups, and the rest."""
    import torch

    noise = torch.rand(chosen.shape, device=chosen.device)
    kept = chosen.view(len(chosen), g.n_group, -1).any(2).repeat_interleave(g.experts_per_group, 1)
    return torch.where(chosen, 2.0 + noise, torch.where(kept, -3.0 + noise, -6.0 + noise))


def changes(choose: Callable[[int], object], most: int) -> list[int]:
    """Every T up to `most` at which the plan is another than at T - 1."""
    return [t for t in range(2, most + 1) if choose(t) != choose(t - 1)]


class Curve:
    def __init__(self, session, device, offset: int, seed: int, most: int) -> None:
        import stress_checks as checks
        import torch

        from blockmoe.bench.timing import make_timer
        from blockmoe.geometry import HEADLINE, TINY

        self.session, self.device, self.seed = session, device, seed
        self.cuda = device.type == "cuda"
        if self.cuda:
            from gpu_clock import Clock

            self.clock = Clock
        self.g = HEADLINE if self.cuda else TINY
        self.offset = offset or self.g.num_local_experts
        self.checks = checks
        self.timer = make_timer(device)
        tensors, _ = checks.Layer(self.g, "trace", device, seed).open(most)
        self.bias = torch.zeros_like(tensors[1])
        self.x, self.x_scale, self.weights = tensors[2], tensors[3], tensors[4:]
        self.points: list[dict] = []
        self.order = random.Random(seed)

    def plan(self, tokens: int):
        return self.checks.plan_of(self.g, tokens, self.device)

    def neighbours(self, tokens: int) -> dict[str, object]:
        """Other plans than the chosen one that might serve `tokens` tokens, with its routing: a routing tile may bound T. And its ways,
        where routing chooses of several."""
        chosen = self.plan(tokens)
        found = {f"{way.path} by {way.gate_up.block_n}": way for way in chosen.ways if way != chosen}
        for other in (tokens // 2, tokens - 1, tokens + 1, 2 * tokens):
            plan = replace(self.plan(max(1, other)), route=chosen.route)
            fits = not plan.dense or (chosen.route.one_launch and tokens <= plan.gate_up.block_n)
            if plan != chosen and fits and plan not in found.values():
                found[f"T={other}"] = plan
        return found

    def family(self, name: str, sizes: list[int]) -> None:
        logits = logits_of(choices(name, self.g, max(sizes), self.offset, self.seed, self.device), self.g)
        for tokens in sizes:
            self.session.attempt(f"{name} T={tokens}", partial(self.point, name, tokens, logits))

    def point(self, family: str, tokens: int, all_logits) -> None:
        import layer
        import torch

        g = self.g
        inputs = [all_logits[:tokens], self.bias, self.x[:tokens], self.x_scale[:, :tokens].contiguous(), *self.weights]
        counts = self.checks.counts(inputs, g, self.offset)
        out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device=self.device)

        def call(plan=None):
            return layer.call(inputs, g, self.offset, FACTOR, plan, out=out)

        for _ in range(3 if self.cuda else 0):  # compiled, and launches bound to their addresses
            call()
        host_us = self.timer.host_us(lambda: None, call) if self.cuda else 0.0
        expected = call().clone()
        others = self.neighbours(tokens)
        for label, plan in others.items():
            error = layer.relative(call(plan), expected) if tokens <= 4096 else 0.0  # a plan that computes less isn't faster
            if not error < 0.05:
                self.session.check(f"{family} T={tokens} plan of {label}", False, different=error, plan=str(plan))
        calls = {"": call} | {label: partial(call, plan) for label, plan in others.items()}
        self.spans(calls, 1)
        once = statistics.median(self.spans(calls, 3)[""])
        repeats = REPEATS if once < LONG_US else FEW_REPEATS
        if self.cuda:
            self.warm(call, once)
        samples = self.spans(calls, repeats)
        doubtful = [label for label in others if self.much_slower(samples, label)]
        if doubtful:  # once more, and only what is in doubt
            samples |= self.spans({label: calls[label] for label in ("", *doubtful)}, 2 * repeats)
        us = statistics.median(samples[""])
        low, _, high = statistics.quantiles(samples[""], n=4)
        point = dict(
            family=family, tokens=tokens, **counts, us=us, quartiles=[low, high], us_per_pair=us / max(1, counts["pairs"]),
            graph_us=self.graph_us(call) if self.cuda else None, host_us=host_us, **self.floor(tokens, **counts), timer=self.timer.name,
            samples=len(samples[""]), mhz=self.mhz, plan=str(self.plan(tokens)),
            neighbours={label: {"us": statistics.median(samples[label]), "plan": str(plan)} for label, plan in others.items()},
        )  # fmt: skip
        self.points.append(point)
        self.session.say("point", **point)

    def much_slower(self, samples: dict[str, list[float]], label: str) -> bool:
        return statistics.median(samples[""]) > curve_report.SLOWER * statistics.median(samples[label])

    def warm(self, call: Callable, us: float) -> None:
        """The call again and again, as it is measured, until the device has been at it for WARM_US, or HOT_US."""
        for _ in range(int((WARM_US if us < HOT_FROM_US else HOT_US) / us)):
            self.timer.flush()
            call()

    def spans(self, calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
        """Spans in us of each call, interleaved at random, L2 cold; `mhz` is then the multiprocessors' clock during those of ""."""
        labels = [label for label in calls for _ in range(repeats)]
        self.order.shuffle(labels)
        clock = self.clock(len(labels)) if self.cuda else None
        for number, label in enumerate(labels):
            self.timer.flush()
            with clock.during(number) if clock else nullcontext():
                self.timer.timed(number, calls[label])
        every = [mhz for mhz, label in zip(clock.mhz(), labels, strict=True) if label == ""] if clock else []
        self.mhz = statistics.median(every) if every else None
        found: dict[str, list[float]] = {label: [] for label in calls}
        for label, sample in zip(labels, self.timer.collect(), strict=True):
            found[label].append(1000 * sample.ms)
        return found

    def graph_us(self, call: Callable) -> float:
        import torch

        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return 1000 * self.timer.replay_ms(lambda number: None, graph, list(range(7)))

    def floor(self, tokens: int, pairs: int, active: int, tokens_with_pairs: int) -> dict[str, float]:
        """The larger floor, as the bench measures them."""
        from blockmoe.bench import roofline

        size, flops = roofline.workload_cost(self.g, tokens, tokens_with_pairs, pairs, active)
        streaming = 1000 * roofline.streaming_ms(size, SimpleNamespace(device=self.device, timer=self.timer))
        compute = 1e6 * flops / roofline._rate(self.device)
        return {"floor_us": max(streaming, compute), "streaming_us": streaming, "compute_us": compute}


def measure(arguments: argparse.Namespace) -> int:
    import gpu_session
    import torch

    cuda = arguments.device == "cuda"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    most = arguments.most if cuda else min(arguments.most, 64)
    session = gpu_session.Session("gpu_curve", arguments.seconds)
    session.say("device", name=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__, seed=arguments.seed)
    torch.manual_seed(arguments.seed)
    session.section("inputs")
    curve = session.attempt("inputs", lambda: Curve(session, device, arguments.offset, arguments.seed, most))
    powers = [1 << n for n in range(most.bit_length()) if 1 << n <= most]
    for family in arguments.families if curve else ():
        session.section(family)
        edges = changes(curve.plan, min(most, 16384)) if family == "uniform" and not arguments.powers_only else []
        sizes = sorted({*powers, *(t for edge in edges for t in (edge - 1, edge))})
        session.attempt(family, partial(curve.family, family, sizes))
    points = curve.points if curve else []
    session.section("promises")
    for fault in curve_report.rises(points):
        session.check("time per pair rises", False, **fault)
    for fault in curve_report.better_plans(points):
        session.check("a neighbour's plan is faster", False, **fault)
    session.check("points", bool(points), points=len(points))
    print(curve_report.table(points), flush=True)
    return session.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="begin no point after this")
    parser.add_argument("--families", type=lambda s: s.split(","), default=list(FAMILIES), help=",".join(FAMILIES))
    parser.add_argument("--most", type=int, default=65536, help="largest T")
    parser.add_argument("--powers-only", action="store_true", help="no points at the changes of plan")
    parser.add_argument("--offset", type=int, default=0, help="of the local experts; 0: the second group")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw this JSONL and measure nothing")
    parser.add_argument("--to", type=Path, default=Path("results/h100/curve/curve.svg"))
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(FAMILIES):
        parser.error(f"--families: expected some of {','.join(FAMILIES)}, got {','.join(sorted(unknown))}")
    if arguments.plot and arguments.to.suffix != ".svg":
        parser.error(f"--to: expected a name that ends in .svg, got {arguments.to}")
    if not arguments.plot:
        return measure(arguments)
    points = curve_report.load(arguments.plot)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    arguments.to.write_text(curve_report.picture(points), encoding="utf-8")
    print(curve_report.table(points))
    return int(bool(curve_report.rises(points) or curve_report.better_plans(points)))


if __name__ == "__main__":
    sys.exit(main())
