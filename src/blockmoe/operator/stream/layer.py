"""The streaming kernel: both GEMMs and the output's last sum in one launch, and its roles one after the other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from blockmoe.geometry import BLOCK, MoEGeometry
from blockmoe.operator.launch import Descriptor, Launch, Slot, descriptor
from blockmoe.operator.lists import LISTS
from blockmoe.operator.persistent import unit_queue
from blockmoe.operator.plan import StreamTile
from blockmoe.operator.stream.compute import consumer
from blockmoe.operator.stream.load import pairs_producer, weights_producer
from blockmoe.operator.stream.sums import STORED, teller
from blockmoe.operator.stream.units import SPLIT_TILES, WORDS
from blockmoe.operator.workspace import MOST_PROGRAMS, SPLIT_PAIRS, Round

REGISTERS = 56  # a thread of the producers
SECOND_REGISTERS = gl.constexpr(168)  # a thread of the second consumer, where there is one
CONSUMER_REGISTERS = gl.constexpr(208)  # of the consumer, where it is not the program's first warps
WEIGHT_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def stage_buffers(ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr):
    """Buffers of weights, pairs and both kinds of scales."""
    CODES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    X_BUFS: gl.constexpr = 2 if DENSE else 1
    w_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, 128], CODES)
    x_bufs = gl.allocate_shared_memory(gl.float8e4nv, [X_BUFS * STAGES, N, 128], CODES)
    s_bufs = gl.allocate_shared_memory(gl.float32, [X_BUFS * (128 // ROWS) * STAGES, N], VECTOR)
    w_s_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1], VECTOR)
    return w_bufs, x_bufs, s_bufs, w_s_bufs


@gluon.jit
def stage_barriers(STAGES: gl.constexpr, GATHERERS: gl.constexpr):
    """Barriers of stages whose weights and whose pairs are there, and of empty ones."""
    asked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(asked.index(i), count=1)
        mbarrier.init(full.index(i), count=32 * GATHERERS)
        mbarrier.init(empty.index(i), count=1)
    return asked, full, empty


@gluon.jit
def place_of_sums(ROWS: gl.constexpr, N: gl.constexpr):
    """Where a second consumer leaves a unit's sums for the first, and barriers that say that they are there, and that they were read."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    other = gl.allocate_shared_memory(gl.float32, [2, ROWS, N], LAYOUT)
    given = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(given.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    return other, given, taken


@gluon.jit
def meeting_places(ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr, GATHERERS: gl.constexpr):
    """Where a program's roles meet: barriers of stages, units, and a second consumer's sums (DENSE) or what is stored.

    None that nobody uses: the compiler would give its memory to a buffer too, which the barrier, never invalidated, then spoils.
    """
    stages = stage_barriers(STAGES, GATHERERS)
    units = unit_queue(3, WORDS)  # for all roles but the one that draws: consumer and gatherers, with a second consumer or the teller
    if DENSE:
        return stages, units, place_of_sums(ROWS, N)
    else:
        stored = gl.allocate_shared_memory(gl.int64, [STORED, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STORED):
            mbarrier.init(stored.index(i), count=1)
        return stages, units, stored


@gluon.jit
def invalidate(barriers):
    COUNT: gl.constexpr = barriers.shape[0]
    for i in gl.static_range(COUNT):
        mbarrier.invalidate(barriers.index(i))


@gluon.jit
def give_up(places):
    """Of places where nobody has met (not DENSE). In a branch that may come here the compiler leaves their memory to these barriers."""
    stages, units, stored = places
    barriers = (stages[0], stages[1], stages[2], units[1], units[2], stored)
    for kind in gl.static_range(len(barriers)):
        invalidate(barriers[kind])


@gluon.jit
def streams(
    way, places, w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, lists, slots, counters, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SMALL_N: gl.constexpr, SMALL_STAGES: gl.constexpr, SPLIT: gl.constexpr, DENSE: gl.constexpr, FLIGHT: gl.constexpr,
    BURST: gl.constexpr, REGISTERS: gl.constexpr, WARPS: gl.constexpr, GATHERERS: gl.constexpr,
):  # fmt: skip
    """`stream` by tiles of N pairs, or, where SMALL_N, of so many if `way` is 0."""
    if SMALL_N > 0 and way == 0:
        stream(
            places, w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, lists, slots, counters, tokens,
            HIDDEN, INTER, TOP_K, ROWS, SMALL_N, SMALL_STAGES, SPLIT, DENSE, FLIGHT, BURST, REGISTERS, WARPS, GATHERERS,
        )  # fmt: skip
    else:
        stream(
            places, w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, lists, slots, counters, tokens,
            HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SPLIT if SMALL_N == 0 else 1, DENSE, FLIGHT, BURST, REGISTERS, WARPS, GATHERERS,
        )  # fmt: skip


@gluon.jit
def stream(
    places, w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, lists, slots, counters, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, DENSE: gl.constexpr, FLIGHT: gl.constexpr, BURST: gl.constexpr, REGISTERS: gl.constexpr, WARPS: gl.constexpr,
    GATHERERS: gl.constexpr,
):  # fmt: skip
    """The layer after routing, by all roles: `stream_kernel`. GATHERERS: warps that gather pairs; four are the program's first ones."""
    IN_FLIGHT: gl.constexpr = FLIGHT if FLIGHT > 0 else STAGES
    stages, units, between = places  # `between`: consumers, or the consumer and the teller
    asked, full, empty = stages
    queue, told, heard = units
    w_bufs, x_bufs, s_bufs, w_s_bufs = stage_buffers(ROWS, N, STAGES, DENSE)
    tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight = lists
    ticket, part, finished, written, summed = counters
    multiplied = (
        between, (w_bufs, x_bufs, s_bufs, w_s_bufs, asked, full, empty), queue, told, heard, middle, middle_scale, rows, out,
        finished, written, summed, partial, tile_count, tile_end, pair_weight, slots, tokens,
    )  # fmt: skip
    weights = (w1, w2, w_bufs, asked, empty, queue, told, heard, ticket, part, lists, slots[3], tokens)
    pairs = (
        x, x_scale, w1_scale, middle, middle_scale, w2_scale, x_bufs, s_bufs, w_s_bufs, full, empty, queue, told, heard, finished,
        lists, tokens,
    )  # fmt: skip
    said = (between, queue, told, heard, finished, written, summed, tile_count)
    if DENSE:
        gl.warp_specialize(
            [
                (consumer, (0, multiplied, HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SPLIT, DENSE, WARPS)),
                (consumer, (1, multiplied, HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SPLIT, DENSE, WARPS)),
                (weights_producer, (weights, HIDDEN, INTER, ROWS, N, STAGES, SPLIT, DENSE, IN_FLIGHT, BURST)),
                (pairs_producer, (pairs, HIDDEN, INTER, ROWS, N, STAGES, SPLIT, DENSE, GATHERERS)),
            ],
            [WARPS, 1, GATHERERS],
            [SECOND_REGISTERS, REGISTERS, REGISTERS],
        )
    elif GATHERERS == 4:
        gl.warp_specialize(
            [
                (pairs_producer, (pairs, HIDDEN, INTER, ROWS, N, STAGES, SPLIT, DENSE, GATHERERS)),
                (consumer, (0, multiplied, HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SPLIT, DENSE, WARPS)),
                (weights_producer, (weights, HIDDEN, INTER, ROWS, N, STAGES, SPLIT, DENSE, IN_FLIGHT, BURST)),
                (teller, (said, HIDDEN, INTER, ROWS, SPLIT)),
            ],
            [WARPS, 1, 1],
            [CONSUMER_REGISTERS, REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, multiplied, HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SPLIT, DENSE, WARPS)),
                (weights_producer, (weights, HIDDEN, INTER, ROWS, N, STAGES, SPLIT, DENSE, IN_FLIGHT, BURST)),
                (pairs_producer, (pairs, HIDDEN, INTER, ROWS, N, STAGES, SPLIT, DENSE, GATHERERS)),
                (teller, (said, HIDDEN, INTER, ROWS, SPLIT)),
            ],
            [1, GATHERERS, 1],
            [REGISTERS, REGISTERS, REGISTERS],
        )


@gluon.jit(do_not_specialize=["tokens"])
def stream_kernel(
    w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, tile_count, tile_expert, tile_group, tile_begin,
    tile_end, pair_token, pair_weight, token_pair, token_pairs, slot_token, slot_count, way, ticket, part, finished, written, summed,
    tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SMALL_N: gl.constexpr, SMALL_STAGES: gl.constexpr, SPLIT: gl.constexpr, DENSE: gl.constexpr, FLIGHT: gl.constexpr,
    BURST: gl.constexpr, REGISTERS: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The layer after routing.

    GEMM1: middle[p, i] = silu(gate) * up as e4m3, middle_scale[p, i / ROWS] its scale times the pair's routing weight. GEMM2: out[t, h]
    in bfloat16; the sum over a token's pairs in float32, of products where DENSE, else of `rows` [pairs, H] in bfloat16.

    Descriptors: w1 [L * 2 I, H], w2 [L * H, I]. x [T, H]; x_scale [H / 128, T]. ticket, part, finished [tiles], written [2] and summed
    [programs] begin at 0. partial: float32 sums of shares of GEMM1's K. Where SMALL_N, tiles have so many pairs if `way` is 0.
    """
    GATHERERS: gl.constexpr = 1 if DENSE else 2  # warps: of 64 pairs one would hold more addresses than registers
    places = meeting_places(ROWS, N, max(STAGES, SMALL_STAGES), DENSE, GATHERERS)
    if PDL:
        gdc_wait()
    lists = (tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight)
    slots = (token_pair, token_pairs, slot_token, slot_count)
    counters = (ticket, part, finished, written, summed)
    taken = gl.load(way) if SMALL_N > 0 else 0
    streams(
        taken, places, w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, lists, slots, counters, tokens,
        HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SMALL_N, SMALL_STAGES, SPLIT, DENSE, FLIGHT, BURST, REGISTERS, WARPS, GATHERERS,
    )  # fmt: skip


def boxes_of(w1: Slot, w2: Slot, tile: StreamTile, round: Round) -> tuple[Descriptor, ...]:
    """What TMA loads: w1, w2."""
    g, box = round.geometry, (tile.rows, BLOCK)
    first = (g.num_local_experts * 2 * g.intermediate_size, g.hidden_size), (g.num_local_experts * g.hidden_size, g.intermediate_size)
    return tuple(descriptor(w, shape, box, WEIGHT_LAYOUT, tile.promotion) for w, shape in zip((w1, w2), first, strict=True))


def split_of(tile: StreamTile, geometry: MoEGeometry) -> int:
    """By how many units the K blocks of one of GEMM1 may be shared: each has four at least, before the last of which the next is drawn."""
    blocks = geometry.hidden_size // BLOCK
    apart = tile.small and tile.small.stages != tile.stages  # small tiles have code of their own, which alone may split
    if tile.block_n > SPLIT_PAIRS and not apart and not (tile.small and tile.few >= 2 * SPLIT_TILES.value):  # large ones may be few
        return 1
    return next((split for split in (4, 2) if blocks % (split * tile.burst) == 0 and blocks // split >= 4), 1)


def constants_of(tile: StreamTile, round: Round) -> tuple:
    """The kernel's but the last three."""
    g = round.geometry
    assert g.hidden_size % (tile.rows if tile.dense else 2 * tile.rows) == 0, "a unit's columns of the output"
    assert not tile.dense or g.intermediate_size % (2 * BLOCK) == 0, "a stage is two K blocks of GEMM2"
    assert g.hidden_size % (tile.burst * BLOCK) == 0 == g.intermediate_size % (tile.burst * BLOCK), "K blocks that are asked for together"
    small = (tile.small.block_n, tile.small.stages) if tile.small and tile.small.stages != tile.stages else (0, 0)
    sizes = (g.hidden_size, g.intermediate_size, g.top_k, tile.rows, tile.block_n, tile.stages, *small)
    return (*sizes, split_of(tile, g), tile.dense, tile.flight or 0, tile.burst)


def layer(x: Slot, x_scale: Slot, w1: Slot, w1_scale: Slot, w2: Slot, w2_scale: Slot, out: Slot, round: Round) -> list[Launch]:
    """Both GEMMs, SwiGLU and the output's last sum."""
    assert round.sm_count <= MOST_PROGRAMS, "counters and partial sums are of so many"
    tile, b = round.plan.gate_up, round.memory
    lists = (*(b[n] for n in LISTS), round.way_taken, *(b[n] for n in ("ticket", "part", "finished", "written", "summed")))
    inputs = (x, x_scale, w1_scale, w2_scale, b["middle"], b["middle_scale"], b["partial"], out if tile.dense else b["rows"], out)
    arguments = (*boxes_of(w1, w2, tile, round), *inputs, *lists, round.sizes.tokens)
    constants = (*constants_of(tile, round), REGISTERS, tile.num_warps, round.plan.pdl)
    return [round.launch(stream_kernel, round.sm_count, arguments, constants, tile.num_warps)]
