"""Check and time routing on a GPU: python scripts/gpu_route.py [--tokens 1,7,80] [--old FILE] [--seconds 50]

Check: the lists that routing leaves, over poisoned memory and twice, against `blockmoe.reference.route`. A token whose
experts differ is wrong unless it has a near-tie (2e-6) at the border. Time: medians of event pairs behind a device-side
backlog, three ways: cold (L2 flushed, so code and data from memory), code (flushed, then logits and bias read again: only
code is cold), warm. The candidates' questions:

- empty, empty twice: what one and two launches and the events cost;
- old (--old, a copy of an earlier route.py): the gain;
- unrolled: the same instructions executed, more of them fetched; if cold - warm grows, code size is what costs;
- one launch / two, and tokens a program: barriers and the wait between launches against warps that share a scheduler.

JSONL to $OUT (default results/tmp); the table comes last.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from gpu_session import Journal

from blockmoe.geometry import GEOMETRIES, HEADLINE, MoEGeometry
from blockmoe.operator import route as route_module
from blockmoe.operator.kernel_parts import before_next_kernel
from blockmoe.operator.launch import BIAS, LOGITS, WORKSPACE, Launch, Prepared, Slot, _compiled
from blockmoe.operator.plan import Plan, RouteTile, choose_plan
from blockmoe.operator.workspace import Round, layout, sizes, slots
from blockmoe.reference import route as reference_route

DEVICE, OFFSET, FACTOR = "cuda", 32, 2.5
journal = Journal("gpu_route")
say, attempt, START = journal.say, journal.attempt, journal.start


@triton.jit
def empty_kernel(data, PDL: tl.constexpr):
    before_next_kernel(PDL)


@triton.jit
def read_kernel(data, sink, size, BLOCK_SIZE: tl.constexpr):
    total = tl.zeros((BLOCK_SIZE,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK_SIZE, size, tl.num_programs(0) * BLOCK_SIZE):
        at = start + tl.arange(0, BLOCK_SIZE)
        total ^= tl.load(data + at, mask=at < size, other=0)
    if tl.max(total, 0) == 0x12345678:  # never: keeps the loads
        tl.store(sink, 1)


class Stage:
    """Routing of `tokens` tokens by a plan and a route module, over memory of its own."""

    def __init__(self, g: MoEGeometry, inputs, plan: Plan, module=route_module) -> None:
        logits, bias = inputs
        self.g, self.plan, self.tokens = g, plan, len(logits)
        self.memory = torch.full((layout(g, self.tokens, plan)[1],), 255, dtype=torch.uint8, device=DEVICE)
        named = slots(g, self.tokens, plan)
        this = Round(g, plan, sizes(g, self.tokens, plan), named, 1056)
        logits_slot = Slot(LOGITS, logits.dtype)
        bias_slot = logits_slot if bias is None else Slot(BIAS, bias.dtype)
        self.launches = module.route(logits_slot, bias_slot, min(OFFSET, g.num_experts - g.num_local_experts), FACTOR, this)
        self.named = named
        self.addresses = [0] * 10
        self.addresses[LOGITS], self.addresses[WORKSPACE] = logits.data_ptr(), self.memory.data_ptr()
        self.addresses[BIAS] = (logits if bias is None else bias).data_ptr()
        _compiled.clear()  # old and new kernels have the same names
        self.ready = Prepared(self.launches, torch.cuda.current_device())
        self.run()

    def run(self) -> None:
        self.ready.run(self.addresses)

    def lists(self) -> dict[str, torch.Tensor]:
        tensors = [None] * 9 + [self.memory]
        return {name: slot.of(tensors) for name, slot in self.named.items() if slot.dtype.itemsize == 4}

    def weights(self) -> torch.Tensor:
        """[T, local] as the lists say; raises where they disagree with each other."""
        torch.cuda.synchronize()
        found = {name: values.cpu() for name, values in self.lists().items()}
        tiles = int(found["tile_count"][0])
        expert, begin, end = (found[name][:tiles].long() for name in ("tile_expert", "tile_begin", "tile_end"))
        assert (expert.diff() >= 0).all() and (begin[1:] >= end[:-1]).all(), "tiles out of order"
        length = end - begin
        assert (length > 0).all() and (length <= self.plan.gate_up.block_n).all(), "tile lengths"
        row = torch.arange(int(length.sum())) + (begin - (length.cumsum(0) - length)).repeat_interleave(length)
        expert = expert.repeat_interleave(length)
        token, weight = found["pair_token"][row].long(), found["pair_weight"][row]
        order = expert * self.tokens + token
        assert (order.diff() > 0).all(), "pairs out of order"
        result = torch.zeros(self.tokens, self.g.num_local_experts)
        result[token, expert] = weight
        if self.plan.path != "dense":
            count = found["token_pairs"].long()
            assert (count == (result != 0).sum(1)).all(), "token_pairs"
            listed = torch.arange(self.g.top_k)[None] < count[:, None]
            by_token = found["token_pair"].view(self.tokens, -1).long()[listed]
            assert (by_token == row[(token * self.g.num_local_experts + expert).argsort()]).all(), "token_pair"
        return result


def draw(g: MoEGeometry, tokens: int):
    logits = torch.randn(tokens, g.num_experts, device=DEVICE)
    return logits, (0.01 * torch.randn(g.num_experts, device=DEVICE)).bfloat16() if g.routing == "deepseek_v3" else None


def check(g: MoEGeometry, tokens: int, plan: Plan, label: str) -> bool:
    inputs = draw(g, tokens)
    stage = Stage(g, inputs, plan)
    got, first = stage.weights(), stage.memory.clone()
    stage.memory.fill_(255)
    stage.run()
    torch.cuda.synchronize()
    same = torch.equal(first, stage.memory)
    ids, weights = (t.cpu() for t in reference_route(*inputs, g, FACTOR))
    full = torch.zeros(tokens, g.num_experts).scatter_(1, ids, weights)
    offset = min(OFFSET, g.num_experts - g.num_local_experts)
    want = full[:, offset : offset + g.num_local_experts]
    other = ((got != 0) != (want != 0)).any(1)
    error = ((got - want).abs() / want.abs().clamp(min=1e-6))[~other].max().item() if not other.all() else float("inf")
    score = inputs[0].float() if inputs[1] is None else inputs[0].float().sigmoid() + inputs[1].float()
    near = 0
    for token in other.nonzero().flatten().tolist():  # neighbours in the order of scores: is there a tie up to rounding?
        gaps = score[token].sort().values.diff()
        near += int((gaps < 2e-6).any())
    ok = same and error < 1e-5 and int(other.sum()) == near and near <= tokens / 500
    say("check", ok=ok, label=label, geometry=g.definition_name[22:], tokens=tokens, pairs=int((got != 0).sum()), near_ties=near,
        other=int(other.sum()), weight_error=error, repeatable=same)  # fmt: skip
    return ok


class Timer:
    def __init__(self) -> None:
        self.buffer = torch.zeros(100 << 18, dtype=torch.int32, device=DEVICE)  # 100 MB
        self.sink = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def median_us(self, work, how: str, data=(), repeats: int = 25) -> float:
        for _ in range(2):
            work()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # about 12 ms: the host runs ahead
        for begin, end in pairs:
            if how != "warm":
                self.buffer.fill_(1)  # write, so that nothing of ours stays; then read, so that no line stays dirty
                read_kernel[(528,)](self.buffer, self.sink, self.buffer.numel(), 4096, num_warps=8)
            if how == "code":
                for tensor in data:
                    words = tensor.view(torch.int32).view(-1)
                    read_kernel[(132,)](words, self.sink, words.numel(), 4096, num_warps=8)
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(1000 * begin.elapsed_time(end) for begin, end in pairs)


def module_from(text: str, name: str):
    path = Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def candidates(tokens: int) -> dict[str, tuple]:
    """(module, plan) by label; the default first."""
    base = choose_plan(HEADLINE, tokens)
    found = {"default": (route_module, base)}
    if arguments.old.exists():
        warps = 1 if tokens == 1 else 32 if tokens > 2048 else 16
        old = RouteTile(warps, 1 if tokens == 1 else 128 if tokens > 2048 else 16, warps, tokens <= 16)
        found["old"] = (module_from(arguments.old.read_text(), "old_route"), replace(base, route=old))
    text = Path(route_module.__file__).read_text()
    found["unrolled"] = (module_from(text.replace("range(rounds)", "range(8)"), "unrolled_route"), base)
    tried = {}
    if base.path == "dense":
        tried["16 warps"] = RouteTile(16, 16, 16, True)
        if tokens <= 4:
            tried["4 warps"] = RouteTile(4, 4, 4, True)
    else:
        if tokens <= 32:
            block = 16 if tokens <= 16 else 32
            tried["one launch"] = RouteTile(block, block, block, True)
        for block in (1, 2, 4, 8, 16, 32):
            if block * 128 >= tokens or (block >= 16 and tokens > 2048):
                place = 128 if tokens > 2048 else block
                tried[f"{block} a program"] = RouteTile(block, place, block, False, True)
    found |= {label: (route_module, replace(base, route=tile)) for label, tile in tried.items() if tile != base.route}
    return found


def measure(timer: Timer, tokens: int, rows: list) -> None:
    inputs = draw(HEADLINE, tokens)
    for label, (module, plan) in candidates(tokens).items():
        if time.time() - START > arguments.seconds:
            say("stopped", tokens=tokens, label=label)
            return

        def one(label=label, module=module, plan=plan):
            stage = Stage(HEADLINE, inputs, plan, module)
            times = {how: timer.median_us(stage.run, how, inputs) for how in ("cold", "code", "warm")}
            if len(stage.launches) == 2:
                for name, launch in zip(("choose", "place"), stage.launches, strict=True):
                    single = Prepared([launch], torch.cuda.current_device())
                    times[name] = timer.median_us(lambda s=single: s.run(stage.addresses), "cold")
            say("time", tokens=tokens, label=label, **times, tile=str(plan.route))
            rows.append((tokens, label, times))

        attempt(f"T={tokens} {label}", one)


def main() -> None:
    torch.manual_seed(0)
    say("device", name=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    bad = []
    for tokens in (1, 7, 16, 32, 55, 80, 901, 4096, 14107):
        bad += [tokens] * (attempt(f"check {tokens}", lambda t=tokens: check(HEADLINE, t, choose_plan(HEADLINE, t), "default")) is not True)
    one = replace(choose_plan(HEADLINE, 16), route=RouteTile(16, 16, 16, True))
    bad += ["one"] * (attempt("check one launch", lambda: check(HEADLINE, 16, one, "one launch")) is not True)
    for g in GEOMETRIES.values():
        if g != HEADLINE:
            for tokens in (5, 300):
                name = g.definition_name
                bad += [name] * (attempt(name, lambda g=g, t=tokens: check(g, t, choose_plan(g, t), "default")) is not True)
    timer, rows = Timer(), []
    blank = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    slot = Slot(LOGITS, torch.int32)
    for count, label in ((1, "empty"), (2, "empty twice")):
        launches = [Launch(empty_kernel, 1, (slot,), (), (True,), 4, True)] * count
        ready = Prepared(launches, torch.cuda.current_device())
        addresses = [blank.data_ptr()] + [0] * 9
        times = {how: timer.median_us(lambda r=ready, a=addresses: r.run(a), how) for how in ("cold", "warm")}
        say("time", tokens=0, label=label, **times)
        rows.append((0, label, times))
    for tokens in arguments.tokens:
        attempt(f"T={tokens}", lambda tokens=tokens: measure(timer, tokens, rows))
    print("T candidate | cold code-cold warm | choose place (cold, alone)", flush=True)
    for tokens, label, times in rows:
        named = " ".join(f"{times[n]:.1f}" if n in times else "-" for n in ("cold", "code", "warm"))
        print(f"{tokens} {label} | {named} | " + " ".join(f"{times[n]:.1f}" for n in ("choose", "place") if n in times), flush=True)
    print(f"checks: {'all passed' if not bad else f'FAILED {bad}'}; {time.time() - START:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1, 7, 16, 80, 901, 14107, 32, 55, 4096])
    parser.add_argument("--old", type=Path, default=Path(".whl/old_route.py"))
    parser.add_argument("--seconds", type=float, default=45.0, help="begin no candidate after this")
    arguments = parser.parse_args()
    main()
