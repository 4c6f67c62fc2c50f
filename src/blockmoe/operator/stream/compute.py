"""The consumers of the streaming kernel: products, promotion by scales that lie in shared memory, epilogues, the output's last sum.

Weights stand on wgmma's M side, pairs on the N side. A stage's two boxes have a sum each (`two_sums`), so that SwiGLU moves nothing; or,
where they are two K blocks, one together (`one_sum`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from blockmoe.operator.persistent import GENERIC, QUEUE, barrier, hear, wait_until
from blockmoe.operator.stream.load import pairs_at, second_unit, unit_at, unit_counts
from blockmoe.operator.stream.stay import let_go, may_leave

# Barriers by which a program's consumer says, in turn, that a unit is stored: it hears of no unit before the teller has heard of the one
# QUEUE before it, and so has waited for all that came before that.
STORED = gl.constexpr(QUEUE.value + 1)


@gluon.jit
def two_sums(
    it, stages, GROUP: gl.constexpr, N: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    M: gl.constexpr,
):  # fmt: skip
    """Scaled sums of both runs of weight rows with a tile's first N pairs, [ROWS, N] each, over this consumer's of COUNT stages from `it`
    on."""
    w_bufs, x_bufs, s_bufs, w_s_bufs, asked, full, empty = stages
    S: gl.constexpr = gl.SliceLayout(0, M)
    X_BUFS: gl.constexpr = 2 if DENSE else 1
    S_BUFS: gl.constexpr = 4 if DENSE else 1
    zero = gl.zeros([ROWS, N], gl.float32, M)
    first = gl.zeros([ROWS, N], gl.float32, M)
    second = gl.zeros([ROWS, N], gl.float32, M)
    for step in range(own_first(it, GROUP, DENSE), it + COUNT, 2 if DENSE else 1):
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
    return first, second, it + COUNT


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
    c = gate / (1.0 + gl.exp(-gate)) * up
    scale = gl.maximum(gl.max(gl.abs(c), 0), 1e-34) * (1.0 / 448.0)
    codes = gl.convert_layout((c / gl.expand_dims(scale, 0)).to(gl.float8e4nv), OUT)
    gl.store(middle_scale + s_pair * BLOCKS + block, scale * weight, mask=s_pair < end)
    pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    column = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    to = middle + gl.expand_dims(pair * INTER, 0) + gl.expand_dims(column, 1)
    gl.store(to, codes, mask=gl.expand_dims(pair < end, 0), eviction_policy="evict_last" if STAY else "")


@gluon.jit
def store_rows(
    sum, begin, end, column, rows, HIDDEN: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, STAY: gl.constexpr
):  # fmt: skip
    """[ROWS, N] as bfloat16 to `rows` [pairs, H]: columns `column` ... of rows begin ... end - 1. STAY: in the L2, until `combine` has
    read them, so that they don't reach DRAM beside the weights (T = 300, where stream ran then: 6 us of 491)."""
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
    pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    at = column + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    to = rows + gl.expand_dims(pair.to(gl.int64) * HIDDEN, 0) + gl.expand_dims(at, 1)
    values = gl.convert_layout(sum.to(gl.bfloat16), OUT)
    gl.store(to, values, mask=gl.expand_dims(pair < end, 0), eviction_policy="evict_last" if STAY else "")


@gluon.jit
def write_zeros(out, token_order, some, tokens, HIDDEN: gl.constexpr, WARPS: gl.constexpr):
    """Zeros for this program's of the tokens without pairs, a warp a token: those behind the first `some` of `token_order`."""
    C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    zeros = gl.zeros([WARPS, 256], gl.bfloat16, C)
    column = gl.expand_dims(gl.arange(0, 256, layout=gl.SliceLayout(0, C)), 0)
    for first in range(some + gl.program_id(0) * WARPS, tokens, gl.num_programs(0) * WARPS):
        slot = first + gl.arange(0, WARPS, layout=gl.SliceLayout(1, C))
        token = gl.load(token_order + slot, mask=slot < tokens, other=0)
        to = out + gl.expand_dims(token.to(gl.int64) * HIDDEN, 1) + column
        for run in range(0, HIDDEN, 256):
            gl.store(to + run, zeros, mask=gl.expand_dims(slot < tokens, 1))


@gluon.jit
def rows_of(token, token_pair, token_pairs, TOP_K: gl.constexpr):
    """Of each `token`, not negative: how many pairs it has, and TOP_K numbers of which the first so many are their rows."""
    there = token >= 0
    count = gl.load(token_pairs + token, mask=there, other=0)
    pairs = ()
    for n in gl.static_range(TOP_K):
        pairs = pairs + (gl.load(token_pair + token * TOP_K + n, mask=there, other=0),)
    return count, pairs


@gluon.jit
def combine(
    rows, out, token_pair, token_pairs, token_order, some, written, least, group, number, numbers,
    HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, TOP_K: gl.constexpr, RUN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out[t] = the sum over a token's rows, in the order of their experts, in float32: a column group's, share `number` of `numbers`, once
    `written` is at least `least`.

    A warp a token that has rows, of which there are `some`, RUN columns at a time. Where the next token's rows are is read meanwhile, and what has been
    read may leave the L2 (in a workspace that begins inside a line a row's last line may stay).
    """
    C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    LINES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])  # of 64 columns
    RUNS: gl.constexpr = (COLUMNS + RUN - 1) // RUN
    parts = (some + WARPS - 1) // WARPS * RUNS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, C))
    line = gl.arange(0, 32, layout=gl.SliceLayout(0, LINES))
    slot = number // RUNS * WARPS + warp
    token = gl.load(token_order + slot, mask=slot < some, other=-1)
    slot = (number + numbers) // RUNS * WARPS + warp
    next_token = gl.load(token_order + slot, mask=slot < some, other=-1)
    count, pairs = rows_of(token, token_pair, token_pairs, TOP_K)
    once = gl.zeros([32 * WARPS], gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    wait_until(written + once, once + least, once + 50, GENERIC)
    barrier()
    for part in range(number, parts, numbers):
        first = part % RUNS * RUN
        inside = first + gl.arange(0, RUN, layout=gl.SliceLayout(0, C))
        there = gl.expand_dims(token >= 0, 1) & gl.expand_dims(inside < COLUMNS, 0)
        column = gl.expand_dims(group * COLUMNS + inside, 0)
        next_count, next_pairs = rows_of(next_token, token_pair, token_pairs, TOP_K)
        slot = (part + 2 * numbers) // RUNS * WARPS + warp
        third_token = gl.load(token_order + slot, mask=slot < some, other=-1)
        sum = gl.zeros([WARPS, RUN], gl.float32, C)
        for n in gl.static_range(TOP_K):
            at = rows + gl.expand_dims(pairs[n].to(gl.int64) * HIDDEN, 1) + column
            mask = there & gl.expand_dims(n < count, 1)
            sum += gl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(gl.float32)
        gl.store(out + gl.expand_dims(token.to(gl.int64) * HIDDEN, 1) + column, sum.to(gl.bfloat16), mask=there)
        lines = gl.expand_dims((line < RUN // 64) & (first + 64 * line < COLUMNS), 0)
        for n in gl.static_range(TOP_K):
            pair = gl.convert_layout(gl.where(n < count, pairs[n], -1), gl.SliceLayout(1, LINES))
            at = rows + gl.expand_dims(pair.to(gl.int64) * HIDDEN, 1) + gl.expand_dims(group * COLUMNS + first + 64 * line, 0)
            may_leave(at, lines & gl.expand_dims(pair >= 0, 1))
        token = next_token
        next_token = third_token
        count = next_count
        pairs = next_pairs


@gluon.jit
def teller(
    parameters, HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, RUN: gl.constexpr
):  # fmt: skip
    """One warp: tells other programs of each unit that it is stored, when the consumer has said so, which waiting for its stores to come to
    the L2 would keep from its next unit. (H200, T = 130, 500, 901: 4.5, 4.6, 4.0 us of 316, 341, 364; results/h200/operator/teller.txt)"""
    stored, queue, told, heard, finished, written, tile_count, tile_group, order_count = parameters
    IN: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = HIDDEN // (2 * ROWS) // GROUPS
    tiles, units_1, sums, last_sums, units = unit_counts(tile_count, order_count, HIDDEN, INTER, ROWS, False, GROUPS, RUN)
    n = 0
    unit = hear(queue, told, heard, n, 1)
    while unit < units_1:
        tile, _ = unit_at(unit, tile_group, IN, False)
        mbarrier.wait(stored.index(n % STORED), (n // STORED) & 1)
        gl.atomic_add(finished + tile, 1, sem="release")
        n += 1
        unit = hear(queue, told, heard, n, 1)
    while unit < units:
        group, _, is_sum = second_unit(unit - units_1, tiles * OUT, sums, GROUPS)
        mbarrier.wait(stored.index(n % STORED), (n // STORED) & 1)
        if is_sum == 0:
            gl.atomic_add(written + group, 1, sem="release")
        n += 1
        unit = hear(queue, told, heard, n, 1)


@gluon.jit
def gate_up_unit(
    it, n, begin, end, block, stages, exchange, pair_weight, middle, middle_scale,
    GROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    DENSE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A unit of GEMM1, of a tile's first N pairs."""
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    s_pair = begin + gl.arange(0, N, layout=gl.SliceLayout(0, M))
    weight = gl.load(pair_weight + s_pair, mask=s_pair < end, other=0.0)
    up, gate, it = two_sums(it, stages, GROUP, N, HIDDEN // 128, ROWS, STAGES, DENSE, M)
    if GROUP == 1:
        hand_over((up, gate), exchange, n)
    else:
        if DENSE:
            up, gate = join((up, gate), exchange, n, M)
        store_middle(up, gate, weight, begin, end, block, middle, middle_scale, INTER, ROWS, N, WARPS, not DENSE, M)
    return it


@gluon.jit
def down_unit(
    it, begin, end, column, stages, rows,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A unit of GEMM2 of sorted pairs: 2 * ROWS columns from `column` on, of a tile's first N pairs."""
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    first, second, it = two_sums(it, stages, 0, N, INTER // 128, ROWS, STAGES, False, M)
    store_rows(first, begin, end, column, rows, HIDDEN, ROWS, N, WARPS, True)
    store_rows(second, begin, end, column + ROWS, rows, HIDDEN, ROWS, N, WARPS, True)
    return it


@gluon.jit
def consumer(
    GROUP: gl.constexpr, parameters,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    DENSE: gl.constexpr, GROUPS: gl.constexpr, RUN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """ROWS / 16 warps. `finished` counts a tile's units of GEMM1, `written` a column group's of GEMM2.

    Where DENSE there are two, and each multiplies every other stage: one alone takes some 580 cycles for a stage of GEMM2, longer than the
    memory where few programs have units left. What the second has summed it hands to the first, which does all else.

    `between`: where consumers meet, or barriers that say, in turn, to the teller that a unit is stored.

    Of tiles with more than 32 pairs the products of the first 32 are a code of their own, for those that have no others.
    """
    (
        between, stages, queue, told, heard, middle, middle_scale, rows, out,
        finished, written, tile_count, tile_group, tile_begin, tile_end, pair_weight, token_pair, token_pairs, token_order,
        order_count, tokens,
    ) = parameters
    FEW: gl.constexpr = min(N, 32)
    IN: gl.constexpr = INTER // ROWS
    OUT: gl.constexpr = HIDDEN // ROWS if DENSE else HIDDEN // (2 * ROWS) // GROUPS
    tiles, units_1, sums, last_sums, units = unit_counts(tile_count, order_count, HIDDEN, INTER, ROWS, DENSE, GROUPS, RUN)
    some = 0
    if DENSE == 0:
        some = gl.load(order_count) >> 16
        write_zeros(out, token_order, some, tokens, HIDDEN, WARPS)  # while the first weights are on their way
    it = 0
    n = 0
    unit = hear(queue, told, heard, n, WARPS)
    while unit < units_1:
        tile, block = unit_at(unit, tile_group, IN, DENSE)
        begin, end = pairs_at(tile, tile_begin, tile_end, tokens, N, DENSE)
        if N > FEW and end - begin <= FEW:
            it = gate_up_unit(
                it, n, begin, end, block, stages, between, pair_weight, middle, middle_scale,
                GROUP, HIDDEN, INTER, ROWS, FEW, STAGES, DENSE, WARPS,
            )  # fmt: skip
        else:
            it = gate_up_unit(
                it, n, begin, end, block, stages, between, pair_weight, middle, middle_scale,
                GROUP, HIDDEN, INTER, ROWS, N, STAGES, DENSE, WARPS,
            )  # fmt: skip
        if GROUP == 0:
            barrier()
            if DENSE:
                gl.atomic_add(finished + tile, 1, sem="release")
            else:
                mbarrier.arrive(between.index(n % STORED), count=1)
        n += 1
        unit = hear(queue, told, heard, n, WARPS)
    while unit < units:
        if DENSE:
            M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
            sum, it = one_sum(it, tiles * (INTER // 256), stages, GROUP, N, ROWS, STAGES, M)
            if GROUP == 1:
                hand_over((sum,), between, n)
            else:
                sum = join((sum,), between, n, M)[0]
                store_rows(sum, 0, tokens, (unit - units_1) * ROWS, out, HIDDEN, ROWS, N, WARPS, False)
        else:
            group, number, is_sum = second_unit(unit - units_1, tiles * OUT, sums, GROUPS)
            if is_sum:
                mbarrier.arrive(between.index(n % STORED), count=1)
                shares = gl.where(group == GROUPS - 1, last_sums, sums)
                combine(
                    rows, out, token_pair, token_pairs, token_order, some, written + group, tiles * OUT, group, number, shares,
                    HIDDEN, HIDDEN // GROUPS, TOP_K, RUN, WARPS,
                )  # fmt: skip
                if group == GROUPS - 1:  # nothing is stored there any more
                    let_go(middle, gl.load(tile_end + tiles - 1, mask=tiles > 0, other=0) * INTER, number, last_sums, WARPS)
            else:
                tile, block = unit_at(number, tile_group, OUT, False)
                begin, end = pairs_at(tile, tile_begin, tile_end, tokens, N, DENSE)
                column = (group * OUT + block) * (2 * ROWS)
                if N > FEW and end - begin <= FEW:
                    it = down_unit(it, begin, end, column, stages, rows, HIDDEN, INTER, ROWS, FEW, STAGES, WARPS)
                else:
                    it = down_unit(it, begin, end, column, stages, rows, HIDDEN, INTER, ROWS, N, STAGES, WARPS)
                barrier()
                mbarrier.arrive(between.index(n % STORED), count=1)
        n += 1
        unit = hear(queue, told, heard, n, WARPS)
