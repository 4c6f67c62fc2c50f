"""Check and time every peer on a GPU: python scripts/gpu_peers.py [--peers a,b] [--tokens 1,16,901] [--seconds 150]

Check: relative L2 and matched ratio (rtol 0.2, atol 0.1) against the float32 reference on the bench's own inputs, both modes,
outputs poisoned, two calls. Time: medians of event pairs behind a device-side backlog, L2 flushed before every call, eager
and as CUDA-graph replay; both layouts of DeepGEMM, and, unless peers are named, other tiles of the SGLang kernel.

Peers run in a child process: one that breaks the CUDA context is noted, and the rest go on in a fresh child. DeepGEMM's
kernels are built meanwhile by another child. Tracebacks and everything printed go to $OUT/gpu_peers.log, figures to
$OUT/gpu_peers.jsonl (default results/tmp); a short table comes last.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from functools import partial

from peer_runs import JOURNAL, LOG, OUT, Bench, attempt, caller, load, read, run_pending, say

TOKENS = (1, 7, 16, 80, 901, 11948, 14107)
PEERS = (
    "blockmoe", "sglang_triton_moe", "triton_fused_moe_v3", "triton_fused_moe_v2", "triton_fused_moe_v1",
    "sglang_fp8_blockwise_moe_v2", "sglang_fp8_blockwise_moe_v1", "deepgemm_moe",
)  # fmt: skip
BUILT = OUT / "gpu_peers.built"  # there once DeepGEMM's kernels are
REPEATS = 12


# timing


class Timer:
    def __init__(self) -> None:
        import torch

        from blockmoe.bench.timing import flush_bytes, release_kept_lines

        self.buffer = torch.zeros(flush_bytes("cuda") // 4, dtype=torch.int32, device="cuda")
        self.sink = torch.zeros((), dtype=torch.int32, device="cuda")
        self.release_l2 = release_kept_lines()

    def flush(self) -> None:
        import torch

        self.buffer.fill_(1)  # write, so that nothing of ours stays; then read, so that no line stays dirty
        torch.amax(self.buffer, dim=0, out=self.sink)

    def median_us(self, work, repeats: int = REPEATS) -> float:
        import torch

        work()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize()
        self.release_l2()
        torch.cuda._sleep(20_000_000)  # about 12 ms: the host runs ahead
        for begin, end in pairs:
            self.flush()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(1000 * begin.elapsed_time(end) for begin, end in pairs)


def host_us(work) -> float:
    import torch

    samples = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        samples.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(samples)


def graph_of(work):
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        graph.kept = work()  # an output of the graph's own pool
    return graph


def launches(work) -> int:
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


# what is run for each peer


def check(name: str, module, bench: Bench, mode: str, tokens: int, label: str = "", **override) -> None:
    import torch

    from blockmoe.bench.correctness import Tolerance, judge

    arguments = bench.open(mode, tokens)
    reference = bench.references[mode, tokens]
    call = caller(module, arguments, tokens, reference.shape[1], **override)
    first = call().clone()
    again = call()
    torch.cuda.synchronize()
    found = judge(first, reference, Tolerance(0.2, 0.1, 0.85))
    zeros = (reference == 0).all(1)
    clean = not first[zeros].any().item()
    say(
        "check", peer=name + label, mode=mode, tokens=tokens, ok=found.passed and clean and found.relative_l2 < 0.1,
        rel_l2=found.relative_l2, matched=found.matched_ratio, matched_nonzero=found.matched_ratio_nonzero_rows,
        repeatable=torch.equal(first.view(torch.int16), again.view(torch.int16)), zeros=clean, message=found.message[:120],
    )  # fmt: skip


def measure(name: str, module, bench: Bench, timer: Timer, tokens: int, label: str = "", **override) -> None:
    arguments = bench.open("trace", tokens)
    call = caller(module, arguments, tokens, bench.geometry.hidden_size, **override)
    label = name + label
    eager = attempt(f"{label} T={tokens} eager", lambda: timer.median_us(call))
    host = attempt(f"{label} T={tokens} host", lambda: host_us(call)) if tokens <= 901 else None
    graph = attempt(f"{label} T={tokens} graph", lambda: timer.median_us(graph_of(call).replay))
    count = attempt(f"{label} launches", lambda: launches(call)) if tokens == 16 else None
    say("time", peer=label, tokens=tokens, eager_us=eager, graph_us=graph, host_us=host, launches=count)


def run_peer(name: str, bench: Bench, timer: Timer, until: float) -> None:
    module = attempt(f"{name} import", lambda: load(name))
    if module is None:
        return
    variants = {"": {}}
    if name == "deepgemm_moe":
        variants = {" masked": {"masked": True}, " contiguous": {"masked": False}}
    for label, override in variants.items():
        for mode in bench.inputs:
            for tokens in bench.tokens:
                work = partial(check, name, module, bench, mode, tokens, label, **override)
                attempt(f"{name}{label} check {mode} T={tokens}", work)
    for label, override in variants.items():
        for tokens in bench.tokens:
            if time.time() > until:
                say("stopped", peer=name + label, tokens=tokens)
                return
            attempt(f"{name}{label} T={tokens}", partial(measure, name, module, bench, timer, tokens, label, **override))


def other_tiles(bench: Bench, timer: Timer, until: float) -> None:
    """Tiles that might beat the SGLang kernel's choice."""
    module = attempt("tiles import", lambda: load("sglang_triton_moe"))
    if module is None:
        return
    tiles = {
        "few": [(16, 64, 1, 4, 3), (16, 64, 1, 4, 5), (16, 128, 1, 4, 4), (32, 64, 1, 4, 4)],
        "some": [(16, 64, 8, 4, 4), (32, 64, 8, 4, 4), (32, 128, 8, 4, 4), (64, 64, 8, 4, 4), (64, 128, 1, 4, 3), (128, 128, 8, 8, 4)],
        "many": [(64, 128, 8, 4, 4), (128, 128, 1, 8, 4), (128, 128, 8, 8, 3), (128, 128, 32, 8, 4)],
    }
    for tokens in bench.tokens:
        for sizes in tiles["few" if tokens <= 256 else "some" if tokens <= 4096 else "many"]:
            if time.time() > until:
                return
            tile = module.Tile(*sizes)
            label = f" {'x'.join(map(str, sizes))}"
            attempt(f"tile{label} T={tokens}", partial(measure, "sglang_triton_moe", module, bench, timer, tokens, label, tile=tile))


def swiglu_variants(timer: Timer) -> None:
    """One Triton kernel beside sgl_kernel's own fused SwiGLU and quantisation, over 8 T rows.

    The latter takes the gate first, so that it needs the halves swapped by a copy; timed with and without that copy.
    """
    import sgl_kernel
    import torch

    load("triton_fused_moe_v3")
    steps = sys.modules["steps_v3"]
    limits = (128, 1e-10, -448.0, 448.0)
    quantise = sgl_kernel.sgl_per_token_group_quant_8bit
    fused = partial(quantise, fuse_silu_and_mul=True, enable_v2=True)

    def fused_after_swap(x, codes, scales):
        fused(torch.cat(x.chunk(2, 1)[::-1], 1), codes, scales, *limits)

    for tokens in (1, 80, 901, 14107):
        rows, middle = 8 * tokens, 2048
        x = torch.randn(rows, 2 * middle, device="cuda", dtype=torch.bfloat16)
        c = torch.randn(rows, middle, device="cuda", dtype=torch.bfloat16)
        codes = torch.empty(rows, middle, device="cuda", dtype=torch.float8_e4m3fn)
        scales = torch.empty(rows, middle // 128, device="cuda")
        variants = {
            "triton": partial(steps.swiglu_quantise, x, codes, scales),
            "sgl fused": partial(fused, x, codes, scales, *limits),
            "sgl fused after swap": partial(fused_after_swap, x, codes, scales),
            "sgl quantise v1": partial(quantise, c, codes, scales, *limits, enable_v2=False),
            "sgl quantise v2": partial(quantise, c, codes, scales, *limits, enable_v2=True),
        }
        times = {label: attempt(f"swiglu {label} T={tokens}", partial(timer.median_us, work)) for label, work in variants.items()}
        say("swiglu", tokens=tokens, **times)


def worker(arguments) -> None:
    import torch

    say("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    until = arguments.until
    bench, timer = Bench(arguments.tokens, arguments.seed), Timer()
    for name in arguments.peers:
        say("begin", peer=name)
        if name == "deepgemm_moe":
            wait_for_kernels(until)
        if name == "extras":
            attempt("swiglu variants", lambda: swiglu_variants(timer))
            other_tiles(bench, timer, until)
        elif time.time() < until:
            run_peer(name, bench, timer, until)
            torch.cuda.empty_cache()
        say("done", peer=name)


# DeepGEMM builds its kernels at first use


def build_kernels(arguments) -> None:
    """Call deepgemm_moe on made-up weights, once for each T and layout; the built kernels stay on disk."""
    import torch

    module = load("deepgemm_moe")

    def codes(*shape):
        return torch.zeros(shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)

    weights = codes(32, 4096, 7168), torch.ones(32, 32, 56, device="cuda"), codes(32, 7168, 2048), torch.ones(32, 56, 16, device="cuda")
    bias = torch.zeros(256, dtype=torch.bfloat16, device="cuda")
    for masked in (True, False):
        for tokens in arguments.tokens:
            begin = time.time()
            logits, scales = torch.randn(tokens, 256, device="cuda"), torch.ones(56, tokens, device="cuda")
            output = torch.empty(tokens, 7168, dtype=torch.bfloat16, device="cuda")
            call = (logits, bias, codes(tokens, 7168), scales, *weights, 32, 2.5, output)
            attempt(f"build masked={masked} T={tokens}", lambda call=call, masked=masked: module.run(*call, masked=masked))
            say("built", masked=masked, tokens=tokens, seconds=time.time() - begin)


def wait_for_kernels(until: float) -> None:
    while time.time() < until and not BUILT.exists():
        time.sleep(0.2)


# the parent


def run_children(arguments) -> None:
    common = ["--tokens", ",".join(map(str, arguments.tokens)), "--seed", str(arguments.seed), "--until", str(arguments.until)]
    log = LOG.open("a")
    builder = None
    if "deepgemm_moe" in arguments.peers:
        command = [sys.executable, __file__, "--build", *common]
        shell = ["sh", "-c", '"$@"; touch "$0"', str(BUILT), *command]
        builder = subprocess.Popen(shell, stdout=log, stderr=log, start_new_session=True)
    command = [sys.executable, __file__, "--worker", *common]
    run_pending([*arguments.peers, *(["extras"] if arguments.peers == list(PEERS) else [])], command, arguments.until)
    if builder and builder.poll() is None:
        os.killpg(builder.pid, signal.SIGTERM)


def table(lines: list[dict], tokens: list[int]) -> None:
    times = {(line["peer"], line["tokens"]): line for line in lines if line["kind"] == "time"}
    wrong: dict[str, list] = {}
    for line in lines:
        if line["kind"] == "check":
            wrong.setdefault(line["peer"], [])
            if not line["ok"]:
                wrong[line["peer"]].append(f"{line['mode']}/{line['tokens']} rel {line['rel_l2']:.3g}")
    errors = [line for line in lines if line["kind"] in ("failed", "child ended", "timeout", "stopped")]
    for line in errors[:12]:
        print("!", {key: value for key, value in line.items() if key != "kind"})
    print(f"{'eager/graph us':44}", *(f"{count:>13}" for count in tokens), " launches")
    for peer in dict.fromkeys(peer for peer, _ in times):
        cells, count = [], ""
        for t in tokens:
            line = times.get((peer, t), {})
            cells.append("/".join("-" if line.get(key) is None else f"{line[key]:.0f}" for key in ("eager_us", "graph_us")))
            count = line.get("launches") or count
        print(f"{peer:44}", *(f"{cell:>13}" for cell in cells), f" {count}")
    for peer, faults in wrong.items():
        print(f"{peer}: {'all checks passed' if not faults else 'WRONG ' + '; '.join(faults)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS), type=lambda text: text.split(","))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        worker(arguments)
    elif arguments.build:
        build_kernels(arguments)
    else:
        arguments.until = time.time() + arguments.seconds
        for file in (BUILT, JOURNAL, LOG):
            file.unlink(missing_ok=True)
        run_children(arguments)
        table(read(), arguments.tokens)


if __name__ == "__main__":
    main()
