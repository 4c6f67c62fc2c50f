"""What outlasts the flush that goes ahead of every timed call, on a GPU: python scripts/gpu_cold_l2.py

Loads that depend on each other, a line each, from 8 MB that were brought into the L2 in several ways, before and after flushes: an L2 hit
and a read of DRAM tell themselves apart. Last, what the operator leaves behind. It fails where something is in the L2 that should not be,
or where nothing outlasts a flush without the driver's reset (then the reset shows nothing).
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
from blockmoe.operator.plan import choose_plan
from blockmoe.operator.workspace import layout

LINES = 1 << 16  # of 128 bytes
LOADS = 1000


@triton.jit
def chase(data, found, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """found[0]: nanoseconds that COUNT loads take, STRIDE apart, each waiting for the one before."""
    begin = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer; // $1", "=l,l", [found.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
    )
    at = (begin >> 63).to(tl.int32)  # 0, and not known before
    for _ in range(COUNT):
        at += STRIDE + (tl.load(data + at) == 0x12345679).to(tl.int32)
    end = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer; // $1", "=l,r", [at], dtype=tl.int64, is_pure=False, pack=1
    )  # fmt: skip
    tl.store(found, end - begin)
    tl.store(found + 1, at.to(tl.int64))


@triton.jit
def each_line(data, WORD: tl.constexpr):
    at = data + (tl.program_id(0) * 256 + tl.arange(0, 256)) * 32
    tl.inline_asm_elementwise(WORD, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store(data, POLICY: tl.constexpr):
    at = data + tl.program_id(0) * 8192 + tl.arange(0, 8192)
    tl.store(at, 0, eviction_policy=POLICY)


def ns_a_load(data: torch.Tensor, before: list[Callable[[], object]], timer: DeviceTimer) -> float:
    lines = len(data) // 32
    step = max(1, (lines // LOADS - 1) | 1)  # odd
    loads = min(LOADS, lines // step)
    found = torch.zeros(2, dtype=torch.int64, device="cuda")
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        timer.release_l2()
        timer.flush()
        timer.flush()
        for work in before:
            work()
        chase[(1,)](data, found, 32 * step, loads, num_warps=1)
        samples.append(found[0].item() / loads)
    return statistics.median(samples)


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
    cold = ns_a_load(data, [], timer)
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
    weights = operator.weights(HEADLINE)
    buffers = []
    for tokens in (80, 901):
        inputs, offset = operator.workload(HEADLINE, tokens)
        pairs, _ = operator.counts((*inputs, *weights), HEADLINE, offset)
        call = Variant((*inputs, *weights), offset, choose_plan(HEADLINE, tokens))
        placed = layout(HEADLINE, tokens, choose_plan(HEADLINE, tokens))[0]
        for name, size in (("rows", 2 * HEADLINE.hidden_size), ("middle", HEADLINE.intermediate_size)):
            buffers.append((f"T = {tokens}: {name}", call, call.tensors[-1][placed[name][0] :][: pairs * size].view(torch.int32)))
        buffers.append((f"T = {tokens}: hidden states", call, call.tensors[2].view(torch.int32).flatten()))

    bad = 0
    print(f"{'cold':56} {cold:5.0f} ns a load")
    for label, before, there in rows:
        ns = ns_a_load(data, before, timer)
        right = (ns < 0.75 * cold) == there
        bad += not right
        print(f"{label:56} {ns:5.0f}{'' if right else '  UNEXPECTED'}", flush=True)
    for label, call, buffer in buffers:
        ns = ns_a_load(buffer, [lambda call=call: call.events(timer, False), flush], timer)
        right = ns > 0.75 * cold
        bad += not right
        print(f"{'operator, flushed; ' + label:56} {ns:5.0f}{'' if right else '  UNEXPECTED'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
