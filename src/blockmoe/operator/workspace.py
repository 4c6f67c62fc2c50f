"""The device memory between the kernels: one allocation, laid out by a pure function of sizes.

Nothing in it that reaches a result is read before the same call wrote it, and its size never depends on the routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch

from blockmoe.geometry import BLOCK, MoEGeometry
from blockmoe.operator.launch import ALIGNMENT, WORKSPACE, Descriptor, Launch, Slot
from blockmoe.operator.machine import Machine
from blockmoe.operator.plan import MOST_TILES, TOKEN_CHUNK, Plan, choose_plan


@dataclass(frozen=True)
class Sizes:
    """Upper bounds that hold for any routing of `tokens` tokens."""

    tokens: int
    rows: int  # of the intermediate
    tiles: int
    chunks: int  # programs that sort
    first_chunks: int  # of which so many have first_tokens tokens each, the others other_tokens
    first_tokens: int
    other_tokens: int
    blocks: int  # 128-column blocks of the output computed at a time


@lru_cache(maxsize=512)
def sizes(geometry: MoEGeometry, tokens: int, plan: Plan) -> Sizes:
    if len(plan.ways) > 1:
        every = [astuple(sizes(geometry, tokens, way)) for way in plan.ways]
        return Sizes(*map(max, *every))
    per_token = min(geometry.top_k, geometry.num_local_experts)
    pairs = tokens * per_token
    block_n = plan.gate_up.block_n
    if plan.dense:
        tiles = min(geometry.num_local_experts, pairs)
        return Sizes(tokens, tiles * block_n, tiles, 1, 1, tokens, 0, geometry.hidden_blocks)
    # Every expert wastes less than a tile, and holds each token at most once.
    tiles = min(
        min(geometry.num_local_experts, pairs) + pairs // block_n,
        geometry.num_local_experts * -(-tokens // block_n),
    )
    rows = tiles * BLOCK if plan.path == "prefill" else pairs  # there every tile begins at a multiple of 128
    first, first_tokens, other_tokens = (1, tokens, 0) if plan.route.one_launch else plan.route.shares(tokens)
    chunks = min(first, -(-tokens // first_tokens)) + (-(-(tokens - first * first_tokens) // other_tokens) if other_tokens else 0)
    every = geometry.hidden_blocks
    fitting = [b for b in range(1, every + 1) if every % b == 0 and 2 * pairs * b * BLOCK <= plan.row_buffer]
    blocks = every if plan.down is None else max(fitting, default=1)
    return Sizes(tokens, rows, tiles, chunks, first, first_tokens, other_tokens, blocks)


MOST_PROGRAMS = 256  # of a persistent kernel: one a multiprocessor
SPLIT_PAIRS = 32  # at most, of a tile of stream whose products are summed by shares of K
MAIL_SLOTS = 8  # of units that a cluster's first program of the prefill kernel passes on: at most three are unread


def counters(bound: Sizes, plan: Plan) -> dict[str, int]:
    """What the programs of a persistent kernel count in, one after the other in memory; routing sets them to zero."""
    if len(plan.ways) > 1:
        every = [counters(bound, way) for way in plan.ways]
        return {name: max(found.get(name, 0) for found in every) for name in reduce(or_, every)}
    if plan.path == "stream":
        return {"ticket": 1, "part": 1, "written": 2, "finished": bound.tiles, "summed": MOST_PROGRAMS}
    if plan.path == "prefill":
        mail, added = MOST_PROGRAMS // 2 * MAIL_SLOTS, bound.tiles * bound.blocks // 2
        return {"ticket": 1, "mail": mail, "ready": MOST_PROGRAMS, "finished": bound.tiles, "added": added}
    return {}


def _fields(geometry: MoEGeometry, tokens: int, plan: Plan) -> dict[str, tuple[int, torch.dtype]]:
    """Element count and type of every buffer, by name; of several ways the largest."""
    if len(plan.ways) > 1:
        found: dict[str, tuple[int, torch.dtype]] = {"way": (1, torch.int32)}
        for way in plan.ways:
            for name, (count, dtype) in _fields(geometry, tokens, way).items():
                found[name] = (max(count, found[name][0] if name in found else 0), dtype)
        if plan.path == "either":  # more pairs take prefill's way
            tile = plan.gate_up.stream
            most = max(int(MOST_TILES * geometry.num_local_experts) * tile.block_n, tile.few * tile.ways[0].block_n)
            found["rows"] = min(found["rows"][0], most * geometry.hidden_size), torch.bfloat16
        return found
    bound = sizes(geometry, tokens, plan)
    local, block_i, prefill = geometry.num_local_experts, plan.gate_up.block_i, plan.path == "prefill"
    fields: dict[str, tuple[int, torch.dtype]] = {
        "token_weight": (tokens * local, torch.float32),
        "chunk_count": (bound.chunks * local, torch.int32),
        "chunk_kinds": (bound.chunks, torch.int32),
        "tile_count": (1, torch.int32),
        "tile_expert": (bound.tiles, torch.int32),
        "tile_group": (bound.tiles, torch.int32),
        "tile_begin": (bound.tiles, torch.int32),
        "tile_end": (bound.tiles, torch.int32),
        "pair_token": (bound.rows, torch.int32),
        "pair_weight": (bound.rows, torch.float32),
        "token_pair": (0 if prefill else tokens * geometry.top_k, torch.int32),
        "token_pairs": (tokens, torch.int32),
        "slot_token": (0 if prefill else tokens, torch.int32),
        "slot_count": (2, torch.int32),
        "before": (bound.rows if prefill else 0, torch.int32),
        "middle": (bound.rows * geometry.intermediate_size, torch.float8_e4m3fn),
        "middle_scale": (bound.rows * geometry.intermediate_size // block_i, torch.float32),
    }
    if plan.path == "stream":  # sums of shares of K, of all programs but those that add them
        fields["partial"] = (3 * MOST_PROGRAMS // 4 * 2 * plan.gate_up.rows * SPLIT_PAIRS, torch.float32)
    if not plan.dense and not prefill:
        fields["rows"] = (bound.rows * bound.blocks * BLOCK, torch.bfloat16)
    elif plan.path == "dense" and plan.down.split > 1:
        fields["rows"] = (plan.down.split * tokens * geometry.hidden_size, torch.float32)
    return fields


@lru_cache(maxsize=512)
def layout(geometry: MoEGeometry, tokens: int, plan: Plan) -> tuple[dict[str, tuple[int, int, torch.dtype]], int]:
    """Offset, element count and type of every buffer, and the bytes of all."""
    fields = _fields(geometry, tokens, plan)
    fields |= {name: (count, torch.int32) for name, count in counters(sizes(geometry, tokens, plan), plan).items()}
    placed, offset = {}, 0
    for name, (count, dtype) in fields.items():
        placed[name] = (offset, count, dtype)
        offset += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return placed, offset


def rounds(tokens: int) -> list[int]:
    """How many tokens each round of a call has."""
    full, rest = divmod(tokens, TOKEN_CHUNK)
    return [TOKEN_CHUNK] * full + ([rest] if rest else [])


@lru_cache(maxsize=512, typed=True)
def workspace_size(geometry: MoEGeometry, tokens: int, *, sm_count: int = 132, capability: int = 90) -> int:
    """Bytes of workspace that are enough for every call of at most `tokens` tokens on such a GPU, whatever its memory and the routing.

    Every number of tokens is looked at, as a plan for fewer may want more: a second or two for each `tokens`, so ask once, for the most.
    Raises TypeError or ValueError for what is no number of tokens.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens: expected an integer, got {type(tokens).__name__}")
    if tokens < 0:
        raise ValueError(f"tokens: expected 0 or more, got {tokens}")
    kinds = (False, True) if capability == 90 else (False,)  # elsewhere no plan asks
    machines = [Machine(sm_count, capability, hbm3e) for hbm3e in kinds]
    found = 0
    for t in range(1, min(tokens, TOKEN_CHUNK) + 1):
        for plan in {choose_plan(geometry, t, machine) for machine in machines}:
            found = max(found, layout.__wrapped__(geometry, t, plan)[1])  # past the cache, which holds what calls use
    return found


@lru_cache(maxsize=512)
def slots(geometry: MoEGeometry, tokens: int, plan: Plan) -> Mapping[str, Slot]:
    """The buffers as launches name them."""
    placed, _ = layout(geometry, tokens, plan)
    found = {name: Slot(WORKSPACE, dtype, offset, count) for name, (offset, count, dtype) in placed.items()}
    if each := [found[name] for name in counters(sizes(geometry, tokens, plan), plan)]:
        past = each[-1].offset + 4 * each[-1].count
        found["counters"] = Slot(WORKSPACE, torch.int32, each[0].offset, (past - each[0].offset) // 4)
    else:
        found["counters"] = Slot(WORKSPACE, torch.int32, 0, 0)
    return found


@dataclass(frozen=True)
class Round:
    """What every stage of one round knows."""

    geometry: MoEGeometry
    plan: Plan
    sizes: Sizes
    memory: Mapping[str, Slot]
    programs: int  # bound on the grids of the sorted and wide paths
    sm_count: int

    @property
    def ways(self) -> list[Round]:
        """The same for each of the plan's ways, in the same memory."""
        return [replace(self, plan=way, sizes=sizes(self.geometry, self.sizes.tokens, way)) for way in self.plan.ways]

    @property
    def way_taken(self) -> Slot:
        """Where routing notes which it is; anything where it has no choice."""
        return self.memory.get("way", self.memory["tile_count"])

    def launch(self, kernel: Any, programs: int, arguments: tuple, constants: tuple, num_warps: int, *, cluster: int = 1) -> Launch:
        """`arguments` are TMA descriptors, then slots, then numbers; of `programs` as many as are whole clusters."""
        described = sum(isinstance(a, Descriptor) for a in arguments)
        count = described + sum(isinstance(a, Slot) for a in arguments)
        slots, numbers = arguments[described:count], arguments[count:]
        programs = programs // cluster * cluster
        return Launch(kernel, programs, slots, numbers, constants, num_warps, self.plan.pdl, arguments[:described], cluster)
