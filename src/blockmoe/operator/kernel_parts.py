"""Small jit helpers that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous_kernel(PDL: tl.constexpr):
    """Wait for the kernel before, then let the next one take free multiprocessors; nothing where PDL is off.

    Every program of every kernel does this, or `before_next_kernel`, before its first dependent read and its first
    write; but for `choose_kernel`, which lets the next one begin later. A kernel that waits first lets the next one know that everything up
    to the kernel before it is complete.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def before_next_kernel(PDL: tl.constexpr):
    """The same in the other order: the next kernel may begin at once, and know nothing until it has waited itself."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def quantise(x, axis: tl.constexpr):
    """e4m3 codes of x and one float32 scale (largest magnitude / 448) a slice along `axis` (0 or 1) of two."""
    largest = tl.max(tl.abs(x), axis)
    scale = tl.maximum(largest, 1e-34) * (1.0 / 448.0)  # an all-zero slice gets codes 0, not 0/0
    codes = (x / tl.expand_dims(scale, axis)).to(tl.float8e4nv)
    return codes, scale
