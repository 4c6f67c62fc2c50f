"""The units of the streaming kernel, and the parts of its last sum: which number stands for what."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockmoe.operator.workspace import SPLIT_PAIRS

RUN = gl.constexpr(512)  # columns of a token that the last sum adds at a time
END = gl.constexpr(1 << 30)  # told instead of a unit: there is none any more
# Told of a unit: its number, its tile and block of columns, the tile's first row and that behind its last, and its expert. Of parts of
# the output, and of END, the number alone; of GEMM2 where tokens are few (dense) the number and the block.
WORDS = gl.constexpr(6)
# The most tiles whose row blocks are split by K, and the most pairs of one. Of 64 pairs, which have no code for it, there are more tiles
# wherever a kernel splits (`layer.split_of`).
SPLIT_TILES, MOST_SPLIT = gl.constexpr(4), gl.constexpr(SPLIT_PAIRS)


@gluon.jit
def unit_at(unit, tile_group, BLOCKS, DENSE: gl.constexpr):
    """Tile and row block of a unit: an expert's units side by side, of those the tiles that share weights. Where DENSE it has one tile."""
    if DENSE:
        return unit // BLOCKS, unit % BLOCKS
    else:
        group = gl.load(tile_group + unit // BLOCKS)  # 4096 * the expert's first tile + its tiles
        first = group >> 12
        tiles = group & 4095
        inside = unit - first * BLOCKS
        return first + inside % tiles, inside // tiles


@gluon.jit
def blocks_before(tiles, BLOCKS: gl.constexpr):
    """Of BLOCKS column blocks those of the first of two column groups. Nothing hides the last group's sum; but programs that have no units
    left should find the first group's rows stored, so the last group has as many units as there are programs."""
    last = (gl.num_programs(0) + tiles - 1) // gl.maximum(tiles, 1)
    return BLOCKS - gl.maximum(gl.minimum(last, BLOCKS // 2), 1)


@gluon.jit
def second_unit(unit, tiles, tile_group, BLOCKS: gl.constexpr):
    """Tile and column block of a unit of GEMM2, the first 0: units of the first column group come first."""
    first = blocks_before(tiles, BLOCKS)
    group = gl.where(unit >= tiles * first, 1, 0)
    several = gl.where(group == 0, gl.maximum(first, 1), BLOCKS - first)
    tile, block = unit_at(unit - group * tiles * first, tile_group, several, False)
    return tile, block + group * first


@gluon.jit
def runs_of(blocks, ROWS: gl.constexpr):
    """Runs of RUN columns in so many column blocks."""
    return (blocks * (2 * ROWS) + RUN - 1) // RUN


@gluon.jit
def parts_drawn(some, tokens, tiles, BLOCKS: gl.constexpr, ROWS: gl.constexpr):
    """Parts that are zeros of all columns, for ROWS / 16 of the tokens without pairs, a warp each; and those of the first column group's
    sum, as many of the other tokens, `some`, by RUN columns."""
    WARPS: gl.constexpr = ROWS // 16
    sums = (some + WARPS - 1) // WARPS * runs_of(blocks_before(tiles, BLOCKS), ROWS)
    return (tokens - some + WARPS - 1) // WARPS, sums


@gluon.jit
def unit_counts(tile_count, HIDDEN: gl.constexpr, INTER: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr, DENSE: gl.constexpr):
    """How many tiles there are, by how many shares of K each row block of GEMM1 is units (their logarithm), and how many units there are of
    GEMM1, and of both GEMMs.

    A multiprocessor reads 80 GB a second at most: where row blocks are few, each is 2 or up to SPLIT units with as many shares of K. Where
    DENSE half of the programs are enough for the memory. (One expert, 1, 16, 17, 32, 64, 100, 128 tokens: 24.1, 25.3, 51.0, 50.0, 51.9,
    54.4, 57.9 us to 23.5, 24.8, 39.6, 40.5, 42.5, 45.1, 47.9; by half of the programs 64 and 100 to 45.3 and 55.8.)
    """
    OUT: gl.constexpr = HIDDEN // ROWS if DENSE else HIDDEN // (2 * ROWS)
    tiles = gl.load(tile_count)
    blocks = tiles * (INTER // ROWS)
    programs = gl.num_programs(0) // (2 if DENSE else 1)
    shares = gl.to_tensor(0)
    if SPLIT >= 2:
        shares = gl.where((2 * blocks <= programs) & (tiles <= SPLIT_TILES), 1, 0)
    if SPLIT >= 4:
        shares = gl.where((4 * blocks <= programs) & (tiles <= SPLIT_TILES), 2, shares)
    units_1 = blocks << shares
    return tiles, shares, units_1, units_1 + (OUT if DENSE else tiles * OUT)


@gluon.jit
def share_of(unit, shares):
    """Which share of K a unit of GEMM1 is; the last one's program adds the others' sums."""
    return unit & ((1 << shares) - 1)


@gluon.jit
def pairs_at(tile, tile_begin, tile_end, tokens, N: gl.constexpr, DENSE: gl.constexpr):
    """First row of a tile and that behind its last. Where DENSE tile t lists all tokens from row N * t on, which saves a read."""
    if DENSE:
        return tile * N, tile * N + tokens
    else:
        return gl.load(tile_begin + tile), gl.load(tile_end + tile)
