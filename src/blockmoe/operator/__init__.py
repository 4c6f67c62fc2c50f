"""The operator: validate, plan, route, gate_up, down, combine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from blockmoe.geometry import MoEGeometry


def warmup(
    geometry: MoEGeometry, device: int | None = None, logits_dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None
) -> int:
    """Compile (or load from Triton's cache) every kernel that some T of `geometry` launches on CUDA device `device`, where tensors are
    aligned to 16 bytes (else others run).

    Takes seconds and no device memory to speak of; launches nothing. `device` None is the current one, `logits_dtype` None is
    float32, `bias_dtype` None bfloat16: routing has kernels for each. Returns how many kernels there are. Raises RuntimeError where
    there is no GPU, ValueError where it has no FP8.
    """
    from blockmoe.operator.pipeline import compile_all

    return compile_all(geometry, device, logits_dtype, bias_dtype)
