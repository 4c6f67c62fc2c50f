"""What the CUDA driver's calls for launches take, as ctypes."""

from __future__ import annotations

import ctypes

CLUSTER_DIMENSION, SCHEDULING_POLICY, STREAM_SERIALIZATION = 4, 5, 6  # CUlaunchAttributeID
SPREAD = 1  # CUclusterSchedulingPolicy


class _Value(ctypes.Union):
    _fields_ = (("size", ctypes.c_char * 64), ("number", ctypes.c_int), ("three", ctypes.c_uint * 3))


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _Value))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


def attribute(id: int, *values: int) -> Attribute:
    """Of one number, or three."""
    return Attribute(id, b"", _Value(number=values[0]) if len(values) == 1 else _Value(three=values))
