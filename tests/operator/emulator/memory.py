"""Bytes, their types, and who wrote and read them last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

CHECKED = (np.add, np.subtract, np.multiply)
GRANULE = 4  # bytes that share an account of who wrote and read them


class Fault(Exception):
    """What a GPU would not have to do as meant."""


# --- types ----------------------------------------------------------------------------------------------------------


class Values(np.ndarray):
    """A tensor in registers. bfloat16 and e4m3 are float32 of values that those have."""

    def __array_ufunc__(self, ufunc: Any, method: str, *given: Any, **options: Any) -> Any:
        """int32 does not wrap: no kernel here means it to."""
        given = [_bare(one) for one in given]
        if "out" in options:
            options["out"] = tuple(map(_bare, options["out"]))
        wide = None
        if method == "__call__" and ufunc in CHECKED and all(type(one) is int or np.asarray(one).dtype == np.int32 for one in given):
            wide = ufunc(*(np.asarray(one, np.int64) for one in given))
        found = getattr(ufunc, method)(*given, **options)
        if wide is not None and (wide != found).any():
            raise Fault(f"{ufunc.__name__}: {int(wide[wide != found].flat[0])} does not fit into 32 bits")
        return values(found)

    def to(self, dtype: Any) -> Values:
        kind = kind_of(dtype)
        rounded = kind.encode(self) if kind.size < 4 else self.astype(kind.storage)
        return values(kind.decode(rounded))


def _bare(given: Any) -> Any:
    return given.view(np.ndarray) if isinstance(given, Values) else given


def values(array: Any) -> Values:
    return np.asarray(array).view(Values)


@dataclass(frozen=True)
class Kind:
    """How elements lie in memory (`storage`), and between that and registers."""

    size: int
    storage: Any
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[Any], np.ndarray]


def _plain(storage: Any) -> Kind:
    return Kind(np.dtype(storage).itemsize, storage, lambda raw: raw, lambda given: np.asarray(given).astype(storage))


def _rounded(dtype: torch.dtype, storage: Any, same_size: torch.dtype) -> Kind:
    every = torch.arange(1 << 8 * dtype.itemsize).to(same_size).view(dtype).float().numpy()

    def encode(given: Any) -> np.ndarray:
        floats = torch.from_numpy(np.array(given, dtype=np.float32))
        return floats.to(dtype).view(same_size).numpy().view(storage)

    return Kind(dtype.itemsize, storage, lambda raw: every[raw], encode)


KINDS = {
    "int32": _plain(np.int32),
    "int64": _plain(np.int64),
    "float32": _plain(np.float32),
    "float8_e4m3fn": _rounded(torch.float8_e4m3fn, np.uint8, torch.uint8),
    "bfloat16": _rounded(torch.bfloat16, np.uint16, torch.int16),
}
NAMES = {"int32": "int32", "int64": "int64", "fp32": "float32", "fp8e4nv": "float8_e4m3fn", "bf16": "bfloat16"}


def kind_of(dtype: Any) -> Kind:
    """Of a torch or a Gluon type."""
    name = str(dtype).removeprefix("torch.")
    return KINDS[NAMES.get(name, name)]


# --- accounts -------------------------------------------------------------------------------------------------------


class View:
    """What an agent knows to have happened: the clock of every agent, to loads and stores (`plain`), and to TMA and wgmma in shared memory
    (`near`) and in global memory (`far`)."""

    def __init__(self, agents: int) -> None:
        self.clocks = np.zeros((3, agents), np.int32)

    @property
    def plain(self) -> np.ndarray:
        return self.clocks[0]

    @property
    def near(self) -> np.ndarray:
        return self.clocks[1]

    @property
    def far(self) -> np.ndarray:
        return self.clocks[2]

    def copy(self) -> View:
        new = View(0)
        new.clocks = self.clocks.copy()
        return new

    def learn(self, other: View) -> None:
        np.maximum(self.clocks, other.clocks, out=self.clocks)

    def fence(self, *, shared_only: bool) -> None:
        """fence.proxy.async, of shared memory (.shared::cta) or all."""
        proxies = self.clocks[: 2 if shared_only else 3]
        proxies[:] = proxies.max(0)


@dataclass
class Access:
    """Whose access, at which moment of its clock, knowing what; by which proxy; and for messages."""

    agent: int
    clock: int
    view: View
    by_proxy: bool
    what: str


class Account:
    """Of `size` bytes: the last write of each granule, and every agent's last read."""

    def __init__(self, size: int, name: str, names: Sequence[str], *, shared: bool) -> None:
        self.name, self.names, self.shared = name, names, shared
        self.count = -(-size // GRANULE)
        self.writer = np.zeros(self.count, np.int16)
        self.written = np.zeros(self.count, np.int32)
        self.reads: dict[int, np.ndarray] = {}

    def read(self, at: Any, access: Access) -> None:
        """`at`: a slice or an array of granules."""
        self._behind_the_writer(at, access, "reads")
        if access.agent not in self.reads:
            self.reads[access.agent] = np.zeros(self.count, np.int32)
        self.reads[access.agent][at] = access.clock

    def write(self, at: Any, access: Access) -> None:
        self._behind_the_writer(at, access, "writes")
        for agent, clocks in self.reads.items():
            if agent != access.agent and (late := clocks[at] > access.view.plain[agent]).any():
                raise Fault(f"race: {access.what} writes {self._place(at, late)}, and {self.names[agent]} may not have read that yet")
        self.writer[at] = access.agent
        self.written[at] = access.clock

    def _behind_the_writer(self, at: Any, access: Access, does: str) -> None:
        view = access.view
        known = view.plain if not access.by_proxy else view.near if self.shared else view.far
        writer = self.writer[at]
        if (late := self.written[at] > known[writer]).any():
            other = self.names[int(writer[late].flat[0])]
            fenced = not (self.written[at] > view.plain[writer]).any()
            why = "without a fence between" if fenced else "whose write is not known to be done"
            raise Fault(f"race: {access.what} {does} {self._place(at, late)} behind {other}, {why}")

    def _place(self, at: Any, late: np.ndarray) -> str:
        places = np.arange(self.count)[at]
        return f"{self.name}, byte {GRANULE * int(places[late].flat[0])}"


def granules(first: np.ndarray, width: int) -> np.ndarray:
    """Of runs of `width` bytes from each byte of `first` on."""
    first = np.asarray(first, np.int64).reshape(-1)
    if width < GRANULE:
        return np.unique(first // GRANULE)
    return (first[:, None] // GRANULE + np.arange(-(-width // GRANULE))).reshape(-1)


# --- global memory --------------------------------------------------------------------------------------------------


class Buffer:
    """A tensor of the call. Without an account nothing ever writes it (weights)."""

    def __init__(self, tensor: torch.Tensor, name: str, account: Account | None, *, writable: bool) -> None:
        self.bytes = tensor.view(torch.uint8).reshape(-1).numpy() if tensor.numel() else np.zeros(0, np.uint8)
        self.name, self.account, self.writable = name, account, writable


class Pointer:
    """`at` elements of a type behind the beginning of a buffer: a number, or an array of them. It may point anywhere; only what lies from
    byte `low` to `high` may be read or written."""

    def __init__(self, buffer: Buffer, kind: Kind, at: Any, low: int, high: int) -> None:
        self.buffer, self.kind, self.at, self.low, self.high = buffer, kind, at, low, high

    def __add__(self, offset: Any) -> Pointer:
        at = np.asarray(self.at, np.int64) + np.asarray(offset) if isinstance(offset, np.ndarray) else self.at + int(offset)
        return Pointer(self.buffer, self.kind, at, self.low, self.high)

    def __sub__(self, offset: int) -> Pointer:
        return self + -offset

    def places(self, mask: Any, slack: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Elements, and which of them are meant. Raises Fault where one lies outside, but for `slack` bytes behind the last."""
        at, there = np.broadcast_arrays(np.asarray(self.at, np.int64), True if mask is None else np.asarray(mask, bool))
        first = self.kind.size * at[there]
        if first.size and (first.min() < self.low or first.max() + self.kind.size > self.high + slack):
            wrong = first[(first < self.low) | (first + self.kind.size > self.high + slack)][0]
            raise Fault(f"{self.buffer.name}: byte {wrong} is not within {self.low} ... {self.high - 1}")
        return at, there

    def read(self, at: np.ndarray, there: np.ndarray, access: Access) -> np.ndarray:
        """Elements at[there]."""
        if self.buffer.account:
            self.buffer.account.read(granules(self.kind.size * at[there], self.kind.size), access)
        return self.kind.decode(self._elements()[at[there]])

    def write(self, at: np.ndarray, there: np.ndarray, given: Any, access: Access) -> None:
        where = at[there]
        if len(np.unique(where)) != where.size:
            raise Fault(f"{access.what} writes an element of {self.buffer.name} twice at once")
        if not self.buffer.writable:
            raise Fault(f"{access.what} writes {self.buffer.name}, an input")
        self.buffer.account.write(granules(self.kind.size * where, self.kind.size), access)
        self._elements()[where] = self.kind.encode(np.broadcast_to(given, at.shape)[there])

    def _elements(self) -> np.ndarray:
        usable = len(self.buffer.bytes) // self.kind.size * self.kind.size
        return self.buffer.bytes[:usable].view(self.kind.storage)
