"""Events against CUPTI on a known set of kernels: the sums and the verdicts with a timer that is told its times, and once on a GPU."""

import json
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from blockmoe.bench import agreement, doctor, environment, worker
from blockmoe.bench.agreement import BLOCK_CALLS, EMPTY, OFFSET_REPEATS, REPEATS, Agreement, Row, compare, document, events_offset_us
from blockmoe.bench.bundled import definition_of
from blockmoe.bench.timing import MARK, HostTimer, Sample, _Cupti
from blockmoe.geometry import TINY

SPANS = {EMPTY: 1.5, "chain": 25.0, "read": 500.0}


class ToldTimer:
    """Times calls that return their span in us; events read `more` than that. `deaf` calls have no CUPTI span, `lost` lose a block's."""

    def __init__(self, cupti=True, more=2.7, deaf=(), lost=()):
        self.cupti, self.more, self.deaf, self.lost = cupti, more, deaf, lost
        self.enqueued, self.log = [], []
        self.host_us(None, None)

    def host_us(self, prepare, call):
        self.name = "cupti" if self.cupti else "cuda_events"

    def hold(self):
        self.log.append("hold")

    def flush(self):
        self.log.append("flush")

    def timed(self, number, call):
        self.log.append("timed")
        self.enqueued.append((number, call()))

    def synchronize(self):
        self.log.append("synchronize")

    def collect(self):
        samples = []
        for number, span in self.enqueued:
            events = (span + (self.more(span) if callable(self.more) else self.more)) / 1e3
            by_cupti = self.cupti and span not in self.deaf
            samples.append(Sample(number, span / 1e3 if by_cupti else events, events))
            if span in self.lost:
                self.name = f"cuda_events (CUPTI lost records: 4 of {BLOCK_CALLS} calls)"
        self.enqueued = []
        return samples


def measured(both=None, alone=None):
    calls = {name: lambda span=span: span for name, span in SPANS.items()}
    return compare(calls, both or ToldTimer(), alone or ToldTimer(cupti=False))


def by_name(found):
    return {row.kernel: row for row in found.rows}


def printed(found):
    console = Console(width=200, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(agreement.table(found), *agreement.summary(found), sep="\n")
    return capture.get()


def test_the_offset_of_the_empty_kernel_is_taken_off():
    both = ToldTimer()
    found = measured(both)
    assert found.offset == pytest.approx(2.7) and found.holds
    assert found.counts(found.offset) == (3, 3) and found.counts(0.0) == (1, 1)  # 3 % of 500 us is more than 2.7 us, 2 us are not
    rows = by_name(found)
    assert [len(rows[name].cupti) for name in SPANS] == [OFFSET_REPEATS, REPEATS, REPEATS]
    assert [rows[name].allowed for name in SPANS] == [2.0, 2.0, 15.0]
    assert both.log[:4] == ["hold", "flush", "timed", "synchronize"]  # the order of a contender's timed call
    text = printed(found)
    assert "chain 25.00 27.70 +2.70 27.70 +2.70 +0.00 2.00 yes" in " ".join(text.split())
    assert "events read 2.70 us more than CUPTI on the empty kernel (median of 200 calls)" in text
    assert "Within 3 % or 2 us, the offset taken off: 3 of 3 beside CUPTI, 3 of 3 by events alone." in text
    assert "As they were read: 1 of 3 beside CUPTI, 1 of 3 by events alone." in text


def test_a_kernel_that_the_timers_disagree_on():
    found = measured(ToldTimer(more=lambda span: 2.7 if span < 2 else 4.8))  # 2.1 us beyond the offset: too much for 25 us, not for 500
    assert not found.holds and found.counts(found.offset) == (2, 3)
    assert "beside: no" in printed(found)
    found = measured(alone=ToldTimer(cupti=False, more=-17.0))
    assert [row.within(found.offset) for row in found.rows] == [(True, False)] * 3 and "alone: no" in printed(found)


@pytest.mark.parametrize("fault", [dict(deaf=(25.0,)), dict(lost=(25.0,))])
def test_spans_that_cupti_does_not_give_are_no_agreement(fault):
    found = measured(ToldTimer(**fault))
    assert found.offset == pytest.approx(2.7) and not found.holds and not by_name(found)["chain"].recorded
    assert by_name(found)["read"].recorded  # the next kernel's first call has a fresh timer
    assert f"no: CUPTI recorded 0 of {REPEATS} calls" in printed(found)
    without = measured(ToldTimer(deaf=(1.5,)))
    assert without.offset is None and not without.holds and "there is no offset" in printed(without)
    for one in (found, without):
        json.dumps(document(one), allow_nan=False)


def test_the_middle_is_taken_of_each_calls_difference():
    row = Row("k", [10.0, 20.0, 30.0], [12.0, 23.0, 34.0], [10.0, 21.5, 30.0])
    assert row.differences == (3.0, 1.5)
    assert row.within(0.0) == (False, True) and row.within(1.0) == (True, True) and row.within(4.0) == (True, False)


def test_document():
    found = document(measured(), hardware="a GPU")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["hardware"], found["agree"], found["events_offset_us"]) == ("a GPU", True, 2.7)
    assert found["allowed"] == {"share": 0.03, "us": 2.0}
    chain = found["kernels"][1]
    assert {name: chain[name] for name in ("kernel", "cupti_us", "events_us", "difference_us", "within", "within_alone")} == {
        "kernel": "chain", "cupti_us": 25.0, "events_us": 27.7, "difference_us": 2.7, "within": True, "within_alone": True,
    }  # fmt: skip
    assert {name: len(spans) for name, spans in chain["samples_us"].items()} == dict.fromkeys(("cupti", "events", "events_alone"), REPEATS)


def test_offset_of_a_session(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: 1.5)
    assert events_offset_us(ToldTimer(more=2.684)) == 2.68
    assert events_offset_us(ToldTimer(cupti=False)) is None and events_offset_us(HostTimer()) is None
    assert events_offset_us(ToldTimer(deaf=(1.5,))) is None and events_offset_us(ToldTimer(lost=(1.5,))) is None


def test_a_worker_says_its_offset_where_it_has_one(monkeypatch, tmp_path):
    request = dict(definition=definition_of(TINY).to_json(), root=str(tmp_path), device="cpu", mode="trace", seed=0, use_cupti=True)
    assert "events_offset_us" not in worker.Handler().answer({"do": "start"} | request)["extra"]
    monkeypatch.setattr(agreement, "events_offset_us", lambda timer: 2.68)
    assert worker.Handler().answer({"do": "start"} | request)["extra"]["events_offset_us"] == 2.68


def test_what_comparing_needs(monkeypatch):
    needs = "comparing the timers needs CUDA and CUPTI: "
    monkeypatch.setattr(doctor, "gpus", list)
    assert doctor.timers_lack() == needs + "this machine has no NVIDIA GPU"
    monkeypatch.setattr(doctor, "gpus", lambda: ["NVIDIA H100"])
    for build, reason in ((None, "torch is not installed"), ("", "this Python's torch is built without CUDA")):
        monkeypatch.setattr(doctor, "torch_build", lambda build=build: build)
        assert doctor.timers_lack() == needs + reason
    monkeypatch.setattr(doctor, "torch_build", lambda: "12.9")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.timers_lack() == needs + "cupti-python is not installed (pip install cupti-python)"
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    assert doctor.timers_lack() is None


@pytest.mark.parametrize("more, code", [(2.7, 0), (lambda span: span, 1)])
def test_exit_code_and_file(monkeypatch, tmp_path, capsys, more, code):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(agreement, "make_timer", lambda device, use_cupti=True: ToldTimer(use_cupti, more))
    monkeypatch.setattr(agreement, "known_set", lambda device: {name: lambda span=span: span for name, span in SPANS.items()})
    monkeypatch.setattr(agreement, "gpu_state", lambda index, uuid: {"sm_clock_mhz": 1980.0, "driver": "580"})
    monkeypatch.setattr(agreement, "worker_environment", lambda device: environment.worker_environment(torch.device("cpu")))
    assert agreement.show(tmp_path / "new" / "timers.json") == code
    found = json.loads((tmp_path / "new" / "timers.json").read_text())
    assert found["agree"] == (code == 0) and len(found["kernels"]) == 3 and "torch" in found["libs"]
    assert found["environment"]["gpu"] == {"sm_clock_mhz": [1980.0, 1980.0]} and found["environment"]["driver"] == "580"
    assert "Offset: " in capsys.readouterr().out
    monkeypatch.setattr(agreement, "make_timer", lambda device: ToldTimer(cupti=False))
    assert agreement.show(None) == 2 and "needs CUPTI, which does not start" in capsys.readouterr().err


class _Activity:
    def __init__(self, start, end, name=None):
        self.start, self.end = start, end
        if name:  # copies and fills have none
            self.name = name


class _StandIn:
    """As much of cupti-python as the bench uses."""

    class ActivityKind:
        CONCURRENT_KERNEL, MEMCPY, MEMSET = 1, 2, 3

    def activity_flush_all(self, forced):
        pass


def test_cupti_records_are_cut_into_spans_at_the_marks():
    cupti = _Cupti(_StandIn())
    mark = f"void at::native::{MARK}_kernel<float>"
    cupti._completed([_Activity(0, 5, "spin"), _Activity(10, 11, mark), _Activity(20, 30, "first"), _Activity(60, 61, mark)])
    cupti._completed([_Activity(35, 50), _Activity(100, 101, mark), _Activity(110, 111, mark)])
    assert cupti.spans() == [30e-6, 0.0] and cupti.spans() == []  # 20 to 50 ns, the copy included; then a call of nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("cupti") is None, reason="needs a CUDA device and cupti-python")
def test_the_timers_agree_on_the_known_set():
    device = torch.device("cuda", 0)
    both, alone = agreement.make_timer(device), agreement.make_timer(device, use_cupti=False)
    found = compare(agreement.known_set(device), both, alone)
    assert found.holds and 0 < found.offset < 10, printed(found)
    assert events_offset_us(both) == pytest.approx(found.offset, abs=1.0) and events_offset_us(alone) is None
    assert isinstance(found, Agreement) and all(row.recorded for row in found.rows)
