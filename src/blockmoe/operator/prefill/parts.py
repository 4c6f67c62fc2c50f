"""What both GEMMs of the prefill engine are made of: their units, stages in shared memory, who fills them, and who multiplies.

  load_tiles    one warp: the TMA loads of stages of one K block (128 columns)
  load_scales   one warp: the pairs' scales to shared memory
  multiply      two consumers, four warps each: 64 pairs by 2 x 128 weight rows in registers. A K block's product goes to
                registers of its own and is added to the sum times both scales. Where a tile has at most 64 pairs, the second
                consumer takes no part (`skip`)

Two programs are a cluster (CLUSTER 2; 1: none). Their tiles share an operand, which each loads one half of, for both by multicast:
the weights, where they have two tiles of one expert and the same columns; where an expert has a single tile (left), its pairs, and
neighbouring columns. `full` takes an arrival of each loading warp (and TMA's bytes), `empty` one of each consumer of the cluster.

Every tile begins at a multiple of 128 pairs, so that whole tiles can be stored: rows past an expert's end are rubbish that nobody
reads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from blockmoe.operator.persistent import BOTH, MULTICAST, barrier, say, wait_until

K = gl.constexpr(128)  # columns a stage, and a scale
ROWS = gl.constexpr(64)  # pairs of a consumer
CODES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))


@gluon.jit
def stage_buffers(STAGES: gl.constexpr, CLUSTER: gl.constexpr):
    """Buffers of pairs, weights and scales; barriers of full and of empty stages."""
    x_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, K], CODES)
    w_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, K, K], CODES)
    s_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2 * CLUSTER)
    return x_buffers, w_buffers, s_buffers, full, empty


@gluon.jit
def meet(ready, CLUSTER: gl.constexpr):
    """The programs of a cluster wait for each other: then both run, and the barriers of both are initialised."""
    if CLUSTER > 1:
        FENCE: gl.constexpr = "fence.mbarrier_init.release.cluster; mov.b32 $0, $1;"
        program = gl.program_id(0)
        gl.inline_asm_elementwise(FENCE, "=r,r", [program], dtype=gl.int32, is_pure=False, pack=1)
        barrier()
        gl.atomic_xchg(ready + program, 1, sem="release")
        wait_until(ready + (program ^ 1), 1, 50)
        barrier()


@gluon.jit
def my_units(tile_count, COLUMNS: gl.constexpr, CLUSTER: gl.constexpr):
    """This program's first unit, the step to its next, and how many there are. A cluster's programs have the same units."""
    units = gl.load(tile_count) * (COLUMNS // CLUSTER)
    return gl.program_id(0) // CLUSTER, gl.num_programs(0) // CLUSTER, units


@gluon.jit
def unit_at(unit, tile_group, COLUMNS: gl.constexpr, CLUSTER: gl.constexpr):
    """The tile and column tile of this program's part of a unit, and whether its cluster has two tiles and one column tile.

    A tile has as many units as columns, of a cluster half as many; a pair of tiles those of both.
    """
    if CLUSTER == 1:
        return unit // COLUMNS, unit % COLUMNS, False
    else:
        HALF: gl.constexpr = COLUMNS // 2
        rank = gl.program_id(0) % 2
        tile = unit // HALF
        column = unit % HALF
        group = gl.load(tile_group + tile)  # 4096 * the expert's first tile + its tiles
        even = (tile - (group >> 12)) & 1 ^ 1
        paired = (even == 0) | (tile + 1 < (group >> 12) + (group & 4095))
        if paired:
            column += HALF * (1 - even)
            tile += even - 1 + rank
        else:
            column = 2 * column + rank
        return tile, column, paired


@gluon.jit
def acquire(empty, full, step, rows, STAGES: gl.constexpr):
    """A free stage, told to expect so many rows of pairs beside two weight tiles, and its barrier."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    if rows > ROWS:
        mbarrier.expect(full.index(stage), 2 * ROWS * K + 2 * K * K)
    else:
        mbarrier.expect(full.index(stage), ROWS * K + 2 * K * K)
    return stage, full.index(stage)


@gluon.jit
def load_tile(
    x, w, x_buffers, w_buffers, full, empty, step, begin, rows, first, paired,
    OTHER_ROWS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """All stages of a unit: pairs' rows begin ... of x, and 128 weight rows each from `first` and from `first` + OTHER_ROWS."""
    if CLUSTER == 1:
        for k in range(BLOCKS):
            stage, bar = acquire(empty, full, step, rows, STAGES)
            tma.async_copy_global_to_shared(x, [begin, k * K], bar, x_buffers.index(2 * stage))
            if rows > ROWS:
                tma.async_copy_global_to_shared(x, [begin + ROWS, k * K], bar, x_buffers.index(2 * stage + 1))
            tma.async_copy_global_to_shared(w, [first, k * K], bar, w_buffers.index(2 * stage))
            tma.async_copy_global_to_shared(w, [first + OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + 1))
            step += 1
    else:
        HALF: gl.constexpr = ROWS // 2
        halves = x_buffers._reinterpret(gl.float8e4nv, [4 * STAGES, HALF, K], CODES)
        rank = gl.program_id(0) % 2
        if paired:
            for k in range(BLOCKS):
                stage, bar = acquire(empty, full, step, rows, STAGES)
                for i in gl.static_range(2):
                    tma.async_copy_global_to_shared(x, [begin + i * HALF, k * K], bar, halves.index(4 * stage + i))
                if rows > ROWS:
                    for i in gl.static_range(2, 4):
                        tma.async_copy_global_to_shared(x, [begin + i * HALF, k * K], bar, halves.index(4 * stage + i))
                say(MULTICAST)
                tma.async_copy_global_to_shared(w, [first + rank * OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + rank))
                step += 1
        else:
            for k in range(BLOCKS):
                stage, bar = acquire(empty, full, step, rows, STAGES)
                say(MULTICAST)
                tma.async_copy_global_to_shared(x, [begin + rank * HALF, k * K], bar, halves.index(4 * stage + rank))
                if rows > ROWS:
                    say(MULTICAST)
                    tma.async_copy_global_to_shared(x, [begin + ROWS + rank * HALF, k * K], bar, halves.index(4 * stage + 2 + rank))
                tma.async_copy_global_to_shared(w, [first, k * K], bar, w_buffers.index(2 * stage))
                tma.async_copy_global_to_shared(w, [first + OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + 1))
                step += 1
    return step


@gluon.jit
def load_tiles(
    x, w, x_buffers, w_buffers, full, empty, step, ready_tiles, enough, tile_count, tile_expert, tile_group, tile_begin, tile_end,
    EXPERT_ROWS: gl.constexpr, OTHER_ROWS: gl.constexpr, STEP: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, RING: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Every unit of this program. Column tile j takes weight rows STEP * j and STEP * j + OTHER_ROWS, 128 of each.

    x holds the pairs' rows, sorted: all of them (RING 0), or RING tiles in turn. A tile's are there when `ready_tiles` counts `enough`.
    """
    zeros = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    first_unit, stride, units = my_units(tile_count, COLUMNS, CLUSTER)
    for unit in range(first_unit, units, stride):
        tile, column, paired = unit_at(unit, tile_group, COLUMNS, CLUSTER)
        first = gl.load(tile_expert + tile) * EXPERT_ROWS + column * STEP
        begin = gl.load(tile_begin + tile)
        rows = gl.load(tile_end + tile) - begin
        if RING > 0:
            begin = (tile % RING) * (2 * ROWS)
        wait_until(ready_tiles + tile + zeros, zeros + enough, zeros + 100)
        step = load_tile(x, w, x_buffers, w_buffers, full, empty, step, begin, rows, first, paired, OTHER_ROWS, BLOCKS, STAGES, CLUSTER)
    return step


@gluon.jit
def drain(empty, step, STAGES: gl.constexpr):
    """Until every stage is empty. A program whose stages the other of its cluster still frees must not end."""
    for i in gl.static_range(STAGES):
        mbarrier.wait(empty.index((step + i) % STAGES), (((step + i) // STAGES) & 1) ^ 1)


@gluon.jit
def load_scales(
    scale, s_buffers, full, empty, step, ready_tiles, enough, tile_count, tile_group, tile_begin, pitch,
    COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: `scale` [BLOCKS, pitch] of the pairs as they are sorted; of a ring as in `load_tiles`.

    A load runs a stage ahead. Gathered by token instead, 128 scales a stage took longer than the stage's products.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    zeros = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    first_unit, stride, units = my_units(tile_count, COLUMNS, CLUSTER)
    for unit in range(first_unit, units, stride):
        tile, _, _ = unit_at(unit, tile_group, COLUMNS, CLUSTER)
        if RING > 0:
            begin = (tile % RING) * (2 * ROWS)
        else:
            begin = gl.load(tile_begin + tile)
        wait_until(ready_tiles + tile + zeros, zeros + enough, zeros + 100)
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
    return step


@gluon.jit
def free(empty, stage, CLUSTER: gl.constexpr):
    """This consumer has read a stage."""
    if CLUSTER > 1:
        say(BOTH)
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def multiply(
    GROUP: gl.constexpr, x_buffers, w_buffers, s_buffers, full, empty, step, scale_0, scale_1,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Both sums [64, 128] of a consumer's half of a tile, and the next step; scale_0 and scale_1: where the weight blocks' scales begin.

    The wait for the next stage lies behind the second product, whose time hides it.
    """
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    zero = gl.zeros([ROWS, K], gl.float32, SUMS)
    sum_0 = gl.zeros([ROWS, K], gl.float32, SUMS)
    sum_1 = gl.zeros([ROWS, K], gl.float32, SUMS)
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    for k in range(BLOCKS):
        stage = step % STAGES
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
        step += 1
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1, pred=k + 1 < BLOCKS)
        product = warpgroup_mma_wait(0, deps=(product,))
        free(empty, stage, CLUSTER)
        sum_1 += product * gl.expand_dims(by_1, 1)
    return sum_0, sum_1, step


@gluon.jit
def skip(full, empty, step, BLOCKS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr):
    """A unit that has no pairs for this consumer: its stages are freed unread."""
    for _ in range(BLOCKS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        free(empty, stage, CLUSTER)
        step += 1
    return step
