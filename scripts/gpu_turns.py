"""Trees of this project beside each other on a GPU: python scripts/gpu_turns.py [--tokens 14107,11948] [--rounds 6] LABEL=TREE...

    mkdir old && git archive COMMIT | tar x -C old
    python scripts/gpu_turns.py old=old new=. new2=. variant=.,NAME=VALUE

Each tree's operator (465d850 or newer) runs in a process of its own, with the environment NAME=VALUE, on the same inputs. The processes
take turns, each round beginning with the next: where power is the limit, the first and the last of a round meet a higher clock (kernel
log, section 36). So ask for as many rounds as there are trees. Processes of one tree differ too: give it twice. Cold L2 before each call;
cold code, too, if calls of other numbers of tokens come `--between`. Routing is a bundled workload's, else uniform; or, where tokens are
given as 128:one-expert, that of a family of `gpu_curve.py`, or, as 8192:even, every local expert has as many of the tokens. Printed last,
as medians over the rounds of medians of six calls: the whole call in us, the clock of the multiprocessors during it, their cycles, the
stages by themselves. Before that a sum over the output's bits by place, by which trees agree or not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

import gpu_curve
import torch
from gpu_clock import Clock

CALLS = 6  # a turn
FAMILIES = (*gpu_curve.FAMILIES, "even")


class Tree:
    """A process that measures one tree's operator when asked (`serve`)."""

    def __init__(self, given: str) -> None:
        self.label, _, rest = given.partition("=")
        self.path, *settings = rest.split(",")
        needed = [Path(self.path or "nowhere") / name for name in ("src/blockmoe/operator/plan.py", "scripts/gpu_operator.py")]
        if not all(file.is_file() for file in needed) or not all("=" in setting for setting in settings):
            raise SystemExit(f"gpu_turns: expected LABEL=TREE[,NAME=VALUE]..., with {needed[0]} and {needed[1]}, got {given!r}")
        self.environment = {**os.environ, **dict(setting.split("=", 1) for setting in settings)}

    def start(self, between: str) -> None:
        command = [sys.executable, __file__, "--serve", self.path, between]
        self.process = subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # `answer` says that it ended
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()

    def answer(self) -> str:
        found = self.process.stdout.readline().strip()
        if not found:
            raise SystemExit(f"gpu_turns: {self.label} ended with code {self.process.wait()}")
        return found


def serve(tree: str, between: str) -> None:
    """Answers "make T" with the output's sums and "time T" with us, MHz, thousands of cycles, and us of each stage. Calls of `between`
    tokens, made before, run before each."""
    sys.path[:0] = [f"{tree}/scripts", f"{tree}/src"]
    import gpu_operator as operator

    from blockmoe.geometry import HEADLINE
    from blockmoe.operator import machine
    from blockmoe.operator.launch import Prepared
    from blockmoe.operator.pipeline import stages
    from blockmoe.operator.plan import choose_plan
    from blockmoe.operator.workspace import layout

    torch.manual_seed(0)
    weights, timer, made = operator.weights(HEADLINE), operator.Timer(), {}
    on = (machine.of_gpu(0),) if hasattr(machine, "Machine") else ()  # older trees choose for an H100

    def make(given: str) -> str:
        tokens, family = size_of(given)
        inputs, offset = operator.workload(HEADLINE, tokens)
        if family:
            offset = HEADLINE.num_local_experts  # a group's experts
            chosen = gpu_curve.choices(family, HEADLINE, tokens, offset, 0, torch.device("cuda"))
            inputs = gpu_curve.logits_of(chosen, HEADLINE), torch.zeros_like(inputs[1]), *inputs[2:]
        plan = choose_plan(HEADLINE, tokens, *on)
        out = torch.full((tokens, HEADLINE.hidden_size), float("nan"), dtype=torch.bfloat16, device="cuda")
        memory = torch.full((layout(HEADLINE, tokens, plan)[1],), 255, dtype=torch.uint8, device="cuda")
        tensors = [*inputs, *weights, out, memory]
        ready = [Prepared(launches, 0) for launches in stages(HEADLINE, tokens, plan, offset, 2.5).values()]
        made[given] = tensors, tuple(t.data_ptr() for t in tensors), ready
        for stage in ready:
            stage.run(made[given][1])
        bits, places = out.view(torch.int16).flatten(), torch.arange(out.numel(), device="cuda")
        return f"bits {int((bits * (places % 1000003 + 1)).sum())}, {int(out.isnan().sum())} NaN"

    def measure(given: str) -> str:
        _, addresses, ready = made[given]
        others = [made[t] for t in between.split(",") if t]
        clock = Clock(CALLS)
        whole, parts = [], []
        timer.release_l2()
        torch.cuda._sleep(4_000_000)  # the host runs ahead
        for call in range(CALLS):
            for apart in (False, True):
                for _, there, kernels in others:
                    for stage in kernels:
                        stage.run(there)
                timer.flush()
                if not apart:
                    clock.stamp(call, 0)
                marks = [torch.cuda.Event(enable_timing=True)]
                marks[0].record()
                for stage in ready:
                    stage.run(addresses)
                    if apart or stage is ready[-1]:
                        marks.append(torch.cuda.Event(enable_timing=True))
                        marks[-1].record()
                if not apart:
                    clock.stamp(call, 1)
                (parts if apart else whole).append(marks)
        torch.cuda.synchronize()
        us = statistics.median(1000 * m[0].elapsed_time(m[1]) for m in whole)
        mhz = statistics.median(clock.mhz())
        each = [statistics.median(1000 * m[i].elapsed_time(m[i + 1]) for m in parts) for i in range(len(ready))]
        return " ".join(f"{value:.1f}" for value in (us, mhz, us * mhz / 1000, *each))

    print("ready", flush=True)
    for line in sys.stdin:
        word, given = line.split()
        print((make if word == "make" else measure)(given), flush=True)


def size_of(given: str) -> tuple[int, str]:
    """Tokens and family of such as 901 or 128:one-expert. Raises ValueError."""
    number, _, family = given.partition(":")
    if int(number) < 1 or family.replace("-", " ") not in ("", *FAMILIES):
        raise ValueError
    return int(number), family.replace("-", " ")


def sizes_of(text: str) -> list[str]:
    found = [given for given in text.split(",") if given]
    try:
        for given in found:
            size_of(given)
    except ValueError:
        families = ", ".join(name.replace(" ", "-") for name in FAMILIES)
        wanted = f"numbers of at least 1 and commas, each with :FAMILY or not, of {families}"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=sizes_of, default="14107,11948,4096,2048", help="comma-separated, as 901 or 128:one-expert")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--between", type=sizes_of, default="", help="as 8,4096: calls of so many tokens run before each measured one")
    parser.add_argument("trees", nargs="+", metavar="LABEL=TREE")
    arguments = parser.parse_args()
    tokens, between = arguments.tokens, arguments.between
    if not tokens or arguments.rounds < 1:
        parser.error(f"--tokens, --rounds: expected at least 1, got {len(tokens)} and {arguments.rounds}")
    trees = [Tree(given) for given in arguments.trees]
    if len({tree.label for tree in trees}) < len(trees):
        parser.error(f"expected a label of its own for each tree, got {' '.join(tree.label for tree in trees)}")
    for tree in trees:
        tree.start(",".join(between))
    for tree in trees:
        print(tree.label, tree.answer(), flush=True)
    for t in dict.fromkeys(tokens + between):
        for tree in trees:
            tree.ask(f"make {t}")
        for tree in trees:
            print(f"T={t} {tree.label}: {tree.answer()}", flush=True)
    found: dict[tuple[str, str], list[list[float]]] = {(t, tree.label): [] for t in tokens for tree in trees}
    for n in range(arguments.rounds):
        for t in tokens:
            first = n % len(trees)
            for tree in trees[first:] + trees[:first]:
                tree.ask(f"time {t}")
                found[t, tree.label].append([float(value) for value in tree.answer().split()])
    print("T | tree | call, us | MHz | kcycles | stages, us | least, us")
    for (t, label), rounds in found.items():
        us, mhz, cycles, *each = (statistics.median(column) for column in zip(*rounds, strict=True))
        apart = ", ".join(f"{e:.1f}" for e in each)
        print(f"{t} | {label} | {us:.1f} | {mhz:.0f} | {cycles:.0f} | {apart} | {min(r[0] for r in rounds):.1f}")


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
