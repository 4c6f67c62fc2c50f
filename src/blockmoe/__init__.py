"""blockmoe: the FP8 block-scale mixture-of-experts operator for Hopper, and the bench that measures it."""

from typing import Any

__version__ = "0.1.0"

_LAZY = {  # torch and triton are imported when one of these is first used
    "fused_moe": "blockmoe.operator.api",
    "trtllm_fp8_block_scale_moe": "blockmoe.operator.api",
    "workspace_size": "blockmoe.operator.workspace",
    "MoEGeometry": "blockmoe.geometry",
}
_MODULES = ("operator", "reference")
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"blockmoe.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'blockmoe' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
