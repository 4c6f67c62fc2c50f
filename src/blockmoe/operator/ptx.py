"""What Gluon cannot say, put into the PTX that it compiles to: TMA loads for both programs of a cluster, arrivals in both, L2 hints.

A kernel says a word before the operation (`persistent.say`): a comment in its PTX. The next TMA load, or arrival at a barrier, is then
rewritten here, and the result assembled anew. Everything else stays Triton's. Meanings of the instructions: PTX ISA 8.7,
cp.async.bulk.tensor, mapa, mbarrier.arrive.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

WORDS = ("multicast", "both", "evict first", "evict last")
POLICIES = {"evict first": 0x12F0000000000000, "evict last": 0x14F0000000000000}  # as createpolicy encodes them for all of an access

_LOAD = re.compile(r"(@%p\d+ cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global)(?:\.tile)?(\.mbarrier::complete_tx::bytes) ([^;]+);")
_ARRIVE = re.compile(r"@(%p\d+) mbarrier\.arrive\.(?:release\.cta\.)?shared::cta\.b64 _, \[([^\]]+)\](?:, 1)?;")
_ELSEWHERE = re.compile(r"\s*(\$L__BB|ret\b|(@!?%p\d+\s+)?bra\b)")  # a branch, or where one leads
_WORD = re.compile(r"/\* blockmoe: ([a-z ]+) \*/")


class Unexpected(RuntimeError):
    """The PTX is not as known: another Triton, say. The kernel must not be launched as it is."""


def heard(ptx: str) -> str:
    """`ptx` with every word carried out. Raises Unexpected where what a word stands before is not as known."""
    lines, waiting = [], []
    for line in ptx.splitlines():
        if word := _WORD.search(line):
            if word[1] not in WORDS:
                raise Unexpected(f"unknown word {word[1]!r}")
            waiting.append(word[1])
        elif waiting and "cp.async.bulk.tensor" in line:
            line, waiting = _load(line, waiting), []
        elif waiting and "mbarrier.arrive" in line and "expect_tx" not in line:
            line, waiting = _arrive(line, waiting), []
        elif waiting and _ELSEWHERE.match(line):
            raise Unexpected(f"{waiting} stands before {line.strip()!r}")
        lines.append(line)
    if waiting:
        raise Unexpected(f"{waiting} stands before nothing")
    return "\n".join(lines) + "\n"


def _load(line: str, words: list[str]) -> str:
    found = _LOAD.search(line)
    if not found or "both" in words:
        raise Unexpected(f"{words} before {line.strip()!r}")
    begin, end, operands = found.groups()
    suffix, before, after = "", "", ""
    if "multicast" in words:
        suffix += ".multicast::cluster"
        before += ".reg .b16 programs; mov.b16 programs, 3; "
        after += ", programs"
    for word, policy in POLICIES.items():
        if word in words:
            suffix += ".L2::cache_hint"
            before += f".reg .b64 policy; mov.b64 policy, {policy:#x}; "
            after += ", policy"
    return f"{line[: found.start()]}{{ {before}{begin}{end}{suffix} {operands}{after}; }}{line[found.end() :]}"


def _arrive(line: str, words: list[str]) -> str:
    found = _ARRIVE.search(line)
    if not found or words != ["both"]:
        raise Unexpected(f"{words} before {line.strip()!r}")
    predicate, address = found.groups()
    other = (
        "{ .reg .b32 rank, there; mov.u32 rank, %cluster_ctarank; xor.b32 rank, rank, 1; "
        f"@{predicate} mapa.shared::cluster.u32 there, {address}, rank; "
        f"@{predicate} mbarrier.arrive.shared::cluster.b64 _, [there]; }}"
    )
    return f"{line[: found.end()]} {other}{line[found.end() :]}"


def assembled(ptx: str, capability: int) -> bytes:
    """The cubin of `ptx` by Triton's ptxas, kept in Triton's cache."""
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.runtime.cache import get_cache_manager

    ptxas = get_ptxas(capability)
    key = hashlib.sha256(f"{ptxas.version} {ptx}".encode()).hexdigest()
    cache = get_cache_manager(key)
    if kept := cache.get_file("heard.cubin"):
        return Path(kept).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "heard.ptx", Path(folder) / "heard.cubin"
        source.write_text(ptx)
        command = [ptxas.path, "-lineinfo", "-v", "--gpu-name=sm_90a", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unexpected(f"ptxas: {done.stderr.strip()[:500]}")
        cubin = target.read_bytes()
    cache.put(cubin, "heard.cubin", binary=True)
    return cubin


def let_hear(compiled: Any) -> Any:
    """Triton's compiled kernel, not loaded yet, with what it says carried out."""
    compiled.kernel = assembled(heard(compiled.asm["ptx"]), compiled.metadata.target.arch)
    return compiled
