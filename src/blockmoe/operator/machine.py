"""What of a GPU decides a plan."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=16)
def of_gpu(index: int, argument: str = "hidden_states") -> tuple[int, int]:
    """Multiprocessors of a CUDA device, and ten times its compute capability. Raises ValueError, naming `argument`, where it has no FP8."""
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    if capability < 89:
        raise ValueError(f"{argument}: expected a GPU with FP8 (compute capability 8.9 or more), got {capability / 10}")
    return properties.multi_processor_count, capability
