"""TMA descriptors: what a kernel is given for one, encoded once an address and kept.

Triton encodes a descriptor anew at each launch (2.2 us). Here a repeated address costs one look-up.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType
from typing import Any

import torch

from blockmoe.operator.versions import release

MOST_ADDRESSES = 256  # kept of one kind: a model's layers, and the workspaces and outputs that its allocator hands out in turn


@dataclass(frozen=True, slots=True)
class Kind:
    """All of a descriptor but its address: row-major `shape` in boxes of `box`, `layout` being Gluon's of a box."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    box: tuple[int, ...]
    layout: Any
    promotion: int = 128  # bytes the L2 reads at once: 128 or 256

    @property
    def strides(self) -> tuple[int, ...]:
        found = [1]
        for size in self.shape[:0:-1]:
            found.insert(0, found[0] * size)
        return tuple(found)

    def argument(self, address: int) -> Any:
        """What Triton's own launch wants."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(Address(address, self.dtype), self.shape, self.strides, list(self.box), self.layout)


@dataclass(frozen=True, slots=True)
class Address:
    """What Triton's own launch wants of a pointer argument."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Kept(dict):
    """From an address to a launcher's arguments for a descriptor there."""

    def __init__(self, make: Callable[[int], tuple]) -> None:
        self.make = make

    def __missing__(self, address: int) -> tuple:
        if len(self) >= MOST_ADDRESSES:
            self.clear()
        made = self[address] = self.make(address)
        return made


def c_launcher(compiled: Any) -> Callable | None:
    """Triton's C function beneath what encodes descriptors and allocates scratch memory; None where it is not as known."""
    run = compiled.run
    launch = getattr(run, "launch", None)
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    known = release() == (3, 6) and isinstance(launch, BuiltinFunctionType)
    return launch if known and not run.global_scratch_size and not run.profile_scratch_size else None


def kept(kind: Kind, compiled: Any, nth: int, encoded: bool) -> Kept:
    """For a compiled kernel's nth descriptor: encoded, or as `compiled.run` takes it."""
    if not encoded:
        return _as_arguments(kind)
    meta = compiled.metadata.tensordesc_meta[nth]
    return _encoded(kind, meta["swizzle"], meta["elem_size"], meta["elem_type"], tuple(meta["block_size"]))


@lru_cache(maxsize=1024)
def _as_arguments(kind: Kind) -> Kept:
    return Kept(lambda address: (kind.argument(address),))


@lru_cache(maxsize=1024)
def _encoded(kind: Kind, swizzle: int, elem_size: int, elem_type: int, block_size: tuple[int, ...]) -> Kept:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    meta = dict(swizzle=swizzle, elem_size=elem_size, elem_type=elem_type, block_size=block_size, fp4_padded=False)

    def make(address: int) -> tuple:
        made = make_tensordesc_arg(kind.argument(address), meta)
        if kind.promotion != 128:
            _encode_again(made[0], address, kind, meta)
        return tuple(made)

    return Kept(make)


def _encode_again(descriptor: Any, address: int, kind: Kind, meta: dict) -> None:
    """Over Triton's, whose promotion is 128 bytes: the map lies 128 bytes into the object (alignment 128)."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    rank = len(kind.shape)
    shape = (ctypes.c_uint64 * rank)(*reversed(kind.shape))
    strides = (ctypes.c_uint64 * rank)(*(s * meta["elem_size"] for s in reversed(kind.strides[:-1])))  # all but the last
    box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    error = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(id(descriptor) + 128), TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], rank, ctypes.c_void_p(address),
        shape, strides, box, ones, 0, meta["swizzle"], {64: 1, 128: 2, 256: 3}[kind.promotion], 0,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for {kind} at {address:#x}")
