"""Check and time the operator on a GPU: python scripts/gpu_operator.py [--tokens 1,16,901] [--skip check,geometries,time]

Check: relative L2 against the float32 reference on the same GPU, outputs poisoned, fresh inputs, two calls compared bit
for bit, CUDA-graph replay with other routing. Time, with the routing of the bundled workload of each T: medians of event
pairs behind a device-side backlog, L2 flushed (written, then read) before every call; whole call, graph replay, stage by
stage; candidates for each T beside the plain read of the same bytes; host time a call. Every line is flushed; a variant
that fails is noted and passed over. JSONL goes to $OUT (default results/tmp); the summary table is printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from gpu_session import Journal

from blockmoe.bench.routing_logits import routing_inputs
from blockmoe.bench.timing import flush_bytes, release_kept_lines
from blockmoe.geometry import BLOCK, GEOMETRIES, HEADLINE, MoEGeometry
from blockmoe.operator.api import fused_moe
from blockmoe.operator.launch import Prepared, _compiled
from blockmoe.operator.machine import H100, H200, of_gpu
from blockmoe.operator.pipeline import stages
from blockmoe.operator.plan import Plan, PrefillTile, StreamTile, choose_plan
from blockmoe.operator.workspace import layout
from blockmoe.reference import moe_reference
from blockmoe.reference import route as reference_route

DEVICE = "cuda"
REPEATS = 15
journal = Journal("gpu_operator")
say, attempt, START = journal.say, journal.attempt, journal.start


def codes(*shape: int) -> torch.Tensor:
    """e4m3 from N(0, 1) clamped to ±2, made a slice at a time."""
    result = torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    for part in result if len(shape) == 3 else [result]:
        part.copy_(torch.randn(part.shape, device=DEVICE).clamp_(-2, 2))
    return result


def weights(g: MoEGeometry) -> tuple[torch.Tensor, ...]:
    experts, h, i = g.num_local_experts, g.hidden_size, g.intermediate_size
    return (
        codes(experts, 2 * i, h), torch.randn(experts, 2 * i // BLOCK, h // BLOCK, device=DEVICE),
        codes(experts, h, i), torch.randn(experts, h // BLOCK, i // BLOCK, device=DEVICE),
    )  # fmt: skip


def activations(g: MoEGeometry, tokens: int, spread: float = 1.0) -> tuple:
    """Uniform routing at spread 1; one favoured group of experts at a spread of 0."""
    logits = torch.randn(tokens, g.num_experts, device=DEVICE) * spread
    bias = (0.01 * torch.randn(g.num_experts, device=DEVICE)).bfloat16() if g.routing == "deepseek_v3" else None
    return logits, bias, codes(tokens, g.hidden_size), torch.randn(g.hidden_size // BLOCK, tokens, device=DEVICE)


def workload(g: MoEGeometry, tokens: int) -> tuple[tuple, int]:
    """Activations with the routing of the bundled workload of `tokens` tokens, and its offset; uniform where there is none."""
    path = Path(__file__).parents[1] / "dataset/workloads/moe" / f"{g.definition_name}.jsonl"
    for line in path.read_text().splitlines():
        entry = json.loads(line)["workload"]
        if entry["axes"]["seq_len"] == tokens:
            offset, recipe = entry["inputs"]["local_expert_offset"]["value"], entry["recipe"]
            logits, bias = routing_inputs(g, tokens, offset, recipe["pairs"], recipe["active_experts"], recipe["seed"])
            _, _, x, x_scale = activations(g, tokens)
            return (torch.from_numpy(logits).to(DEVICE), torch.from_numpy(bias).bfloat16().to(DEVICE), x, x_scale), offset
    return activations(g, tokens), 32


def call(inputs, g: MoEGeometry, offset: int, plan: Plan | None = None, **memory):
    return fused_moe(
        *inputs, local_expert_offset=offset, routed_scaling_factor=2.5, routing=g.routing, top_k=g.top_k,
        n_group=g.n_group, topk_group=g.topk_group, plan=plan, **memory,
    )  # fmt: skip


def counts(inputs, g: MoEGeometry, offset: int) -> tuple[int, int]:
    experts, _ = reference_route(inputs[0], inputs[1], g, 2.5)
    local = experts - offset
    local = local[(local >= 0) & (local < g.num_local_experts)]
    return local.numel(), local.unique().numel()


def check(g: MoEGeometry, w: tuple, tokens: int, plan: Plan | None = None, spread: float = 1.0) -> None:
    offset = min(32, g.num_experts - g.num_local_experts)
    inputs = (*activations(g, tokens, spread), *w)
    out = torch.full((tokens, g.hidden_size), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    call(inputs, g, offset, plan, out=out)
    reference = moe_reference(*inputs, offset, 2.5, geometry=g)
    again = torch.full_like(out, float("nan"))
    call(inputs, g, offset, plan, out=again)
    torch.cuda.synchronize()
    norm = reference.double().norm().item()
    error = (out.double() - reference.double()).norm().item() / (norm or 1.0)
    untouched = (reference == 0).all(1)
    ok = error < 0.03 and torch.equal(out.view(torch.int16), again.view(torch.int16)) and not out[untouched].any()
    pairs, active = counts(inputs, g, offset)
    say(
        "check", ok=bool(ok), geometry=g.definition_name[22:], tokens=tokens, pairs=pairs, active=active, rel_l2=error,
        repeatable=torch.equal(out.view(torch.int16), again.view(torch.int16)), nan=int(out.isnan().sum()),
        plan=str(plan or choose_plan(g, tokens, of_gpu(0))),
    )  # fmt: skip


@triton.jit
def read_kernel(data, sink, size, BLOCK_SIZE: tl.constexpr):
    total = tl.zeros((BLOCK_SIZE,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK_SIZE, size, tl.num_programs(0) * BLOCK_SIZE):
        total ^= tl.load(data + start + tl.arange(0, BLOCK_SIZE))
    if tl.max(total, 0) == 0x12345678:  # never: keeps the loads
        tl.store(sink, 1)


class Timer:
    def __init__(self) -> None:
        self.flush_buffer = torch.zeros(flush_bytes(DEVICE) // 4, dtype=torch.int32, device=DEVICE)
        self.sink = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.release_l2 = release_kept_lines()

    def flush(self) -> None:
        self.flush_buffer.fill_(1)  # write, so that nothing of ours stays; then read, so that no line stays dirty
        read_kernel[(528,)](self.flush_buffer, self.sink, self.flush_buffer.numel(), 4096, num_warps=8)

    def median_us(self, work, repeats: int = REPEATS, cold: bool = True, before=None) -> float:
        """`before` runs ahead of each timed call, behind the flush."""
        for _ in range(2):
            if before:
                before()
            work()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize()
        self.release_l2()  # whoever had the L2 keep what
        torch.cuda._sleep(20_000_000)  # about 12 ms: the host runs ahead
        for begin, end in pairs:
            if cold:
                self.flush()
            if before:
                before()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(1000 * begin.elapsed_time(end) for begin, end in pairs)


def host_us(work) -> float:
    for _ in range(20):
        work()
    samples = []
    for _ in range(60):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        samples.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(samples)


def graph_of(work):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def stage_times(timer: Timer, inputs, g: MoEGeometry, offset: int, plan: Plan, tokens: int) -> dict[str, float]:
    """Each stage alone, over what a run of all of them left in the workspace; `layer` behind a route, whose counters it uses up; choose and
    place apart too.

    `route_warm`: without a flush before it, so with its instructions and logits in the L2. `events`: nothing between them.
    """
    out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    memory = torch.empty(layout(g, tokens, plan)[1], dtype=torch.uint8, device=DEVICE)
    tensors = [*(t if t is not None else inputs[0] for t in inputs), out, memory]
    addresses = tuple(t.data_ptr() for t in tensors)
    bias_dtype = None if inputs[1] is None else inputs[1].dtype
    found = stages(g, tokens, plan, offset, 2.5, sm_count=of_gpu(0).sm_count, bias_dtype=bias_dtype)
    ready = {name: Prepared(launches, 0) for name, launches in found.items()}
    for stage in ready.values():
        stage.run(addresses)
    routed = {"layer": lambda: ready["route"].run(addresses)}
    result = {name: timer.median_us(lambda s=stage: s.run(addresses), before=routed.get(name)) for name, stage in ready.items()}
    result["route_warm"] = timer.median_us(lambda: ready["route"].run(addresses), cold=False)
    result["events"] = timer.median_us(lambda: None)
    if len(found["route"]) == 2:
        for name, launch in zip(("choose", "place"), found["route"], strict=True):
            one = Prepared([launch], 0)
            result[name] = timer.median_us(lambda s=one: s.run(addresses))
    return result


def candidates(tokens: int) -> dict[str, Plan]:
    """The default plan first, then what might beat it."""
    base = choose_plan(HEADLINE, tokens, of_gpu(0))
    found = {"default": base}

    def stream(tile: StreamTile) -> None:
        found[str(tile)] = Plan("stream", base.route, tile)

    for way in base.ways:
        found[f"{way.path} {way.gate_up}"] = way
    if streaming := [way.gate_up for way in base.ways if way.path == "stream"]:
        tile = streaming[-1]
        for flight in (2, 3, 4, None):
            stream(replace(tile, flight=flight))
        for machine in (H100, H200):
            for other in choose_plan(HEADLINE, tokens, machine).ways:
                if other.path == "stream":
                    stream(other.gate_up)
        for promotion in (128, 256):
            for burst in (1,) if tile.dense else (1, 2):
                stream(replace(tile, promotion=promotion, burst=burst))
        if not tile.dense:
            stream(replace(tile, block_n=16))
            found["sorted"] = choose_plan(HEADLINE, tokens, of_gpu(0), tma=False)
    if tokens > 100:
        for stages, cluster, flight in ((4, 1, 2), (4, 1, 3), (4, 2, 2), (4, 2, 3), (3, 2, 2)):
            plan = Plan("prefill", base.route, PrefillTile(stages, cluster, flight))
            found[f"prefill {plan.gate_up}"] = plan
    labels = {plan: label for label, plan in reversed(found.items())}  # each plan once, by its first label
    return {label: plan for label, plan in found.items() if labels[plan] == label}


def measure(timer: Timer, w: tuple, tokens: int, floor_data: torch.Tensor, rows: list) -> None:
    g = HEADLINE
    inputs, offset = workload(g, tokens)
    inputs = (*inputs, *w)
    pairs, active = counts(inputs, g, offset)
    floor_bytes = active * g.expert_bytes
    words = floor_bytes // 4 // 4096 * 4096
    floor = timer.median_us(lambda: read_kernel[(1056,)](floor_data, timer.sink, words, 4096, num_warps=8))
    compute = pairs * g.pair_flops / 1.5e15 * 1e6
    say("floor", tokens=tokens, pairs=pairs, active=active, read_us=floor, compute_us_at_1500_tflops=compute)
    out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    best = None
    for label, plan in candidates(tokens).items():
        if time.time() - START > arguments.seconds:
            say("stopped", tokens=tokens, label=label)
            break

        def one(label=label, plan=plan):
            nonlocal best
            work = lambda: call(inputs, g, offset, plan, out=out)  # noqa: E731
            eager = timer.median_us(work)
            graph = timer.median_us(graph_of(work).replay)
            say("time", tokens=tokens, label=label, us=eager, graph_us=graph, over_floor=min(eager, graph) / floor, plan=str(plan))
            if best is None or min(eager, graph) < best[1]:
                best = (label, min(eager, graph), plan)
            return eager, graph

        result = attempt(f"T={tokens} {label}", one)
        if label == "default" and result:
            parts = attempt("stages", lambda plan=plan: stage_times(timer, inputs, g, offset, plan, tokens)) or {}
            host = host_us(lambda: call(inputs, g, offset))
            say("stages", tokens=tokens, host_us=host, **parts)
            default = (*result, parts, host)
    if best:
        if best[0] != "default":
            parts = attempt("stages", lambda: stage_times(timer, inputs, g, offset, best[2], tokens)) or {}
            say("best stages", tokens=tokens, label=best[0], **parts)
            attempt("check best", lambda: check(g, w, tokens, best[2]))
        rows.append((tokens, pairs, active, floor, compute, *default, best[0], best[1]))


def graph_with_other_routing(w: tuple) -> None:
    """A graph captured with one routing replays another; eight local experts are favoured, so that every token has pairs."""
    g, offset = HEADLINE, 32
    for tokens in (3, 80):
        logits, bias, *rest = activations(g, tokens)
        bias[offset + torch.randperm(g.num_local_experts, device=DEVICE)[: g.top_k]] += 0.5
        inputs = (logits, bias, *rest, *w)
        before = counts(inputs, g, offset)
        out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        graph = graph_of(lambda inputs=inputs, out=out: call(inputs, g, offset, out=out))
        bias[offset : offset + g.num_local_experts] = bias[offset : offset + g.num_local_experts].roll(1)
        logits.copy_(torch.randn_like(logits))
        pairs, active = counts(inputs, g, offset)
        out.fill_(float("nan"))
        graph.replay()
        reference = moe_reference(*inputs, offset, 2.5, geometry=g)
        error = ((out.double() - reference.double()).norm() / reference.double().norm()).item()
        ok = error < 0.03 and pairs >= tokens
        say("graph check", ok=ok, tokens=tokens, pairs=pairs, active=active, captured=before, rel_l2=error)


def unaligned(w: tuple) -> None:
    """Pointers that TMA can't take: the same bits as the plan without it gives."""
    g, tokens = HEADLINE, 80
    inputs = activations(g, tokens)
    x = inputs[2]
    shifted = torch.empty(x.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(torch.float8_e4m3fn).view(x.shape)
    shifted.copy_(x)
    expected = call((*inputs, *w), g, 32, choose_plan(g, tokens, of_gpu(0), tma=False))
    got = call((*inputs[:2], shifted, *inputs[3:], *w), g, 32)
    say("check unaligned", ok=torch.equal(got, expected) and bool(got.any()))


def resources() -> None:
    """Registers and spills as the driver loaded them."""
    for key, compiled in _compiled.items():
        if hasattr(compiled, "n_regs") and compiled.n_spills:
            say("spills", kernel=key[0], constants=key[1], registers=compiled.n_regs, spills=compiled.n_spills)


def main() -> None:
    torch.manual_seed(int(time.time()) if arguments.seed is None else arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    say("device", name=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    w = weights(HEADLINE)
    rows: list = []
    if "check" not in arguments.skip:
        for tokens in (1, 2, 7, 8, 16, 17, 55, 64, 65, 80, 200, 901, 2049, 4096, 14107, 20000):
            attempt(f"check {tokens}", lambda tokens=tokens: check(HEADLINE, w, tokens))
        for label, plan in list(candidates(7).items())[1:3]:
            attempt(f"check {label}", lambda plan=plan: check(HEADLINE, w, 7, plan))
        attempt("check unaligned", lambda: unaligned(w))
        attempt("check 0", lambda: call((*activations(HEADLINE, 0), *w), HEADLINE, 0))
        attempt("skew", lambda: check(HEADLINE, w, 300, spread=0.0))
        attempt("graph", lambda: graph_with_other_routing(w))
    if "time" not in arguments.skip:
        timer = Timer()
        floor_data = torch.randint(0, 2**31 - 1, (32 * HEADLINE.expert_bytes // 4 + 4096,), dtype=torch.int32, device=DEVICE)
        for tokens in arguments.tokens:
            attempt(f"T={tokens}", lambda tokens=tokens: measure(timer, w, tokens, floor_data, rows))
        del floor_data
    if "geometries" not in arguments.skip:
        del w
        torch.cuda.empty_cache()
        for g in GEOMETRIES.values():
            if g != HEADLINE and time.time() - START < arguments.seconds + 25:

                def one(g=g):
                    w = weights(g)
                    for tokens in (1, 16, 100):
                        attempt(f"{g.definition_name} {tokens}", lambda tokens=tokens: check(g, w, tokens))

                attempt(g.definition_name, one)
                torch.cuda.empty_cache()
    attempt("resources", resources)
    print("T pairs active | floor compute | eager graph (x floor) | route (choose place) and the other stages | host | best", flush=True)
    for tokens, pairs, active, floor, compute, eager, graph, parts, host, label, fastest in rows:
        split = f" ({parts['choose']:.1f} {parts['place']:.1f})" if "choose" in parts else ""
        others = " ".join(f"{parts[s]:.1f}" for s in ("layer", "gate_up", "down", "combine") if s in parts)
        each = f"{parts.get('route', 0):.1f}{split} {others}"
        print(
            f"{tokens} {pairs} {active} | {floor:.1f} {compute:.1f} | {eager:.1f} {graph:.1f} "
            f"({min(eager, graph) / max(floor, compute):.2f}) | {each} | {host:.1f} | {label} {fastest:.1f} "
            f"({fastest / max(floor, compute):.2f})", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1, 7, 16, 32, 55, 80, 901, 4096, 14107])
    parser.add_argument("--skip", type=lambda s: s.split(","), default=[])
    parser.add_argument("--seconds", type=float, default=110.0, help="begin no candidate after this")
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    main()
