"""Units of the prefill engine: how many there are, which tile and columns one is, and how a cluster comes by its next.

One ticket deals out all units in ascending order, GEMM1's before GEMM2's: a cluster that is done takes the next, so that all end within a
unit of each other, though a unit of 64 pairs takes half the time of one of 128. A warp of the cluster's first program draws, and tells the
other roles; that of the second reads what the first has drawn in `mail`, MAIL slots a cluster, so that both have the same units in the
same order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockmoe.geometry import BLOCK
from blockmoe.operator.persistent import GENERIC, QUEUE, barrier, hear, tell, wait_until
from blockmoe.operator.workspace import MAIL_SLOTS

K = gl.constexpr(BLOCK)  # columns of K a stage, of the intermediate a unit; of the output a unit has twice as many
MAIL = gl.constexpr(MAIL_SLOTS)
THERE = gl.constexpr(QUEUE.value + 1)  # `rows_there`
DOWN, END = gl.constexpr(1), gl.constexpr(2)  # kinds: 0 a unit of GEMM1, DOWN one of GEMM2, END none
# Of a unit as roles hear of it: its kind, tile, column tile, whether paired; of the tile its first pair, the one past its last, its expert
WORDS = gl.constexpr(7)
# Tiles of an expert that go through all columns before its others begin: their hidden states, 14.7 MB at a hidden size of 7,168, stay in
# the L2 meanwhile, beside an expert's weights.
TILES_AT_ONCE = gl.constexpr(16)


@gluon.jit
def unit_at(unit, tile_group, COLUMNS: gl.constexpr, CLUSTER: gl.constexpr):
    """The tile and column tile of this program's part of a unit, and whether its cluster has two tiles and one column tile (paired: 1).

    An expert has as many units as tiles in every CLUSTER column tiles. These stand side by side, TILES_AT_ONCE at most, since they read the
    same weights.
    """
    WIDTH: gl.constexpr = COLUMNS // CLUSTER
    group = gl.load(tile_group + unit // WIDTH)  # 4096 * the expert's first tile + its tiles
    first = group >> 12
    inside = unit - first * WIDTH
    before = inside // (TILES_AT_ONCE * WIDTH) * TILES_AT_ONCE
    tiles = gl.minimum((group & 4095) - before, TILES_AT_ONCE)
    first += before
    inside -= before * WIDTH
    column = inside // tiles * CLUSTER
    place = inside % tiles
    if CLUSTER == 1:
        return first + place, column, gl.to_tensor(0)
    else:
        rank = gl.program_id(0) % 2
        pairs = tiles // 2
        paired = gl.where(place < 2 * pairs, 1, 0)
        if paired > 0:
            column += place // pairs
            tile = first + place % pairs * 2 + rank
        else:
            column += rank
            tile = first + tiles - 1
        return tile, column, paired


@gluon.jit
def hear_unit(queue, told, heard, n, WARPS: gl.constexpr):
    """The nth unit told, for a role of WARPS warps: WORDS numbers."""
    return hear(queue, told, heard, n, WARPS, WORDS)


@gluon.jit
def wait_until_finished(finished, tile, INTER: gl.constexpr):
    """One warp: a tile's rows of the intermediate are there, of all its units of GEMM1."""
    zeros = gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    wait_until(finished + tile + zeros, zeros + INTER // K, zeros + 100, GENERIC)


@gluon.jit
def rows_there():
    """Barriers that say of GEMM2's units, in turn, that their tile's rows of the intermediate are there. When one is arrived at again, all
    roles have heard of the unit behind the one it was about, so none waits for that any more."""
    there = gl.allocate_shared_memory(gl.int64, [THERE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(THERE):
        mbarrier.init(there.index(i), count=1)
    return there


@gluon.jit
def wait_for_rows(there, n):
    """Of this program's nth unit of GEMM2."""
    mbarrier.wait(there.index(n % THERE), (n // THERE) & 1)


@gluon.jit
def draw(
    ticket, mail, queue, told, heard, wanted, there, finished, tile_count, tile_expert, tile_group, tile_begin, tile_end,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """One warp: tells this program's roles every unit, then END; of a unit of GEMM2 also when its rows are `there`.

    A unit is drawn when EARLY_1 or EARLY_2 K blocks of the one before it are left to be asked for, or all (`wanted`): early enough to be
    known in time, and late enough to even out what units cost. tile_count tiles have INTER / K / CLUSTER units of GEMM1 each, HIDDEN /
    (2 * K) / CLUSTER of GEMM2.

    mail [clusters, MAIL] begins at 0 and holds units plus one. A slot's new value is larger than the last one read: units ascend. It
    is not overwritten unread: the first program asks for nothing of a unit before the cluster's consumers have freed nearly all
    stages of the last, so that it is at most three units ahead here.
    """
    tiles = gl.load(tile_count)
    units_1 = tiles * (INTER // K // CLUSTER)
    units = units_1 + tiles * (HIDDEN // (2 * K) // CLUSTER)
    slots = mail + gl.program_id(0) // CLUSTER * MAIL
    unit = gl.to_tensor(-1)
    n = 0
    downs = gl.to_tensor(0)
    kind = gl.to_tensor(0)
    while kind < END:  # the first is drawn before it is known how many there are
        mbarrier.wait(wanted.index(0), (n & 1) ^ 1)
        if gl.program_id(0) % CLUSTER == 0:
            unit = gl.atomic_add(ticket, 1, sem="relaxed")
            if CLUSTER > 1:
                gl.atomic_xchg(slots + n % MAIL, unit + 1, sem="relaxed")
        else:
            unit = wait_until(slots + n % MAIL, unit + 2, 50, GENERIC) - 1
        kind = gl.where(unit < units_1, 0, gl.where(unit < units, DOWN, END))
        tile = gl.to_tensor(0)
        column = gl.to_tensor(0)
        paired = gl.to_tensor(0)
        if unit < units_1:
            tile, column, paired = unit_at(unit, tile_group, INTER // K, CLUSTER)
        elif unit < units:
            tile, column, paired = unit_at(unit - units_1, tile_group, HIDDEN // (2 * K), CLUSTER)
        left = unit < units
        begin = gl.load(tile_begin + tile, mask=left, other=0)
        end = gl.load(tile_end + tile, mask=left, other=0)
        expert = gl.load(tile_expert + tile, mask=left, other=0)
        tell(queue, told, heard, n, (kind, tile, column, paired, begin, end, expert))
        if kind == DOWN:
            wait_until_finished(finished, tile, INTER)
            barrier()
            mbarrier.arrive(there.index(downs % THERE), count=1)
            downs += 1
        n += 1
