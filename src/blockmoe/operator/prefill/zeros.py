"""Rows of the output of tokens without a pair, set to zero beside the GEMMs: by TMA, out of a page of zeros in shared memory.

At T = 14107 these are 115 MB. Routing took 26 us longer with them, the GEMMs take 11 (docs/kernel-log.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from blockmoe.operator.persistent import barrier
from blockmoe.operator.prefill.units import END, K, hear_unit

COLUMNS = gl.constexpr(256)  # of a run: the most that a TMA box has
PAGE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2))


def page_runs(hidden_size: int) -> int:
    """Runs of a page: at most 4 (2 KiB), and so that a token's row is whole pages."""
    runs = hidden_size // COLUMNS.value
    return min(4, runs & -runs)


@gluon.jit
def write_zeros(out, page, token_pairs, queue, told, heard, tile_count, tokens, HIDDEN: gl.constexpr, INTER: gl.constexpr):
    """One warp: this program's share of the tokens, some at every unit that it hears of, the rest behind the last.

    out [T * H / 256, 256].
    """
    RUNS: gl.constexpr = HIDDEN // COLUMNS
    RUNS_A_PAGE: gl.constexpr = page.shape[0]
    page.store(gl.zeros([RUNS_A_PAGE, COLUMNS], gl.bfloat16, gl.BlockedLayout([1, 8], [1, 32], [1, 1], [1, 0])))
    fence_async_shared()
    barrier()
    units = gl.load(tile_count) * (INTER // K + HIDDEN // (2 * K))
    share = (tokens + units - 1) // gl.maximum(units, 1) * gl.num_programs(0)
    token = gl.program_id(0)
    n = gl.to_tensor(0)
    kind = hear_unit(queue, told, heard, n, 1)[0]
    while (kind < END) | (token < tokens):
        past = gl.minimum(gl.where(kind < END, token + share, tokens), tokens)
        while token < past:
            if gl.load(token_pairs + token) == 0:
                for run in gl.static_range(0, RUNS, RUNS_A_PAGE):
                    tma.async_copy_shared_to_global(out, [token * RUNS + run, 0], page)
            token += gl.num_programs(0)
        if kind < END:
            n += 1
            kind = hear_unit(queue, told, heard, n, 1)[0]
    tma.store_wait(0)
