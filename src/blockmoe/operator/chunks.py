"""How routing shares out tokens: which programs choose and sort them, and how many each at a time.

Times are of whole calls of the headline geometry on an H100 unless said; the runs are in results/h100/operator, what was learnt in
docs/kernel-log.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockmoe.geometry import MoEGeometry
from blockmoe.operator.machine import Machine

ONE_LAUNCH_TOKENS = 16  # of routing, a warp each; T = 16: 8.3 us, in two launches 8.4; 32: 12.5, 8.4
TOKEN_CHUNK = 16384  # more tokens run as several rounds, which bounds the workspace
FEW_CHUNKS, MOST_CHUNKS = 128, 256  # programs that sort; each reads the counts of all
MOST_COUNTED = 1023  # of tokens that are sorted at a time, in ten bits (`lists.list_rows`)


def power_of_two_at_least(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RouteTile:
    """`block_t` tokens at a time are chosen for, a warp each where num_warps allows; `place_t` at a time are sorted.

    One launch takes at most `block_t` tokens. `once`: with two, no chunk has more than `place_t`. At most `chunks` chunks, a power of two;
    if `first`, so many of them have a multiprocessor's first turn.
    """

    block_t: int
    place_t: int
    num_warps: int
    one_launch: bool
    once: bool = False
    chunks: int = FEW_CHUNKS
    first: int = 0

    def __post_init__(self) -> None:
        assert self.chunks == power_of_two_at_least(self.chunks), "their counts are a tile"
        assert max(self.block_t if self.one_launch else 0, self.place_t) <= MOST_COUNTED, "kinds are counted beside pairs"
        assert self.first <= self.chunks and (not self.once or self.place_t % self.block_t == 0), "a chunk's tokens"

    def shares(self, tokens: int) -> tuple[int, int, int]:
        """Of two launches: how many chunks are first ones, how many tokens each of those has, and each of the others.

        A multiprocessor runs two programs, of which the first one's warps go first, and to choose for `block_t` tokens takes as long as for
        fewer. So of an odd number of times the first programs have one more. (H200, T = 14107, where each had 56 tokens: the last was done
        after 11.4 us; with 64 and 46 after 10.0. Where the first had four times of six, or both of two, 0.4 to 0.6 us were lost: T = 11948,
        4096 as it was then. results/h200/operator/shares.txt, calls 6 and 8.)
        """
        if not self.first:
            return self.chunks, max(self.block_t, -(-tokens // self.chunks)), 0
        most = self.place_t // self.block_t if self.once else tokens
        others = self.chunks - self.first
        own = theirs = 0
        while self.block_t * (self.first * own + others * theirs) < tokens:  # in turn, the first ones first
            if not others or own == theirs < most:
                own += 1
            else:
                theirs += 1
        if not theirs:
            return self.first, -(-tokens // self.first), 0
        if (rest := tokens - self.first * self.block_t * own) > 0:
            return self.first, self.block_t * own, -(-rest // others)
        return self.first, -(-(tokens - others * self.block_t * theirs) // self.first), self.block_t * theirs


def route_tile(geometry: MoEGeometry, tokens: int, machine: Machine) -> RouteTile:
    local = power_of_two_at_least(geometry.num_local_experts)
    if tokens == 1:
        return RouteTile(1, 1, 1, True)
    for block_t in (8, ONE_LAUNCH_TOKENS):
        if tokens <= block_t:
            return RouteTile(block_t, block_t, block_t, True)
    # few warps a multiprocessor: its four schedulers take a token each, or two. T = 901, H200: 344.3 us by 16 tokens, 342.5 by 8, 345.0
    # by 4 in 256 chunks; 600: 323.6, 323.1, 325.4; 1,024: 332.6, 332.4, 334.4 (results/h200/operator/ranks.txt, call 2), one expert
    # at 1,024: 93.5, 93.2 (shares.txt, call 1)
    # Of 4 tokens no more than 60 programs, a number that was not searched for: where routing holds most multiprocessors, the next kernel's
    # clusters probably wait for two of a group. T = 400, 500, H200: 329.3, 330.6 us, by 4 tokens 329.7, 333.2 (clusters.txt, call 3). With
    # 16 from 513 on: 560, 640, 720, 800, 880, 901, 960: 331.9, 333.0, 333.3, 334.8, 336.8, 348.2, 338.1, by 8 333.2, 333.6, 334.1, 335.6,
    # 338.1, 347.5, 339.2 (calls 4, 5)
    # Two programs a multiprocessor, with 16 tokens each: 2,200, 3,000, 4,096: 385.5, 405.1, 449.9 us, each sorting 64 with most of them
    # masked 388.1, 408.2, 452.6 (results/h200/operator/chunks.txt, call 5)
    for block_t, most in ((4, 60), (8, 120), (16, FEW_CHUNKS), (16, MOST_CHUNKS)):
        if tokens <= block_t * most:
            return RouteTile(block_t, block_t, block_t, False, True, max(FEW_CHUNKS, power_of_two_at_least(most)))
    # T = 14107: routing took 34.6 us, with 512 chunks of half the tokens 35.1. T = 6000, 8192, H200: 12.4, 13.5 us by 32 to sort, by 64
    # 13.0, 14.3 (chunks.txt, call 5)
    place_t = min(32 if tokens <= 32 * MOST_CHUNKS else 64, 4096 // local)
    once = place_t * MOST_CHUNKS >= tokens
    two_fit = geometry.num_experts <= 256  # of more a thread has 16, which take more registers
    return RouteTile(16, place_t, 16, False, once, MOST_CHUNKS, min(machine.sm_count, MOST_CHUNKS) if two_fit else 0)
