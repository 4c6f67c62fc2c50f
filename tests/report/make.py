"""Traces for the report's tests: written as a bench would, with whatever a test wants changed."""

import copy
import itertools
import json
import time
from pathlib import Path

import numpy as np

DEFINITION = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
GPU = "NVIDIA H100 80GB HBM3"
SIZES = {1: 3, 16: 12, 80: 32, 901: 32, 11948: 32, 14107: 32}  # T: active experts


def trace(solution="alpha", tokens=1, latency=1.0, reference=20.0, noise=0.004, blocks=12, seed=0, **changes):
    """A passed evaluation as a dictionary; `changes` replace fields of `evaluation`, `definition` or `hardware`."""
    draw = np.random.default_rng([seed, tokens, *solution.encode("utf-8", "replace")])
    samples = latency * np.exp(noise * draw.standard_normal((blocks, 5)))
    found = float(np.median(samples))
    speedup = reference / found
    pairs, active = max(3, tokens), SIZES.get(tokens, 32)
    performance = {
        "latency_ms": found,
        "reference_latency_ms": reference,
        "speedup_factor": speedup,
        "extra": {
            "samples_ms": samples.tolist(),
            "speedup_interval": [speedup * 0.995, speedup * 1.005],
            "timer": "cupti",
            "host_us": 40.0,
            "graph_ms": found * 0.97,
            "floor_ms": 0.05 + active * 0.014,
            "floor_kind": "streaming" if tokens < 5000 else "compute",
            "bytes": active * 44.04e6,
            "flops": pairs * 88.08e6,
        },
    }
    evaluation = {
        "status": "PASSED",
        "environment": {"hardware": changes.pop("hardware", GPU), "libs": {"torch": "2.11.0"}, "extra": {"driver": "580"}},
        "timestamp": changes.pop("timestamp", "2026-11-21T20:00:00"),
        "log": "",
        "correctness": {"max_relative_error": 0.1, "max_absolute_error": 8.0, "extra": {"relative_l2": 0.002}},
        "performance": performance,
        "extra": {"run": changes.pop("run", "r1"), "pairs": pairs, "active_experts": active, "settings": {"rtol": 0.2}},
    }
    definition = changes.pop("definition", DEFINITION)
    evaluation.update(changes)
    return {
        "definition": definition,
        "workload": {
            "axes": {"seq_len": tokens},
            "inputs": {"local_expert_offset": {"type": "scalar", "value": 32}},
            "uuid": f"{tokens:08x}-0000-0000-0000-000000000000",
        },
        "solution": solution,
        "evaluation": evaluation,
    }


def failed(solution="alpha", tokens=1, status="RUNTIME_ERROR", message="it broke"):
    broken = trace(solution, tokens)
    broken["evaluation"].update(status=status, correctness=None, performance=None)
    broken["evaluation"]["extra"]["message"] = message
    return broken


def plain(solution="alpha", tokens=1, latency=1.0, reference=20.0):
    """As flashinfer-bench writes it: no extra fields at all."""
    bare = copy.deepcopy(trace(solution, tokens, latency, reference))
    bare["evaluation"].pop("extra")
    for part in ("performance", "correctness", "environment"):
        bare["evaluation"][part].pop("extra")
    return bare


def run(latencies, sizes=SIZES, reference=20.0, **changes):
    """A whole run: {solution: latency, or a function of T}; the reference is measured too."""
    traces = []
    for tokens in sizes:
        traces.append(trace("reference", tokens, reference, reference, **changes))
        for solution, latency in latencies.items():
            value = latency(tokens) if callable(latency) else latency
            traces.append(trace(solution, tokens, value, reference, **changes))
    return traces


def folder(path: Path, traces, about=None) -> Path:
    """Write traces (dictionaries, or strings as they are) and optionally run.json as a result folder."""
    target = path / "traces" / "moe"
    target.mkdir(parents=True, exist_ok=True)
    lines = [item if isinstance(item, str) else json.dumps(item) for item in traces]
    (target / "definition.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if about is not None:
        (path / "run.json").write_text(about if isinstance(about, str) else json.dumps(about), encoding="utf-8")
    return path


def times_of_a_yardstick(work) -> float:
    """Processor time of `work()`, by that of a fixed loop of some 0.1 s which the same process runs before and after. (Seconds would say as
    much of the machine: processor time too grows where another process has the core's other half.)"""
    marks = []
    for task in (yardstick, work, yardstick):
        marks.append(time.process_time())
        task()
    marks.append(time.process_time())
    before, itself, after = (end - begin for begin, end in itertools.pairwise(marks))
    return itself / ((before + after) / 2)


def yardstick() -> int:
    return sum(number * number % 7 for number in range(1_500_000))
