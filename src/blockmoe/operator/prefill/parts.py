"""What both GEMMs of the prefill engine are made of: stages in shared memory, who fills them, and who multiplies.

  load_...      one warp: the TMA loads of stages of one K block (128 columns): weights; in GEMM2 pairs too
  load_scales   GEMM2, one warp: the pairs' scales, and the weights'
  gather        GEMM1, four warps: the pairs' hidden states by token, their scales and the weights' (`gate_up.py`)
  multiply      two consumers, four warps each: 64 pairs by 2 x 128 weight rows in registers. A K block's product goes to
                registers of its own and is added to the sum times both scales. Where a tile has at most 64 pairs, the second
                consumer takes no part (`skip`)

Two programs are a cluster (CLUSTER 2; 1: none). They have two tiles of one expert and the same columns (paired), and each loads one half of
the weights, for both by multicast; or, where an expert has a single tile left, that tile and neighbouring columns, and GEMM2's pairs are
shared so. `full` takes an arrival of the loading warp (and TMA's bytes) and PAIRS for the pairs or their scales, and the weights'.
`empty` takes one of each consumer of the cluster, whose stages are filled at the same time. Clusters of four were slower (T = 14107: 1,473
us for 1,398).

Every tile begins at a multiple of 128 pairs, so that whole tiles can be stored: rows past an expert's end are rubbish that nobody
reads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from blockmoe.operator.persistent import APART, BOTH, MULTICAST, barrier, proxy_fence, say, wait_until
from blockmoe.operator.prefill.turns import give_turn, take_turn
from blockmoe.operator.prefill.units import DOWN, END, K, hear_unit, wait_for_rows

ROWS = gl.constexpr(64)  # pairs of a consumer
CODES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
PAIRS = gl.constexpr(128)  # arrivals for what does not come by TMA
# The next unit is drawn when so many K blocks of a unit of GEMM1, of GEMM2, are left to be asked for, or at the first of fewer. (T = 3,000,
# 4,096, 8,192: 409.3, 435.1, 720.1 us; always at the first 413.1, 444.4, 723.8; by 28 and 12 410.0, 437.1, 721.3.)
EARLY_1, EARLY_2 = gl.constexpr(16), gl.constexpr(10)
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))


@gluon.jit
def stage_buffers(STAGES: gl.constexpr):
    """Buffers of pairs, weights, and the scales of both."""
    x_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, K], CODES)
    w_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, K, K], CODES)
    s_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    w_s_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return x_buffers, w_buffers, s_buffers, w_s_buffers


@gluon.jit
def stage_barriers(STAGES: gl.constexpr, CLUSTER: gl.constexpr):
    """Barriers of full and of empty stages."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + PAIRS)
        mbarrier.init(empty.index(i), count=2 * CLUSTER)
    return full, empty


@gluon.jit
def barriers_made(CLUSTER: gl.constexpr):
    """Before roles begin: the barriers may be made known to the other program of the cluster."""
    if CLUSTER > 1:
        FENCE: gl.constexpr = "fence.mbarrier_init.release.cluster; mov.b32 $0, $1;"
        gl.inline_asm_elementwise(FENCE, "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1)
        barrier()


@gluon.jit
def meet(ready, CLUSTER: gl.constexpr):
    """One warp, before it loads for the other program of its cluster too: then both run, and the barriers of both are initialised. So are
    they for who frees a stage in both: none is full before this warp has loaded. Meanwhile others draw and look up the first unit."""
    if CLUSTER > 1:
        program = gl.program_id(0)
        gl.atomic_xchg(ready + program, 1, sem="release")
        wait_until(ready + (program ^ 1), 1, 50)
        barrier()


@gluon.jit
def acquire(empty, full, step, rows, STAGES: gl.constexpr):
    """A free stage, told to expect so many rows of pairs beside two weight tiles, and its barrier."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    if rows > ROWS:
        mbarrier.expect(full.index(stage), 2 * ROWS * K + 2 * K * K)
    elif rows > 0:
        mbarrier.expect(full.index(stage), ROWS * K + 2 * K * K)
    else:
        mbarrier.expect(full.index(stage), 2 * K * K)
    return stage, full.index(stage)


@gluon.jit
def load_weights(w, w_buffers, bar, stage, first, k, paired, OTHER_ROWS: gl.constexpr, CLUSTER: gl.constexpr):
    """128 weight rows each from `first` and from `first` + OTHER_ROWS; of a paired unit one of both, for both programs."""
    if CLUSTER > 1 and paired > 0:
        rank = gl.program_id(0) % 2
        say(MULTICAST)
        tma.async_copy_global_to_shared(w, [first + rank * OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + rank))
    else:
        tma.async_copy_global_to_shared(w, [first, k * K], bar, w_buffers.index(2 * stage))
        tma.async_copy_global_to_shared(w, [first + OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + 1))


@gluon.jit
def load_rows(x, boxes, bar, stage, begin, rows, k, paired, CLUSTER: gl.constexpr):
    """64 or 128 pairs' rows from `begin` on, in boxes of 64 / CLUSTER; of a unit that is not paired half of them, for both programs."""
    BOX: gl.constexpr = ROWS // CLUSTER
    at = 2 * CLUSTER * stage
    if CLUSTER == 1:
        tma.async_copy_global_to_shared(x, [begin, k * K], bar, boxes.index(at))
        if rows > ROWS:
            tma.async_copy_global_to_shared(x, [begin + ROWS, k * K], bar, boxes.index(at + 1))
    elif paired > 0:
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(x, [begin + i * BOX, k * K], bar, boxes.index(at + i))
        if rows > ROWS:
            for i in gl.static_range(2, 4):
                tma.async_copy_global_to_shared(x, [begin + i * BOX, k * K], bar, boxes.index(at + i))
    else:
        rank = gl.program_id(0) % 2
        say(MULTICAST)
        tma.async_copy_global_to_shared(x, [begin + rank * BOX, k * K], bar, boxes.index(at + rank))
        if rows > ROWS:
            say(MULTICAST)
            tma.async_copy_global_to_shared(x, [begin + ROWS + rank * BOX, k * K], bar, boxes.index(at + 2 + rank))


@gluon.jit
def load_gate_up(
    w, w_buffers, full, empty, queue, told, heard, wanted,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: the weights of GEMM1, up rows and gate rows. Returns how many stages it filled, the number of the next unit, and that."""
    step = gl.to_tensor(0)
    n = gl.to_tensor(0)
    unit = hear_unit(queue, told, heard, n, 1)
    while unit[0] < DOWN:
        _, _, column, paired, _, _, expert = unit
        first = expert * (2 * INTER) + column * K
        for k in range(HIDDEN // K):
            if k == max(HIDDEN // K - EARLY_1, 0):
                mbarrier.arrive(wanted.index(0), count=1)
            stage, bar = acquire(empty, full, step, 0, STAGES)
            load_weights(w, w_buffers, bar, stage, first, k, paired, INTER, CLUSTER)
            step += 1
        n += 1
        unit = hear_unit(queue, told, heard, n, 1)
    return step, n, unit


@gluon.jit
def load_down(
    middle, w, boxes, w_buffers, full, empty, queue, told, heard, wanted, n, unit, there,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: weights and pairs of GEMM2, from the nth unit on. Returns how many stages it filled."""
    step = gl.to_tensor(0)
    units = gl.to_tensor(0)
    while unit[0] < END:
        _, _, column, paired, begin, end, expert = unit
        first = expert * HIDDEN + column * (2 * K)
        rows = end - begin
        wait_for_rows(there, units)
        proxy_fence()
        for k in range(INTER // K):
            if k == max(INTER // K - EARLY_2, 0):
                mbarrier.arrive(wanted.index(0), count=1)
            stage, bar = acquire(empty, full, step, rows, STAGES)
            load_rows(middle, boxes, bar, stage, begin, rows, k, paired, CLUSTER)
            load_weights(w, w_buffers, bar, stage, first, k, paired, K, CLUSTER)
            step += 1
        n += 1
        units += 1
        unit = hear_unit(queue, told, heard, n, 1)
    return step


@gluon.jit
def drain(empty, step, STAGES: gl.constexpr):
    """Until every stage is empty. A program whose stages the other of its cluster still frees must not end."""
    for i in gl.static_range(STAGES):
        mbarrier.wait(empty.index((step + i) % STAGES), (((step + i) // STAGES) & 1) ^ 1)


@gluon.jit
def load_scales(
    scale, w_scale, s_buffers, w_s_buffers, full, empty, queue, told, heard, n, unit, there, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp, for GEMM2 from the nth unit on: `scale` [I / 128, pitch] of the pairs as they are sorted, and the weight blocks'. Loads run
    a stage ahead."""
    step = gl.to_tensor(0)
    units = gl.to_tensor(0)
    BLOCKS: gl.constexpr = INTER // K
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    while unit[0] < END:
        _, _, column, _, begin, _, expert = unit
        blocks = w_scale + (expert * (HIDDEN // K) + 2 * column + gl.arange(0, 2, layout=ONE)) * BLOCKS
        w_s = gl.load(blocks)
        wait_for_rows(there, units)
        at = scale + begin + gl.arange(0, ROWS, layout=LAYOUT)
        s_a = gl.load(at, cache_modifier=".cg")
        s_b = gl.load(at + ROWS, cache_modifier=".cg")
        for k in range(BLOCKS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            s_buffers.index(2 * stage).store(s_a)
            s_buffers.index(2 * stage + 1).store(s_b)
            w_s_buffers.index(stage).store(w_s)
            mbarrier.arrive(full.index(stage), count=PAIRS)
            ahead = gl.minimum(k + 1, BLOCKS - 1)
            w_s = gl.load(blocks + ahead)
            s_a = gl.load(at + ahead * pitch, cache_modifier=".cg")
            s_b = gl.load(at + (ahead * pitch + ROWS), cache_modifier=".cg")
            step += 1
        n += 1
        units += 1
        unit = hear_unit(queue, told, heard, n, 1)


@gluon.jit
def free(empty, stage, CLUSTER: gl.constexpr):
    """This consumer has read a stage."""
    if CLUSTER > 1:
        say(BOTH)
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def multiply(
    GROUP: gl.constexpr, x_buffers, w_buffers, s_buffers, w_s_buffers, full, empty, step, both,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Both sums [64, 128] of a consumer's half of a tile, and the next step. both: 1 where the other consumer multiplies its half too, else
    0."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    zero = gl.zeros([ROWS, K], gl.float32, SUMS)
    sum_0 = gl.zeros([ROWS, K], gl.float32, SUMS)
    sum_1 = gl.zeros([ROWS, K], gl.float32, SUMS)
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(full.index(stage), phase)
    # Warps go apart: each has waited for a stage itself, and what they read is freed behind a barrier of all four.
    for k in range(BLOCKS):
        rows = x_buffers.index(2 * stage + GROUP)
        take_turn(GROUP, both)
        say(APART)
        product = warpgroup_mma(rows, w_buffers.index(2 * stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        give_turn(GROUP, both)
        s = s_buffers.index(2 * stage + GROUP).load(BY_ROW)
        by_0 = s * w_s_buffers.index(stage).slice(0, 1).load(BY_ROW)
        product = warpgroup_mma_wait(0, deps=(product,))
        sum_0 += product * gl.expand_dims(by_0, 1)
        # nothing is outstanding: this only keeps ptxas from issuing the next product early, which costs 60 registers
        sum_0 = warpgroup_mma_wait(0, deps=(sum_0,))
        take_turn(GROUP, both)
        product = warpgroup_mma(rows, w_buffers.index(2 * stage + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
        give_turn(GROUP, both)
        by_1 = s * w_s_buffers.index(stage).slice(1, 1).load(BY_ROW)
        # for the next stage, beside the product; the last time for this one again
        more = gl.where(k + 1 < BLOCKS, 1, 0)
        wraps = gl.where(stage == STAGES - 1, more, 0)
        following = gl.where(wraps > 0, 0, stage + more)
        phase ^= wraps
        say(APART)
        mbarrier.wait(full.index(following), phase)
        product = warpgroup_mma_wait(0, deps=(product,))
        free(empty, stage, CLUSTER)
        sum_1 += product * gl.expand_dims(by_1, 1)
        stage = following
    return sum_0, sum_1, step + BLOCKS


@gluon.jit
def skip(full, empty, step, BLOCKS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr):
    """A unit that has no pairs for this consumer: its stages are freed unread."""
    for _ in range(BLOCKS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        free(empty, stage, CLUSTER)
        step += 1
    return step
