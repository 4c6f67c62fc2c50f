"""Where a call's time goes, and on how many rows: python scripts/gpu_collapse.py [--peers a,b] [--tokens 1,901] [--seconds 60]

For each solution and T, on the bench's own inputs: the kernels of CALLS profiled calls (torch.profiler; L2 flushed, the host
ahead of the device), told apart by stage, beside the rows that each stage computes and the pairs that it would need to.

A kernel's time is the part of it that no earlier kernel of the call covers, so that overlapped launches count once and the
stages and the gaps between kernels add up to the span. Stages: the two products are known by their kernels' names, and what
runs before, between and behind them by its place. `needed` rows are the local pairs; `rows` are those handed to the stage;
`tile_rows` count the padding to whole tiles too, where the tile's height is known.

Lines go to $OUT/gpu_collapse.jsonl (default results/tmp), tracebacks to gpu_collapse.log; a table comes last. Run again over
a journal, `--table FILE` prints that table without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from peer_runs import JOURNAL, LOG, OUT, Bench, attempt, caller, load, read, run_pending, say

TOKENS = (1, 80, 901, 11948, 14107)
PUBLISHED = ("sglang_fp8_blockwise_moe_v1", "sglang_fp8_blockwise_moe_v2", "triton_fused_moe_v1", "triton_fused_moe_v2")
PEERS = (*PUBLISHED, "triton_fused_moe_v3", "sglang_triton_moe", "blockmoe", "deepgemm_moe")
STAGES = ("routing", "permute", "GEMM1", "activation", "GEMM2", "both GEMMs", "combine", "other")
CALLS = 5
SPIN_CYCLES = 8_000_000  # 4 ms: a profiled launch takes the host up to 0.1 ms, and a call has 32 at most
MARK = "nextafter"  # the kernel that brackets a call: no solution launches it
PRODUCT = re.compile(
    r"cutlass|group_gemm_starts|grouped_gemm_kernel|fp8_gemm|gate_up|(^|_)down_|down_kernel|stream_kernel|prefill_kernel|either_kernel"
)
FIRST_ONLY, SECOND_ONLY = re.compile(r"gate_up"), re.compile(r"(^|_)down_|down_kernel")
BOTH = re.compile(r"stream_kernel|prefill_kernel|either_kernel")
PERMUTE = re.compile(r"compute_problem_sizes|compute_expert|compute_arg_sorts|shuffle_row|gather|align|sort|place")
OTHER = re.compile(r"Memset|memset|FillFunctor")

# (name, start ns, end ns)
Kernel = tuple[str, int, int]


# from kernels to stages


def calls_of(kernels: list[Kernel]) -> list[list[Kernel]]:
    """The kernels between each pair of marks, in the order of their starts."""
    calls, inside = [], None
    for kernel in sorted(kernels, key=lambda k: k[1]):
        if MARK not in kernel[0]:
            if inside is not None:
                inside.append(kernel)
        elif inside is None:
            inside = []
        else:
            calls.append(inside)
            inside = None
    return calls


def stages_of(names: list[str]) -> list[str]:
    """The stage of each kernel of one call, in order: routing, permute, GEMM1, activation, GEMM2, combine."""
    products = [bool(PRODUCT.search(name)) for name in names]
    if not any(products):
        return ["other"] * len(names)
    first, last = products.index(True), len(names) - 1 - products[::-1].index(True)
    between = [index for index in range(first, last) if not products[index] and not OTHER.search(names[index])]
    found, permuting = [], False
    for index, name in enumerate(names):
        if OTHER.search(name):
            stage = "other"
        elif BOTH.search(name):
            stage = "both GEMMs"
        elif products[index]:
            second = bool(between) and index > between[0]
            stage = "GEMM2" if (SECOND_ONLY.search(name) or second) and not FIRST_ONLY.search(name) else "GEMM1"
        elif index < first:
            permuting = permuting or bool(PERMUTE.search(name))
            stage = "permute" if permuting else "routing"
        elif index > last or "combine" in name:
            stage = "combine"
        else:
            stage = "activation"
        found.append(stage)
    return found


def spent(call: list[Kernel]) -> tuple[dict[str, float], float, float]:
    """Microseconds by stage, of the gaps, and from the first start to the last end."""
    times = dict.fromkeys(STAGES, 0.0)
    covered, gaps = call[0][1], 0.0
    for (_, start, end), stage in zip(call, stages_of([name for name, _, _ in call]), strict=True):
        gaps += max(0, start - covered)
        times[stage] += max(0, end - max(start, covered))
        covered = max(covered, end)
    return {stage: ns / 1000 for stage, ns in times.items()}, gaps / 1000, (covered - call[0][1]) / 1000


# rows


def rows_of(solution: str, tokens: int, counts: list[int], tile: int | None = None) -> dict[str, tuple[int, int | None]]:
    """(rows, rows in whole tiles of `tile`, where known) of each stage, from the local experts' counts of pairs."""
    pairs, all_rows = sum(counts), 8 * tokens
    in_tiles = sum(-(-count // tile) * tile for count in counts) if tile else None
    local = dict.fromkeys(("permute", "GEMM1", "activation", "GEMM2", "combine"), (pairs, None))
    products = dict.fromkeys(("GEMM1", "GEMM2", "both GEMMs"), (pairs, in_tiles))
    if solution in PUBLISHED or solution == "triton_fused_moe_v3":
        every = dict.fromkeys(local, (all_rows, None))
        return every if solution in PUBLISHED else every | {"combine": (pairs, None)}
    if solution == "sglang_triton_moe":  # gathers while it multiplies; aligns, quantises and reduces every row
        return products | dict.fromkeys(("permute", "activation", "combine"), (all_rows, None))
    return local | products


def tile_of(solution: str, module, tokens: int, counts: list[int]) -> int | None:
    """The height in rows of the products' tiles, where the solution's own choice tells."""
    if solution == "sglang_triton_moe":
        return module.choose_tile(tokens).block_m
    if solution == "deepgemm_moe" and tokens > module.MASKED_TOKENS:
        return module.ALIGN
    if solution == "blockmoe":
        from blockmoe.geometry import HEADLINE
        from blockmoe.operator.machine import of_gpu
        from blockmoe.operator.plan import choose_plan

        return choose_plan(HEADLINE, tokens, of_gpu(0)).way(counts).gate_up.block_n
    return None


def work_of(stage: str, rows: int, hidden: int = 7168, middle: int = 2048) -> tuple[float, float]:
    """(FLOPs, least bytes of rows read and written) of a stage over `rows` rows; weights are left out."""
    flops = {name: n * middle * hidden * rows for name, n in (("GEMM1", 4), ("GEMM2", 2), ("both GEMMs", 6))}
    scaled = 1 + 4 / 128  # an e4m3 value with its share of a float32 scale
    moved = {"permute": 2 * scaled * hidden, "activation": 4 * middle + scaled * middle, "combine": 2 * hidden}
    return flops.get(stage, 0.0), moved.get(stage, 0.0) * rows


# measuring


def profiled(work, flush) -> list[list[Kernel]]:
    """The kernels of CALLS calls, by call."""
    import torch

    mark = torch.ones(1, device="cuda")
    out = torch.empty_like(mark)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            flush()
            torch.cuda._sleep(SPIN_CYCLES)
            torch.nextafter(mark, mark, out=out)
            work()
            torch.nextafter(mark, mark, out=out)
            torch.cuda.synchronize()
    on_device = [event for event in profile.profiler.kineto_results.events() if event.device_type() == torch.autograd.DeviceType.CUDA]
    return calls_of([(event.name(), event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_device])


def local_counts(values: dict, geometry) -> list[int]:
    """Pairs of each local expert, by the reference's routing."""
    import torch

    from blockmoe.reference import route

    ids, _ = route(values["routing_logits"], values["routing_bias"], geometry, values["routed_scaling_factor"])
    local = ids.flatten() - int(values["local_expert_offset"])
    local = local[(local >= 0) & (local < geometry.num_local_experts)]
    return torch.bincount(local, minlength=geometry.num_local_experts).tolist()


def measure(name: str, module, bench: Bench, flush, tokens: int) -> None:
    inputs = bench.inputs["trace"]
    inputs.open(bench.workloads[tokens])
    work = caller(module, list(inputs.values.values()), tokens, bench.geometry.hidden_size)
    for _ in range(3):
        work()
    calls = profiled(work, flush)
    if not calls or not all(calls):
        raise RuntimeError(f"{len(calls)} calls in the profile, {sum(map(bool, calls))} of them with kernels")
    found = [spent(call) for call in calls]
    span = statistics.median(total for _, _, total in found)
    gaps = statistics.median(gap for _, gap, _ in found)
    counts = local_counts(inputs.values, bench.geometry)
    rows = rows_of(name, tokens, counts, tile_of(name, module, tokens, counts))
    names = [kernel for kernel, _, _ in calls[0]]
    by_stage = list(zip(names, stages_of(names), strict=True))
    say("call", peer=name, tokens=tokens, span_us=span, gaps_us=gaps, launches=len(names), pairs=sum(counts), calls=len(calls))
    for stage in STAGES:
        kernels = [kernel for kernel, its in by_stage if its == stage]
        if not kernels:
            continue
        us = statistics.median(times[stage] for times, _, _ in found)
        handed, in_tiles = rows.get(stage, (None, None))
        flops, moved = work_of(stage, handed or 0)
        say(
            "stage", peer=name, tokens=tokens, stage=stage, us=us, share=us / span, launches=len(kernels),
            needed=sum(counts), rows=handed, tile_rows=in_tiles, tflops=flops / us / 1e6 if us and flops else None,
            gbs=moved / us / 1e3 if us and moved else None, kernels=list(dict.fromkeys(kernel[:160] for kernel in kernels)),
        )  # fmt: skip


def worker(arguments) -> None:
    import torch

    from blockmoe.bench.timing import release_kept_lines

    properties = torch.cuda.get_device_properties(0)
    say("device", name=properties.name, torch=torch.__version__, calls=CALLS)
    buffer = torch.zeros(2 * properties.L2_cache_size // 4, dtype=torch.int32, device="cuda")

    release_l2 = release_kept_lines()

    def flush():
        torch.cuda.synchronize()
        release_l2()
        buffer.add_(1)  # write, so that nothing of ours stays; then read, so that no line stays dirty
        buffer.sum()

    bench = Bench(arguments.tokens, arguments.seed)
    for name in arguments.peers:
        say("begin", peer=name)
        module = attempt(f"{name} import", partial(load, name))
        for tokens in arguments.tokens if module else ():
            if time.time() > arguments.until:
                say("stopped", peer=name, tokens=tokens)
                break
            attempt(f"{name} T={tokens}", partial(measure, name, module, bench, flush, tokens))
        torch.cuda.empty_cache()
        say("done", peer=name)


# the table


def table(lines: list[dict]) -> str:
    """A row for each T and solution: the span, and microseconds with rows over needed rows by stage."""
    spans = {(line["tokens"], line["peer"]): line for line in lines if line["kind"] == "call"}
    stages = {(line["tokens"], line["peer"], line["stage"]): line for line in lines if line["kind"] == "stage"}
    out = [f"! {line}" for line in lines if line["kind"] in ("failed", "child ended", "context lost", "timeout", "stopped")]
    columns = [stage for stage in STAGES if any(stage == found for *_, found in stages)]
    out.append(f"{'T':>6} {'solution':28} {'span us':>9} {'gaps':>6} " + " ".join(f"{stage:>16}" for stage in columns))
    for tokens, peer in sorted(spans, key=lambda key: key[0]):
        cells = []
        for stage in columns:
            line = stages.get((tokens, peer, stage))
            rows = f" ({line['rows'] / line['needed']:.2f})" if line and line["rows"] and line["needed"] else ""
            cells.append(f"{line['us']:.1f}{rows}" if line else "")
        call = spans[tokens, peer]
        out.append(f"{tokens:>6} {peer:28} {call['span_us']:>9.1f} {call['gaps_us']:>6.1f} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS), type=lambda text: text.split(","))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--table", type=Path, help="a journal of an earlier run")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        worker(arguments)
        return
    until = time.time() + arguments.seconds
    for file in (JOURNAL, LOG):
        file.unlink(missing_ok=True)
    common = ["--tokens", ",".join(map(str, arguments.tokens)), "--seed", str(arguments.seed), "--until", str(until)]
    run_pending(list(arguments.peers), [sys.executable, __file__, "--worker", *common], until)
    print(table(read()))


if __name__ == "__main__":
    main()
