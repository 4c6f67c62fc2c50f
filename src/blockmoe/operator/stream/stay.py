"""How lines that the L2 was asked to keep may leave it again."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def may_leave(at, there):
    """The L2 lines of 128 bytes around each `at` are no longer kept (evict_last); where `there`.

    Lines so kept outlive a kernel, and hundreds of megabytes read or written after it: whoever asks for it takes it back.
    """
    WORD: gl.constexpr = """{
        .reg .pred p;
        .reg .b64 line;
        setp.ne.s32 p, $2, 0;
        and.b64 line, $1, -128;
        @p applypriority.global.L2::evict_normal [line], 128;
        mov.b32 $0, 0;
        }"""
    gl.inline_asm_elementwise(WORD, "=r,l,r", [at, there.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_go(data, size, number, numbers, WARPS: gl.constexpr):
    """Share `number` of `numbers` of `size` bytes, whole lines' worth, from `data` on may leave the L2."""
    THREADS: gl.constexpr = 32 * WARPS
    thread = gl.arange(0, THREADS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    for first in range(number * THREADS, size // 128 + 1, numbers * THREADS):  # data may begin inside a line
        at = gl.minimum(128 * (first + thread), size - 1)
        may_leave(data + at, at >= 0)
