"""GEMM1 in the prefill kernel: hidden states gathered by token, SwiGLU and quantisation in the epilogue.

Hopper's TMA can't gather rows by token. Four warps do, by cp.async, straight into the stages; their scales too. `finished` counts consumers
that are done with a unit of a tile, its rows of the intermediate stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from blockmoe.operator.persistent import barrier
from blockmoe.operator.prefill.parts import PAIRS, ROWS, SUMS, multiply, skip
from blockmoe.operator.prefill.units import DOWN, K, hear_unit


@gluon.jit
def gather(
    x, x_scale, x_buffers, s_buffers, full, empty, queue, told, heard, pair_token, tokens, HIDDEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: 128 bytes of each pair's row, and its scale, a stage. Returns the number of the next unit, and that.

    A stage is said to be full when the one after it has been asked for: these warps wait for their copies and set the fence behind which
    wgmma sees them, which the consumers would otherwise do between products (26 us at T = 14107).
    """
    X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BLOCKS: gl.constexpr = HIDDEN // K
    scales = s_buffers._reinterpret(gl.float32, [STAGES, 2 * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, X)), 0)
    step = gl.to_tensor(0)
    n = gl.to_tensor(0)
    unit = hear_unit(queue, told, heard, n, 4)
    while unit[0] < DOWN:
        _, _, _, _, begin, end, _ = unit
        row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, X))
        there_0 = row < end
        there_1 = row + ROWS < end
        at_0 = x + gl.expand_dims(gl.load(pair_token + row, mask=there_0, other=0) * HIDDEN, 1) + k
        at_1 = x + gl.expand_dims(gl.load(pair_token + (row + ROWS), mask=there_1, other=0) * HIDDEN, 1) + k
        line = begin + gl.arange(0, 2 * ROWS, layout=ONE_EACH)
        at_scale = x_scale + gl.load(pair_token + line, mask=line < end, other=0)
        for block in range(BLOCKS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(x_buffers.index(2 * stage), at_0, mask=gl.expand_dims(there_0, 1))
            if begin + ROWS < end:
                async_copy.async_copy_global_to_shared(x_buffers.index(2 * stage + 1), at_1, mask=gl.expand_dims(there_1, 1))
            async_copy.async_copy_global_to_shared(scales.index(stage), at_scale, mask=line < end)
            async_copy.commit_group()
            if block > 0:
                async_copy.wait_group(1)
                gathered(full, step - 1, STAGES)
            at_0 += K
            at_1 += K
            at_scale += tokens
            step += 1
        async_copy.wait_group(0)
        gathered(full, step - 1, STAGES)
        n += 1
        unit = hear_unit(queue, told, heard, n, 4)
    return n, unit


@gluon.jit
def gathered(full, step, STAGES: gl.constexpr):
    fence_async_shared()
    mbarrier.arrive(full.index(step % STAGES), count=PAIRS)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def stored(finished, pending):
    """The TMA store of this consumer's last unit, one of tile `pending` (-1: none), is complete, and said to be."""
    WAIT: gl.constexpr = "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(WAIT, "=r,r", [pending], dtype=gl.int32, is_pure=False, pack=1)
    barrier()
    if pending >= 0:
        gl.atomic_add(finished + pending, 1, sem="release")


@gluon.jit
def gate_up_consumer(
    GROUP: gl.constexpr, middle, out_buffers, x_buffers, w_buffers, s_buffers, full, empty, queue, told, heard, w_scale, pair_weight,
    middle_scale, finished, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Four warps: pairs GROUP * 64 ... of each tile. Returns the number of the next unit, and that."""
    BLOCKS: gl.constexpr = HIDDEN // K
    COLUMNS: gl.constexpr = INTER // K
    step = gl.to_tensor(0)
    pending = gl.to_tensor(-1)
    n = gl.to_tensor(0)
    unit = hear_unit(queue, told, heard, n, 4)
    while unit[0] < DOWN:
        _, tile, column, _, first, end, expert = unit
        begin = first + GROUP * ROWS
        if begin < end:
            up_scale = w_scale + (expert * (2 * COLUMNS) + column) * BLOCKS
            up, gate, step = multiply(
                GROUP, x_buffers, w_buffers, s_buffers, full, empty, step, up_scale, up_scale + COLUMNS * BLOCKS,
                gl.where(first + ROWS < end, 1, 0), BLOCKS, STAGES, CLUSTER,
            )  # fmt: skip
            row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            weight = gl.load(pair_weight + row, mask=row < end, other=0.0)
            value = gate * reciprocal(1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            scale = gl.maximum(gl.max(gl.abs(value), 1), 1e-34) * (1.0 / 448.0)
            codes = (value * gl.expand_dims(1.0 / scale, 1)).to(gl.float8e4nv)
            stored(finished, pending)
            out = out_buffers.index(GROUP)
            out.store(codes)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(middle, [begin, column * K], out)
            gl.store(middle_scale + column * pitch + row, scale * weight)
            pending = tile
        else:
            step = skip(full, empty, step, BLOCKS, STAGES, CLUSTER)
            gl.atomic_add(finished + tile, 1, sem="relaxed")
        n += 1
        unit = hear_unit(queue, told, heard, n, 4)
    stored(finished, pending)
    return n, unit
