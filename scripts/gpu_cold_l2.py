"""What outlasts the flush that goes ahead of every timed call, on a GPU: python scripts/gpu_cold_l2.py

Loads that depend on each other, a line each: an L2 hit and a read of DRAM tell themselves apart. First of 8 MB that were brought into the
L2 in several ways, before and after flushes; then of what a call of the operator had the L2 keep. It fails where something is in the L2
that should not be, or where nothing outlasts a flush without the driver's reset (then the reset shows nothing).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import gpu_operator as operator
import torch
import triton
import triton.language as tl
from gpu_prefill import Variant

from blockmoe.bench.timing import DeviceTimer
from blockmoe.geometry import HEADLINE
from blockmoe.operator.machine import of_gpu
from blockmoe.operator.plan import choose_plan
from blockmoe.operator.workspace import layout

LINES = 1 << 16  # of 128 bytes
LOADS = 1000


@triton.jit
def chase(data, lines, found, COUNT: tl.constexpr):
    """found[0]: nanoseconds that loads of COUNT `lines` of 32 words take, each waiting for the one before."""
    begin = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer; // $1", "=l,l", [found.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
    )  # fmt: skip
    last = (begin >> 63).to(tl.int32)  # 0, and not known before
    for n in range(COUNT):
        last = (tl.load(data + 32 * tl.load(lines + n + last)) == 0x12345679).to(tl.int32)
    end = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer; // $1", "=l,r", [last], dtype=tl.int64, is_pure=False, pack=1
    )  # fmt: skip
    tl.store(found, end - begin)
    tl.store(found + 1, last.to(tl.int64))


@triton.jit
def each_line(data, WORD: tl.constexpr):
    at = data + (tl.program_id(0) * 256 + tl.arange(0, 256)) * 32
    tl.inline_asm_elementwise(WORD, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store(data, POLICY: tl.constexpr):
    at = data + tl.program_id(0) * 8192 + tl.arange(0, 8192)
    tl.store(at, 0, eviction_policy=POLICY)


def ns_a_load(data: torch.Tensor, lines: torch.Tensor, before: list[Callable[[], object]], timer: DeviceTimer) -> float:
    """Of LOADS of `lines`, drawn at random; the list itself, and the code, are read before."""
    drawn = lines[torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))[:LOADS]].to(torch.int32).to(data.device)
    elsewhere = torch.zeros(32 * (int(lines.max()) + 1), dtype=torch.int32, device=data.device)
    found = torch.zeros(2, dtype=torch.int64, device=data.device)
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        timer.release_l2()
        timer.flush()
        timer.flush()
        for work in before:
            work()
        chase[(1,)](elsewhere, drawn, found, len(drawn), num_warps=1)
        chase[(1,)](data, drawn, found, len(drawn), num_warps=1)
        samples.append(found[0].item() / len(drawn))
    return statistics.median(samples)


def kept_by(call: Variant, tokens: int, pairs: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Memory as words, and which of its lines a call had the L2 keep."""
    plan = choose_plan(HEADLINE, tokens, of_gpu(0))
    placed, memory = layout(HEADLINE, tokens, plan)[0], call.tensors[-1]
    found = {}
    for name, size in (("rows", 2 * HEADLINE.hidden_size), ("middle", HEADLINE.intermediate_size)):
        words = memory[placed[name][0] :][: pairs * size].view(torch.int32)
        found[name] = words, torch.arange(len(words) // 32)
    return found


def main() -> int:
    device = torch.device("cuda")
    timer = DeviceTimer(device, use_cupti=False)
    print(torch.cuda.get_device_name(device), "reset of kept lines:", timer.releases_l2)
    data = torch.zeros(32 * LINES, dtype=torch.int32, device=device)

    def word(text: str) -> Callable[[], object]:
        return lambda: each_line[(LINES // 256,)](data, text + " mov.b32 $0, 0;")

    def release() -> None:
        torch.cuda.synchronize()
        timer.release_l2()

    asked, kept = word("prefetch.global.L2::evict_normal [$1];"), word("prefetch.global.L2::evict_last [$1];")
    let_go, flush = word("applypriority.global.L2::evict_normal [$1], 128;"), timer.flush
    stored, stored_kept = (lambda policy=policy: store[(LINES // 256,)](data, policy) for policy in ("", "evict_last"))
    every = torch.arange(LINES)
    cold = ns_a_load(data, every, [], timer)
    rows = [  # what came before, and whether the lines should be there
        ("prefetched", [asked], True),
        ("prefetched, flushed", [asked, flush], False),
        ("stored, flushed", [stored, flush], False),
        ("prefetched with evict_last, flushed", [kept, flush], True),
        ("prefetched with evict_last, flushed three times", [kept, flush, flush, flush], True),
        ("stored with evict_last, flushed", [stored_kept, flush], True),
        ("prefetched with evict_last, reset, flushed", [kept, release, flush], False),
        ("stored with evict_last, reset, flushed", [stored_kept, release, flush], False),
        ("prefetched with evict_last, applypriority, flushed", [kept, let_go, flush], False),
        ("stored with evict_last, applypriority, flushed", [stored_kept, let_go, flush], False),
    ]
    bad = 0
    print(f"{'cold':56} {cold:5.0f} ns a load")
    for label, before, there in rows:
        ns = ns_a_load(data, every, before, timer)
        right = ns < 0.75 * cold if there else ns > 0.95 * cold
        bad += not right
        print(f"{label:56} {ns:5.0f}{'' if right else '  UNEXPECTED'}", flush=True)
    weights = operator.weights(HEADLINE)
    for tokens in (80, 255):  # stream, sorted
        inputs, offset = operator.workload(HEADLINE, tokens)
        inputs = (*inputs, *weights)
        call = Variant(inputs, offset, choose_plan(HEADLINE, tokens, of_gpu(0)))
        for name, (words, lines) in kept_by(call, tokens, operator.counts(inputs, HEADLINE, offset)[0]).items():
            cold = ns_a_load(words, lines, [], timer)
            ns = ns_a_load(words, lines, [lambda call=call: call.events(timer, False), flush], timer)
            right = ns > 0.95 * cold
            bad += not right
            label = f"operator, T = {tokens}, flushed; {name} (cold {cold:.0f})"
            print(f"{label:56} {ns:5.0f}{'' if right else '  UNEXPECTED'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
