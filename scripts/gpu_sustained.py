"""Does a solution keep its speed? python scripts/gpu_sustained.py [--peers blockmoe,deepgemm_moe] [--tokens 14107,11948,901]

A benchmark's few calls end before the GPU's power limit lowers its clock; a server's don't. Here each solution's graph is replayed back
to back for about --seconds, solutions by turns, --rounds times, after a rest of half a second. Nothing is flushed in between: from some
tens of tokens on the active experts' weights are many times the L2. Printed: the time of a call during the first 10 ms and during the
second half, the multiprocessors' clock during that, the power that nvidia-smi reports (where it is installed), and how many times as fast
the first solution is as each other. A line a stretch goes to $OUT/gpu_sustained.jsonl (default results/tmp), tracebacks to its .log. Exit
code 1 where a solution failed or the output of an eager call was wrong, 3 where one broke the CUDA context, which ends the run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from peer_runs import JOURNAL, LOG, ROOT, Bench, attempt, caller, load, read, say

from blockmoe.bench.bundled import workloads_of
from blockmoe.geometry import HEADLINE

REST_S, FIRST_US, STEP_US = 0.5, 10_000.0, 20_000.0


class Power:
    """Watts by nvidia-smi while `during` runs, by samples (the bench's `gpu_state` reads once); none where it is not installed."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu  # an index, or better its UUID: nvidia-smi knows nothing of CUDA_VISIBLE_DEVICES
        self.command = shutil.which("nvidia-smi")
        self.watts: list[float] = []

    @contextmanager
    def during(self) -> Iterator[None]:
        self.watts = []
        if not self.command:
            yield
            return
        query = [self.command, f"--id={self.gpu}", "--query-gpu=power.draw.instant", "--format=csv,noheader,nounits", "--loop-ms=50"]
        with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
            try:
                yield
            finally:
                reader.terminate()
                lines = reader.communicate()[0].splitlines()
        for line in lines:
            with suppress(ValueError):  # "[N/A]", or a line cut off
                self.watts.append(float(line))


def stretch(replay, seconds: float, power: Power) -> dict[str, float | None]:
    """`replay` again and again for so long: us a call at first and in the second half, MHz and watts."""
    import torch
    from gpu_clock import Clock

    once = span_us(replay, 3)
    Clock(1).stamp(0, 0)  # compiles
    torch.cuda.synchronize()
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


def measure(arguments: argparse.Namespace) -> None:
    import gpu_peers
    import torch

    device = torch.cuda.get_device_properties(0)
    say("device", name=device.name, torch=torch.__version__, seed=arguments.seed, seconds=arguments.seconds, rounds=arguments.rounds)
    bench, power = Bench(arguments.tokens, arguments.seed), Power(f"GPU-{device.uuid}" if hasattr(device, "uuid") else "0")
    for tokens in arguments.tokens:
        inputs, graphs = bench.open("trace", tokens), {}
        for peer in arguments.peers:
            if module := attempt(f"{peer} T={tokens} import", partial(load, peer)):
                attempt(f"{peer} T={tokens} check", partial(gpu_peers.check, peer, module, bench, "trace", tokens))
                call = caller(module, inputs, tokens, bench.geometry.hidden_size)
                graphs[peer] = attempt(f"{peer} T={tokens} graph", partial(gpu_peers.graph_of, call))
        for number in range(arguments.rounds):
            for peer in arguments.peers[:: 1 if number % 2 == 0 else -1]:
                if graph := graphs.get(peer):
                    found = attempt(f"{peer} T={tokens} stretch", partial(stretch, graph.replay, arguments.seconds, power))
                    if found:
                        say("stretch", peer=peer, tokens=tokens, round=number, **found)
        graphs.clear()
        torch.cuda.empty_cache()


def table(lines: list[dict], peers: list[str]) -> str:
    """Medians over the rounds, a line a solution and T."""
    found: dict[tuple[int, str], list[dict]] = {}
    for line in lines:
        if line["kind"] == "stretch":
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


def failed(lines: list[dict]) -> bool:
    """Whether a solution failed somewhere, or was wrong."""
    return any(line["kind"] == "failed" or (line["kind"] == "check" and not line["ok"]) for line in lines)


def numbers_of(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers and commas, got {text!r}") from None
    known = [workload.axes["seq_len"] for workload in workloads_of(HEADLINE)]
    if unknown := [t for t in found if t not in known]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(map(str, sorted(known)))}, got {','.join(map(str, unknown))}")
    return found


def solutions_of(text: str) -> list[str]:
    known = sorted(file.parent.name for file in ROOT.glob("solutions/*/main.py"))
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(unknown)}")
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=solutions_of, default="blockmoe,deepgemm_moe", help="solutions; all are compared with the first")
    parser.add_argument("--tokens", type=numbers_of, default="14107,11948,901", help="comma-separated, of the 19 workloads")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a stretch lasts, about")
    parser.add_argument("--rounds", type=int, default=2, help="stretches of each solution and T; medians are printed")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    arguments = parser.parse_args()
    if arguments.seconds <= 0 or arguments.rounds < 1:
        parser.error(f"--seconds, --rounds: expected more than 0 and at least 1, got {arguments.seconds} and {arguments.rounds}")
    import torch

    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    for file in (JOURNAL, LOG):
        file.unlink(missing_ok=True)
    measure(arguments)
    print(table(read(), arguments.peers))
    return int(failed(read()))


if __name__ == "__main__":
    sys.exit(main())
