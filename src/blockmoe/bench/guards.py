"""Guards inside the worker: what a solution must not do, each with a verdict of its own name (`verdicts.py`)."""

from __future__ import annotations

import torch

from blockmoe.bench.verdicts import Verdict


class Tripped(Exception):
    """A guard was tripped."""

    def __init__(self, verdict: Verdict, message: str) -> None:
        super().__init__(message)
        self.verdict, self.message = verdict, message


# --- outputs --------------------------------------------------------------------------------------------------------

# NaNs and integers that no arithmetic makes, by element size and kind. Narrower integers have no such value.
_POISON = {
    torch.bfloat16: (torch.int16, 0x7FB5), torch.float16: (torch.int16, 0x7DB5), torch.float32: (torch.int32, 0x7FB5A5A5),
    torch.float8_e4m3fn: (torch.uint8, 0x7F), torch.float8_e5m2: (torch.uint8, 0x7D),
    torch.int64: (torch.int64, 0x7DB5A5A57DB5A5A5), torch.int32: (torch.int32, 0x7DB5A5A5),
}  # fmt: skip
FREED = 4  # pieces of poisoned memory given back to the allocator before a call


def poison(tensor: torch.Tensor) -> None:
    """Fill with a bit pattern that no computation leaves behind."""
    if tensor.dtype in _POISON:
        integer, pattern = _POISON[tensor.dtype]
        tensor.detach().view(integer).fill_(pattern)


def poison_freed_memory(like: list[torch.Tensor]) -> None:
    """Poison memory of these outputs' sizes and free it: where `torch.empty` hands it out again, an unwritten element shows."""
    pieces = [torch.empty_like(tensor) for tensor in like for _ in range(FREED)]
    for piece in pieces:
        poison(piece)


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
    if more := _dispatch_keys(value) - _dispatch_keys(torch.empty(0, device=device)):
        raise Tripped(Verdict.NOT_A_PLAIN_TENSOR, f"{name}: expected a tensor with memory of its own, got one of {', '.join(sorted(more))}")
    return value


def _dispatch_keys(value: torch.Tensor) -> set[str]:
    """What handles a tensor's operations: functional, batched and zero tensors have the type of a plain one and no values yet."""
    return set(str(torch._C._dispatch_keys(value)).removeprefix("DispatchKeySet(").rstrip(")").split(", "))


def stamp(value: object) -> tuple:
    """What must still be so of a tensor after a call that it was an argument of."""
    if type(value) is not torch.Tensor:
        return (type(value),)
    return type(value), value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def overlaps(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors share bytes."""
    if first.numel() == 0 or second.numel() == 0:
        return False
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.numel() * second.element_size() and b < a + first.numel() * first.element_size()
