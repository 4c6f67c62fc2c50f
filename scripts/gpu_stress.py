"""Is the operator right, on a GPU? python scripts/gpu_stress.py [--seconds 100] [--sections geometries,special,...]

    geometries  six geometries, both input modes, T from 0 to 4,096 (headline to 14,107), memory full of NaN
    small       every T from 1 to 130
    special     no pair, one expert, ragged, NaN and infinite logits, offsets, scales of 1e-8, 0, < 0 and huge; odd addresses;
                other types of logits and bias
    repeat      1,000 random calls, each twice, compared bit for bit
    graph       CUDA-graph replay with other routings of the same T; a process whose first calls are captured, after warmup alone
    streams     two streams at once, different inputs, 50 times
    large       T = 65,536 and 49,153: a sample of tokens, and zeros for every token without a pair

A check wants relative L2 <= 0.03 against the float32 reference (0.1 for every single token) and <= 2e-3 against the oracle that
rounds as the plan does; tokens whose choice hangs on the last bits of a float32 sigmoid are counted (`ties`) and left out.
Exit code 1 where a check fails or is cut off by --seconds. With --device cpu everything is tiny, and under
TRITON_INTERPRET=1 the kernels are interpreted.

For the sanitizers, few and small launches through every plan of the headline geometry; inputs and references stay on the CPU:

    python scripts/gpu_stress.py --sanitizer                  # compiles
    compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/gpu_stress.py --sanitizer    # and racecheck, initcheck
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_session
import layer
import numpy as np
import stress_checks as checks
import torch
from stress_checks import FACTOR, Layer, compare, passes, special, verify

from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY, MoEGeometry
from blockmoe.operator.launch import interpreted
from blockmoe.operator.plan import TOKEN_CHUNK, Plan, choose_plan, plans
from blockmoe.operator.workspace import workspace_size
from blockmoe.reference import moe_reference, route

MODES = ("trace", "realistic")
SMALL = MoEGeometry(32, 8, 4, 512, 512, "deepseek_v3", 4, 2)  # for the sanitizers
INTERPRETED = interpreted()


class Stress:
    """The sections. `quick`: sizes for trying the script without a GPU."""

    def __init__(self, session: gpu_session.Session, device: torch.device, seed: int, machine: str | None = None) -> None:
        self.session, self.device, self.seed, self.machine = session, device, seed, machine
        self.quick = device.type == "cpu"
        self.oracle = not self.quick or INTERPRETED  # the call without kernels rounds nothing
        self.g = TINY if self.quick else HEADLINE
        self._layers: dict[str, Layer] = {}

    def layer(self, mode: str) -> Layer:
        if mode not in self._layers:
            self._layers[mode] = Layer(self.g, mode, self.device, self.seed)
        return self._layers[mode]

    def check(self, label: str, tensors: list, offset: int, g: MoEGeometry | None = None, **options) -> None:
        def work() -> None:
            ok, worst, facts = verify(tensors, g or self.g, offset, oracle=self.oracle, **options)
            self.session.check(label, ok, worst, **facts)

        self.session.attempt(label, work)

    def geometries(self) -> None:
        compiling = {} if self.quick else {g: self._compile(g) for g in GEOMETRIES.values() if g not in (TINY, HEADLINE)}
        sizes = (0, 1, 3, 17, 70) if self.quick else (0, 1, 3, 17, 80, 150, 200, 300, 901, 1600, 4096)
        for g in (self.g, *compiling):
            if g in compiling:
                compiling[g].wait()
            for mode in MODES:
                made = self.session.attempt(
                    f"{g.definition_name} {mode}", lambda g=g, mode=mode: self.layer(mode) if g == self.g else self._other(g, mode)
                )
                for tokens in (*sizes, 4097, 6000, 11948, 14107) if g == HEADLINE else sizes:
                    label = f"{g.definition_name} {mode} T={tokens}"
                    if made and (opened := self.session.attempt(label, partial(made.open, tokens))):
                        self.check(label, *opened, g)
                made = opened = None  # before the next weights are made
                self._free()

    def _compile(self, g: MoEGeometry) -> subprocess.Popen:
        """Another process fills Triton's cache meanwhile."""
        code = f"from blockmoe.geometry import GEOMETRIES as g; from blockmoe.operator import warmup; warmup(g[{g.definition_name!r}])"
        if self.machine:
            here = str(Path(__file__).parent)
            code = f"import sys; sys.path.insert(0, {here!r}); import stress_checks as s; s.plan_as_for({self.machine!r}); {code}"
        return subprocess.Popen([sys.executable, "-c", code])

    def _other(self, g: MoEGeometry, mode: str) -> Layer:
        return Layer(g, mode, self.device, self.seed)

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def small(self) -> None:
        """Tokens don't depend on each other: one reference serves every T."""
        most = 20 if INTERPRETED else 130
        tensors, offset = self.layer("realistic").open(most)
        reference = moe_reference(*tensors, offset, FACTOR, geometry=self.g)
        ignored = checks.near_ties(tensors[0], tensors[1], self.g)
        for tokens in range(1, most + 1):

            def work(tokens: int = tokens) -> None:
                part = checks.sliced(tensors, slice(tokens))
                memory = checks.poisoned(self.g, tokens, self.device)
                found = compare(layer.call(part, self.g, offset, FACTOR, **memory), reference[:tokens], ignored[:tokens])
                worst = {name: found.pop(name) for name in ("rel_l2", "token")}
                self.session.check(f"T={tokens}", passes(found | worst), worst, **found)

            self.session.attempt(f"T={tokens}", work)

    def special(self) -> None:
        most = 12  # tokens for the oracle
        last = self.g.num_experts - self.g.num_local_experts  # 224
        for tokens in (3, 12) if self.quick else (5, 20, 40, 100, 128, 150, 200, 300, 901, 1600, 4096):
            tensors, _ = self.layer("trace").open(tokens)
            offset = self.g.num_local_experts
            for name in checks.SPECIALS:
                self.check(f"{name} T={tokens}", special(tensors, name, offset, self.g), offset, most=most)
            for offset in (0, last // 2 + 5, last):
                changed = special(tensors, "all tokens on the same experts", offset, self.g)
                changed[0] = tensors[0] + (changed[0] > 10) * 0.5  # favours some local experts
                self.check(f"offset {offset} T={tokens}", changed, offset, most=most)
        for tokens in (12,) if self.quick else (5, 40, 901):
            tensors, offset = self.layer("realistic").open(tokens)
            self.check(f"addresses that are not aligned T={tokens}", [checks.unaligned(t) for t in tensors], offset)
        for tokens in (12,) if self.quick else (1, 7, 40, 901, 4096):
            tensors, offset = self.layer("trace").open(tokens)
            for logits, bias in (("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")):
                changed = [tensors[0].to(getattr(torch, logits)), tensors[1].to(getattr(torch, bias)), *tensors[2:]]
                self.check(f"{logits} logits, {bias} bias T={tokens}", changed, offset)

    def repeat(self) -> None:
        calls, largest = (30, 40) if self.quick else (1000, 16384)
        tensors, _ = self.layer("trace").open(largest)
        _, _, x, x_scale, *weights = tensors
        g, random = self.g, np.random.default_rng(self.seed)
        machine = checks.machine(self.device)
        size = workspace_size(g, largest, sm_count=machine.sm_count, capability=machine.capability)
        memory = torch.full((size,), 255, dtype=torch.uint8, device=self.device)
        differs = torch.zeros(calls, 2, dtype=torch.bool, device=self.device)
        sizes = np.exp(random.uniform(0, np.log(largest + 1), calls)).astype(int)

        def work() -> None:
            for i, tokens in enumerate(sizes.tolist()):
                begin = int(random.integers(0, largest - tokens + 1))
                part = slice(begin, begin + tokens)
                favour = torch.randn(g.num_experts, device=self.device) * float(random.choice([0.0, 1.0, 4.0]))
                logits = torch.randn(tokens, g.num_experts, device=self.device) + favour
                bias = (0.05 * torch.randn(g.num_experts, device=self.device)).bfloat16()
                inputs = [logits, bias, x[part], x_scale[:, part].contiguous(), *weights]
                offset = int(random.choice([0, 1, g.num_local_experts, g.num_experts - g.num_local_experts]))
                first = layer.call(inputs, g, offset, FACTOR)
                again = torch.full_like(first, torch.nan)
                layer.call(inputs, g, offset, FACTOR, out=again, workspace=memory)
                differs[i, 0] = (first.view(torch.int16) != again.view(torch.int16)).any()
                differs[i, 1] = first.isnan().any()
            found = differs.cpu().numpy()
            wrong = sizes[found.any(1)][:20].tolist()
            self.session.check(f"{calls} calls", not wrong, differ=int(found[:, 0].sum()), nan=int(found[:, 1].sum()), at_tokens=wrong)

        self.session.attempt(f"{calls} calls", work)

    def graph(self) -> None:
        if self.quick:
            return self.session.say("skipped", section="graph", why="CUDA only")
        self.session.attempt("captured first", self._captured_first)
        for tokens in (3, 80, 150, 300, 901, 1600, 14107):
            self.session.attempt(f"T={tokens}", lambda tokens=tokens: self._replay(tokens))

    def _captured_first(self) -> None:
        """In another process: here all has been called."""
        command = [sys.executable, str(Path(__file__).parent / "captured_first.py")]
        done = subprocess.run(command, capture_output=True, text=True)
        self.session.check("captured first", done.returncode == 0, said=(done.stdout + done.stderr).strip().splitlines()[-3:])

    def _replay(self, tokens: int) -> None:
        tensors, offset = self.layer("trace").open(tokens)
        tensors, g = [t.clone() for t in tensors[:4]] + tensors[4:], self.g
        first, bias = tensors[0].clone(), tensors[1].clone()
        out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device=self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer.call(tensors, g, offset, FACTOR, out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            layer.call(tensors, g, offset, FACTOR, out=out)
        captured = checks.counts(tensors, g, offset)
        routings: dict[str, Callable[[], list]] = {
            "as captured": lambda: [first, bias],
            "other logits": lambda: [torch.randn_like(first), bias.roll(1)],
            **{name: partial(special, [first, bias, *tensors[2:]], name, offset, g) for name in list(checks.SPECIALS)[:5]},
        }
        for name, make in routings.items():
            made = make()
            tensors[0].copy_(made[0])
            tensors[1].copy_(made[1])
            tensors[2].view(torch.uint8).bitwise_xor_(0x80)  # other contents too: signs
            out.fill_(torch.nan)
            graph.replay()
            eager = layer.call(tensors, g, offset, FACTOR)
            ignored = checks.near_ties(tensors[0], tensors[1], g)
            found = compare(out, moe_reference(*tensors, offset, FACTOR, geometry=g), ignored)
            same = torch.equal(out.view(torch.int16), eager.view(torch.int16))
            now = checks.counts(tensors, g, offset)
            worst = {key: found.pop(key) for key in ("rel_l2", "token")}
            label = f"T={tokens} {name}"
            self.session.check(label, same and passes(found | worst), worst, as_eager=same, captured=captured, now=now, **found)

    def streams(self) -> None:
        if self.quick:
            return self.session.say("skipped", section="streams", why="CUDA only")
        for sizes in ((80, 901), (150, 300), (300, 901), (3, 14107), (17, 17)):
            self.session.attempt(f"T={sizes}", lambda sizes=sizes: self._at_once(sizes))

    def _at_once(self, sizes: tuple[int, int], times: int = 50) -> None:
        sides, g = [], self.g
        for tokens in sizes:
            tensors, offset = self.layer("trace").open(tokens)
            tensors = [torch.randn_like(tensors[0]), *[t.clone() for t in tensors[1:3]], torch.randn_like(tensors[3]), *tensors[4:]]
            ok, _, _ = verify(tensors, g, offset, oracle=False)
            sides.append((tensors, offset, layer.call(tensors, g, offset, FACTOR), ok, torch.cuda.Stream()))
        wrong = torch.zeros(2, times, dtype=torch.bool, device=self.device)
        events = [[(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)] for _ in sides]
        base = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        base.record()
        for *_, stream in sides:
            stream.wait_event(base)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(4_000_000)  # 2 ms: both have work waiting
        for i in range(times):
            for side, (tensors, offset, expected, _, stream) in enumerate(sides):
                with torch.cuda.stream(stream):
                    events[side][i][0].record()
                    out = layer.call(tensors, g, offset, FACTOR)
                    events[side][i][1].record()
                    wrong[side, i] = (out.view(torch.int16) != expected.view(torch.int16)).any()
        torch.cuda.synchronize()
        spans = [[tuple(base.elapsed_time(event) for event in pair) for pair in side] for side in events]
        met = sum(any(b < end and begin < e for b, e in spans[1]) for begin, end in spans[0])
        bad = wrong.sum(1).tolist()
        ok = not any(bad) and all(alone for *_, alone, _ in sides)
        self.session.check(f"T={sizes}", ok and met > 0, wrong=bad, calls_that_met_another=met, calls=times)

    def large(self) -> None:
        for tokens in (130,) if self.quick else (65536, 49153):
            for name in ("as made", "all tokens on the same experts"):
                self.session.attempt(f"T={tokens} {name}", lambda tokens=tokens, name=name: self._large(tokens, name))
            self._free()

    def _large(self, tokens: int, name: str) -> None:
        tensors, offset = self.layer("trace").open(tokens)
        if name in checks.SPECIALS:
            tensors = special(tensors, name, offset, self.g)
        out = torch.full((tokens, self.g.hidden_size), torch.nan, dtype=torch.bfloat16, device=self.device)
        layer.call(tensors, self.g, offset, FACTOR, out=out)
        edges = [t for begin in range(0, tokens + 1, TOKEN_CHUNK) for t in (begin - 1, begin, begin + 1) if 0 <= t < tokens]
        index = torch.tensor([*edges, tokens - 2, tokens - 1], device=self.device)
        index = torch.cat([index, torch.randint(tokens, (64,), device=self.device)]).unique()
        part = checks.sliced(tensors, index)
        found = compare(out[index], moe_reference(*part, offset, FACTOR, geometry=self.g), checks.near_ties(part[0], part[1], self.g))
        experts = route(tensors[0], tensors[1], self.g, FACTOR)[0]
        without = ~((experts >= offset) & (experts < offset + self.g.num_local_experts)).any(1)
        without &= ~checks.near_ties(tensors[0], tensors[1], self.g)
        nan = sum(int(rows.isnan().sum()) for rows in out.split(TOKEN_CHUNK))
        stray = int((out[without] != 0).sum())
        worst = {key: found.pop(key) for key in ("rel_l2", "token")}
        ok = passes(found | worst) and not nan and not stray
        found |= {"nan_anywhere": nan, "not_zero_anywhere": stray, "without_pair": int(without.sum()), "sample": len(index)}
        self.session.check(f"T={tokens} {name}", ok, worst, **found)


def sanitizer(session: gpu_session.Session, device: torch.device) -> None:
    """Every plan of the headline geometry on a small one; the device runs the operator's kernels and copies, nothing else."""
    session.section("sanitizer")
    machine = checks.machine(device)
    cases = [(fitting(plan), plan) for plan in plans(HEADLINE, machine)]
    cases += [(200, choose_plan(HEADLINE, t, machine)) for t in (128, 901, 14107)]  # tiles that are full; of both ways prefill's
    cases += [(200, replace(choose_plan(HEADLINE, t, machine, tma=False), row_buffer=1)) for t in (901, 14107)]  # columns in blocks
    cases += [(t, None) for t in (1, 0, 33, 900)]  # 900: the large-T path as the call chooses it
    one = [(t, choose_plan(HEADLINE, t, machine), replace(SMALL, hidden_size=2048)) for t in (9, 20, 60, 128)]
    for tokens, plan, g in [*((t, plan, SMALL) for t, plan in cases), *one]:

        def work(tokens: int = tokens, plan=plan, g=g) -> None:
            chosen = plan or checks.plan_of(g, max(1, tokens), device)
            inputs = layer.make(g, tokens, seed=tokens)
            if g == SMALL:
                inputs[0][::2, 9] = 6.0  # an expert with several tiles beside ragged ones
            else:  # one with few, whose row blocks are shares of K
                checks.SPECIALS["all tokens on one expert"](inputs, 8, g)
            ignored = checks.near_ties(inputs[0], inputs[1], g)
            memory = {name: t.to(device) for name, t in checks.poisoned(g, tokens, torch.device("cpu"), chosen).items()}
            out = layer.call([t.to(device) for t in inputs], g, 8, FACTOR, plan, **memory).cpu()
            found = compare(out, moe_reference(*inputs, 8, FACTOR, geometry=g), ignored)
            worst = {name: found.pop(name) for name in ("rel_l2", "token")}
            session.check(f"T={tokens}", passes(found | worst), worst, **found, plan=str(chosen))

        session.attempt(f"T={tokens} {plan}", work)


def fitting(plan: Plan) -> int:
    """Some tokens, as many as a plan for few may serve."""
    most = min(40, plan.route.block_t) if plan.route.one_launch else 40
    return min(most, plan.gate_up.block_n) if plan.dense else most


SECTIONS = ("geometries", "small", "special", "repeat", "graph", "streams", "large")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no check after this")
    parser.add_argument("--sections", type=lambda s: s.split(","), default=list(SECTIONS), help=",".join(SECTIONS))
    parser.add_argument("--sanitizer", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--machine", choices=checks.BY_NAME, help="whose plans, by its memory: default the GPU's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"--sections: expected some of {','.join(SECTIONS)}, got {','.join(sorted(unknown))}")
    if arguments.machine and arguments.device != "cuda":
        parser.error(f"--machine: expected --device cuda, got {arguments.device}")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(arguments.seed)
    if INTERPRETED:
        import interpreter_casts
        import warp

        interpreter_casts.install()
        warp.install()
    session = gpu_session.Session("gpu_sanitizer" if arguments.sanitizer else "gpu_stress", arguments.seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    session.say("device", name=name, torch=torch.__version__, seed=arguments.seed, plans_of=arguments.machine or "the device")
    if arguments.machine:
        checks.plan_as_for(arguments.machine)
    if arguments.sanitizer:
        sanitizer(session, device)
        return session.finish()
    stress = Stress(session, device, arguments.seed, arguments.machine)
    for section in arguments.sections:
        session.section(section)
        session.attempt(section, getattr(stress, section))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
