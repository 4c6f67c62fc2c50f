"""Names of the guards' verdicts, apart from the guards themselves: the parent knows the names and never imports torch.

A verdict stands in the trace's `evaluation.extra`; the status beside it is one of the format's. Docs: `docs/guards.md`.
"""

from __future__ import annotations

from enum import Enum

from blockmoe.bench.schema import Status


class Verdict(str, Enum):
    """Named verdicts; the value of each is what a trace says."""

    NOT_A_PLAIN_TENSOR = "NOT_A_PLAIN_TENSOR"  # a subclass, another layout or device, strided, or no tensor at all
    OUTPUT_ALIASES_INPUT = "OUTPUT_ALIASES_INPUT"
    OUTPUT_ALIASES_EARLIER_OUTPUT = "OUTPUT_ALIASES_EARLIER_OUTPUT"
    OUTPUT_REPLACED = "OUTPUT_REPLACED"  # the destination tensor was given another type, shape or memory
    UNWRITTEN_OUTPUT = "UNWRITTEN_OUTPUT"  # poison is still there
    OUTPUT_CACHED = "OUTPUT_CACHED"  # an earlier call's output for other inputs
    TIMED_OUTPUT_WRONG = "TIMED_OUTPUT_WRONG"  # passed while checked, wrong while timed
    INPUT_MUTATED = "INPUT_MUTATED"
    WORK_LEFT_BEHIND = "WORK_LEFT_BEHIND"  # on another stream or thread when the call returned
    TIMER_TAMPERED = "TIMER_TAMPERED"
    BENCH_TAMPERED = "BENCH_TAMPERED"  # functions that judge were replaced, or an output was changed on its way to the judge
    INPUTS_DIFFER = "INPUTS_DIFFER"  # between processes: a defect of the bench or the machine, not of the solution
    REFERENCE_FAILED = "REFERENCE_FAILED"
    IMPOSSIBLE = "IMPOSSIBLE"  # faster than the floor


def status_of(verdict: Verdict) -> Status:
    """The format's status that a verdict goes with. Those with INCORRECT_NUMERICAL come with error statistics."""
    numerical = (Verdict.UNWRITTEN_OUTPUT, Verdict.OUTPUT_CACHED, Verdict.TIMED_OUTPUT_WRONG)
    return Status.INCORRECT_NUMERICAL if verdict in numerical else Status.RUNTIME_ERROR
