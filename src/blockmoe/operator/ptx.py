"""What Gluon cannot say, put into the PTX that it compiles to: TMA loads for both programs of a cluster of two, arrivals in both, and
warps that do not wait for each other; and a loop's descriptors made ahead (`ahead.py`).

A kernel says a word before the operation (`persistent.say`): a comment in its PTX. The next TMA load, or arrival at a barrier, is then
rewritten here, or the `bar.sync` left out that Triton sets before the next wait or product; and the result is assembled anew. Everything
else stays Triton's. The instructions are those of the PTX ISA, 8.7: cp.async.bulk.tensor, mapa, mbarrier.arrive, bar.sync.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from blockmoe.operator.ahead import Unexpected, ahead

_WORD = re.compile(r"/\* blockmoe: (multicast|both|apart) \*/")
_LOAD = re.compile(r"(@%p\d+ cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global)(?:\.tile)?(\.mbarrier::complete_tx::bytes) ([^;]+);")
_ARRIVE = re.compile(r"@(%p\d+) mbarrier\.arrive\.(?:release\.cta\.)?shared::cta\.b64 _, \[([^\]]+)\](?:, 1)?;")
_SYNC = re.compile(r"\s*bar\.sync\s+\d+, \d+;")
_APART = re.compile(r"mbarrier\.try_wait|wgmma\.mma_async")
_ELSEWHERE = re.compile(r"\s*(\$L__BB|ret\b|(@!?%p\d+\s+)?bra\b)")  # a branch, or where one leads


def heard(ptx: str) -> str:
    """`ptx` with every word carried out. Raises Unexpected where what a word stands before is not as known."""
    lines, word = [], None
    for line in ptx.splitlines():
        if found := _WORD.search(line):
            if word:
                raise Unexpected(f"{word} stands before {found[1]}")
            word = found[1]
        elif word == "apart" and _SYNC.match(line):
            word = None
            continue
        elif word == "apart" and _APART.search(line):
            raise Unexpected(f"{word} stands before {line.strip()!r}")
        elif word in ("multicast", "both") and ("cp.async.bulk.tensor" in line or ("mbarrier.arrive" in line and "expect_tx" not in line)):
            line, word = _rewritten(line, word), None
        elif word and _ELSEWHERE.match(line):
            raise Unexpected(f"{word} stands before {line.strip()!r}")
        lines.append(line)
    if word:
        raise Unexpected(f"{word} stands before nothing")
    return "\n".join(lines) + "\n"


def mended(ptx: str) -> str:
    """`ptx` as it is assembled. Raises Unexpected."""
    return ahead(heard(ptx))


def _rewritten(line: str, word: str) -> str:
    found = (_LOAD if word == "multicast" else _ARRIVE).search(line)
    if not found:
        raise Unexpected(f"{word} stands before {line.strip()!r}")
    if word == "multicast":
        begin, end, operands = found.groups()
        new = f"{{ .reg .b16 both; mov.b16 both, 3; {begin}{end}.multicast::cluster {operands}, both; }}"
    else:
        predicate, address = found.groups()
        new = (
            f"{found[0]} {{ .reg .b32 other, there; mov.u32 other, %cluster_ctarank; xor.b32 other, other, 1; "
            f"mapa.shared::cluster.u32 there, {address}, other; "
            f"@{predicate} mbarrier.arrive.shared::cluster.b64 _, [there]; }}"
        )
    return line[: found.start()] + new + line[found.end() :]


def assembled(ptx: str, capability: int) -> bytes:
    """The cubin of `ptx` by Triton's ptxas, kept in Triton's cache. Raises Unexpected where ptxas refuses it."""
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.runtime.cache import get_cache_manager

    ptxas = get_ptxas(capability)
    cache = get_cache_manager(hashlib.sha256(f"{ptxas.version} {ptx}".encode()).hexdigest())
    if kept := cache.get_file("heard.cubin"):
        return Path(kept).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "heard.ptx", Path(folder) / "heard.cubin"
        source.write_text(ptx)
        command = [ptxas.path, "-lineinfo", f"--gpu-name=sm_{capability}a", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unexpected(f"ptxas: {done.stderr.strip()[:500]}")
        cubin = target.read_bytes()
    cache.put(cubin, "heard.cubin", binary=True)
    return cubin


def let_hear(compiled: Any) -> Any:
    """Triton's compiled kernel, not loaded yet, with what it says carried out, and what it needs early made ahead."""
    compiled.kernel = assembled(mended(compiled.asm["ptx"]), compiled.metadata.target.arch)
    return compiled
