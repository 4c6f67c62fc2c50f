"""How many clusters of programs a GPU runs at once: its multiprocessors come in groups, and a cluster stays within one."""

from __future__ import annotations

import ctypes

CLUSTER_DIMENSION = 4  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


def active_clusters(function: int, threads: int, shared: int, cluster: int) -> int:
    """Of `cluster` programs of `threads` threads and `shared` bytes, by the driver's count. Raises RuntimeError where it gives none.

    The calling thread has a context: the function was loaded, or another kernel launched, by it.
    """
    try:
        count_clusters = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveClusters
    except (OSError, AttributeError) as missing:
        raise RuntimeError(f"clusters: expected a driver of CUDA 11.8 or newer, got {missing}") from missing
    attribute = _Attribute(CLUSTER_DIMENSION, 0, (ctypes.c_uint * 16)(cluster, 1, 1))
    config = _Config((cluster, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(attribute), 1)
    count = ctypes.c_int(0)
    error = count_clusters(ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(config))
    if error or count.value < 1:
        raise RuntimeError(f"cuOccupancyMaxActiveClusters: error {error}, {count.value} clusters of {cluster}")
    return count.value
