"""Guards inside the worker: what a solution must not do, each with a verdict of its own name (`verdicts.py`)."""

from __future__ import annotations

import time

import torch

from blockmoe.bench.verdicts import Verdict


class Tripped(Exception):
    """A guard was tripped."""

    def __init__(self, verdict: Verdict, message: str) -> None:
        super().__init__(message)
        self.verdict, self.message = verdict, message


# --- outputs --------------------------------------------------------------------------------------------------------

# NaNs (and integers) that no arithmetic makes, by element size and kind
_POISON = {
    torch.bfloat16: (torch.int16, 0x7FB5), torch.float16: (torch.int16, 0x7DB5), torch.float32: (torch.int32, 0x7FB5A5A5),
    torch.float8_e4m3fn: (torch.uint8, 0x7F), torch.float8_e5m2: (torch.uint8, 0x7D),
    torch.int64: (torch.int64, 0x7DB5A5A57DB5A5A5), torch.int32: (torch.int32, 0x7DB5A5A5), torch.int16: (torch.int16, 0x7DB5),
    torch.int8: (torch.int8, 0x7D),
}  # fmt: skip


def poison(tensor: torch.Tensor) -> None:
    """Fill with a bit pattern that no computation leaves behind."""
    if tensor.dtype in _POISON:
        integer, pattern = _POISON[tensor.dtype]
        tensor.view(integer).fill_(pattern)


def poisoned(tensor: torch.Tensor) -> int:
    """How many elements still hold the poison."""
    if tensor.dtype not in _POISON or tensor.numel() == 0:
        return 0
    integer, pattern = _POISON[tensor.dtype]
    return int((tensor.view(integer) == pattern).sum())


def require_plain(name: str, value: object, device: torch.device) -> torch.Tensor:
    """`value` if it is an ordinary contiguous tensor on the device; trips NOT_A_PLAIN_TENSOR otherwise."""
    if type(value) is not torch.Tensor:
        raise Tripped(Verdict.NOT_A_PLAIN_TENSOR, f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        raise Tripped(Verdict.NOT_A_PLAIN_TENSOR, f"{name}: expected a strided tensor, got layout {value.layout}")
    if value.device != device:
        raise Tripped(Verdict.NOT_A_PLAIN_TENSOR, f"{name}: expected a tensor on {device}, got one on {value.device}")
    if not value.is_contiguous() or value.is_conj() or value.is_neg():
        raise Tripped(Verdict.NOT_A_PLAIN_TENSOR, f"{name}: expected contiguous memory, got strides {value.stride()}")
    return value


def overlaps(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors share bytes."""
    if first.numel() == 0 or second.numel() == 0:
        return False
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.numel() * second.element_size() and b < a + first.numel() * first.element_size()


# --- timers ---------------------------------------------------------------------------------------------------------


class TimerWatch:
    """Remembers the functions that time is read by; `changed` names the first that has been replaced since."""

    _PLACES = (
        (time, ("perf_counter", "perf_counter_ns", "monotonic", "time")),
        (torch.cuda, ("synchronize", "Event", "current_stream", "default_stream", "_sleep")),
        (torch.cuda.Event, ("record", "elapsed_time", "synchronize", "wait", "query")),
        (torch.cuda.Stream, ("synchronize", "record_event", "wait_event")),
    )

    def __init__(self) -> None:
        self._bound = [(owner, name, getattr(owner, name)) for owner, names in self._PLACES for name in names]

    def changed(self) -> str | None:
        for owner, name, function in self._bound:
            if getattr(owner, name, None) is not function:
                return f"{owner.__name__}.{name}"
        return None

    def require_untouched(self) -> None:
        """Trips TIMER_TAMPERED where a timing function was replaced."""
        if (name := self.changed()) is not None:
            raise Tripped(Verdict.TIMER_TAMPERED, f"{name} was replaced by the solution")
