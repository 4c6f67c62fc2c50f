"""Timing one call at a time: the host clock on a CPU; on CUDA the span by events, and by CUPTI where it is installed.

On CUDA a spin kernel goes ahead of every timed call, so that the host has enqueued the call's launches before the device
reaches them (a backlog): the span then holds the device's work and no launch gaps of the host. The L2 is flushed before
each call, outside the span, by writing a buffer of twice its size and then reading another (a write alone leaves dirty
lines behind). Lines that a kernel had the L2 keep (evict_last, persisting accesses) outlast that; the driver lets them go
first. A longer spin (`hold`) goes ahead of the inputs' loading: a call that starts work on a stream of its own, not
ordered behind the current one, has the inputs of the call before, and no head start. Eager host time is measured apart.

Every function that timing needs is bound when this module's classes are made, before a solution is imported.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SPIN_CYCLES_PER_US = 1980  # the H100's top SM clock in MHz: at lower clocks the backlog only grows
LEAST_BACKLOG_US, MOST_BACKLOG_US = 30.0, 3000.0
FIRST_HOLD_US, MOST_HOLD_US = 1000.0, 20000.0
# Reading one of CUPTI's records takes about 60 us of Python. A call of hundreds of kernels takes milliseconds, and the 2 us
# that events add are nothing to it: such a contender is timed by events, and its trace says so.
MOST_RECORDS = 100
MARK = "nextafter"  # the kernel that brackets each timed call in CUPTI's records: nothing else launches it


@dataclass
class Sample:
    """One timed call: span in ms, by the timer that the worker names; `events_ms` beside it on CUDA."""

    call: int
    ms: float
    events_ms: float | None = None


class HostTimer:
    """The CPU's timer."""

    name = "host_clock"
    flush_bytes = 0
    releases_l2: bool | None = None

    def __init__(self) -> None:
        self._clock = time.perf_counter
        self._pending: list[Sample] = []

    def timed(self, number: int, call: Callable[[], object]) -> object:
        """Run one call and keep its time; returns what the call returned."""
        start = self._clock()
        result = call()
        self._pending.append(Sample(number, (self._clock() - start) * 1e3))
        return result

    def hold(self) -> None:
        """Nothing: a CPU has no queue."""

    def flush(self) -> None:
        """Nothing: a CPU call reads weights of many times the cache."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def collect(self) -> list[Sample]:
        """The samples since the last collect."""
        samples, self._pending = self._pending, []
        return samples


def flush_bytes(device: torch.device | str) -> int:
    """What a flush writes and reads: twice the L2 of a CUDA device."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size


def release_kept_lines() -> Callable[[], bool]:
    """The driver's call by which every line of the L2 may leave it again, whatever kernels asked for; it says whether it worked.

    8 MB loaded or stored with evict_last were still in an H100's L2 after a flush, and most of them after three; after this call
    and a flush they were not (results/h100/cold-l2.txt).
    """
    try:
        reset = ctypes.CDLL("libcuda.so.1").cuCtxResetPersistingL2Cache
    except (OSError, AttributeError):
        return lambda: False
    return lambda: reset() == 0


class DeviceTimer:
    """CUDA's timer: events always, CUPTI's kernel records where cupti-python is installed and `use_cupti` allows.

    Events read 2 to 3 us more: the first kernel's launch lies between them. That offset is measured (`agreement.py`) and
    reported, and no span is corrected by it: without CUPTI, where it would matter most, it can't be measured.
    """

    def __init__(self, device: torch.device, use_cupti: bool = True) -> None:
        self._clock, self._event, self._spin = time.perf_counter, torch.cuda.Event, torch.cuda._sleep
        self._synchronize, self._stream, self._mark = torch.cuda.synchronize, torch.cuda.current_stream, torch.nextafter
        self._record, self._elapsed, self._query = torch.cuda.Event.record, torch.cuda.Event.elapsed_time, torch.cuda.Event.query
        self.device = device
        self.flush_bytes = flush_bytes(device)
        words = self.flush_bytes // 8
        self._dirty = torch.zeros(words, dtype=torch.int64, device=device)
        self._clean = torch.ones(words, dtype=torch.int64, device=device)
        self._one = torch.ones(1, device=device)
        self._out = torch.empty(1, device=device)
        self.release_l2 = release_kept_lines()
        self.releases_l2 = self.release_l2()
        self._backlog_us, self._hold_us = LEAST_BACKLOG_US, FIRST_HOLD_US
        self._held: torch.cuda.Event | None = None  # recorded behind the last hold's spin
        self._pending: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._cupti = _Cupti.start() if use_cupti else None
        self.name = "cupti" if self._cupti else "cuda_events"
        self.synchronize()

    def synchronize(self) -> None:
        self._synchronize(self.device)

    def hold(self) -> None:
        """Wait for the device and let go what its L2 was to keep; then keep it from all that is enqueued from here on until the next timed
        call is enqueued too."""
        self.synchronize()  # what still runs could have more kept
        self.release_l2()
        self._held = self._event()
        self._spin(int(self._hold_us * SPIN_CYCLES_PER_US))
        self._record(self._held, self._stream(self.device))

    def flush(self) -> None:
        """Leave nothing of the caller's in L2, save lines that a kernel had it keep (`hold` lets those go), and no dirty lines."""
        self._dirty.add_(1)
        self._clean.sum()

    def host_us(self, prepare: Callable[[], None], call: Callable[[], object], repeats: int = 5) -> float:
        """Median time until an eager call returns to the host, launched on an idle device; sets backlog and hold."""
        times, preparing = [], []
        for _ in range(repeats):
            start = self._clock()
            prepare()
            preparing.append((self._clock() - start) * 1e6)
            self.synchronize()
            start = self._clock()
            call()
            times.append((self._clock() - start) * 1e6)
            self.synchronize()
        if self._cupti:
            before = self._cupti.count()
            self._cupti.record(True)
            call()
            self.synchronize()
            self._cupti.record(False)
            self._cupti.reading = self._cupti.count() - before <= MOST_RECORDS
            self.name = "cupti" if self._cupti.reading else "cuda_events"
        host = statistics.median(times)
        self._backlog_us = min(max(LEAST_BACKLOG_US, 1.5 * host), MOST_BACKLOG_US)
        self._hold_us = min(max(FIRST_HOLD_US, 2 * statistics.median(preparing)), MOST_HOLD_US)
        return host

    def timed(self, number: int, call: Callable[[], object]) -> object:
        """Enqueue one call behind a backlog and between events; returns what the call returned. Times come with `collect`."""
        begin, end = self._event(enable_timing=True), self._event(enable_timing=True)
        stream = self._stream(self.device)
        if self._cupti:
            self._cupti.record(True)
        self._spin(int(self._backlog_us * SPIN_CYCLES_PER_US))
        self._mark(self._one, self._one, out=self._out)
        self._record(begin, stream)
        if self._held is not None and self._query(self._held):  # the device was faster than the host
            self._hold_us = min(2 * self._hold_us, MOST_HOLD_US)
        self._held = None
        result = call()
        self._record(end, stream)
        self._mark(self._one, self._one, out=self._out)
        if self._cupti:
            self._cupti.record(False)
        self._pending.append((number, begin, end))
        return result

    def collect(self) -> list[Sample]:
        """Wait for the device; the samples since the last collect."""
        self.synchronize()
        samples = []
        for number, begin, end in self._pending:
            events_ms = self._elapsed(begin, end)
            samples.append(Sample(number, events_ms, events_ms))
        self._pending = []
        if self._cupti and self._cupti.reading:
            spans = self._cupti.spans()
            if len(spans) == len(samples):
                for sample, span in zip(samples, spans, strict=True):
                    sample.ms = span if span > 0 else sample.ms  # a call that launches nothing has no span
            else:
                self.name = f"cuda_events (CUPTI lost records: {len(spans)} of {len(samples)} calls)"
        return samples

    def replay_ms(self, prepare: Callable[[int], None], graph: torch.cuda.CUDAGraph, calls: list[int]) -> float:
        """Median span of a captured graph's replays, by events behind a backlog, cold L2."""
        times = []
        for number in calls:
            self.release_l2()
            prepare(number)
            self.flush()
            begin, end = self._event(enable_timing=True), self._event(enable_timing=True)
            self._spin(int(LEAST_BACKLOG_US * SPIN_CYCLES_PER_US))
            self._record(begin, self._stream(self.device))
            graph.replay()
            self._record(end, self._stream(self.device))
            self.synchronize()
            times.append(self._elapsed(begin, end))
        if self._cupti:
            self._cupti.spans()  # drop the replays' records
        return statistics.median(times)


class _Cupti:
    """Kernel, copy and fill records of this process, cut into spans at the mark kernels."""

    def __init__(self, cupti: object) -> None:
        self._cupti = cupti
        self._kinds = [getattr(cupti.ActivityKind, kind) for kind in ("CONCURRENT_KERNEL", "MEMCPY", "MEMSET")]
        self._records: list[tuple[int, int, bool]] = []  # (start ns, end ns, is a mark)
        self._count = 0
        self.reading = True  # whether records are read as they come, or only counted

    @classmethod
    def start(cls) -> _Cupti | None:
        """None where cupti-python is missing or refuses (another profiler is attached, say)."""
        try:
            from cupti import cupti

            self = cls(cupti)
            cupti.activity_register_callbacks(lambda: (8 << 20, 0), self._completed)
            self.record(True)  # refuses here if at all
            self.record(False)
        except Exception:
            return None
        return self

    def record(self, wanted: bool) -> None:
        """Begin or end recording: only timed calls are recorded, since every record costs about 60 us of Python."""
        switch = self._cupti.activity_enable if wanted and self.reading else self._cupti.activity_disable
        for kind in self._kinds:
            switch(kind)

    def _completed(self, activities: list) -> None:
        self._count += len(activities)
        for activity in activities if self.reading else ():
            self._records.append((activity.start, activity.end, MARK in (getattr(activity, "name", "") or "")))

    def count(self) -> int:
        """How many records there have been."""
        self._cupti.activity_flush_all(1)
        return self._count

    def spans(self) -> list[float]:
        """Milliseconds from first start to last end between each pair of marks since the last call; a mark too many is a span too."""
        self._cupti.activity_flush_all(1)
        records, self._records = sorted(self._records), []
        spans, inside = [], None
        for start, end, is_mark in records:
            if is_mark and inside is None:
                inside = []
            elif is_mark:
                spans.append((max(e for _, e in inside) - min(s for s, _ in inside)) / 1e6 if inside else 0.0)
                inside = None
            elif inside is not None:
                inside.append((start, end))
        return spans if inside is None else [*spans, 0.0]


def make_timer(device: torch.device, use_cupti: bool = True) -> HostTimer | DeviceTimer:
    """The timer for a device."""
    return DeviceTimer(device, use_cupti) if device.type == "cuda" else HostTimer()
