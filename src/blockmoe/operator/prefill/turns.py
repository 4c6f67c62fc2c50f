"""The two consumers of a program take turns at the tensor cores.

A product takes 256 cycles, its four instructions are issued in some 50. Where both consumers issue as they like, the instructions of two
products mingle: both end late and at once, and while both add nothing is multiplied. So a consumer issues when the other has: its product
stands behind the other's, and each adds beside the other's. (T = 14107: 3 % fewer cycles, and what shortens the way from one product to
the next, which made the kernel slower without, gains: docs/kernel-log.md, section 17.)

A turn is a named barrier: one consumer waits there, the other arrives. Of the 16 of a program Triton numbers those of its roles from 0 on.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

THREADS = 256  # of both consumers
FIRST = 14  # the first consumer's turn; 15 the second's


def _words(action: str) -> tuple[gl.constexpr, gl.constexpr]:
    """For the barrier of each consumer, where $1 is not 0."""
    word = "{{ .reg .pred p; setp.ne.s32 p, $1, 0; @p bar.{} {}, {}; mov.b32 $0, 0; }}"
    return tuple(gl.constexpr(word.format(action, FIRST + group, THREADS)) for group in range(2))


TAKE_0, TAKE_1 = _words("sync")
GIVE_0, GIVE_1 = _words("arrive")


@gluon.jit
def _say(WORD: gl.constexpr, both):
    gl.inline_asm_elementwise(WORD, "=r,r", [both], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_turn(GROUP: gl.constexpr, both):
    """Wait until the other consumer gave it, where it multiplies too (`both` is 1, not 0)."""
    _say(TAKE_0 if GROUP == 0 else TAKE_1, both)


@gluon.jit
def give_turn(GROUP: gl.constexpr, both):
    """To the other consumer, where it multiplies too."""
    _say(GIVE_1 if GROUP == 0 else GIVE_0, both)


@gluon.jit
def begin_turns(GROUP: gl.constexpr):
    """The first consumer's comes first, in this unit and, as both take as many, in every other."""
    if GROUP == 1:
        give_turn(GROUP, gl.to_tensor(1))


@gluon.jit
def end_turns(GROUP: gl.constexpr):
    """Nobody waits or has arrived any more."""
    if GROUP == 0:
        take_turn(GROUP, gl.to_tensor(1))
