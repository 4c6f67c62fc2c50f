"""The prefill engine: the whole layer after routing as two warp-specialised persistent Gluon kernels (sm_90).

For many pairs an expert. A multiprocessor runs one program. Two consumer warpgroups hold 64 pairs each by 2 x 128 weight
rows in registers (gate and up of one intermediate block in GEMM1, 256 output columns in GEMM2); a warp issues the TMA loads
of stages of K = 128, another brings the pairs' scales to shared memory. A product of one K block goes to registers of its
own and is added to the sum times both scales.

Pairs are sorted by expert; every tile of 128 starts at `tile` * 128, so that whole tiles can be stored: rows past an
expert's end hold rubbish that nobody reads. Where a tile has at most 64 pairs, the second consumer idles.

- GEMM1 sorts: four warps copy the hidden states of tiles to come into a ring of sorted tiles, from where TMA loads them. A
  tile's copy is shared out to the programs of its column tiles: `copied` counts the parts, `used` the programs done with it.
- GEMM2 combines: four warps add a finished tile to the output, in the order of experts, so that every bit is the same
  from call to call and no row is stored twice. A tile's rows wait until the tile that holds the token's pair before
  (`before`, per pair) has been added (`added`, per tile and column block). Programs take tiles in ascending order and all
  run at once, so what is waited for is always under way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
def load_tiles(
    x, w, x_buffers, w_buffers, full, empty, copied, tile_count, tile_expert, tile_begin, tile_end,
    EXPERT_ROWS: gl.constexpr, OTHER_ROWS: gl.constexpr, STEP: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The TMA warp. Column tile j takes weight rows STEP * j and STEP * j + OTHER_ROWS, 128 of each.

    x holds the pairs' rows, sorted: all of them (RING 0), or RING tiles that `copy_rows` fills.
    """
    one = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        first = gl.load(tile_expert + tile) * EXPERT_ROWS + (unit % COLUMNS) * STEP
        begin = gl.load(tile_begin + tile)
        two = gl.load(tile_end + tile) - begin > ROWS
        if RING > 0:
            begin = (tile % RING) * (2 * ROWS)
            wait_until(copied + tile + one, one + COLUMNS)
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
def wait_until(counter, least):
    """Spin, every thread for its own, until `counter` is at least `least`; what was written before is then visible, to TMA too."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        again:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.lt.s32 p, $0, $2;
        @p bra again;
        fence.proxy.async;
        }""",
        "=r,l,r", [counter, least], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def copy_rows(
    x, x_scale, ring, ring_scale, pair_token, copied, used, tile_count, tile_begin, tile_end, tokens,
    HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Four warps. Part j of a tile: columns j * H / COLUMNS ..., and the scales of K blocks j, j + COLUMNS, ..."""
    WIDTH: gl.constexpr = HIDDEN // COLUMNS  # bytes
    LANES: gl.constexpr = 32  # a warp a row, 16 bytes a lane
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [1, LANES], [4, 1], [1, 0])
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PART: gl.constexpr = 16
    byte = gl.expand_dims(gl.arange(0, 16 * LANES, layout=gl.SliceLayout(0, LAYOUT)), 0)
    one = gl.zeros([128], gl.int32, ONE_EACH)
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        part = unit % COLUMNS
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        slot = (tile % RING) * (2 * ROWS)
        if tile >= RING:
            wait_until(used + (tile - RING) + one, one + COLUMNS)
            barrier()
        for first in range(0, 2 * ROWS, PART):
            row = first + gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
            there = begin + row < end
            token = gl.expand_dims(gl.load(pair_token + begin + row, mask=there, other=0).to(gl.int64), 1)
            mask = gl.expand_dims(there, 1) & (byte < WIDTH)
            data = gl.load(x + token * HIDDEN + part * WIDTH + byte, mask=mask, other=0.0)
            gl.store(ring + (slot + gl.expand_dims(row, 1)) * HIDDEN + part * WIDTH + byte, data, mask=mask)
        row = gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        there = begin + row < end
        token = gl.load(pair_token + begin + row, mask=there, other=0)
        for k in range(part, HIDDEN // K, COLUMNS):
            gl.store(ring_scale + k * (RING * 2 * ROWS) + slot + row, gl.load(x_scale + k * tokens + token, mask=there, other=0.0))
        barrier()
        gl.atomic_add(copied + tile, 1, sem="release")


@gluon.jit
def load_scales(
    scale, s_buffers, full, empty, copied, tile_count, tile_begin, pitch,
    COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The scale warp: `scale` [BLOCKS, pitch] of the pairs as they are sorted; of a ring as in `load_tiles`.

    A load runs a stage ahead. Gathered by token instead, 128 scales a stage took longer than the stage's products.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    one = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    step = 0
    units = gl.load(tile_count) * COLUMNS
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // COLUMNS
        if RING > 0:
            begin = (tile % RING) * (2 * ROWS)
            wait_until(copied + tile + one, one + COLUMNS)
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
    middle_scale, token_pair, token_pairs, before, added, used, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
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
        if GROUP == 0:
            gl.atomic_add(used + tile, 1, sem="relaxed")
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
def put(at, values, how):
    """Store (how 1) or add (2) 16 bytes, 8 bfloat16, of every pair of 64-bit words; 0: neither."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b32 a, b, c, d;
        mov.b64 {a, b}, $3;
        mov.b64 {c, d}, $4;
        setp.eq.s32 p, $5, 1;
        setp.eq.s32 q, $5, 2;
        @p st.global.v4.b32 [$1], {a, b, c, d};
        @q red.relaxed.gpu.global.add.noftz.v4.bf16x2 [$1], {a, b, c, d};
        mov.b32 $0, 0;
        }""",
        "=r,l,l,l,l,r,r", [at, values, how], dtype=gl.int16, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def add_group(
    GROUP: gl.constexpr, out, words, done, taken, pair_token, before, begin, end, c, tiles, HIDDEN: gl.constexpr,
):  # fmt: skip
    """What consumer GROUP left of the tile at `begin` into columns 256 c ... of the output (here of 4-column words)."""
    PART: gl.constexpr = 32  # rows at a time
    WORDS: gl.constexpr = K // 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    column = c * (2 * WORDS) + gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    mbarrier.wait(done.index(GROUP), tiles & 1)
    for part in gl.static_range(ROWS // PART):
        row = begin + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
        there = row < end
        token = gl.load(pair_token + row, mask=there, other=0)
        how = gl.where(there, gl.where(gl.load(before + row, mask=there, other=-1) >= 0, 2, 1), 0)
        how = gl.expand_dims(how, 1) + gl.zeros([PART, WORDS], gl.int32, LAYOUT)
        at = out + gl.expand_dims(token.to(gl.int64) * (HIDDEN // 4), 1) + column
        put(at, words.index(2 * GROUP).slice(part * PART, PART).load(LAYOUT), how)
        put(at + WORDS, words.index(2 * GROUP + 1).slice(part * PART, PART).load(LAYOUT), how)
    barrier()
    mbarrier.arrive(taken.index(GROUP), count=1)


@gluon.jit
def add_rows(
    out, done_buffers, done, taken, pair_token, before, added, token_pairs, tile_count, tile_begin, tile_end, tokens,
    HIDDEN: gl.constexpr,
):  # fmt: skip
    """Four warps: zeros for tokens without a pair, then finished tiles into the output."""
    PART: gl.constexpr = 32  # tokens at a time
    WORDS: gl.constexpr = K // 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    column = gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    words = done_buffers._reinterpret(gl.int64, [4, ROWS, WORDS], gl.SwizzledSharedLayout(2, 1, 8, [1, 0]))
    one = gl.zeros([128], gl.int32, ONE_EACH) + 1
    for first in range(gl.program_id(0) * PART, tokens, gl.num_programs(0) * PART):
        token = first + gl.arange(0, PART, layout=BY_ROW)
        none = gl.expand_dims(gl.load(token_pairs + token, mask=token < tokens, other=1) == 0, 1)
        at = out + gl.expand_dims(token.to(gl.int64) * (HIDDEN // 4), 1) + column
        for c in range(0, HIDDEN // 4, WORDS):
            gl.store(at + c, gl.zeros([PART, WORDS], gl.int64, LAYOUT), mask=none)

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
        wait_until(added + ((earlier + 1) * COLUMNS + c), one)
        barrier()
        add_group(0, out, words, done, taken, pair_token, before, begin, end, c, tiles, HIDDEN)
        if begin + ROWS < end:
            add_group(1, out, words, done, taken, pair_token, before, begin + ROWS, end, c, large_tiles, HIDDEN)
            large_tiles += 1
        tiles += 1  # noqa: SIM113
        barrier()
        gl.atomic_xchg(added + ((tile + 1) * COLUMNS + c), 1, sem="release")


@gluon.jit
def stage_buffers(STAGES: gl.constexpr):
    """Buffers of pairs, weights and scales; barriers of full and of empty stages."""
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
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
    ring, w, middle, x, x_scale, ring_rows, ring_scale, w_scale, middle_scale, pair_token, pair_weight, token_pair, token_pairs,
    before, added, copied, used, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    PDL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, COPIER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """middle[p, i] = silu(gate) * up as e4m3, middle_scale[i / 128, p] its scale times the pair's routing weight.

    Descriptors: ring [RING * 128, H] over ring_rows, w [L * 2 I, H], middle [pitch, I]. x [T, H]; x_scale [H / 128, T];
    ring_scale [H / 128, RING * 128]; middle_scale [I / 128, pitch]. copied and used [tiles] begin at 0.
    """
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES)
    out_buffers = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, K], CODES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (gate_up_consumer, (
                0, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, w_scale, pair_weight, middle_scale,
                token_pair, token_pairs, before, added, used, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
                HIDDEN, INTER, TOP_K, STAGES,
            )),
            (gate_up_consumer, (
                1, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, w_scale, pair_weight, middle_scale,
                token_pair, token_pairs, before, added, used, tile_count, tile_expert, tile_begin, tile_end, tokens, pitch,
                HIDDEN, INTER, TOP_K, STAGES,
            )),
            (copy_rows, (
                x, x_scale, ring_rows, ring_scale, pair_token, copied, used, tile_count, tile_begin, tile_end, tokens,
                HIDDEN, COLUMNS, RING,
            )),
            (load_tiles, (
                ring, w, x_buffers, w_buffers, full, empty, copied, tile_count, tile_expert, tile_begin, tile_end,
                2 * INTER, INTER, K, COLUMNS, BLOCKS, STAGES, RING,
            )),
            (load_scales, (
                ring_scale, s_buffers, full, empty, copied, tile_count, tile_begin, RING * 2 * ROWS, COLUMNS, BLOCKS, STAGES,
                RING,
            )),
        ],
        [4, 4, 1, 1],
        [CONSUMER_REGISTERS, COPIER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def down_kernel(
    middle, w, out, middle_scale, w_scale, pair_token, token_pairs, before, added, tile_count, tile_expert, tile_begin,
    tile_end, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, ADDER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out[t, h] in bfloat16: the sum over the token's pairs, in the order of their experts, rounded after each.

    middle [pitch, I] and w [L * H, I]: descriptors.
    """
    BLOCKS: gl.constexpr = INTER // K
    COLUMNS: gl.constexpr = HIDDEN // (2 * K)
    x_buffers, w_buffers, s_buffers, full, empty = stage_buffers(STAGES)
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
            (load_tiles, (
                middle, w, x_buffers, w_buffers, full, empty, added, tile_count, tile_expert, tile_begin, tile_end,
                HIDDEN, K, 2 * K, COLUMNS, BLOCKS, STAGES, 0,
            )),
            (load_scales, (
                middle_scale, s_buffers, full, empty, added, tile_count, tile_begin, pitch, COLUMNS, BLOCKS, STAGES, 0,
            )),
        ],
        [4, 4, 1, 1],
        [CONSUMER_REGISTERS, ADDER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
