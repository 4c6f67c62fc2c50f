"""Judging an output against the reference's.

The rule is the format's: an element fails only if its absolute error exceeds atol AND its relative error (over |ref| + 1e-8)
exceeds rtol; NaN and infinity fail the whole output; shape and dtype must be the reference's. With outputs of 1e4 the
absolute tolerance means nothing and rows without a pair are zeros that match for free, so the relative L2 error, the cosine
and the matched ratio over non-zero rows stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch

from blockmoe.bench.schema import Correctness, Status

CHUNK = 1 << 23  # elements compared at once: bounds the float64 scratch to 64 MB a tensor
EPSILON = 1e-8


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float
    required_matched_ratio: float


@dataclass(frozen=True)
class Judgement:
    """Outcome of one comparison; errors are over all elements, ratios are shares of elements within tolerance."""

    status: Status
    message: str = ""
    max_absolute_error: float = 0.0
    max_relative_error: float = 0.0
    relative_l2: float = 0.0
    cosine: float = 1.0
    matched_ratio: float = 1.0
    matched_ratio_nonzero_rows: float = 1.0
    nonzero_rows: int = 0
    worst_row: int = -1
    worst_row_relative_l2: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status is Status.PASSED

    def correctness(self, **extra: object) -> Correctness | None:
        """The trace's part, where its status has one."""
        if self.status not in (Status.PASSED, Status.INCORRECT_NUMERICAL):
            return None
        fields = asdict(self)
        for name in ("status", "message", "max_absolute_error", "max_relative_error"):
            del fields[name]
        return Correctness(
            max_relative_error=self.max_relative_error, max_absolute_error=self.max_absolute_error, extra=fields | extra
        )


def judge(output: torch.Tensor, reference: torch.Tensor, tolerance: Tolerance) -> Judgement:
    """Compare two tensors of any device; never raises for a wrong output. Where the reference is NaN or infinite nothing matches."""
    if tuple(output.shape) != tuple(reference.shape):
        return Judgement(Status.INCORRECT_SHAPE, f"output: expected shape {list(reference.shape)}, got {list(output.shape)}")
    if output.dtype != reference.dtype:
        return Judgement(Status.INCORRECT_DTYPE, f"output: expected {reference.dtype}, got {output.dtype}")
    if output.numel() == 0:
        return Judgement(Status.PASSED)
    output = output.to(reference.device)
    if (bad := int((~torch.isfinite(output.float())).sum())) > 0:
        message = f"output: {bad} of {output.numel()} elements are NaN or infinite"
        nan = math.nan
        return Judgement(Status.INCORRECT_NUMERICAL, message, nan, nan, nan, nan, 0.0, 0.0)
    return _compare(output.reshape(len(output) if output.dim() else 1, -1), reference.reshape(output.shape), tolerance)


def _compare(output: torch.Tensor, reference: torch.Tensor, tolerance: Tolerance) -> Judgement:
    """output [R, C], finite; reference of as many elements."""
    reference = reference.reshape(output.shape)
    rows, columns = output.shape
    step = max(1, CHUNK // max(1, columns))
    max_abs = max_rel = error_sum = ref_sum = out_sum = dot = 0.0
    failed = failed_nonzero = nonzero_rows = 0
    worst_row, worst = -1, 0.0
    for start in range(0, rows, step):
        out, ref = output[start : start + step].double(), reference[start : start + step].double()
        absolute = (out - ref).abs_()
        relative = absolute / (ref.abs() + EPSILON)
        fails = ~((absolute <= tolerance.atol) | (relative <= tolerance.rtol))  # a NaN is no match
        nonzero = (ref != 0).any(1)
        error_rows, ref_rows = absolute.square().sum(1), ref.square().sum(1)
        row_errors = (error_rows / ref_rows.clamp(min=1e-300)).sqrt_()
        row_errors[~nonzero & (error_rows == 0)] = 0.0
        max_abs, max_rel = max(max_abs, absolute.max().item()), max(max_rel, relative.max().item())
        error_sum, ref_sum = error_sum + error_rows.sum().item(), ref_sum + ref_rows.sum().item()
        out_sum, dot = out_sum + out.square().sum().item(), dot + (out * ref).sum().item()
        failed, failed_nonzero = failed + int(fails.sum()), failed_nonzero + int(fails[nonzero].sum())
        nonzero_rows += int(nonzero.sum())
        if (here := row_errors.max().item()) > worst:
            worst_row, worst = start + int(row_errors.argmax()), here
    matched = 1.0 - failed / output.numel()
    passed = matched >= tolerance.required_matched_ratio
    return Judgement(
        status=Status.PASSED if passed else Status.INCORRECT_NUMERICAL,
        message="" if passed else f"matched ratio {matched:.4f}, required {tolerance.required_matched_ratio}",
        max_absolute_error=max_abs,
        max_relative_error=max_rel,
        relative_l2=math.sqrt(error_sum / ref_sum) if ref_sum else (0.0 if error_sum == 0 else math.inf),
        cosine=dot / math.sqrt(ref_sum * out_sum) if ref_sum and out_sum else (1.0 if ref_sum == out_sum else 0.0),
        matched_ratio=matched,
        matched_ratio_nonzero_rows=1.0 - failed_nonzero / (nonzero_rows * columns) if nonzero_rows else 1.0,
        nonzero_rows=nonzero_rows,
        worst_row=worst_row,
        worst_row_relative_l2=worst,
    )


def worse(first: Judgement | None, second: Judgement) -> Judgement:
    """The judgement to report of several calls: a failed one, else the larger error of each kind."""
    if first is None or not second.passed:
        return second
    if not first.passed:
        return first
    base = first if first.relative_l2 >= second.relative_l2 else second
    row = first if first.worst_row_relative_l2 >= second.worst_row_relative_l2 else second
    return replace(
        base,
        max_absolute_error=max(first.max_absolute_error, second.max_absolute_error),
        max_relative_error=max(first.max_relative_error, second.max_relative_error),
        cosine=min(first.cosine, second.cosine),
        matched_ratio=min(first.matched_ratio, second.matched_ratio),
        matched_ratio_nonzero_rows=min(first.matched_ratio_nonzero_rows, second.matched_ratio_nonzero_rows),
        worst_row=row.worst_row,
        worst_row_relative_l2=row.worst_row_relative_l2,
    )
