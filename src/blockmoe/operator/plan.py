"""Which kernels and tiles serve a call: a pure function from sizes to a frozen value.

Three paths, by how many rows an expert meets:

- dense:  few tokens. Every active expert's tile holds all tokens, those that did not choose it as zeros. The weights'
  one read decides the time, so the spare multiplications are free; in return there is no sort, GEMM2 sums over the
  experts in its accumulator and writes the output itself.
- sorted: pairs sorted by expert, tiles of 16 to 64 pairs on the N side, weights on the M side; a combine sums rows.
- wide:   pairs sorted by expert, 128 pairs on the M side.

A plan depends on T only through powers of two and thresholds: the compiled variants are few (`plans`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from blockmoe.geometry import BLOCK, MoEGeometry

Path = Literal["dense", "sorted", "wide"]

DENSE_TOKENS = 7  # T = 16, 12 active experts: sorted 203 us, the best dense 209; T = 32: 247 and 271; T = 55: 352 and 444
ONE_LAUNCH_TOKENS = 64  # up to it one program routes everything; above, the choice alone would take it longer than a launch
WIDE_ROWS = 96  # mean rows an expert from which 128-row tiles win; at 28 (T = 901) sorted 574 us, wide 1018
TOKEN_CHUNK = 16384  # more tokens run as several rounds, which bounds the workspace
MOST_CHUNKS = 128  # programs that sort; each reads the counts of all
ROW_BUFFER = 128 << 20  # bytes of GEMM2 rows kept at a time: worst-case routing would fill 1.6 GB at T = 14,107


def power_of_two_at_least(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RouteTile:
    """`block_t` tokens at a time are chosen for, a warp each where num_warps allows; `place_t` at a time are sorted."""

    block_t: int
    place_t: int
    num_warps: int
    one_launch: bool


@dataclass(frozen=True)
class GateUpTile:
    """`block_i` intermediate columns (so 2·block_i weight rows) by `block_n` pairs; one scale a pair and tile.

    `guess`: how many K blocks of its presumed weights a program asks for while routing still runs.
    """

    block_i: int
    block_n: int
    stages: int
    num_warps: int
    guess: int = 0

    def __post_init__(self) -> None:
        assert self.block_i in (32, 64, 128), "2·block_i rows fill wgmma's 64, and a tile stays in one scale block"
        assert self.block_n in (16, 32, 64, 128), "8 columns fall back to mma.sync in Triton 3.6"
        assert self.num_warps in (4, 8)


@dataclass(frozen=True)
class DownTile:
    """`block_m` rows of W2 by `block_n` pairs (tokens where dense); `split` programs share a dense row block.

    `prefetch`: for how many experts (sorted: 1, its first tile's) a program asks for its weights before GEMM1 is done.
    """

    block_m: int
    block_n: int
    stages: int
    num_warps: int
    split: int = 1
    prefetch: int = 0

    def __post_init__(self) -> None:
        assert self.block_m in (64, 128), "wgmma's M, and a tile stays in one scale block"
        assert self.block_n in (16, 32, 64, 128)
        assert self.num_warps in (4, 8) and self.split >= 1


@dataclass(frozen=True)
class Plan:
    path: Path
    route: RouteTile
    gate_up: GateUpTile
    down: DownTile
    pdl: bool = True

    def __post_init__(self) -> None:
        assert self.gate_up.block_n == self.down.block_n, "both GEMMs walk one tile list"
        assert self.path != "wide" or self.gate_up.block_i == self.gate_up.block_n == self.down.block_m == BLOCK

    def __str__(self) -> str:
        g, d = self.gate_up, self.down
        return (
            f"{self.path}: route {self.route.block_t}t {self.route.num_warps}w in {1 if self.route.one_launch else 2}, "
            f"gate_up {2 * g.block_i}x{g.block_n} {g.stages}s {g.num_warps}w guess {g.guess}, "
            f"down {d.block_m}x{d.block_n} {d.stages}s {d.num_warps}w split {d.split} prefetch {d.prefetch}{', pdl' if self.pdl else ''}"
        )


def choose_plan(geometry: MoEGeometry, tokens: int, *, sm_count: int = 132, capability: int = 90) -> Plan:
    """The plan for `tokens` tokens on a GPU with `sm_count` multiprocessors and compute capability `capability`."""
    pdl = capability >= 90
    route = route_tile(geometry, tokens)
    if tokens <= DENSE_TOKENS and route.one_launch:
        return _dense(geometry, route, sm_count, pdl)
    rows = tokens * geometry.top_k / geometry.num_experts
    if rows >= WIDE_ROWS:
        # T = 14107: gate_up 1578 us with 3 stages, 1381 with 4; the whole call 2655 with (4, 3), 2780 with (3, 4)
        return Plan("wide", route, GateUpTile(128, 128, 4, 8), DownTile(128, 128, 3, 8), pdl)
    block_n = 16 if rows <= 6 else 32 if rows <= 14 else 64
    if block_n == 64:
        return Plan("sorted", route, GateUpTile(128, 64, 4, 8), DownTile(128, 64, 4, 4), pdl)
    return Plan("sorted", route, GateUpTile(64, block_n, 4, 4), DownTile(64, block_n, 5, 4), pdl)


def route_tile(geometry: MoEGeometry, tokens: int) -> RouteTile:
    experts = power_of_two_at_least(geometry.num_experts)
    local = power_of_two_at_least(geometry.num_local_experts)
    if tokens == 1:
        return RouteTile(1, 1, 1, True)
    if tokens <= 16:
        return RouteTile(16, 16, 16, True)
    block_t = 32 if experts <= 256 else 16  # 32 warps have 64 registers a thread
    if tokens <= ONE_LAUNCH_TOKENS and ONE_LAUNCH_TOKENS * local <= 8192:
        return RouteTile(block_t, 64, block_t, True)
    if tokens <= 16 * MOST_CHUNKS:
        return RouteTile(16, 16, 16, False)
    return RouteTile(block_t, max(16, min(128, 8192 // local)), block_t, False)


def _dense(geometry: MoEGeometry, route: RouteTile, sm_count: int, pdl: bool) -> Plan:
    # T = 7, 10 active experts: whole call 187 us with 128 columns, 188 with 64, 206 with 32: GEMM2's accumulator then holds
    # 1, 2 or 4 columns a token. 64 leaves 96 programs for three active experts; 128 would leave 48.
    gate_up = GateUpTile(64, 16, 4, 4)
    # A program a row block where those nearly fill the SMs (112 of 132 at H = 7168); else several share one.
    row_blocks = geometry.hidden_size // 64
    split = 1 if row_blocks >= 0.75 * sm_count else min(8, max(1, round(2 * sm_count / row_blocks)))
    return Plan("dense", route, gate_up, DownTile(64, 16, 8, 4, split), pdl)


def plans(geometry: MoEGeometry, *, sm_count: int = 132, capability: int = 90) -> list[Plan]:
    """Every plan that some T gets: what a warm-up compiles."""
    found: dict[Plan, None] = {}
    tokens = 1
    while tokens <= TOKEN_CHUNK:
        found[choose_plan(geometry, tokens, sm_count=sm_count, capability=capability)] = None
        tokens += max(1, tokens // 16)
    return list(found)


def with_tiles(plan: Plan, *, gate_up: dict | None = None, down: dict | None = None, pdl: bool | None = None) -> Plan:
    """`plan` with some tile fields replaced, for measuring candidates."""
    return replace(
        plan,
        gate_up=replace(plan.gate_up, **(gate_up or {})),
        down=replace(plan.down, **(down or {})),
        pdl=plan.pdl if pdl is None else pdl,
    )
