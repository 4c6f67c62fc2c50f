"""How many clusters of programs a GPU runs at once: its multiprocessors come in groups, and a cluster stays within one."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from blockmoe.operator.driver import CLUSTER_DIMENSION, Config, attribute


@lru_cache(maxsize=256)
def active_clusters(function: int, threads: int, shared: int, cluster: int) -> int:
    """Of `cluster` programs of `threads` threads and `shared` bytes, by the driver's count. Raises RuntimeError where it gives none.

    The first to ask has a context: it has just loaded the function. Other threads may have none, and are told what it was told.
    """
    try:
        count_clusters = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveClusters
    except (OSError, AttributeError) as missing:
        raise RuntimeError(f"clusters: expected a driver of CUDA 11.8 or newer, got {missing}") from missing
    size = attribute(CLUSTER_DIMENSION, cluster, 1, 1)
    config = Config((cluster, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(size), 1)
    count = ctypes.c_int(0)
    error = count_clusters(ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(config))
    if error or count.value < 1:
        raise RuntimeError(f"cuOccupancyMaxActiveClusters: error {error}, {count.value} clusters of {cluster}")
    return count.value
