"""What both kernels of the prefill engine are made of: stages in shared memory, who fills them, and who multiplies.

  load_tiles    one warp: draws units, issues the TMA loads of stages of one K block (128 columns)
  load_scales   one warp: the pairs' scales to shared memory
  multiply      two consumers, four warps each: 64 pairs by 2 x 128 weight rows in registers. A K block's product goes to
                registers of its own and is added to the sum times both scales. Where a tile has at most 64 pairs, the second
                consumer takes no part (`skip`)

`full` takes an arrival of each loading warp (and TMA's bytes), `empty` one of each consumer. Every tile begins at a multiple of 128
pairs, so that whole tiles can be stored: rows past an expert's end are rubbish that nobody reads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

K = gl.constexpr(128)  # columns a stage, and a scale
ROWS = gl.constexpr(64)  # pairs of a consumer
REGISTERS = (208, 40, 56)  # a thread of consumers, of loaders, of the four warps beside; more for the consumers spill (ptxas 12.9)
QUEUE = gl.constexpr(2)  # units told and not yet heard by all
CODES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # its name in Triton 3.8


@gluon.jit
def stage_buffers(STAGES: gl.constexpr):
    """Buffers of pairs, weights and scales; barriers of full and of empty stages."""
    x_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, K], CODES)
    w_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, K, K], CODES)
    s_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    return x_buffers, w_buffers, s_buffers, full, empty


@gluon.jit
def unit_queue(READERS: gl.constexpr):
    """How `load_tiles` tells the program's other roles, READERS of them, which unit comes next: numbers and two barriers a slot."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queue = gl.allocate_shared_memory(gl.int32, [QUEUE, 32], LAYOUT)
    told = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUEUE):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=READERS)
    return queue, told, heard


@gluon.jit
def tell(queue, told, heard, n, unit):
    """The nth unit of this program, once its slot has been heard by all. One past the last ends every role's loop."""
    slot = n % QUEUE
    mbarrier.wait(heard.index(slot), ((n // QUEUE) & 1) ^ 1)
    queue.index(slot).store(gl.full([32], unit, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def hear(queue, told, heard, n, WARPS: gl.constexpr):
    """The nth unit told, for a role of WARPS warps."""
    slot = n % QUEUE
    mbarrier.wait(told.index(slot), (n // QUEUE) & 1)
    unit = gl.max(queue.index(slot).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    barrier()
    mbarrier.arrive(heard.index(slot), count=1)
    return unit


@gluon.jit
def wait_until(counter, least, pause):
    """Until `counter` is at least `least`, every thread for its own; what was written before is then visible, to TMA too.

    Other threads see it after a barrier. It looks again after `pause` ns: warps that only look take issue slots, L2 bandwidth and
    power from those that multiply.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        again:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.ge.s32 p, $0, $2;
        @p bra found;
        nanosleep.u32 $3;
        bra again;
        found:
        fence.proxy.async;
        }""",
        "=&r,l,r,r", [counter, least, pause], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_tiles(
    x, w, x_buffers, w_buffers, full, empty, queue, told, heard, ticket, copied, tile_count, tile_expert, tile_begin, tile_end,
    EXPERT_ROWS: gl.constexpr, OTHER_ROWS: gl.constexpr, STEP: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """One warp: draws units, tells them, loads them. Column tile j takes weight rows STEP * j and STEP * j + OTHER_ROWS, 128 of each.

    x holds the pairs' rows, sorted: all of them (RING 0), or RING tiles that `copy_rows` fills; `copied` is read for a ring only.
    Units come from `ticket` in ascending order, so that those that share weights run at the same time. The next one is drawn
    before this one is loaded (the answer takes a while) and told after.
    """
    zeros = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    units = gl.load(tile_count) * COLUMNS
    step = 0
    n = 0
    unit = gl.atomic_add(ticket, 1, sem="relaxed")
    tell(queue, told, heard, n, unit)
    while unit < units:
        tile = unit // COLUMNS
        first = gl.load(tile_expert + tile) * EXPERT_ROWS + (unit % COLUMNS) * STEP
        begin = gl.load(tile_begin + tile)
        two = gl.load(tile_end + tile) - begin > ROWS
        unit = gl.atomic_add(ticket, 1, sem="relaxed")
        n += 1
        if RING > 0:
            begin = (tile % RING) * (2 * ROWS)
            wait_until(copied + tile + zeros, zeros + COLUMNS, zeros + 100)
        for k in range(BLOCKS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            if two:
                mbarrier.expect(bar, 2 * ROWS * K + 2 * K * K)
                tma.async_copy_global_to_shared(x, [begin, k * K], bar, x_buffers.index(2 * stage))
                tma.async_copy_global_to_shared(x, [begin + ROWS, k * K], bar, x_buffers.index(2 * stage + 1))
            else:
                mbarrier.expect(bar, ROWS * K + 2 * K * K)
                tma.async_copy_global_to_shared(x, [begin, k * K], bar, x_buffers.index(2 * stage))
            tma.async_copy_global_to_shared(w, [first, k * K], bar, w_buffers.index(2 * stage))
            tma.async_copy_global_to_shared(w, [first + OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + 1))
            step += 1
        tell(queue, told, heard, n, unit)


@gluon.jit
def load_scales(
    scale, s_buffers, full, empty, queue, told, heard, copied, tile_count, tile_begin, pitch,
    COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """One warp: `scale` [BLOCKS, pitch] of the pairs as they are sorted; of a ring as in `load_tiles`.

    A load runs a stage ahead. Gathered by token instead, 128 scales a stage took longer than the stage's products.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    zeros = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    step = 0
    units = gl.load(tile_count) * COLUMNS
    n = 0
    unit = hear(queue, told, heard, n, 1)
    while unit < units:
        tile = unit // COLUMNS
        if RING > 0:
            begin = (tile % RING) * (2 * ROWS)
            wait_until(copied + tile + zeros, zeros + COLUMNS, zeros + 100)
        else:
            begin = gl.load(tile_begin + tile)
        at = scale + begin + gl.arange(0, ROWS, layout=LAYOUT)
        s_a = gl.load(at, cache_modifier=".cg")
        s_b = gl.load(at + ROWS, cache_modifier=".cg")
        for k in range(BLOCKS):
            ahead = gl.minimum(k + 1, BLOCKS - 1) * pitch
            next_a = gl.load(at + ahead, cache_modifier=".cg")
            next_b = gl.load(at + ahead + ROWS, cache_modifier=".cg")
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            s_buffers.index(2 * stage).store(s_a)
            s_buffers.index(2 * stage + 1).store(s_b)
            mbarrier.arrive(full.index(stage), count=1)
            s_a = next_a
            s_b = next_b
            step += 1
        n += 1
        unit = hear(queue, told, heard, n, 1)


@gluon.jit
def multiply(
    GROUP: gl.constexpr, x_buffers, w_buffers, s_buffers, full, empty, step, scale_0, scale_1,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both sums [64, 128] of a consumer's half of a tile, and the next step; scale_0 and scale_1: where the weight blocks' scales begin."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    zero = gl.zeros([ROWS, K], gl.float32, SUMS)
    sum_0 = gl.zeros([ROWS, K], gl.float32, SUMS)
    sum_1 = gl.zeros([ROWS, K], gl.float32, SUMS)
    for k in range(BLOCKS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        rows = x_buffers.index(2 * stage + GROUP)
        product = warpgroup_mma(rows, w_buffers.index(2 * stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = s_buffers.index(2 * stage + GROUP).load(BY_ROW)
        by_0 = s * gl.load(scale_0 + k)
        by_1 = s * gl.load(scale_1 + k)
        product = warpgroup_mma_wait(0, deps=(product,))
        sum_0 += product * gl.expand_dims(by_0, 1)
        # nothing is outstanding: this only keeps ptxas from issuing the next product early, which costs 60 registers
        sum_0 = warpgroup_mma_wait(0, deps=(sum_0,))
        product = warpgroup_mma(rows, w_buffers.index(2 * stage + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(stage), count=1)
        sum_1 += product * gl.expand_dims(by_1, 1)
        step += 1
    return sum_0, sum_1, step


@gluon.jit
def skip(full, empty, step, BLOCKS: gl.constexpr, STAGES: gl.constexpr):
    """A unit that has no pairs for this consumer: its stages are freed unread."""
    for _ in range(BLOCKS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step
