"""What persistent Gluon kernels are made of: units of work, how a program's warps hear of them, and waiting for other programs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

QUEUE = gl.constexpr(2)  # units told and not yet heard by all
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # its name in Triton 3.8


MULTICAST, BOTH, APART = (gl.constexpr(f"mov.b32 $0, $1; /* blockmoe: {word} */") for word in ("multicast", "both", "apart"))


@gluon.jit
def say(WORD: gl.constexpr):
    """A word for `blockmoe.operator.ptx`, which clustered kernels go through: the next TMA load (MULTICAST) or arrival (BOTH) is for both
    programs of a cluster of two; before the next wait for a barrier or product the role's warps don't wait for each other (APART)."""
    gl.inline_asm_elementwise(WORD, "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1)


def _wait(fence: str) -> gl.constexpr:
    return gl.constexpr(f"""{{
        .reg .pred p;
        again:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.ge.s32 p, $0, $2;
        @p bra found;
        nanosleep.u32 $3;
        bra again;
        found:
        {fence}
        }}""")


GENERIC, PROXY = _wait(""), _wait("fence.proxy.async;")  # what is visible after a wait: to loads and stores; to TMA too


@gluon.jit
def wait_until(counter, least, pause, HOW: gl.constexpr = PROXY):
    """Until `counter` is at least `least`, every thread for its own; what was written before is then visible.

    Other threads see it after a barrier. It looks again after `pause` ns: warps that only look take issue slots, L2 bandwidth and
    power from those that multiply.
    """
    return gl.inline_asm_elementwise(HOW, "=&r,l,r,r", [counter, least, pause], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def proxy_fence():
    """What is visible to this warp's loads and stores is visible to its TMA loads."""
    FENCE: gl.constexpr = "fence.proxy.async; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(FENCE, "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def reciprocals(x):
    """1 / x within an ulp; a subnormal x counts as 0, a subnormal result is 0 (PTX's rcp.approx.ftz.f32)."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def unit_queue(READERS: gl.constexpr, WORDS: gl.constexpr):
    """How one role tells the program's others, READERS of them, which unit comes next: WORDS numbers and two barriers a slot."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queue = gl.allocate_shared_memory(gl.int32, [QUEUE * WORDS, 1], LAYOUT)
    told = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUEUE):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=READERS)
    return queue, told, heard


@gluon.jit
def tell(queue, told, heard, n, words):
    """The nth unit of this program, a tuple of numbers, once its slot has been heard by all; for a role of one warp."""
    slot = n % QUEUE
    mbarrier.wait(heard.index(slot), ((n // QUEUE) & 1) ^ 1)
    for i in gl.static_range(len(words)):
        queue.index(slot * len(words) + i).store(gl.full([1], words[i], gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def hear(queue, told, heard, n, WARPS: gl.constexpr, WORDS: gl.constexpr):
    """The nth unit told, for a role of WARPS warps: a tuple of WORDS numbers."""
    slot = n % QUEUE
    mbarrier.wait(told.index(slot), (n // QUEUE) & 1)
    words = ()
    for i in gl.static_range(WORDS):
        words = words + (gl.max(queue.index(slot * WORDS + i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0),)
    barrier()
    mbarrier.arrive(heard.index(slot), count=1)
    return words
