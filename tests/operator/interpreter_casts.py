"""Right float casts for Triton's interpreter: its own truncate to bfloat16 and mis-round to e4m3 (seen in 3.6 and 3.8).

`install()` hands every cast between types that torch has to torch, which rounds and saturates as the hardware does.
"""

from __future__ import annotations

import numpy as np
import torch

FLOATS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def install() -> None:
    import triton.runtime.interpreter as interpreter

    original = interpreter._convert_float

    def convert(values: np.ndarray, source_type, target_type, rounding_mode):
        source, target = FLOATS.get(str(source_type)), FLOATS.get(str(target_type))
        if source is None or target is None:
            return original(values, source_type, target_type, rounding_mode)
        width = source.itemsize
        codes = torch.from_numpy(np.ascontiguousarray(values).view(SIGNED[width]).flatten())
        result = codes.view(source).to(target)
        as_integers = result.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[target.itemsize])
        return as_integers.numpy().view(UNSIGNED[target.itemsize]).reshape(values.shape)

    interpreter._convert_float = convert
