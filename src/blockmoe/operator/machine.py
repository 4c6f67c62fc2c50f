"""What of a GPU decides a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Machine:
    """`capability`: ten times the compute capability. `hbm3e`: whether its memory is HBM3e: an H200, say; of the Hoppers
    those have more than 100 GiB, the others at most 96 GB. `shared`: bytes of shared memory that a program may have: 227 KiB on compute
    capability 9.0 and 10.0, 99 on 8.9 and 12.x."""

    sm_count: int = 132
    capability: int = 90
    hbm3e: bool = False
    shared: int = 227 << 10


H100, H200 = Machine(), Machine(hbm3e=True)
BY_NAME = {"h100": H100, "h200": H200}


@lru_cache(maxsize=16)
def of_gpu(index: int, argument: str = "hidden_states") -> Machine:
    """A CUDA device. Raises ValueError, naming `argument`, where it has no FP8."""
    import torch  # not with this module: plans need none

    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    if capability < 89:
        raise ValueError(f"{argument}: expected a GPU with FP8 (compute capability 8.9 or more), got {capability / 10}")
    shared = getattr(properties, "shared_memory_per_block_optin", (227 if 90 <= capability < 120 else 99) << 10)
    return Machine(properties.multi_processor_count, capability, properties.total_memory > 100 << 30, shared)
