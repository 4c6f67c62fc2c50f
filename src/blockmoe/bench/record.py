"""From what a group found to traces: statuses, statistics, floors, environment. Field by field: `docs/traces.md`."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

from blockmoe.bench.contender import Contender, Failed, Findings
from blockmoe.bench.group import Group
from blockmoe.bench.schema import Correctness, Environment, Evaluation, Performance, Status, Trace, digest
from blockmoe.bench.settings import Settings
from blockmoe.bench.stats import Drift, drift, mad, median, paired_ratio
from blockmoe.bench.verdicts import Verdict, status_of

# A measured floor has noise and a plain read is not the best possible one: only a time this far below it is impossible.
IMPOSSIBLE_BELOW = 0.95
LOG_CHARACTERS = 4000  # of a failed evaluation's output; a passed one's log is left out


def resume_key(contender: Contender, workload_json: str, settings: Settings, hardware: str) -> str:
    """Digest of all that an evaluation depends on."""
    definition = contender.definition.model_dump(mode="json")
    return digest(definition, workload_json, contender.solution.digest, settings.identity(), hardware)


def traces_of(group: Group, run: str, commit: str | None) -> list[Trace]:
    """One trace a contender, the reference first; it has none where every solution failed before anything was timed."""
    measured = [one for one in group.everyone if one.findings.failure or one.findings.samples]
    return [_trace(group, contender, run, commit) for contender in measured]


def _trace(group: Group, contender: Contender, run: str, commit: str | None) -> Trace:
    findings, settings = contender.findings, group.settings
    failure = findings.failure or _faster_than_floor(group, contender)
    status = failure.status if failure else Status.PASSED
    hardware = group.reference.environment
    extra = {
        "verdict": failure.verdict.value if failure and failure.verdict else status.value,
        "message": failure.message if failure else "",
        "settings": settings.identity() | {"timeout": settings.timeout},
        "key": resume_key(contender, group.workload.to_json(), settings, hardware.get("name", "")),
        "solution_digest": contender.solution.digest,
        "definition_digest": digest(contender.definition.model_dump(mode="json")),
        "inputs_digest": contender.inputs_digest,
        "run": run,
        "interleaved": group.residency.together,
    }
    extra |= {name: group.floors[name] for name in ("pairs", "active_experts", "tokens_with_pairs") if name in group.floors}
    evaluation = Evaluation(
        status=status,
        environment=_environment(group, contender, commit),
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        log=findings.log[-LOG_CHARACTERS:] if failure else "",
        correctness=_correctness(findings, status, contender.is_reference),
        performance=_performance(group, contender) if status is Status.PASSED else None,
        extra=extra,
    )
    return Trace(definition=contender.definition.name, workload=group.workload, solution=contender.name, evaluation=evaluation)


def _faster_than_floor(group: Group, contender: Contender) -> Failed | None:
    floor = group.floors.get("floor_ms")
    if not floor or not contender.findings.samples:
        return None
    latency = median(_flat(contender.findings.samples))
    if latency >= IMPOSSIBLE_BELOW * floor:
        return None
    kind = group.floors["floor_kind"]
    message = f"{latency:.4f} ms, but the {kind} floor of this workload is {floor:.4f} ms"
    return Failed(status_of(Verdict.IMPOSSIBLE), message, Verdict.IMPOSSIBLE)


def _correctness(findings: Findings, status: Status, is_reference: bool) -> Correctness | None:
    if status not in (Status.PASSED, Status.INCORRECT_NUMERICAL):
        return None
    if is_reference:
        return Correctness(extra={"relative_l2": 0.0, "cosine": 1.0, "matched_ratio": 1.0, "matched_ratio_nonzero_rows": 1.0})
    if findings.correctness is None:  # poison in the output: there is no error to speak of
        return Correctness(max_relative_error=math.nan, max_absolute_error=math.nan)
    correctness = Correctness.model_validate(findings.correctness)
    correctness.extra = (correctness.extra or {}) | {"rechecked": findings.rechecked}
    return correctness


def _performance(group: Group, contender: Contender) -> Performance:
    findings, reference = contender.findings, group.reference.findings
    samples = _flat(findings.samples)
    latency, reference_latency = median(samples), median(_flat(reference.samples))
    blocks_a_trial = len(group.settings.blocks())
    trials = [number // blocks_a_trial for number in range(len(findings.samples))]
    ratio = paired_ratio(reference.samples, findings.samples, processes=trials if group.settings.fresh_processes else None)
    change = _drift(findings.samples, trials if group.settings.fresh_processes else [])
    extra: dict[str, Any] = {
        "samples_ms": _rounded(findings.samples),
        "reference_samples_ms": _rounded(reference.samples),
        "block_trial": trials,
        "mad_ms": mad(samples),
        "speedup_interval": None if ratio.low is None else [ratio.low, ratio.high],
        "timer": findings.timer,
        "host_us": findings.host_us,
        "drift": {"change": change.change, "drifted": change.drifted},
    }
    if any(findings.events):
        extra["events_ms"] = median(_flat(findings.events))
        extra["events_samples_ms"] = _rounded(findings.events)
    extra |= findings.graph
    floors = group.floors
    extra |= {name: floors[name] for name in ("floor_ms", "floor_kind", "bytes", "flops") if name in floors}
    extra |= {name: floors[name] for name in ("streaming_floor_ms", "compute_floor_ms") if name in floors}
    if floors.get("floor_ms"):
        extra["floor_fraction"] = floors["floor_ms"] / latency
    speedup = 1.0 if contender.is_reference else ratio.ratio
    return Performance(latency_ms=latency, reference_latency_ms=reference_latency, speedup_factor=speedup, extra=extra)


def _drift(blocks: list[list[float]], process: list[int]) -> Drift:
    """The largest within a process, where there are several."""
    if not process:
        return drift(_flat(blocks))
    apart = [[block for block, number in zip(blocks, process, strict=True) if number == one] for one in sorted(set(process))]
    return max((drift(_flat(some)) for some in apart), key=lambda found: (found.drifted, abs(found.change)))


def _environment(group: Group, contender: Contender, commit: str | None) -> Environment:
    seen = contender.environment or group.reference.environment
    extra = dict(seen.get("extra", {})) | {"commit": commit, "timer": contender.findings.timer}
    if group.settings.on_cuda and "l2_bytes" in extra:
        extra["flush_bytes"] = 2 * extra["l2_bytes"]
    if group.gpu and group.gpu[0]:
        first, last = group.gpu[0], group.gpu[-1]
        extra["driver"] = first.get("driver")
        extra["gpu"] = {name: [first.get(name), last.get(name)] for name in first if name != "driver"}
    return Environment(hardware=seen.get("name", "unknown"), libs=seen.get("libs", {}), extra=extra)


def _flat(blocks: list[list[float]]) -> list[float]:
    return [sample for block in blocks for sample in block]


def _rounded(blocks: list[list[float]]) -> list[list[float]]:
    """Tenths of a microsecond: below any timer's resolution, and a third of the file."""
    return [[round(sample, 4) if sample >= 1e-3 else sample for sample in block] for block in blocks]
