"""The two floors of a workload, from its actual routing and this machine's measured ceilings.

Bytes: each active expert's weights and scales once, the activations of tokens that have a pair, the logits, the output.
FLOPs: 6 · H · I a pair (both GEMMs). The streaming floor is the measured time of a plain read of those bytes, cold; the
compute floor is FLOPs over the measured rate of a large FP8 product (of a float32 or bfloat16 product on a CPU).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from blockmoe.geometry import BLOCK, MoEGeometry

if TYPE_CHECKING:
    from blockmoe.bench.session import Session

CPU_READS_MS = 500.0

_rates: dict[str, float] = {}  # FLOP/s by device: once a session
_buffers: dict[str, torch.Tensor] = {}


def workload_cost(geometry: MoEGeometry, tokens: int, tokens_with_pairs: int, pairs: int, active_experts: int) -> tuple[int, int]:
    """(bytes, FLOPs) that a workload can't do without."""
    row = geometry.hidden_size + 4 * geometry.hidden_blocks
    tokens_bytes = tokens * (4 * geometry.num_experts + 2 * geometry.hidden_size) + tokens_with_pairs * row
    return active_experts * geometry.expert_bytes + tokens_bytes, pairs * geometry.pair_flops


def count_routing(geometry: MoEGeometry, values: dict[str, Any]) -> dict[str, int]:
    """Pairs, active experts and tokens with a pair of a workload's inputs."""
    from blockmoe.reference import route

    logits = values["routing_logits"].float().cpu()
    bias = values.get("routing_bias")
    bias = None if bias is None else bias.float().cpu()
    ids, _ = route(logits, bias, geometry, float(values["routed_scaling_factor"]))
    first = int(values["local_expert_offset"])
    local = (ids >= first) & (ids < first + geometry.num_local_experts)
    return {
        "pairs": int(local.sum()),
        "active_experts": len(torch.unique(ids[local])),
        "tokens_with_pairs": int(local.any(1).sum()),
    }


def measured_floors(session: Session) -> dict[str, Any]:
    """Counts, bytes, FLOPs and both floors in ms of the session's open workload; empty for a definition of another family.

    Empty, too, where routing is drawn: calls then differ in their work (at T = 1 some have no pair), and none stands for all.
    """
    geometry = MoEGeometry.from_definition(session.definition.name)
    if geometry is None or not session.inputs.keeps_routing:
        return {}
    session.inputs.load(0)
    counts = count_routing(geometry, session.inputs.values)
    tokens = len(session.inputs.values["hidden_states"])
    size, flops = workload_cost(geometry, tokens, counts["tokens_with_pairs"], counts["pairs"], counts["active_experts"])
    streaming = streaming_ms(size, session) if size else 0.0
    compute = flops / _rate(session.device) * 1e3
    kind = "streaming" if streaming >= compute else "compute"
    return counts | {
        "bytes": size, "flops": flops, "streaming_floor_ms": streaming, "compute_floor_ms": compute,
        "floor_ms": max(streaming, compute), "floor_kind": kind,
    }  # fmt: skip


def streaming_ms(size: int, session: Session) -> float:
    """Measured time of the fastest of a few plain reads of `size` bytes, L2 cold."""
    words = -(-size // (8 * BLOCK)) * BLOCK
    key = str(session.device)
    if key not in _buffers or len(_buffers[key]) < words:
        _buffers[key] = torch.randint(1 << 40, (words,), dtype=torch.int64, device=session.device)
    buffer = _buffers[key][:words]
    if session.device.type == "cpu":
        times = _time(session, [lambda: buffer.sum()] * 3)
        while len(times) < 30 and sum(times) < CPU_READS_MS:  # on a busy machine three in a row can be thousands of times too slow
            times += _time(session, [lambda: buffer.sum()])
        return min(times)
    reads: list[Callable[[], object]] = [lambda: buffer.sum()]
    try:
        from blockmoe.bench.read_kernel import CONFIGURATIONS, read

        reads += [lambda c=configuration: read(buffer, c) for configuration in CONFIGURATIONS]
    except ImportError:
        pass
    return min(statistics.median(_time(session, [read_once] * 9)[2:]) for read_once in reads)


def _rate(device: torch.device) -> float:
    """FLOP/s of a large product on this device: the best of three after a warm-up."""
    key = str(device)
    if key in _rates:
        return _rates[key]
    if device.type == "cuda":
        n = 8192
        a = torch.randn(n, n, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        times = _events(lambda: torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16))
    else:
        n, times = 1024, []
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(n, n).to(dtype)
            if times and _host(lambda a=a: a @ a, 1)[0] > 4 * min(times):
                continue  # bfloat16 without hardware for it takes seconds a product
            times += _host(lambda a=a: a @ a)[1:]
    _rates[key] = 2 * n**3 / (min(times) / 1e3)
    return _rates[key]


def _time(session: Session, calls: list[Callable[[], object]]) -> list[float]:
    for number, call in enumerate(calls):
        session.timer.flush()
        session.timer.timed(number, call)
    return [sample.ms for sample in session.timer.collect()]


def _events(call: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times[2:]


def _host(call: Callable[[], object], repeats: int = 4) -> list[float]:
    from time import perf_counter

    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append((perf_counter() - start) * 1e3)
    return times
