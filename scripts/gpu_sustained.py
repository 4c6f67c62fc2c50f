"""Does a solution keep its speed? python scripts/gpu_sustained.py [--peers blockmoe,deepgemm_moe] [--tokens 14107,11948,901]

A benchmark's few calls end before the GPU's power limit lowers its clock; a server's don't. Here each solution's graph is replayed back to
back for --seconds, solutions by turns, --rounds times, after a rest of half a second. Nothing is flushed in between: a layer's weights are
many times the L2. Printed: the time of a call during the first 10 ms and during the second half, the multiprocessors' clock during that,
the power that nvidia-smi reports (where it is installed), and how many times as fast the first solution is as each other. A line a
stretch goes to $OUT/gpu_sustained.jsonl (default results/tmp). Exit code 1 where a solution failed or its output was wrong.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from peer_runs import JOURNAL, ROOT, Bench, attempt, caller, load, read, say

REST_S, FIRST_US, STEP_US = 0.5, 10_000.0, 20_000.0


class Power:
    """Watts that nvidia-smi reports while `during` runs, by samples; none where it is not installed."""

    def __init__(self) -> None:
        self.command = shutil.which("nvidia-smi")
        self.watts: list[float] = []

    @contextmanager
    def during(self) -> Iterator[None]:
        self.watts = []
        if not self.command:
            yield
            return
        query = [self.command, "--id=0", "--query-gpu=power.draw.instant", "--format=csv,noheader,nounits", "--loop-ms=50"]
        with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
            yield
            reader.terminate()
            for line in reader.communicate()[0].splitlines():
                try:
                    self.watts.append(float(line))
                except ValueError:  # "[N/A]", or a line cut off
                    continue


def stretch(replay, seconds: float, power: Power) -> dict[str, float | None]:
    """`replay` again and again for so long: us a call at first and in the second half, MHz and watts."""
    import torch
    from gpu_clock import Clock

    once = span_us(replay, 3)
    time.sleep(REST_S)
    first, step = (max(1, round(us / once)) for us in (FIRST_US, STEP_US))
    counts = [first] + [step] * max(4, round(1e6 * seconds / (step * once)))
    half = len(counts) // 2
    clock = Clock(1)
    marks = [torch.cuda.Event(enable_timing=True)]
    with power.during():
        marks[0].record()
        for number, count in enumerate(counts):
            if number == half:
                clock.stamp(0, 0)
            for _ in range(count):
                replay()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        clock.stamp(0, 1)
        torch.cuda.synchronize()
    each = [1000 * begin.elapsed_time(end) / count for begin, end, count in zip(marks, marks[1:], counts, strict=False)]
    watts = power.watts[len(power.watts) // 2 : -1]  # the last may be of the end
    return {
        "rested_us": each[0], "sustained_us": statistics.median(each[half:]), "mhz": clock.mhz()[0],
        "watts": statistics.median(watts) if watts else None, "calls": sum(counts),
    }  # fmt: skip


def span_us(replay, count: int) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replay()
    begin.record()
    for _ in range(count):
        replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / count


def measure(arguments: argparse.Namespace) -> bool:
    """Whether all solutions ran, and rightly."""
    import gpu_peers
    import torch

    say("device", name=torch.cuda.get_device_name(), torch=torch.__version__, seed=arguments.seed)
    bench, power, right = Bench(arguments.tokens, arguments.seed), Power(), True
    for tokens in arguments.tokens:
        inputs, graphs = bench.open("trace", tokens), {}
        for peer in arguments.peers:
            module = load(peer)
            attempt(f"{peer} T={tokens}", partial(gpu_peers.check, peer, module, bench, "trace", tokens))
            call = caller(module, inputs, tokens, bench.geometry.hidden_size)
            graphs[peer] = attempt(f"{peer} T={tokens} graph", partial(gpu_peers.graph_of, call))
        right &= all(graphs.values())
        for number in range(arguments.rounds):
            for peer in arguments.peers[:: 1 if number % 2 == 0 else -1]:
                if graph := graphs[peer]:
                    found = attempt(f"{peer} T={tokens}", partial(stretch, graph.replay, arguments.seconds, power))
                    say("stretch", peer=peer, tokens=tokens, round=number, **(found or {}))
        graphs.clear()
        torch.cuda.empty_cache()
    return right and all(line["ok"] for line in read() if line["kind"] == "check")


def table(lines: list[dict], peers: list[str]) -> str:
    """Medians over the rounds, a line a solution and T."""
    found: dict[tuple[int, str], list[dict]] = {}
    for line in lines:
        if line["kind"] == "stretch" and "sustained_us" in line:
            found.setdefault((line["tokens"], line["peer"]), []).append(line)
    rows = [f"T | solution | rested, us | sustained, us | MHz | W | {peers[0]} is so many times as fast: rested, sustained"]
    for (tokens, peer), each in found.items():
        own = found.get((tokens, peers[0]), [])
        rested, sustained = middle(each, "rested_us"), middle(each, "sustained_us")
        times = "-"
        if own and peer != peers[0]:
            times = f"{rested / middle(own, 'rested_us'):.3f}, {sustained / middle(own, 'sustained_us'):.3f}"
        watts = f"{middle(each, 'watts'):.0f}" if all(line["watts"] for line in each) else "-"
        rows.append(f"{tokens} | {peer} | {rested:.1f} | {sustained:.1f} | {middle(each, 'mhz'):.0f} | {watts} | {times}")
    return "\n".join(rows)


def middle(lines: list[dict], key: str) -> float:
    return statistics.median(line[key] for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="blockmoe,deepgemm_moe", help="solutions, comma-separated; the first is beside each other")
    parser.add_argument("--tokens", default="14107,11948,901", help="comma-separated, of the 19 workloads")
    parser.add_argument("--seconds", type=float, default=1.0, help="a stretch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.peers, known = arguments.peers.split(","), sorted(file.parent.name for file in ROOT.glob("solutions/*/main.py"))
    if unknown := [name for name in arguments.peers if name not in known]:
        parser.error(f"--peers: expected some of {','.join(known)}, got {','.join(unknown)}")
    try:
        arguments.tokens = [int(t) for t in arguments.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens: expected numbers and commas, got {arguments.tokens!r}")
    if arguments.seconds <= 0 or arguments.rounds < 1:
        parser.error(f"--seconds, --rounds: expected more than 0 and at least 1, got {arguments.seconds} and {arguments.rounds}")
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    right = measure(arguments)
    print(table(read(), arguments.peers))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
