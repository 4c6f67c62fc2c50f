"""Whether the functions that time is read by, and those that judge, are still the ones that were there before the import.

In a solution's own process nothing is out of its reach, this watch included: `docs/guards.md` says what that leaves open.
"""

from __future__ import annotations

import time
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.utils._device import DeviceContext

from blockmoe.bench.guards import Tripped
from blockmoe.bench.verdicts import Verdict

_TIMING = (
    (time, ("perf_counter", "perf_counter_ns", "monotonic", "time", "sleep")),
    (torch.cuda, ("synchronize", "Event", "Stream", "CUDAGraph", "graph", "current_stream", "default_stream", "_sleep")),
    (torch.cuda.Event, ("record", "elapsed_time", "synchronize", "wait", "query")),
    (torch.cuda.Stream, ("synchronize", "record_event", "wait_event", "wait_stream", "query")),
    (torch._C, ("_cuda_synchronize", "_cuda_getCurrentStream", "_cuda_sleep", "_CudaEventBase", "_CudaStreamBase")),
)
_JUDGING = (
    (torch, ("Tensor", "empty", "empty_like", "zeros", "rand", "randint", "randperm", "index_select", "nextafter", "no_grad", "Generator")),
    (
        torch.Tensor,
        (
            "clone", "copy_", "detach", "contiguous", "is_contiguous", "view", "fill_", "bitwise_xor_", "normal_", "clamp_", "sum",
            "cpu", "numpy", "to", "split", "numel", "element_size", "data_ptr", "storage_offset", "stride", "shape", "dtype", "__eq__",
        ),
    ),
)  # fmt: skip


class Watch:
    """Remembers functions; `require_untouched` trips where one has been replaced since. Made before a solution is imported."""

    def __init__(self, modules: list[ModuleType], instances: list[object]) -> None:
        """`modules`: whose functions and classes judge. `instances`: whose methods may not be hidden by attributes."""
        self._timing = [_Bound(owner, name) for owner, names in _TIMING for name in names if hasattr(owner, name)]
        self._judging = [_Bound(owner, name) for owner, names in _JUDGING for name in names]
        self._instances: list[object] = []
        self.add(modules, instances)
        self._modes = _modes()

    def add(self, modules: list[ModuleType], instances: list[object]) -> None:
        """Watch more, as it is now."""
        for module in modules:
            owners = [module] + [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
            for owner in owners:
                names = [name for name, value in getattr(owner, "__dict__", {}).items() if callable(value) or isinstance(value, property)]
                self._judging += [_Bound(owner, name) for name in names if not isinstance(owner, FunctionType)]
        self._judging += [_Bound(one, name) for one in instances for name, value in vars(one).items() if callable(value)]
        self._instances += instances

    def require_untouched(self) -> None:
        """Trips TIMER_TAMPERED or BENCH_TAMPERED, naming the first thing that was replaced."""
        for verdict, bounds in ((Verdict.TIMER_TAMPERED, self._timing), (Verdict.BENCH_TAMPERED, self._judging)):
            for bound in bounds:
                if bound.changed():
                    raise Tripped(verdict, f"{bound.label} was replaced by the solution")
        for one in self._instances:
            for name in vars(one):
                if hasattr(type(one), name):
                    raise Tripped(Verdict.BENCH_TAMPERED, f"{type(one).__name__}.{name} was hidden by an attribute of its object")
        if _modes() > self._modes:
            raise Tripped(Verdict.BENCH_TAMPERED, "a mode that intercepts every torch function was left on")


class _Bound:
    """One attribute of a module, class or object, and a Python function's code besides."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.value = _raw(owner, name)
        self.code = getattr(self.value, "__code__", None)
        self.label = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"

    def changed(self) -> bool:
        value = _raw(self.owner, self.name)
        return value is not self.value or getattr(value, "__code__", None) is not self.code


def _raw(owner: Any, name: str) -> Any:
    """The attribute as its owner, or the first class that has it, holds it: no descriptor makes a new object of it."""
    for place in getattr(owner, "__mro__", (owner,)):
        if name in vars(place):
            return vars(place)[name]
    return None


def _modes() -> int:
    """How many modes intercept torch functions; a default device is one, and harmless."""
    functions = torch.overrides._get_current_function_mode_stack()
    others = [mode for mode in functions if not isinstance(mode, DeviceContext)]
    return len(others) + torch._C._len_torch_dispatch_stack()
