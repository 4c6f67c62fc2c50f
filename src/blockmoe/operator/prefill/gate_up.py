"""GEMM1 in the prefill kernel: hidden states gathered by token, SwiGLU and quantisation in the epilogue.

Hopper's TMA can't gather rows by token. Four warps do, by cp.async, straight into the stages; all scales too: consumers that read those of
weights from memory themselves waited some 100 cycles a K block for them (T = 14107: 3 % of the cycles). `finished` counts a tile's units
whose rows of the intermediate are stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from blockmoe.operator.persistent import APART, barrier, reciprocals, say
from blockmoe.operator.prefill.parts import CODES, PAIRS, ROWS, SUMS, multiply, skip
from blockmoe.operator.prefill.units import DOWN, K, hear_unit

# Rows side by side that a thread gathers, all of them if there is one: predicates of eight rows were moved to and fro in every K block.
# What lies behind a tile's last row are then copies of the first token's.
EACH = gl.constexpr(4)


@gluon.jit
def gather(
    x, x_scale, w_scale, x_buffers, s_buffers, w_s_buffers, full, empty, queue, told, heard, pair_token, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, FLIGHT: gl.constexpr,
):  # fmt: skip
    """Four warps: 128 bytes of each pair's row a stage, its scale and both weight blocks'. Returns the number of the next unit, and that.

    A stage is said to be full when FLIGHT - 1 after it have been asked for, or the unit's last: these warps wait for their copies and set
    the fence behind which wgmma sees them, which the consumers would otherwise do between products (26 us at T = 14107).

    All stages once round are code of their own, so that what follows from a stage is constant: 39 instructions a K block instead of 92.
    (H200, T = 4096, 6000, 8192, 11948, 14107: -0.8, -1.3, -0.5, -0.4, +0.1 % of the cycles; results/h200/operator/apart.txt, call 10)
    """
    X: gl.constexpr = gl.BlockedLayout([EACH, 16], [4, 8], [4, 1], [1, 0])
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BLOCKS: gl.constexpr = HIDDEN // K
    LATER: gl.constexpr = FLIGHT - 1
    ONCE: gl.constexpr = STAGES if BLOCKS % STAGES == 0 else 1
    rows = x_buffers._reinterpret(gl.float8e4nv, [STAGES, 2 * ROWS, K], CODES)
    scales = s_buffers._reinterpret(gl.float32, [STAGES, 2 * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, X)), 0)
    inside = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, X))
    step = gl.to_tensor(0)
    n = gl.to_tensor(0)
    unit = hear_unit(queue, told, heard, n, 4)
    while unit[0] < DOWN:
        _, _, column, _, begin, end, expert = unit
        token = gl.load(pair_token + begin + inside, mask=begin + inside < end, other=0)
        at = x + gl.expand_dims(token * HIDDEN, 1) + k
        there = gl.expand_dims(inside // EACH * EACH < end - begin, 1)
        line = begin + gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        at_scale = x_scale + gl.load(pair_token + line, mask=line < end, other=0)
        at_w_scale = w_scale + (expert * (2 * INTER // K) + column + gl.arange(0, 2, layout=ONE_EACH) * (INTER // K)) * BLOCKS
        for block in range(0, BLOCKS, ONCE):
            first = 0 if ONCE == STAGES else step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            for j in gl.static_range(ONCE):
                stage = first + j
                say(APART)  # each warp has waited for the stage itself
                mbarrier.wait(empty.index(stage), phase)
                async_copy.async_copy_global_to_shared(rows.index(stage), at + j * K, mask=there)
                async_copy.async_copy_global_to_shared(scales.index(stage), at_scale + j * tokens, mask=line < end)
                async_copy.async_copy_global_to_shared(w_s_buffers.index(stage), at_w_scale + j)
                async_copy.commit_group()
                if j >= LATER:
                    gathered(full, stage, LATER, LATER, STAGES)
                else:
                    if block + j >= LATER:
                        gathered(full, stage, LATER, LATER, STAGES)
            at += ONCE * K
            at_scale += ONCE * tokens
            at_w_scale += ONCE
            step += ONCE
        for left in gl.static_range(LATER):
            gathered(full, step + left, LATER, LATER - 1 - left, STAGES)
        n += 1
        unit = hear_unit(queue, told, heard, n, 4)
    return n, unit


@gluon.jit
def gathered(full, step, AGO: gl.constexpr, PENDING: gl.constexpr, STAGES: gl.constexpr):
    """Says that the stage of AGO steps before `step` is full, when no more than PENDING of those asked for are on their way."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    mbarrier.arrive(full.index((step + STAGES - AGO) % STAGES), count=PAIRS)


@gluon.jit
def store_codes(middle, codes, coded, sent, queue, told, heard, finished):
    """One warp: the consumers' codes of a unit (`coded`) to the intermediate, by TMA, and the unit to `finished`; then their place is free
    (`sent`). Returns the number of the next unit, and that. Consumers would wait for the stores, and for fences, in every epilogue."""
    WAIT: gl.constexpr = "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, $1;"
    n = gl.to_tensor(0)
    large_tiles = gl.to_tensor(0)
    unit = hear_unit(queue, told, heard, n, 1)
    while unit[0] < DOWN:
        _, tile, column, _, begin, end, _ = unit
        mbarrier.wait(coded.index(0), n & 1)
        tma.async_copy_shared_to_global(middle, [begin, column * K], codes.index(0))
        if begin + ROWS < end:
            mbarrier.wait(coded.index(1), large_tiles & 1)
            tma.async_copy_shared_to_global(middle, [begin + ROWS, column * K], codes.index(1))
        gl.inline_asm_elementwise(WAIT, "=r,r", [tile], dtype=gl.int32, is_pure=False, pack=1)
        barrier()
        mbarrier.arrive(sent.index(0), count=1)
        if begin + ROWS < end:
            mbarrier.arrive(sent.index(1), count=1)
            large_tiles += 1
        gl.atomic_add(finished + tile, 1, sem="release")
        n += 1
        unit = hear_unit(queue, told, heard, n, 1)
    return n, unit


@gluon.jit
def gate_up_consumer(
    GROUP: gl.constexpr, codes, coded, sent, x_buffers, w_buffers, s_buffers, w_s_buffers, full, empty, queue, told, heard, pair_weight,
    middle_scale, pitch, HIDDEN: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps: pairs GROUP * 64 ... of each tile, as `codes` for `store_codes`. Returns the number of the next unit, and that."""
    BLOCKS: gl.constexpr = HIDDEN // K
    step = gl.to_tensor(0)
    tiles = gl.to_tensor(0)  # that this consumer had a part in
    n = gl.to_tensor(0)
    unit = hear_unit(queue, told, heard, n, 4)
    while unit[0] < DOWN:
        _, _, column, _, first, end, _ = unit
        begin = first + GROUP * ROWS
        if begin < end:
            up, gate, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, w_s_buffers, full, empty, step, gl.where(first + ROWS < end, 1, 0),
                BLOCKS, STAGES, CLUSTER,
            )  # fmt: skip
            row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            weight = gl.load(pair_weight + row, mask=row < end, other=0.0)
            value = gate * reciprocals(1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            scale = gl.maximum(gl.max(gl.abs(value), 1), 1e-34) * (1.0 / 448.0)
            gl.store(middle_scale + column * pitch + row, scale * weight)
            mbarrier.wait(sent.index(GROUP), (tiles & 1) ^ 1)
            codes.index(GROUP).store((value * gl.expand_dims(1.0 / scale, 1)).to(gl.float8e4nv))
            fence_async_shared()
            barrier()
            mbarrier.arrive(coded.index(GROUP), count=1)
            tiles += 1
        else:
            step = skip(full, empty, step, BLOCKS, STAGES, CLUSTER)
        n += 1
        unit = hear_unit(queue, told, heard, n, 4)
    return n, unit
