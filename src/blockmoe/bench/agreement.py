"""CUDA's two timers against each other: a known set of kernels, each timed by CUPTI and by events as a contender's calls are.

Events begin before the first kernel's launch and end behind the last kernel, CUPTI reads the kernels' own stamps: events read
a constant more. It is measured on an empty kernel and taken off before the two are held against each other; spans in traces
are left as they were read. Events are read twice: beside CUPTI in the same calls, as in a trace's `events_ms`, and alone with
no CUPTI at work, as for a contender that is timed by events. Times are in microseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blockmoe.bench.environment import commit, gpu_state, worker_environment
from blockmoe.bench.listing import console
from blockmoe.bench.settings import BLOCK_CALLS
from blockmoe.bench.timing import DeviceTimer, HostTimer, make_timer
from blockmoe.files import write_whole

WITHIN_SHARE, WITHIN_US = 0.03, 2.0  # the larger of the two is allowed
REPEATS = 60  # as many samples as the published settings take
OFFSET_REPEATS, SESSION_OFFSET_REPEATS = 200, 30  # of the empty kernel, here and when a worker starts
EMPTY = "empty kernel"
READS_MB = (1, 16, 44, 132, 400, 1409)  # 44: one expert's weights; 1409: all 32
CHAINS = (2, 5, 10)
SPIN_CYCLES = (20_000, 2_000_000)  # about 10 us and 1 ms


@dataclass(frozen=True)
class Row:
    """One kernel's spans in us: `cupti` and `events` of the same calls, `alone` of others that CUPTI did not record."""

    kernel: str
    cupti: list[float]
    events: list[float]
    alone: list[float]

    @property
    def recorded(self) -> bool:
        """Whether CUPTI gave a span for every call."""
        return bool(self.cupti) and len(self.cupti) == len(self.alone)

    @property
    def differences(self) -> tuple[float, float]:
        """What events read more than CUPTI: beside it (median of each call's difference), and alone (of the medians)."""
        beside = [events - cupti for events, cupti in zip(self.events, self.cupti, strict=True)]
        return statistics.median(beside), statistics.median(self.alone) - statistics.median(self.cupti)

    @property
    def allowed(self) -> float:
        return max(WITHIN_US, WITHIN_SHARE * statistics.median(self.cupti))

    def within(self, offset: float) -> tuple[bool, bool]:
        """Whether the timers agree once `offset` is taken off the events: beside CUPTI, and alone."""
        if not self.recorded:
            return False, False
        beside, alone = (abs(difference - offset) <= self.allowed for difference in self.differences)
        return beside, alone


@dataclass(frozen=True)
class Agreement:
    """The known set, measured. `offset` is what events read more on the empty kernel, None where CUPTI lost its records."""

    rows: list[Row]

    @property
    def offset(self) -> float | None:
        return next((row.differences[0] for row in self.rows if row.kernel == EMPTY and row.recorded), None)

    @property
    def holds(self) -> bool:
        return self.offset is not None and all(all(row.within(self.offset)) for row in self.rows)

    def counts(self, offset: float) -> tuple[int, int]:
        """How many kernels the timers agree on: beside CUPTI, and alone."""
        verdicts = [row.within(offset) for row in self.rows]
        return sum(beside for beside, _ in verdicts), sum(alone for _, alone in verdicts)


def known_set(device: torch.device) -> dict[str, Callable[[], object]]:
    """The kernels by name, as calls without arguments on a CUDA device; their buffers take about 1.5 GB."""
    spin = torch.cuda._sleep
    words = torch.randint(1 << 40, (max(READS_MB) * 10**6 // 8,), dtype=torch.int64, device=device)
    few = torch.zeros(4096, device=device)
    left, right = (torch.randn(4096, 4096, device=device).bfloat16() for _ in range(2))

    def chain(length: int) -> None:
        for _ in range(length):
            few.add_(1)

    calls: dict[str, Callable[[], object]] = {EMPTY: lambda: spin(0)}
    calls |= {f"spin of {cycles:,} cycles": lambda cycles=cycles: spin(cycles) for cycles in SPIN_CYCLES}
    calls |= {f"chain of {length} small kernels": lambda length=length: chain(length) for length in CHAINS}
    calls |= {f"read of {size:,} MB": lambda part=words[: size * 10**6 // 8]: part.sum() for size in READS_MB}
    half = 44 * 10**6 // 8
    calls["copy of 44 MB"] = lambda: words[:half].copy_(words[half : 2 * half])
    calls["product of 4096 x 4096 x 4096, bf16"] = lambda: left @ right
    return calls


def compare(calls: dict[str, Callable[[], object]], both: DeviceTimer, alone: DeviceTimer) -> Agreement:
    """Time each call by a timer with CUPTI and by one without, in turns of a block each."""
    rows = []
    for kernel, call in calls.items():
        for timer in (both, alone):
            timer.host_us(lambda: None, call)
        row = Row(kernel, [], [], [])
        for _ in range((OFFSET_REPEATS if kernel == EMPTY else REPEATS) // BLOCK_CALLS):
            for cupti, events in _by_both(both, call, BLOCK_CALLS):
                row.cupti.append(cupti)
                row.events.append(events)
            row.alone.extend(events for _, events in _timed(alone, call, BLOCK_CALLS))
        rows.append(row)
    return Agreement(rows)


def events_offset_us(timer: DeviceTimer | HostTimer) -> float | None:
    """What events read more than CUPTI on an empty kernel, in the median; None for a timer without CUPTI."""
    if timer.name != "cupti":
        return None
    spin = torch.cuda._sleep
    pairs = _by_both(timer, lambda: spin(0), SESSION_OFFSET_REPEATS)
    return round(statistics.median(events - cupti for cupti, events in pairs), 2) if pairs else None


def _by_both(timer: DeviceTimer, call: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
    """(CUPTI, events) of each call that CUPTI gave a span: a sample without one repeats its events' span to the last digit."""
    pairs = _timed(timer, call, repeats)
    return [(cupti, events) for cupti, events in pairs if cupti != events] if timer.name == "cupti" else []


def _timed(timer: DeviceTimer, call: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
    """One block as `Session.block` times it, without inputs and outputs: (the timer's span, events)."""
    call()
    for number in range(repeats):
        timer.hold()
        timer.flush()
        timer.timed(number, call)
        timer.synchronize()
    return [(sample.ms * 1e3, sample.events_ms * 1e3) for sample in timer.collect()]


def table(agreement: Agreement) -> Table:
    """A row a kernel. `rest`: the difference that lies further from the offset, less the offset."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("kernel")
    for column in ("CUPTI us", "events us", "difference", "events alone us", "difference", "rest", "allowed", "within?"):
        shown.add_column(column, justify="right")
    offset = agreement.offset
    for row in agreement.rows:
        if not row.recorded:
            lost = f"CUPTI recorded {len(row.cupti)} of {len(row.alone)} calls"
            shown.add_row(row.kernel, "-", "-", "-", f"{statistics.median(row.alone):.2f}", "-", "-", "-", f"no: {lost}")
            continue
        cupti, events, alone = (f"{statistics.median(spans):.2f}" for spans in (row.cupti, row.events, row.alone))
        beside_more, alone_more = (f"{difference:+.2f}" for difference in row.differences)
        rest = "-" if offset is None else f"{_rest(row, offset):+.2f}"
        verdict = "-" if offset is None else _verdict(*row.within(offset))
        shown.add_row(row.kernel, cupti, events, beside_more, alone, alone_more, rest, f"{row.allowed:.2f}", verdict)
    return shown


def summary(agreement: Agreement) -> Iterable[str]:
    """The offset, and how many kernels the timers agree on with and without it."""
    offset, count = agreement.offset, len(agreement.rows)
    if offset is None:
        yield "CUPTI lost records of the empty kernel: there is no offset to hold the timers against each other by."
        return
    repeats = next(len(row.cupti) for row in agreement.rows if row.kernel == EMPTY)
    yield f"Offset: events read {offset:.2f} us more than CUPTI on the empty kernel (median of {repeats} calls)."
    for text, less in ((f"Within {100 * WITHIN_SHARE:g} % or {WITHIN_US:g} us, the offset taken off", offset), ("As they were read", 0.0)):
        beside, alone = agreement.counts(less)
        yield f"{text}: {beside} of {count} beside CUPTI, {alone} of {count} by events alone."


def document(agreement: Agreement, **about: Any) -> dict[str, Any]:
    """The comparison with all samples, for JSON; `about` says on what it was measured."""
    offset = agreement.offset
    rows = []
    for row in agreement.rows:
        found: dict[str, Any] = {"kernel": row.kernel, "recorded": row.recorded, "within": None, "within_alone": None}
        if row.recorded:
            beside, alone = row.differences
            found |= {"cupti_us": round(statistics.median(row.cupti), 3), "events_us": round(statistics.median(row.events), 3)}
            found |= {"events_alone_us": round(statistics.median(row.alone), 3), "difference_us": round(beside, 3)}
            found |= {"difference_alone_us": round(alone, 3), "allowed_us": round(row.allowed, 3)}
            if offset is not None:
                found["within"], found["within_alone"] = row.within(offset)
        samples = {"cupti": row.cupti, "events": row.events, "events_alone": row.alone}
        found["samples_us"] = {name: [round(span, 3) for span in spans] for name, spans in samples.items()}
        rows.append(found)
    tolerance = {"share": WITHIN_SHARE, "us": WITHIN_US}
    rounded = None if offset is None else round(offset, 3)
    return about | {"events_offset_us": rounded, "allowed": tolerance, "agree": agreement.holds, "kernels": rows}


def show(output: Path | None) -> int:
    """Measure the known set on the first GPU and print it; `output` gets it as JSON. 1 where the timers disagree, 2 without CUPTI."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    both = make_timer(device)
    if both.name != "cupti":
        print("blockmoe: comparing the timers needs CUPTI, which does not start: is another profiler attached?", file=sys.stderr)
        return 2
    seen = worker_environment(device)
    before = gpu_state(0, seen["uuid"])
    agreement = compare(known_set(device), both, make_timer(device, use_cupti=False))
    after = gpu_state(0, seen["uuid"])
    if output:
        state = {name: [before.get(name), after.get(name)] for name in before if name != "driver"}
        environment = seen["extra"] | {"commit": commit(), "driver": before.get("driver"), "gpu": state}
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        found = document(agreement, hardware=seen["name"], libs=seen["libs"], environment=environment, timestamp=stamp)
        write_whole(output, json.dumps(found) + "\n")
    console().print(table(agreement), "", *summary(agreement), sep="\n")
    return 0 if agreement.holds else 1


def _rest(row: Row, offset: float) -> float:
    """What is left of the larger difference; to the hundredth, and never -0."""
    return round(max((difference - offset for difference in row.differences), key=abs), 2) + 0.0


def _verdict(beside: bool, alone: bool) -> str:
    if beside and alone:
        return "yes"
    return "no" if not beside and not alone else f"{'alone' if beside else 'beside'}: no"
