"""Launches bound to addresses and a stream: what Triton's C launcher makes of its Python arguments at every call, made once.

A kernel of the operator has 20 to 60 arguments, of which that launcher reads each in a tenth to a fifth of a microsecond. They only
depend on the tensors' addresses, which come again: bound, a launch is one call of the driver's.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from blockmoe.operator.driver import (
    CLUSTER_DIMENSION,
    SCHEDULING_POLICY,
    SPREAD,
    STREAM_SERIALIZATION,
    Attribute,
    Config,
    attribute,
)  # fmt: skip

MAP_OFFSET = 128  # of a TMA map within Triton's object that holds it, which is aligned so


@dataclass(frozen=True, slots=True)
class Ready:
    """A compiled kernel and what a launch of it is given: `run`, Triton's, with `options` before the arguments; descriptors as (tensor,
    offset, what a launcher takes for it by address), slots as (tensor, offset), then numbers and constants."""

    run: Callable
    programs: int  # or clusters
    function: int
    options: tuple
    descriptors: tuple[tuple[int, int, Any], ...]
    slots: tuple[tuple[int, int], ...]
    rest: tuple
    warps: int
    shared: int
    cluster: int
    pdl: bool
    types: tuple[str, ...] | None  # of all arguments; None where they are not as known

    def arguments(self, addresses: Sequence[int]) -> list:
        """Of the call's tensors at `addresses`."""
        described = [value for tensor, at, maps in self.descriptors for value in maps[addresses[tensor] + at]]
        return [*described, *[addresses[tensor] + at for tensor, at in self.slots], *self.rest]

    def launch(self, addresses: Sequence[int], stream: int) -> None:
        """By Triton's launcher."""
        self.run(self.programs, 1, 1, stream, self.function, *self.options, *self.arguments(addresses))


@lru_cache(maxsize=1)
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


def types_of(compiled: Any) -> tuple[str, ...] | None:
    """Of the C launcher's arguments, as Triton 3.6 expands them: a TMA descriptor is its map, its shape and its strides."""
    source, found = getattr(compiled, "src", None), []
    if source is None or getattr(compiled.run, "launch_cooperative_grid", True):
        return None
    for kind in source.signature.values():
        if isinstance(kind, str) and (described := re.match(r"tensordesc<[^\[]*\[([^\]]*)\]", kind)):
            rank = described[1].count(",") + 1
            found += ["map", *["i32"] * rank, *["i64"] * rank]
        elif kind in ("constexpr", "i32", "i64", "fp32") or (isinstance(kind, str) and kind.startswith("*")):
            found.append(kind)
        else:
            return None
    return tuple(found)


class Binder:
    """What all bound launches of `ready` share."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        types = ready.types or ()
        kinds = [kind for kind in types if kind != "constexpr"]
        rest = zip(types[len(types) - len(ready.rest) :], ready.rest, strict=True)
        numbers = [_word(kind, value) for kind, value in rest if kind != "constexpr"]
        self.count = len(kinds) + 2  # Triton's scratch memories, of which the kernels use none
        self.first_slot = len(kinds) - len(numbers) - len(ready.slots)
        self.maps = [n for n, kind in enumerate(kinds) if kind == "map"]
        self.words = struct.pack(f"{self.count}Q", *[0] * (len(kinds) - len(numbers)), *numbers, 0, 0)
        self.attributes = _attributes(ready)
        self.function = ctypes.c_void_p(ready.function)

    def bind(self, addresses: Sequence[int], stream: int) -> Bound:
        """With the arguments for such addresses and stream."""
        ready, count, slots = self.ready, self.count, self.first_slot
        words = (ctypes.c_uint64 * count).from_buffer_copy(self.words)
        begin = ctypes.addressof(words)
        pointers = (ctypes.c_void_p * count).from_buffer_copy(struct.pack(f"{count}Q", *range(begin, begin + 8 * count, 8)))
        held = [maps[addresses[tensor] + at] for tensor, at, maps in ready.descriptors]
        for n, described in zip(self.maps, held, strict=True):
            pointers[n] = id(described[0]) + MAP_OFFSET
            struct.pack_into(f"{len(described) - 1}Q", words, 8 * (n + 1), *described[1:])
        struct.pack_into(f"{len(ready.slots)}Q", words, 8 * slots, *[addresses[tensor] + at for tensor, at in ready.slots])
        grid, block = (ready.programs * ready.cluster, 1, 1), (32 * ready.warps, 1, 1)
        config = Config(grid, block, ready.shared, stream, self.attributes, len(self.attributes))
        return Bound((ctypes.byref(config), self.function, pointers, None), (config, self.attributes, words, held))


def _word(kind: str, value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0] if kind == "fp32" else int(value) & (2**64 - 1)


class Bound:
    """A launch with all its arguments: what the driver is called with, and what it reads then."""

    __slots__ = ("_call", "_held", "_launch")

    def __init__(self, call: tuple, held: tuple) -> None:
        self._call, self._held, self._launch = call, held, _driver()

    def launch(self) -> int:
        """The driver's error, or 0."""
        return self._launch(*self._call)


def _attributes(ready: Ready) -> ctypes.Array:
    found = [attribute(STREAM_SERIALIZATION, 1)] if ready.pdl else []
    if ready.cluster > 1:
        found += [attribute(CLUSTER_DIMENSION, ready.cluster, 1, 1), attribute(SCHEDULING_POLICY, SPREAD)]
    return (Attribute * len(found))(*found)
