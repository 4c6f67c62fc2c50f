"""Which kernels and tiles serve a call: a pure function from sizes to a frozen value.

Six paths, by how many rows an expert meets:

- dense:  few tokens. Every active expert's tile holds all tokens, those that did not choose it as zeros. In return there
  is no sort, and GEMM2 sums over the experts in its accumulator and writes the output itself.
- sorted: pairs sorted by expert, tiles of 16 to 64 pairs on the N side, weights on the M side; a combine sums rows.
- stream: dense or sorted in one persistent, warp-specialised kernel whose weights come by TMA: compute capability 9.0 only.
- wide:   pairs sorted by expert, 128 pairs on the M side.
- prefill: the same by the persistent, warp-specialised kernel of `blockmoe.operator.prefill`: compute capability 9.0 only.
- either: stream or prefill, as routing decides by its tiles, in one kernel (`ways`): where memory is HBM3e.

A plan depends on T only through powers of two and thresholds: the compiled variants are few (`plans`).

Times beside a choice are of whole calls of the headline geometry on an H100 unless said, the lesser of eager and graph; the runs are
in results/h100/operator, what was learnt in docs/kernel-log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from blockmoe.geometry import BLOCK, MoEGeometry
from blockmoe.operator.chunks import TOKEN_CHUNK, RouteTile, route_tile
from blockmoe.operator.machine import H100, Machine

Path = Literal["dense", "sorted", "stream", "wide", "prefill", "either"]

# A tile. T = 16 on an H200: 133.6 us, sorted 139.5 (12 experts); 168.0, 167.0 (15). On an H100, one consumer: 187.1, 186.8; 237.9, 228.0
STREAM_DENSE_TOKENS = 16
DENSE_TOKENS = 7  # elsewhere. T = 7: dense 115 us, the best sorted 116; T = 16: 209 and 203; T = 32: 271 and 247; T = 55: 444 and 352
WIDE_ROWS = 96  # mean rows an expert from which 128-row tiles win; at 28: sorted 574 us, wide 1018; at 128: 1032 and 996
# The same for prefill. On an H200, uniform routing, T = 130, 193, 256, 300, 448, 500: 344.7, 337.6, 348.0, 347.9, 348.9, 350.7 us; stream
# by tiles of 32 pairs 337.4, 331.4, 340.8, 342.2, 346.1, 348.4, of 64, in an earlier form, -, 335.9, 347.9, 350.3, 357.2, 354.7. Where all
# choose the same eight experts, T = 128, 256: 129, 182; by tiles of 32 206, 373. One expert, T = 128: 74; 59. (results/h200:
# operator/prefill-flight.txt; curve/fourth.jsonl, third.jsonl)
PREFILL_ROWS = 4
# Where memory is HBM3e, up to these mean rows a kernel has both ways: stream by tiles of 64 pairs, uniform routing, T = 256, 512, 1,024:
# 324, 327, 340 us, prefill 349, 351, 356 (curve/eighth.jsonl); 1,536, 1,700, 1,900: 343, 357, 384, prefill 361, 367, 380
# (operator/units.txt); 1,791: 372, 366 (curve/ninth.jsonl). An expert's tiles read its weights again and again: where all choose the same
# eight experts, T = 128, 256, 512: 154, 271, 516, prefill 124, 181, 300; where all choices are local, 331, 411, 608, prefill 360, 381, 472
# (curve/seventh-first.jsonl).
EITHER_ROWS = 54
MOST_TILES = 1.25  # of 64 pairs, of an expert that has any, on average: with more it is prefill, unless small ones do (`StreamTile.way`)
# Mean rows from which its programs are clusters. On an H200, uniform routing, T = 128, 200, 300, 500, 901, 2048, 3072, 4096: 326, 346,
# 348, 354, 365, 380, 424, 469 us, without 323, 344, 346, 351, 364, 379, 427, 491. Where all choose the same eight experts, whose tiles
# then share weights, T = 256: 178.5, 181.8; without 190.2, 187.3 (curve/fourth-first.jsonl, fourth.jsonl).
CLUSTER_ROWS = 8
# With this many tiles for each expert, or fewer, prefill waits for weights, and has three stages' hidden states on their way, else two. On
# an H200, T = 512, 901, 2048, 4096: 351.2, 364.1, 384.9, 461.6 us, always with two 357.2, 371.9, 393.8, 486.0; 6000 (two tiles): 563.0,
# 575.5 (582, 582 in two other calls); 8192 (three): 709.4, 703.8. All local, T = 4,096: 3,421 thousand cycles, with three 3,493
# (results/h200/operator/tiles.txt).
MEMORY_BOUND, FLIGHT = 2.25, 3
# With this many tiles for each expert, or fewer, and one for 32 tokens at most, GEMM2's rows that wait for a tile under way are added after
# the tile's others. On an H200, T = 1728, 2048, 3000, 4096: 371.9, 377.2, 394.4, 436.4 us, all together 375.8, 383.9, 408.4, 442.0; 6000
# (two tiles): 548.8, 541.5 (results/h200/operator/apart.txt, call 10)
ROWS_APART = 1.75
PREFILL_STAGES = 4  # of 48 KiB: shared memory holds no fifth
ROW_BUFFER = 128 << 20  # bytes of GEMM2 rows kept at a time: worst-case routing would fill 1.6 GB at T = 14,107


def tiles_of(pairs: Sequence[int], block_n: int) -> int:
    """How many of `block_n` pairs there are where each expert has so many."""
    return sum(-(-n // block_n) for n in pairs)


@dataclass(frozen=True)
class GateUpTile:
    """`block_i` intermediate columns (so 2·block_i weight rows) by `block_n` pairs; one scale a pair and tile."""

    block_i: int
    block_n: int
    stages: int
    num_warps: int

    def __post_init__(self) -> None:
        assert self.block_i in (32, 64, 128), "2·block_i rows fill wgmma's 64, and a tile stays in one scale block"
        assert self.block_n in (16, 32, 64, 128), "8 columns fall back to mma.sync in Triton 3.6"
        assert self.num_warps in (4, 8)


@dataclass(frozen=True)
class DownTile:
    """`block_m` rows of W2 by `block_n` pairs (tokens where dense); `split` programs share a dense row block."""

    block_m: int
    block_n: int
    stages: int
    num_warps: int
    split: int = 1

    def __post_init__(self) -> None:
        assert self.block_m in (64, 128), "wgmma's M, and a tile stays in one scale block"
        assert self.block_n in (16, 32, 64, 128)
        assert self.num_warps in (4, 8) and self.split >= 1


@dataclass(frozen=True)
class StreamTile:
    """Twice `rows` weight rows by `block_n` pairs; `stages` K blocks of 128 in shared memory, of which `flight` (None: all) may be on their
    way at once, or more where `dense` and few programs have units left.

    GEMM1: `rows` intermediate columns, one scale a pair and tile. GEMM2: 2 * `rows` output columns of a tile's pairs; where `dense`, a tile
    lists all tokens, and `rows` columns are summed over all experts (10 stages at most: a second consumer's sums lie beside them).
    `promotion`: bytes that the L2 reads at once (128 or 256). `burst`: K blocks of weights asked for together, 1 or 2.

    Where there are `small` tiles too, routing lists those if they are `few` at most, or one of an expert. With other stages they have other
    buffers, and code of their own; else those of the larger.
    """

    rows: int
    block_n: int
    stages: int
    promotion: int = 256
    dense: bool = False
    flight: int | None = None
    burst: int = 1
    small: StreamTile | None = None
    few: int = 0

    def __post_init__(self) -> None:
        assert self.rows == (64 if self.dense else 128), "of two boxes a stage, and each stays in one scale block"
        assert self.block_n in (16, 32, 64), "sums of more pairs find no registers"
        assert self.flight is None or 0 < self.flight <= self.stages
        assert self.burst in (1, 2) and self.burst <= (self.flight or self.stages)
        assert not self.dense or self.burst == 1, "a stage of dense GEMM2 is two K blocks already"
        assert not self.dense or self.block_n == 16, "sums of both consumers lie beside the stages"
        if self.small:
            as_small = dict(block_n=self.small.block_n, stages=self.small.stages, small=None, few=0)
            assert self.small.block_n < self.block_n and replace(self, **as_small) == self.small, "but for their sizes alike"

    def __str__(self) -> str:
        more = f" promoted {self.promotion}" if self.promotion != 128 else ""
        more += " by twos" if self.burst == 2 else ""
        more += f" {self.flight} in flight" if self.flight else ""
        more += " dense" if self.dense else ""
        stages = [f"x{t.block_n} {t.stages}s" for t in (self.small, self) if t]
        return f"{2 * self.rows}{' or '.join(stages)}{more}"

    @property
    def block_i(self) -> int:
        return self.rows

    @property
    def num_warps(self) -> int:
        return self.rows // 16

    @property
    def ways(self) -> tuple[StreamTile, ...]:
        return (self.small, replace(self, small=None, few=0)) if self.small else (self,)

    def way(self, pairs: Sequence[int]) -> StreamTile:
        """The tile where each expert has so many."""
        if self.small and tiles_of(pairs, self.small.block_n) > self.few and max(pairs) > self.small.block_n:
            return self.ways[-1]
        return self.ways[0]


@dataclass(frozen=True)
class PrefillTile:
    """128 pairs by 2 x 128 weight rows; `stages` K blocks in shared memory (GEMM2: one less), of which `flight` may have hidden states on
    their way, or 2 where there are more than `many` tiles (0: never); programs in clusters of `cluster`, 1 or 2, which share weights by
    multicast. With up to `apart` tiles, and one for 32 tokens, rows of GEMM2 that wait for a tile under way are told apart (0: never)."""

    stages: int
    cluster: int = 1
    flight: int = 2
    many: int = 0
    apart: int = 0
    block_i = block_n = BLOCK
    dense = False

    def __post_init__(self) -> None:
        assert self.stages >= 3, "finished rows wait in GEMM1's last stage, and GEMM2 pipelines the others"
        assert 2 <= self.flight < self.stages, "a consumer frees a stage when the next one is full, for which flight - 1 others are asked"
        assert self.cluster in (1, 2), "two programs; four were slower: T = 14107: 1473 us, two 1398"

    def __str__(self) -> str:
        more = f" (above {self.many} tiles 2)" if self.many else ""
        more += f", rows apart up to {self.apart}" if self.apart else ""
        more += f", clusters of {self.cluster}" if self.cluster > 1 else ""
        return f"128x256 {self.stages}s {self.flight} in flight{more}"


@dataclass(frozen=True)
class EitherTile:
    """Of a kernel that has both: `prefill` where `stream` has no small tiles for the routing, and of the others an expert has many."""

    stream: StreamTile
    prefill: PrefillTile
    block_i = BLOCK
    dense = False

    def __post_init__(self) -> None:
        assert self.stream.small

    def __str__(self) -> str:
        return f"{self.stream} or {self.prefill}"

    @property
    def ways(self) -> tuple[StreamTile | PrefillTile, ...]:
        return *self.stream.ways, self.prefill

    def way(self, pairs: Sequence[int]) -> StreamTile | PrefillTile:
        """The tile where each expert has so many."""
        found, most = self.stream.way(pairs), MOST_TILES * sum(n > 0 for n in pairs)
        return self.prefill if found == self.stream.ways[-1] and tiles_of(pairs, found.block_n) > most else found


WIDE = (GateUpTile(128, 128, 4, 8), DownTile(128, 128, 4, 8))  # T = 14107, stages: (4, 4) 2725 us, (4, 3) 2790, (3, 3) 2933
TILES = {"stream": StreamTile, "prefill": PrefillTile, "either": EitherTile}  # of the paths where one kernel does both GEMMs


@dataclass(frozen=True)
class Plan:
    """`down` is None where `gate_up` is the tile of a kernel that does both GEMMs."""

    path: Path
    route: RouteTile
    gate_up: GateUpTile | StreamTile | PrefillTile | EitherTile
    down: DownTile | None = None
    pdl: bool = True
    row_buffer: int = ROW_BUFFER

    def __post_init__(self) -> None:
        assert isinstance(self.gate_up, TILES.get(self.path, GateUpTile)) and (self.down is None) == (self.path in TILES)
        assert self.down is None or self.gate_up.block_n == self.down.block_n, "both GEMMs walk one tile list"
        assert self.path != "prefill" or not self.route.one_launch, "with two, tiles begin at multiples of 128"
        assert len(getattr(self.gate_up, "ways", (None,))) == 1 or not self.route.one_launch, "with two, routing says which way it is"
        assert self.path != "wide" or self.gate_up.block_i == self.gate_up.block_n == self.down.block_m == BLOCK

    @property
    def dense(self) -> bool:
        """Whether an active expert's tile lists all tokens."""
        return self.path == "dense" or (self.path == "stream" and self.gate_up.dense)

    @property
    def ways(self) -> tuple[Plan, ...]:
        """The plans of which routing chooses."""
        return tuple(map(self._by, getattr(self.gate_up, "ways", (self.gate_up,))))

    def way(self, pairs: Sequence[int]) -> Plan:
        """Which of the ways routing takes that gives each local expert so many pairs (of weight 0 none counts), as `place_kernel` finds."""
        return self._by(self.gate_up.way(pairs)) if len(self.ways) > 1 else self

    def _by(self, tile: GateUpTile | StreamTile | PrefillTile) -> Plan:
        return replace(self, path={StreamTile: "stream", PrefillTile: "prefill"}.get(type(tile), self.path), gate_up=tile)

    def __str__(self) -> str:
        g, d = self.gate_up, self.down
        if d is None:
            tiles = str(g)
        else:
            tiles = f"gate_up {2 * g.block_i}x{g.block_n} {g.stages}s {g.num_warps}w, "
            tiles += f"down {d.block_m}x{d.block_n} {d.stages}s {d.num_warps}w split {d.split}"
        route = f"route {self.route.block_t}t {self.route.num_warps}w in {1 if self.route.one_launch else 2}"
        return f"{self.path}: {route}, {tiles}{', pdl' if self.pdl else ''}"


def choose_plan(geometry: MoEGeometry, tokens: int, machine: Machine = H100, *, clusters: bool = True, tma: bool = True) -> Plan:
    """The plan for `tokens` tokens on such a GPU.

    `clusters`: whether the installed Triton is one whose PTX can be made to use them (`blockmoe.operator.ptx`). `tma`: whether it can read
    the tensors, which it can where they begin at a multiple of 16 bytes, and Triton compiles kernels that use it.
    """
    pdl = machine.capability >= 90
    route = route_tile(geometry, tokens, machine)
    persistent = machine.capability == 90 and tma and geometry.hidden_size % (2 * BLOCK) == 0  # units of GEMM2 are 256 columns wide
    if tokens <= DENSE_TOKENS and not persistent:
        return _dense(geometry, tokens, route, machine, pdl)
    rows = tokens * geometry.top_k / geometry.num_experts
    if rows >= PREFILL_ROWS and geometry.intermediate_size >= PREFILL_STAGES * BLOCK and persistent and not route.one_launch:
        cluster = 2 if clusters and _even(geometry) and geometry.hidden_size % (4 * BLOCK) == 0 else 1
        if machine.hbm3e and _even(geometry) and rows < EITHER_ROWS:
            stream = _stream(geometry, tokens, machine)
            if not stream.small:  # so few tokens that no expert has more than a tile of it
                return Plan("stream", route, stream, pdl=pdl)
            # with code of their own small tiles took 10 us more at T = 901, and 1.3 at 130 to 500: registers were spilled
            # (results/h200/operator/tiles.txt, call 2)
            stream = replace(stream, small=replace(stream.small, stages=stream.stages))
            # in clusters of 2: uniform routing, T = 130 to 1,600: -1.2 to +1.2 us; the same eight experts at 256, 512, 700, 1,024: 170,
            # 290, 406, 552, without 177, 298, 414, 565; all local at 512, 700, 1,024: 463, 549, 687; 477, 568, 713
            # (results/h200/operator/clusters.txt)
            return Plan("either", route, EitherTile(stream, PrefillTile(PREFILL_STAGES, cluster, FLIGHT)), pdl=pdl)
        # T = 14107: 1398 us in clusters of 2, 1475 without; 11948: 997, 1094; 3072: 593, 594
        cluster = cluster if rows >= CLUSTER_ROWS else 1
        many, apart = (int(each * geometry.num_local_experts) for each in (MEMORY_BOUND, ROWS_APART))
        return Plan("prefill", route, PrefillTile(PREFILL_STAGES, cluster, FLIGHT, many, apart), pdl=pdl)
    if rows >= WIDE_ROWS:
        return Plan("wide", route, *WIDE, pdl)
    if persistent:
        return Plan("stream", route, _stream(geometry, tokens, machine), pdl=pdl)
    if rows <= 6:
        # 3 and 4 stages of gate_up: T = 16: 206 us and 208; 32: 335 and 344; 55: 390 and 391; 80: 509 and 513
        return Plan("sorted", route, GateUpTile(64, 16, 3, 4), DownTile(64, 16, 5, 4), pdl)
    if rows <= 14:
        return Plan("sorted", route, GateUpTile(64, 32, 4, 4), DownTile(64, 32, 5, 4), pdl)
    block_n = 32 if rows <= 48 else 64  # at 28 (T = 901): 586 us and 602; between it and 128 nothing is measured
    return Plan("sorted", route, _tall(block_n, machine), DownTile(128, block_n, 4, 4), pdl)


def _even(geometry: MoEGeometry) -> bool:
    """Whether GEMM2's K blocks come in twos."""
    return geometry.intermediate_size % (2 * BLOCK) == 0


def _stream(geometry: MoEGeometry, tokens: int, machine: Machine) -> StreamTile:
    """The tile for so many tokens: tall enough for skewed routing too, where that costs nothing under uniform routing."""
    even = _even(geometry)
    if machine.hbm3e:
        # On an H200, of whole calls (results/h200/operator/bursts.txt): T = 1, 7, 14, 15, 16: 0.5, 3.0, 6.1, 0.4, 6.3 us less than with 256
        # bytes and three in flight
        if tokens <= STREAM_DENSE_TOKENS and even:
            return StreamTile(64, 16, 10, promotion=128, dense=True, flight=4)
        # T = 32, 52, 59, 62, 80, 120: 6.6, 7.9, 7.8, 8.6, 14.3, 12.3 us less than with 256 bytes, one at a time, three in flight; with 128
        # bytes, one at a time, three in flight T = 32, 52, 59, 62, 80: 5.8, 4.6, 6.9, 4.7, 10.4. On an H100 256 bytes were the better: TMA
        # alone read W1 in 310 us, two at a time without in 317.
        small = StreamTile(128, 32, 6, promotion=128, burst=2) if even else StreamTile(128, 32, 6, promotion=128, flight=3)
    elif tokens <= STREAM_DENSE_TOKENS and even:
        # T = 1, 7, 14, 15: 54.6, 98.5, 169.5, 87.6 us; all stages in flight 57.7, 103.8, 174.8, 87.9. On an H200: 45.0, 76.8, 126.7, 69.7;
        # with two consumers, more stages for last units, and idle programs that let others draw 42.3 (by these alone), 72.4, 124.2, 63.4
        return StreamTile(64, 16, 10, dense=True, flight=3)
    else:
        # T = 55, 80: 340.3, 469.1 us; 128x16 341.0, 469.2; 256x16 340.5, 470.0. T = 128: 446.6, 128x16 446.5; all on the same eight
        # experts: 201.7, 413.6
        # With 6 stages, 3 of them in flight (and the last sum in two column groups) T = 16, 32, 80: 185.9, 298.9, 472.0; with 5, all in
        # flight (and one), 188.6, 302.6, 473.9
        small = StreamTile(128, 32, 6, flight=3)
    if tokens <= small.block_n:  # no expert has more
        return small
    # On an H200, beside tiles of 32 alone: T = 52, 80: 0, +0.1 us; all on the same eight experts at 64, 100: -17.5, -34.4; one at 64: +0.1.
    # By tiles of 64 alone +2.2, -0.2; -20.4, -37.0; +2.2 (results/h200/operator/tiles.txt, calls 2 and 1)
    # few: so that each program has a unit of GEMM1 at most, 8 of the headline geometry, of which one expert was measured. T = 128, 256: 60,
    # 66 us; by tiles of 64 pairs 71, 74; prefill 72, 73 (results/h200/curve/tenth.jsonl)
    few = machine.sm_count // (geometry.intermediate_size // BLOCK)
    return replace(small, block_n=64, stages=5, small=small, few=few)


def _dense(geometry: MoEGeometry, tokens: int, route: RouteTile, machine: Machine, pdl: bool) -> Plan:
    # With 128 columns GEMM2's accumulator holds one column a token, with 64 two, but GEMM1 has half the programs:
    # 6 active experts: 114.5 us with 128 (96 programs), 118.0 with 64; 3: 66.4 (48 programs) and 64.6. 6 stages beat 4.
    pairs = tokens * geometry.top_k * geometry.num_local_experts / geometry.num_experts
    wide = pairs * (geometry.intermediate_size // BLOCK) >= machine.sm_count / 2
    gate_up = _tall(16, machine) if wide else GateUpTile(64, 16, 6, 4)
    # A program a row block where those nearly fill the SMs (112 of 132 at H = 7168); else several share one.
    row_blocks = geometry.hidden_size // 64
    split = 1 if row_blocks >= 0.75 * machine.sm_count else min(8, max(1, round(2 * machine.sm_count / row_blocks)))
    return Plan("dense", route, gate_up, DownTile(64, 16, 8, 4, split), pdl)


def _tall(block_n: int, machine: Machine) -> GateUpTile:
    """2 x 128 weight rows by `block_n` pairs, in 4 stages, or as many as shared memory holds: Triton keeps a K block less."""
    return GateUpTile(128, block_n, min(4, 1 + machine.shared // (BLOCK * (2 * BLOCK + block_n))), 8)


def plans(geometry: MoEGeometry, machine: Machine = H100, *, clusters: bool = True, tma: bool = True) -> list[Plan]:
    """The plans of many a T, a sixty-fourth of it apart, which between them have all kernels that some T gets: what a warm-up compiles."""
    found: dict[Plan, None] = {}
    tokens = 1
    while tokens <= TOKEN_CHUNK:
        found[choose_plan(geometry, tokens, machine, clusters=clusters, tma=tma)] = None
        tokens += max(1, tokens // 64)
    return list(found)
