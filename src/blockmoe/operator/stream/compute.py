"""The consumers of the streaming kernel: products, promotion by scales that lie in shared memory, epilogues.

Weights stand on wgmma's M side, pairs on the N side. A stage's two boxes have a sum each (`two_sums`), so that SwiGLU moves nothing; or,
where they are two K blocks, one together (`one_sum`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from blockmoe.operator.persistent import GENERIC, barrier, hear, reciprocals, wait_until
from blockmoe.operator.stream.sums import STORED, last_sum, tell_stored
from blockmoe.operator.stream.units import MOST_SPLIT, WORDS, share_of, unit_counts


@gluon.jit
def two_sums(
    it, count, stages, GROUP: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr, M: gl.constexpr
):
    """Scaled sums of both runs of weight rows with a tile's first N pairs, [ROWS, N] each, over this consumer's of `count` stages from `it`
    on."""
    w_bufs, x_bufs, s_bufs, w_s_bufs, asked, full, empty = stages
    S: gl.constexpr = gl.SliceLayout(0, M)
    X_BUFS: gl.constexpr = 2 if DENSE else 1
    S_BUFS: gl.constexpr = 4 if DENSE else 1
    zero = gl.zeros([ROWS, N], gl.float32, M)
    first = gl.zeros([ROWS, N], gl.float32, M)
    second = gl.zeros([ROWS, N], gl.float32, M)
    for step in range(own_first(it, GROUP, DENSE), it + count, 2 if DENSE else 1):
        at = step % STAGES
        mbarrier.wait(asked.index(at), (step // STAGES) & 1)
        mbarrier.wait(full.index(at), (step // STAGES) & 1)
        fence_async_shared()  # the pairs' rows came by cp.async, wgmma reads them by the other proxy
        # before the products: behind them scales took 160 cycles a stage of GEMM2, waiting for shared memory perhaps
        s = s_bufs.index(S_BUFS * at).slice(0, N, dim=0).load(S)
        s_first = s * w_s_bufs.index(2 * at).load(S)
        s_second = s * w_s_bufs.index(2 * at + 1).load(S)
        b_x = x_bufs.index(X_BUFS * at).slice(0, N, dim=0).permute((1, 0))
        d_first = warpgroup_mma(w_bufs.index(2 * at), b_x, zero, use_acc=False, is_async=True)
        d_second = warpgroup_mma(w_bufs.index(2 * at + 1), b_x, zero, use_acc=False, is_async=True)
        d_first, d_second = warpgroup_mma_wait(0, deps=(d_first, d_second))
        mbarrier.arrive(empty.index(at), count=1)
        first += d_first * gl.expand_dims(s_first, 0)
        second += d_second * gl.expand_dims(s_second, 0)
    return first, second, it + count


@gluon.jit
def one_sum(it, count, stages, GROUP: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, M: gl.constexpr):
    """The sum [ROWS, N] of scaled products over this consumer's of `count` stages from `it` on, of two K blocks each, of which a pair has
    two scales each."""
    w_bufs, x_bufs, s_bufs, w_s_bufs, asked, full, empty = stages
    S: gl.constexpr = gl.SliceLayout(0, M)
    zero = gl.zeros([ROWS, N], gl.float32, M)
    sum = gl.zeros([ROWS, N], gl.float32, M)
    for step in range(own_first(it, GROUP, True), it + count, 2):
        at = step % STAGES
        mbarrier.wait(asked.index(at), (step // STAGES) & 1)
        mbarrier.wait(full.index(at), (step // STAGES) & 1)
        fence_async_shared()
        by_0 = w_s_bufs.index(2 * at).load(S)
        by_1 = w_s_bufs.index(2 * at + 1).load(S)
        s_0 = s_bufs.index(4 * at).load(S) * by_0
        s_1 = s_bufs.index(4 * at + 1).load(S) * by_0
        s_2 = s_bufs.index(4 * at + 2).load(S) * by_1
        s_3 = s_bufs.index(4 * at + 3).load(S) * by_1
        w_0, w_1 = w_bufs.index(2 * at), w_bufs.index(2 * at + 1)
        x_0, x_1 = x_bufs.index(2 * at), x_bufs.index(2 * at + 1)
        d_0 = warpgroup_mma(w_0.slice(0, 64, dim=1), x_0.slice(0, 64, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True)
        d_1 = warpgroup_mma(w_0.slice(64, 64, dim=1), x_0.slice(64, 64, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True)
        d_2 = warpgroup_mma(w_1.slice(0, 64, dim=1), x_1.slice(0, 64, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True)
        d_3 = warpgroup_mma(w_1.slice(64, 64, dim=1), x_1.slice(64, 64, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True)
        d_0, d_1, d_2, d_3 = warpgroup_mma_wait(0, deps=(d_0, d_1, d_2, d_3))
        mbarrier.arrive(empty.index(at), count=1)
        sum += d_0 * gl.expand_dims(s_0, 0) + d_1 * gl.expand_dims(s_1, 0)
        sum += d_2 * gl.expand_dims(s_2, 0) + d_3 * gl.expand_dims(s_3, 0)
    return sum, it + count


@gluon.jit
def own_first(it, GROUP: gl.constexpr, DENSE: gl.constexpr):
    """The first stage from `it` on that is this consumer's: where DENSE each of two has every other one."""
    if DENSE:
        return it + ((it + GROUP) & 1)
    else:
        return it


@gluon.jit
def hand_over(sums, exchange, n):
    """The second consumer's sums of the nth unit to the first."""
    other, given, taken = exchange
    mbarrier.wait(taken.index(0), (n & 1) ^ 1)
    for i in gl.static_range(len(sums)):
        other.index(i).store(sums[i])
    barrier()
    mbarrier.arrive(given.index(0), count=1)


@gluon.jit
def join(sums, exchange, n, M: gl.constexpr):
    """The first consumer's sums of the nth unit and, added to them, the second's."""
    other, given, taken = exchange
    found = ()
    mbarrier.wait(given.index(0), n & 1)
    for i in gl.static_range(len(sums)):
        found = found + (sums[i] + other.index(i).load(M),)
    barrier()
    mbarrier.arrive(taken.index(0), count=1)
    return found


@gluon.jit
def store_middle(
    up, gate, weight, begin, end, block, middle, middle_scale,
    INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, STAY: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """A unit's part of the intermediate. STAY: in the L2, until the last sum."""
    BLOCKS: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = gl.BlockedLayout([16, 1], [ROWS // 16, 512 // ROWS], [1, WARPS], [0, 1])
    s_pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, M))
    c = gate * reciprocals(1.0 + gl.exp2(gate * -1.4426950408889634)) * up
    scale = gl.maximum(gl.max(gl.abs(c), 0), 1e-34) * (1.0 / 448.0)
    gl.store(middle_scale + s_pair * BLOCKS + block, scale * weight, mask=s_pair < end)
    codes = (c * gl.expand_dims(reciprocals(scale), 0)).to(gl.float8e4nv)
    column = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    # by halves, whose change of layout takes half the shared memory, and fewer registers
    parts = gl.split(gl.permute(gl.reshape(codes, [ROWS, 2, N // 2]), (0, 2, 1))) if N > 32 else (codes,)
    PAIRS: gl.constexpr = N // len(parts)
    for i in gl.static_range(len(parts)):
        pair = begin + i * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, OUT))
        to = middle + gl.expand_dims(pair * INTER, 0) + gl.expand_dims(column, 1)
        values = gl.convert_layout(parts[i], OUT)
        gl.store(to, values, mask=gl.expand_dims(pair < end, 0), eviction_policy="evict_last" if STAY else "")


@gluon.jit
def store_rows(
    sum, begin, end, column, rows, HIDDEN: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, STAY: gl.constexpr
):  # fmt: skip
    """[ROWS, N] as bfloat16 to `rows` [pairs, H]: columns `column` ... of rows begin ... end - 1. STAY: in the L2, until the last sum
    has read them, so that they don't reach DRAM beside the weights (T = 300, where stream ran then: 6 us of 491)."""
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
    pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    at = column + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    to = rows + gl.expand_dims(pair.to(gl.int64) * HIDDEN, 0) + gl.expand_dims(at, 1)
    values = gl.convert_layout(sum.to(gl.bfloat16), OUT)
    gl.store(to, values, mask=gl.expand_dims(pair < end, 0), eviction_policy="evict_last" if STAY else "")


@gluon.jit
def sums_at(partial, place, ROWS: gl.constexpr, N: gl.constexpr, M: gl.constexpr):
    """Where the `place`-th sums of a share of K stand in `partial`, two [ROWS, N] behind each other: the first's addresses."""
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, M)), 1)
    return partial + place * (2 * ROWS * MOST_SPLIT) + (row * N + gl.expand_dims(gl.arange(0, N, layout=gl.SliceLayout(0, M)), 0))


@gluon.jit
def add_shares(
    up, gate, unit, shares, partial, summed, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, M: gl.constexpr
):
    """Both sums of a unit's last share of K and, added in their order, those of the others, which have lower numbers."""
    others = (1 << shares) - 1
    block = unit >> shares
    once = gl.zeros([32 * WARPS], gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    wait_until(summed + block + once, once + others, once + 50, GENERIC)
    barrier()
    for share in range(others):
        at = sums_at(partial, block * others + share, ROWS, N, M)
        up += gl.load(at, cache_modifier=".cg")
        gate += gl.load(at + ROWS * N, cache_modifier=".cg")
    return up, gate


@gluon.jit
def gate_up_unit(
    it, n, unit, shares, begin, end, block, stages, exchange, pair_weight, middle, middle_scale, partial, summed,
    GROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, DENSE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A unit of GEMM1, of a tile's first N pairs; where SPLIT > 1 perhaps of a share of K."""
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    s_pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, M))
    weight = gl.load(pair_weight + s_pair, mask=s_pair < end, other=0.0)
    count = HIDDEN // 128 >> shares if SPLIT > 1 else HIDDEN // 128
    up, gate, it = two_sums(it, count, stages, GROUP, N, ROWS, STAGES, DENSE, M)
    if GROUP == 1:
        hand_over((up, gate), exchange, n)
    else:
        if DENSE:
            up, gate = join((up, gate), exchange, n, M)
        share = share_of(unit, shares)
        others = (1 << shares) - 1
        if SPLIT > 1 and share < others:
            at = sums_at(partial, (unit >> shares) * others + share, ROWS, N, M)
            gl.store(at, up)
            gl.store(at + ROWS * N, gate)
        else:
            if SPLIT > 1 and others > 0:
                up, gate = add_shares(up, gate, unit, shares, partial, summed, ROWS, N, WARPS, M)
            store_middle(up, gate, weight, begin, end, block, middle, middle_scale, INTER, ROWS, N, WARPS, not DENSE, M)
    return it


@gluon.jit
def down_unit(
    it, begin, end, column, stages, rows,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A unit of GEMM2 of sorted pairs: 2 * ROWS columns from `column` on, of a tile's first N pairs."""
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    first, second, it = two_sums(it, INTER // 128, stages, 0, N, ROWS, STAGES, False, M)
    store_rows(first, begin, end, column, rows, HIDDEN, ROWS, N, WARPS, True)
    store_rows(second, begin, end, column + ROWS, rows, HIDDEN, ROWS, N, WARPS, True)
    return it


@gluon.jit
def consumer(
    GROUP: gl.constexpr, parameters,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, DENSE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """ROWS / 16 warps. `finished` counts a tile's units of GEMM1, `summed` a row block's of which `partial` has sums, `written` a column
    group's of GEMM2; `slots`: see `sums.py`.

    Where DENSE there are two, and each multiplies every other stage: one alone takes some 580 cycles for a stage of GEMM2, longer than the
    memory where few programs have units left. What the second has summed it hands to the first, which does all else.

    `between`: where consumers meet, or barriers that say, in turn, to the teller that a unit is stored.

    The products of a tile's first half, of 16 pairs at least, are a code of their own, for tiles that have no others.
    """
    (
        between, stages, queue, told, heard, middle, middle_scale, rows, out,
        finished, written, summed, partial, tile_count, tile_end, pair_weight, slots, tokens,
    ) = parameters
    FEW: gl.constexpr = max(16, N // 2)
    tiles, shares, units_1, units = unit_counts(tile_count, HIDDEN, INTER, ROWS, SPLIT, DENSE)
    it = 0
    n = 0
    unit, tile, block, begin, end, _ = hear(queue, told, heard, n, WARPS, WORDS)
    while unit < units_1:
        if N > FEW and end - begin <= FEW:
            it = gate_up_unit(
                it, n, unit, shares, begin, end, block, stages, between, pair_weight, middle, middle_scale, partial, summed,
                GROUP, HIDDEN, INTER, ROWS, FEW, STAGES, SPLIT, DENSE, WARPS,
            )  # fmt: skip
        else:
            it = gate_up_unit(
                it, n, unit, shares, begin, end, block, stages, between, pair_weight, middle, middle_scale, partial, summed,
                GROUP, HIDDEN, INTER, ROWS, N, STAGES, SPLIT if N <= MOST_SPLIT else 1, DENSE, WARPS,
            )  # fmt: skip
        if GROUP == 0:
            barrier()
            if DENSE:
                tell_stored(unit, tile, shares, finished, summed)
            else:
                mbarrier.arrive(between.index(n % STORED), count=1)
        n += 1
        unit, tile, block, begin, end, _ = hear(queue, told, heard, n, WARPS, WORDS)
    while unit < units:
        if DENSE:
            M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
            sum, it = one_sum(it, tiles * (INTER // 256), stages, GROUP, N, ROWS, STAGES, M)
            if GROUP == 1:
                hand_over((sum,), between, n)
            else:
                sum = join((sum,), between, n, M)[0]
                store_rows(sum, 0, tokens, block * ROWS, out, HIDDEN, ROWS, N, WARPS, False)
        else:
            column = block * (2 * ROWS)
            if N > FEW and end - begin <= FEW:
                it = down_unit(it, begin, end, column, stages, rows, HIDDEN, INTER, ROWS, FEW, STAGES, WARPS)
            else:
                it = down_unit(it, begin, end, column, stages, rows, HIDDEN, INTER, ROWS, N, STAGES, WARPS)
            barrier()
            mbarrier.arrive(between.index(n % STORED), count=1)
        n += 1
        unit, tile, block, begin, end, _ = hear(queue, told, heard, n, WARPS, WORDS)
    if DENSE == 0:
        last_sum(
            n, unit, units, queue, told, heard, rows, out, middle, slots, written, tile_end, tiles, tokens,
            HIDDEN, INTER, TOP_K, ROWS, WARPS,
        )  # fmt: skip
