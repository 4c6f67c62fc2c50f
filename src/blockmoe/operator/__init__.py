"""The operator: validate, plan, route, gate_up, down, combine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from blockmoe.geometry import MoEGeometry


def warmup(geometry: MoEGeometry, device: int | None = None, logits_dtype: torch.dtype | None = None) -> int:
    """Compile (or load from Triton's cache) every kernel that some T of `geometry` launches on CUDA device `device`.

    Takes seconds and no device memory to speak of; launches nothing. `device` None is the current one, `logits_dtype` None is
    float32. Returns how many kernels there are. Raises RuntimeError where there is no GPU, ValueError where it has no FP8.
    """
    from blockmoe.operator.pipeline import compile_all

    return compile_all(geometry, device, logits_dtype)
