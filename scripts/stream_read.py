"""TMA alone, for gpu_stream.py: the streaming kernels' weights producer and a consumer that only frees what arrives."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.stream import weight_boxes, weights_producer


@gluon.jit
def freeing_consumer(full, empty, tile_count, blocks, KBLOCKS: gl.constexpr, STAGES: gl.constexpr):
    it = 0
    for _ in range(gl.program_id(0), gl.load(tile_count) * blocks, gl.num_programs(0)):
        for _ in range(KBLOCKS):
            mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
            mbarrier.arrive(empty.index(it % STAGES), count=1)
            it += 1


@gluon.jit(do_not_specialize=["blocks"])
def read_weights_kernel(
    w, tile_count, tile_expert, blocks,
    ROWS: gl.constexpr, STEP: gl.constexpr, OTHER: gl.constexpr, EXPERT_ROWS: gl.constexpr, KBLOCKS: gl.constexpr,
    STAGES: gl.constexpr, BURST: gl.constexpr,
):  # fmt: skip
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    w_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, 128], CODES)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (freeing_consumer, (full, empty, tile_count, blocks, KBLOCKS, STAGES)),
            (weights_producer, (
                w, w_bufs, full, empty, tile_count, tile_expert, 0, blocks, ROWS, STEP, OTHER, EXPERT_ROWS, KBLOCKS, STAGES, BURST,
            )),
        ],
        [1],
        [56],
    )  # fmt: skip


def read_weights(g, which: int, shape, tile, programs: int) -> Launch:
    """All rows of the listed experts of W1 (0) or W2 (1), [experts, rows, K]; tensors: the weights, tile_count, tile_expert."""
    rows = tile.rows
    weights = weight_boxes(Slot(0, torch.float8_e4m3fn), shape[0] * shape[1], shape[2], tile)
    slots = (Slot(1, torch.int32), Slot(2, torch.int32))
    if which == 0:
        blocks, *constants = (g.intermediate_size // rows, rows, rows, g.intermediate_size, 2 * g.intermediate_size, g.hidden_size // 128)
    else:
        blocks, *constants = (g.hidden_size // (2 * rows), rows, 2 * rows, rows, g.hidden_size, g.intermediate_size // 128)
    constants = (*constants, tile.stages, tile.burst)
    return Launch(read_weights_kernel, programs, slots, (blocks,), constants, 4, False, (weights,))
