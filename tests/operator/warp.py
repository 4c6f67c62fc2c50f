"""A warp's PTX, executed on the CPU: what `blockmoe.operator.largest` and `ballots` are written in, and no more.

`install()` has Triton's interpreter execute inline assembly of that kind, a warp a token. Registers hold 32 threads' values; a branch or a
reduction that not all of them take part in is an error.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np

from blockmoe.operator.ballots import EARLIER, UP_TO_HERE
from blockmoe.operator.choose import RECIPROCAL, SHARE

THREADS = 32
COMPARE = {"eq": np.equal, "ne": np.not_equal, "gt": np.greater, "lt": np.less, "le": np.less_equal, "ge": np.greater_equal}
COMBINE = {"and": np.logical_and, "or": np.logical_or}
ARITHMETIC = {"max": np.maximum, "min": np.minimum, "add": np.add, "sub": np.subtract}
ARITHMETIC |= {"and": np.bitwise_and, "or": np.bitwise_or, "shl": np.left_shift}
LANES = {"%laneid": np.arange(THREADS, dtype=np.int32)}
LANES |= {"%lanemask_lt": (1 << np.arange(THREADS, dtype=np.uint32)) - 1, "%lanemask_le": (2 << np.arange(THREADS, dtype=np.uint64)) - 1}
LANES = {name: value.astype(np.uint32).view(np.int32) for name, value in LANES.items()}


def execute(text: str, given: list[np.ndarray], results: int) -> list[np.ndarray]:
    """`text` with $0 ... as its `results` results, and `given`, [32] each, as the operands after them; what the results hold then."""
    lines = [line.strip() for line in text.strip().strip("{}").splitlines() if line.strip() and not line.startswith(".reg")]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    registers: dict[str, np.ndarray] = {f"${results + i}": value.copy() for i, value in enumerate(given)}

    def value(name: str) -> np.ndarray:
        if name == "0f00000000":
            return np.zeros(THREADS, np.float32)
        if name in LANES:
            return LANES[name]
        return registers[name] if not re.fullmatch(r"-?\d+", name) else np.full(THREADS, int(name) & 0xFFFFFFFF, np.uint32).view(np.int32)

    at = executed = 0
    while at < len(lines):
        assert (executed := executed + 1) < 100_000, "it does not end"
        line, at = lines[at], at + 1
        if line.endswith(":"):
            continue
        guard, operation, operands = re.fullmatch(r"(?:@(\w+) )?([\w.]+) (.*);", line).groups()
        here = registers[guard] if guard else np.ones(THREADS, bool)
        name, *kinds = operation.split(".")
        target, *sources = operands.split(", ")
        if name == "bra":
            assert kinds == ["uni"] and (here.all() or not here.any()), f"not all threads take the branch: {line}"
            at = labels[target] if here.all() else at
            continue
        if name == "shfl":
            assert here.all() and kinds in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]) and sources[2:] == ["31", "0xffffffff"], line
            lane = value(sources[1])
            new = value(sources[0])[np.arange(THREADS) ^ lane if kinds[1] == "bfly" else lane & 31]
        elif name == "redux":
            assert here.all() and sources[1] == "0xffffffff" and kinds[0] == "sync", line
            new = np.full(THREADS, ARITHMETIC[kinds[1]].reduce(value(sources[0])), np.int32)
        elif name == "vote":
            assert here.all() and kinds[:2] == ["sync", "ballot"] and sources[1] == "0xffffffff", line
            new = np.full(THREADS, sum(1 << i for i in np.flatnonzero(registers[sources[0]])), np.uint32).view(np.int32)
        elif name == "bfind":
            new = np.array([v.bit_length() - 1 for v in value(sources[0]).view(np.uint32).tolist()], np.int32)
        elif name == "popc":
            new = np.array([bin(v).count("1") for v in value(sources[0]).view(np.uint32).tolist()], np.int32)
        elif name == "setp":
            new = COMPARE[kinds[0]](value(sources[0]), value(sources[1]))
            new = COMBINE[kinds[1]](new, registers[sources[2]]) if len(sources) == 3 else new
        elif name == "selp":
            new = np.where(registers[sources[2]], value(sources[0]), value(sources[1]))
        elif name == "mov":
            new = value(sources[0])
            new = new.view(np.int32) if kinds == ["b32"] else new
        else:
            new = ARITHMETIC[name](value(sources[0]), value(sources[1]))
        registers[target] = new if here.all() else np.where(here, new, registers[target])
    return [registers[f"${i}"] for i in range(results)]


def by_token(text: str, tiles: list[np.ndarray], each: int, results: int) -> list[np.ndarray]:
    """`execute` for every token of tiles [tokens, parts, lanes], of which a thread has `each` values: as many side by side in every part,
    one part after the other (`test_aot.py` looks at what Triton does)."""
    _, parts, lanes = tiles[0].shape
    assert parts * lanes == THREADS * each
    found = []
    for values in zip(*tiles, strict=True):
        by_thread = (tile.reshape(parts, THREADS, -1).swapaxes(0, 1).reshape(THREADS, each) for tile in values)
        columns = execute(text, [column for tile in by_thread for column in tile.T], results * each)
        by_thread = (np.stack(columns[i * each : (i + 1) * each], 1) for i in range(results))
        found.append([tile.reshape(THREADS, parts, -1).swapaxes(0, 1).reshape(parts, lanes) for tile in by_thread])
    return [np.stack(column) for column in zip(*found, strict=True)]


def by_lane(text: str, rows: np.ndarray) -> np.ndarray:
    """`execute` for a tile [32 lanes, ...] of a value each."""
    columns = rows.reshape(THREADS, -1).T
    return np.stack([execute(text, [column], 1)[0] for column in columns], 1).reshape(rows.shape)


def shares(x: np.ndarray) -> np.ndarray:
    """`SHARE`, of what is no NaN and positive."""
    found = np.float32(1) / x
    return np.where(found >= np.finfo(np.float32).tiny, found, np.float32(0))


def install() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_inline_asm(builder, text, constraints, arguments, types, pure, pack):
        tiles = [argument.data for argument in arguments]
        if text in (SHARE.value, RECIPROCAL.value):  # the latter's results are normal numbers
            found = [shares(*tiles)]
        elif text in (UP_TO_HERE.value, EARLIER.value):
            found = [by_lane(text, *tiles)]
        else:
            found = by_token(text, tiles, pack, len(types))
        handles = [TensorHandle(tile, kind.scalar) for tile, kind in zip(found, types, strict=True)]
        return SimpleNamespace(get_result=handles.__getitem__)

    InterpreterBuilder.create_inline_asm = create_inline_asm
