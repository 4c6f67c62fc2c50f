"""The producers of the streaming kernels (`blockmoe.operator.stream`): warps that fill stages of shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def weights_producer(
    w, w_bufs, full, empty, tile_count, tile_expert, first_row, blocks,
    ROWS: gl.constexpr, BLOCK_STEP: gl.constexpr, OTHER_HALF: gl.constexpr, EXPERT_ROWS: gl.constexpr, KBLOCKS: gl.constexpr,
    STAGES: gl.constexpr, BURST: gl.constexpr,
):  # fmt: skip
    tiles = gl.load(tile_count)
    it = 0
    for unit in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        # tiles of one expert side by side: they share the weights in L2
        row = gl.load(tile_expert + unit % tiles) * EXPERT_ROWS + first_row + (unit // tiles) * BLOCK_STEP
        for k in range(0, KBLOCKS, BURST):
            for j in gl.static_range(BURST):
                at = (it + j) % STAGES
                mbarrier.wait(empty.index(at), (((it + j) // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(at), 2 * ROWS * 128)
            for half in gl.static_range(2):
                for j in gl.static_range(BURST):
                    at = (it + j) % STAGES
                    coordinates = [row + half * OTHER_HALF, (k + j) * 128]
                    tma.async_copy_global_to_shared(w, coordinates, full.index(at), w_bufs.index(2 * at + half))
            it += BURST


@gluon.jit
def pairs_at(
    x, x_scale, begin, end, pair_token,
    N: gl.constexpr, KBLOCKS: gl.constexpr, PARTS: gl.constexpr, GATHER: gl.constexpr, X: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Where the rows and the scales of N pairs from `begin` on begin, and which there are."""
    line = begin + gl.arange(0, N, layout=gl.SliceLayout(1, X))
    s_line = begin + gl.arange(0, N, layout=V)
    inside = gl.expand_dims(line < end, 1)
    s_inside = s_line < end
    if GATHER:
        line = gl.load(pair_token + line, mask=line < end, other=0)
        s_line = gl.load(pair_token + s_line, mask=s_inside, other=0)
        s_at = x_scale + s_line
    else:
        s_at = x_scale + s_line * (KBLOCKS * PARTS)
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, X))
    x_at = x + gl.expand_dims(line * (KBLOCKS * 128), 1) + gl.expand_dims(k, 0)
    return x_at, s_at, inside, s_inside


@gluon.jit
def pairs_producer(
    x, x_scale, w_scale, x_bufs, s_bufs, w_s_bufs, full, empty, tile_count, tile_expert, tile_begin, tile_end, pair_token,
    tokens, first_row, blocks,
    N: gl.constexpr, BLOCK_STEP: gl.constexpr, OTHER_HALF: gl.constexpr, EXPERT_ROWS: gl.constexpr, KBLOCKS: gl.constexpr,
    PARTS: gl.constexpr, GATHER: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [1, 1], [1, 0])
    V: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if PDL and not GATHER:
        gdc_wait()  # GEMM1's intermediate
        gdc_launch_dependents()
    tiles = gl.load(tile_count)
    it = 0
    for unit in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile = unit % tiles
        begin = gl.load(tile_begin + tile)
        end = gl.load(tile_end + tile)
        row = gl.load(tile_expert + tile) * EXPERT_ROWS + first_row + (unit // tiles) * BLOCK_STEP
        w_s_at = w_scale + (row // 128) * KBLOCKS + gl.arange(0, 1, layout=V)
        w_s_other = w_scale + ((row + OTHER_HALF) // 128) * KBLOCKS + gl.arange(0, 1, layout=V)
        x_at, s_at, inside, s_inside = pairs_at(x, x_scale, begin, end, pair_token, N, KBLOCKS, PARTS, GATHER, X, V)
        for kb in range(KBLOCKS):
            at = it % STAGES
            mbarrier.wait(empty.index(at), ((it // STAGES) & 1) ^ 1)
            s_step = kb * tokens if GATHER else kb * PARTS
            async_copy.async_copy_global_to_shared(x_bufs.index(at), x_at + kb * 128, mask=inside)
            for part in gl.static_range(PARTS):
                async_copy.async_copy_global_to_shared(s_bufs.index(PARTS * at + part), s_at + (s_step + part), mask=s_inside)
            async_copy.async_copy_global_to_shared(w_s_bufs.index(2 * at), w_s_at + kb)
            async_copy.async_copy_global_to_shared(w_s_bufs.index(2 * at + 1), w_s_other + kb)
            async_copy.mbarrier_arrive(full.index(at), increment_count=False)
            it += 1
