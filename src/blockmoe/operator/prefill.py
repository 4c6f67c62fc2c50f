"""The prefill engine: the whole layer after routing as two warp-specialised persistent Gluon kernels (sm_90).

For many pairs an expert. A multiprocessor runs one program. Two consumer warpgroups hold 64 pairs each by 2 x 128 weight
rows in registers (gate and up of one intermediate block in GEMM1, 256 output columns in GEMM2); a warp issues the TMA loads
of stages of K = 128, another brings the pairs' scales to shared memory. A product of one K block goes to registers of its
own and is added to the sum times both scales.

Pairs are sorted by expert; every tile of 128 starts at `tile` * 128, so that whole tiles can be stored: rows past an
expert's end hold rubbish that nobody reads. Where a tile has at most 64 pairs, the second consumer idles.

- GEMM1 gathers: two warps copy the hidden states of a tile's tokens by cp.async, so that no sorted copy of them exists.
- GEMM2 combines: four warps add a finished tile to the output, in the order of experts, so that every bit is the same
  from call to call and no row is stored twice. A tile's rows wait until the tile that holds the token's pair before
  (`before`, per pair) has been added (`added`, per tile and column block). Programs take tiles in ascending order and all
  run at once, so what is waited for is always under way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

K = gl.constexpr(128)  # columns a stage, and a scale
ROWS = gl.constexpr(64)  # of a consumer
barrier = gl.thread_barrier


@gluon.jit
def load_weights(
    w, w_buffers, full, empty, tile_count, tile_expert,
    EXPERT_ROWS: gl.constexpr, OTHER_ROWS: gl.constexpr, STEP: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A warp. Column tile j takes weight rows STEP * j and STEP * j + OTHER_ROWS, 128 of each."""
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        first = gl.load(tile_expert + unit // COLUMNS) * EXPERT_ROWS + (unit % COLUMNS) * STEP
        for k in range(BLOCKS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * K * K)
            tma.async_copy_global_to_shared(w, [first, k * K], bar, w_buffers.index(2 * stage))
            tma.async_copy_global_to_shared(w, [first + OTHER_ROWS, k * K], bar, w_buffers.index(2 * stage + 1))
            step += 1


@gluon.jit
def load_middle_and_weights(
    x, w, x_buffers, w_buffers, full, empty, tile_count, tile_expert, tile_begin, tile_end,
    EXPERT_ROWS: gl.constexpr, OTHER_ROWS: gl.constexpr, STEP: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """`load_weights` with the pairs' rows of a matrix that is sorted as the pairs are."""
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        first = gl.load(tile_expert + tile) * EXPERT_ROWS + (unit % COLUMNS) * STEP
        begin = gl.load(tile_begin + tile)
        two = gl.load(tile_end + tile) - begin > ROWS
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


@gluon.jit
def gather_hidden(
    x, pair_token, x_buffers, full, empty, tile_count, tile_begin, tile_end,
    HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Two warps. A stage is announced two stages after its copies were issued, when they have landed."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [2, 1], [1, 0])
    LATE: gl.constexpr = 2
    column = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        two = end - begin > ROWS
        row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        a = gl.expand_dims(gl.load(pair_token + row, mask=row < end, other=0) * HIDDEN, 1) + column
        b = gl.expand_dims(gl.load(pair_token + row + ROWS, mask=row + ROWS < end, other=0) * HIDDEN, 1) + column
        for k in range(BLOCKS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(x_buffers.index(2 * stage), x + k * K + a)
            if two:
                async_copy.async_copy_global_to_shared(x_buffers.index(2 * stage + 1), x + k * K + b)
            async_copy.commit_group()
            if step >= LATE:
                async_copy.wait_group(LATE)
                fence_async_shared()
                barrier()
                mbarrier.arrive(full.index((step - LATE) % STAGES), count=1)
            step += 1
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    for late in range(gl.maximum(step - LATE, 0), step):
        mbarrier.arrive(full.index(late % STAGES), count=1)


@gluon.jit
def load_scales(
    x_scale, pair_token, s_buffers, full, empty, tile_count, tile_begin, tile_end, pitch,
    COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A warp: x_scale [BLOCKS, pitch], of the token of each pair where GATHER, else of the pair itself.

    Loads run AHEAD (a divisor of BLOCKS) stages before the stage that they are for: a gather of 128 rows takes longer than a
    stage.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    gl.static_assert(BLOCKS % AHEAD == 0)
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        a = begin + gl.arange(0, ROWS, layout=LAYOUT)
        b = a + ROWS
        in_a = a < end
        in_b = b < end
        if GATHER:
            a = gl.load(pair_token + a, mask=in_a, other=0)
            b = gl.load(pair_token + b, mask=in_b, other=0)
        scales = ()
        for i in gl.static_range(AHEAD):
            scales = scales + (
                gl.load(x_scale + i * pitch + a, mask=in_a, other=0.0),
                gl.load(x_scale + i * pitch + b, mask=in_b, other=0.0),
            )
        for k in range(0, BLOCKS, AHEAD):
            next_scales = ()
            for i in gl.static_range(AHEAD):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                s_buffers.index(2 * stage).store(scales[2 * i])
                s_buffers.index(2 * stage + 1).store(scales[2 * i + 1])
                mbarrier.arrive(full.index(stage), count=1)
                at = x_scale + gl.minimum(k + AHEAD + i, BLOCKS - 1) * pitch
                next_scales = next_scales + (
                    gl.load(at + a, mask=in_a, other=0.0),
                    gl.load(at + b, mask=in_b, other=0.0),
                )
                step += 1
            scales = next_scales


@gluon.jit
def multiply(
    GROUP: gl.constexpr, x_buffers, w_buffers, s_buffers, full, empty, step, scale_0, scale_1, LAYOUT: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both sums [64, 128] of a consumer's tile; scale_0 and scale_1 point to the weight blocks' scales along K."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    zero = gl.zeros([ROWS, K], gl.float32, LAYOUT)
    sum_0 = gl.zeros([ROWS, K], gl.float32, LAYOUT)
    sum_1 = gl.zeros([ROWS, K], gl.float32, LAYOUT)
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
    for _ in range(BLOCKS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gate_up_consumer(
    GROUP: gl.constexpr, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, w_scale, pair_weight,
    middle_scale, token_pair, token_pairs, before, added, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    if GROUP == 0:  # while the first stages are on their way
        prepare_adding(token_pair, token_pairs, before, added, tile_count, tokens, TOP_K, HIDDEN // (2 * K))
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        column = unit % COLUMNS
        begin = gl.load(tile_begin + tile) + GROUP * ROWS
        end = gl.load(tile_end + tile)
        if begin < end:
            up_scale = w_scale + (gl.load(tile_expert + tile) * (2 * COLUMNS) + column) * BLOCKS
            up, gate, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, full, empty, step, up_scale, up_scale + COLUMNS * BLOCKS, LAYOUT,
                BLOCKS, STAGES,
            )  # fmt: skip
            row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            weight = gl.load(pair_weight + row, mask=row < end, other=0.0)
            value = gate * reciprocal(1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            scale = gl.maximum(gl.max(gl.abs(value), 1), 1e-34) * (1.0 / 448.0)
            codes = (value * gl.expand_dims(1.0 / scale, 1)).to(gl.float8e4nv)
            out = out_buffers.index(GROUP)
            tma.store_wait(0)
            barrier()
            out.store(codes)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(middle, [begin, column * K], out)
            gl.store(middle_scale + column * pitch + row, scale * weight)
        else:
            step = skip(full, empty, step, BLOCKS, STAGES)
    tma.store_wait(0)


@gluon.jit
def down_consumer(
    GROUP: gl.constexpr, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, done, taken, w_scale,
    tile_count, tile_expert, tile_begin, tile_end,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    BLOCKS: gl.constexpr = INTER // K
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    step = 0
    tiles = 0  # that this consumer had a part in
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        begin = gl.load(tile_begin + tile) + GROUP * ROWS
        if begin < gl.load(tile_end + tile):
            scale = w_scale + (gl.load(tile_expert + tile) * (2 * COLUMNS) + 2 * (unit % COLUMNS)) * BLOCKS
            left, right, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, full, empty, step, scale, scale + BLOCKS, LAYOUT, BLOCKS, STAGES
            )
            mbarrier.wait(taken.index(GROUP), (tiles & 1) ^ 1)
            done_buffers.index(2 * GROUP).store(left.to(gl.bfloat16))
            done_buffers.index(2 * GROUP + 1).store(right.to(gl.bfloat16))
            barrier()
            mbarrier.arrive(done.index(GROUP), count=1)
            tiles += 1
        else:
            step = skip(full, empty, step, BLOCKS, STAGES)


@gluon.jit
def wait_until_set(flag):
    """Spin, every thread for its own flags, until they are not 0; what was written before they were set is then visible."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        again:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.eq.s32 p, $0, 0;
        @p bra again;
        }""",
        "=r,l", [flag], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def add_group(
    GROUP: gl.constexpr, out, done_buffers, done, taken, pair_token, before, begin, end, c, tiles, HIDDEN: gl.constexpr,
):  # fmt: skip
    """What consumer GROUP left of the tile at `begin` into columns 256 c ... of the output."""
    PART: gl.constexpr = 32  # rows at a time
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    column = c * (2 * K) + gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    mbarrier.wait(done.index(GROUP), tiles & 1)
    for part in gl.static_range(ROWS // PART):
        row = begin + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
        there = row < end
        token = gl.load(pair_token + row, mask=there, other=0)
        again = gl.expand_dims(gl.load(before + row, mask=there, other=-1) >= 0, 1)
        there = gl.expand_dims(there, 1)
        at = out + gl.expand_dims(token.to(gl.int64) * HIDDEN, 1) + column
        old_left = gl.load(at, mask=again, other=0.0, cache_modifier=".cg")
        old_right = gl.load(at + K, mask=again, other=0.0, cache_modifier=".cg")
        left = done_buffers.index(2 * GROUP).slice(part * PART, PART).load(LAYOUT)
        right = done_buffers.index(2 * GROUP + 1).slice(part * PART, PART).load(LAYOUT)
        left = (left.to(gl.float32) + old_left.to(gl.float32)).to(gl.bfloat16)
        right = (right.to(gl.float32) + old_right.to(gl.float32)).to(gl.bfloat16)
        gl.store(at, left, mask=there)
        gl.store(at + K, right, mask=there)
    barrier()
    mbarrier.arrive(taken.index(GROUP), count=1)


@gluon.jit
def add_rows(
    out, done_buffers, done, taken, pair_token, before, added, token_pairs, tile_count, tile_begin, tile_end, tokens,
    HIDDEN: gl.constexpr,
):  # fmt: skip
    """Four warps: zeros for tokens without a pair, then finished tiles into the output."""
    PART: gl.constexpr = 32  # rows at a time
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    column = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    for first in range(gl.program_id(0) * PART, tokens, gl.num_programs(0) * PART):
        token = first + gl.arange(0, PART, layout=BY_ROW)
        none = gl.expand_dims(gl.load(token_pairs + token, mask=token < tokens, other=1) == 0, 1)
        at = out + gl.expand_dims(token.to(gl.int64) * HIDDEN, 1) + column
        for c in range(0, HIDDEN, K):
            gl.store(at + c, gl.zeros([PART, K], gl.bfloat16, LAYOUT), mask=none)

    tiles = 0
    large_tiles = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        c = unit % COLUMNS
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        row = begin + gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        earlier = gl.load(before + row, mask=row < end, other=-1)
        # tile -1 is the entry ahead of the first, and always set
        wait_until_set(added + ((earlier + 1) * COLUMNS + c))
        barrier()
        add_group(0, out, done_buffers, done, taken, pair_token, before, begin, end, c, tiles, HIDDEN)
        if begin + ROWS < end:
            add_group(1, out, done_buffers, done, taken, pair_token, before, begin + ROWS, end, c, large_tiles, HIDDEN)
            large_tiles += 1
        tiles += 1  # noqa: SIM113
        barrier()
        gl.atomic_xchg(added + ((tile + 1) * COLUMNS + c), 1, sem="release")


@gluon.jit
def stage_buffers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """Buffers of pairs, weights and scales; barriers of full and of empty stages."""
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    x_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, K], CODES)
    w_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, K, K], CODES)
    s_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    return x_buffers, w_buffers, s_buffers, full, empty


@gluon.jit
def prepare_adding(
    token_pair, token_pairs, before, added, tile_count, tokens, TOP_K: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """before[pair]: the tile of the token's pair before, or -1; added: 0 but for the entries ahead of the first tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 128, layout=LAYOUT)
    flags = (gl.load(tile_count) + 1) * COLUMNS
    for i in range(gl.program_id(0) * 128, flags, gl.num_programs(0) * 128):
        gl.store(added + i + lane, (i + lane < COLUMNS).to(gl.int32), mask=i + lane < flags)
    for i in range(gl.program_id(0) * 128, tokens, gl.num_programs(0) * 128):
        token = i + lane
        count = gl.load(token_pairs + token, mask=token < tokens, other=0)
        earlier = gl.full([128], -1, gl.int32, LAYOUT)
        for n in gl.static_range(TOP_K):
            pair = gl.load(token_pair + token * TOP_K + n, mask=n < count, other=0)
            gl.store(before + pair, earlier, mask=n < count)
            earlier = pair // (2 * ROWS)


@gluon.jit
def gate_up_kernel(
    w, middle, x, x_scale, w_scale, middle_scale, pair_token, pair_weight, token_pair, token_pairs, before, added,
    tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    PDL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """middle[p, i] = silu(gate) * up as e4m3, middle_scale[i / 128, p] its scale times the pair's routing weight.

    w [L * 2 I, H] (descriptor); middle [pitch, I] (descriptor); x [T, H]; x_scale [H / 128, T]; middle_scale [I / 128, pitch].
    """
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES, 3)
    out_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, K], CODES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (gate_up_consumer, (
                0, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, w_scale, pair_weight, middle_scale,
                token_pair, token_pairs, before, added, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
                HIDDEN, INTER, TOP_K, STAGES,
            )),
            (gate_up_consumer, (
                1, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, w_scale, pair_weight, middle_scale,
                token_pair, token_pairs, before, added, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
                HIDDEN, INTER, TOP_K, STAGES,
            )),
            (gather_hidden, (
                x, pair_token, x_buffers, full, empty, tile_count, tile_begin, tile_end, HIDDEN, COLUMNS, BLOCKS, STAGES,
            )),
            (load_weights, (
                w, w_buffers, full, empty, tile_count, tile_expert, 2 * INTER, INTER, K, COLUMNS, BLOCKS, STAGES,
            )),
            (load_scales, (
                x_scale, pair_token, s_buffers, full, empty, tile_count, tile_begin, tile_end, tokens, COLUMNS, BLOCKS, STAGES,
                True, AHEAD,
            )),
        ],
        [4, 2, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def down_kernel(
    middle, w, out, middle_scale, w_scale, pair_token, token_pairs, before, added, tile_count, tile_expert, tile_begin,
    tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, ADDER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out[t, h] in bfloat16: the sum over the token's pairs, in the order of their experts, rounded after each.

    middle [pitch, I] and w [L * H, I]: descriptors.
    """
    BLOCKS: gl.constexpr = INTER // K
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES, 2)
    done_buffers = gl.allocate_shared_memory(gl.bfloat16, [4, ROWS, K], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (down_consumer, (
                0, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, done, taken, w_scale, tile_count, tile_expert,
                tile_begin, tile_end, HIDDEN, INTER, STAGES,
            )),
            (down_consumer, (
                1, done_buffers, x_buffers, w_buffers, s_buffers, full, empty, done, taken, w_scale, tile_count, tile_expert,
                tile_begin, tile_end, HIDDEN, INTER, STAGES,
            )),
            (add_rows, (
                out, done_buffers, done, taken, pair_token, before, added, token_pairs, tile_count, tile_begin, tile_end,
                tokens, HIDDEN,
            )),
            (load_middle_and_weights, (
                middle, w, x_buffers, w_buffers, full, empty, tile_count, tile_expert, tile_begin, tile_end,
                HIDDEN, K, 2 * K, COLUMNS, BLOCKS, STAGES,
            )),
            (load_scales, (
                middle_scale, tile_count, s_buffers, full, empty, tile_count, tile_begin, tile_end, pitch, COLUMNS, BLOCKS,
                STAGES, False, AHEAD,
            )),
        ],
        [4, 4, 1, 1],
        [CONSUMER_REGISTERS, ADDER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
