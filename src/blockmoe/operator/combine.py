"""The output's last sum, in a fixed order: over a token's pairs, or over the partial sums of a split dense GEMM2.

out[t, h] = sum over n < token_pairs[t] of rows[token_pair[t, n], h]      (routing weights are already in the rows)
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.geometry import BLOCK
from blockmoe.operator.kernel_parts import after_previous_kernel
from blockmoe.operator.workspace import Round

BLOCK_H = 1024  # columns a program: 8 bf16 a thread of 4 warps, a 16-byte load


@triton.jit(do_not_specialize=["first_block", "blocks"])
def combine_kernel(
    rows, token_pair, token_pairs, out, first_block, blocks,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = blocks * 128
    inside = h < columns
    count = tl.load(token_pairs + token)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for n in tl.static_range(TOP_K):
        pair = tl.load(token_pair + token * TOP_K + n, mask=n < count, other=0).to(tl.int64)
        sums += tl.load(rows + pair * columns + h, mask=inside & (n < count), other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + first_block * 128 + h, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def combine_splits_kernel(rows, out, tokens, HIDDEN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr):
    after_previous_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for n in tl.static_range(SPLIT):
        sums += tl.load(rows + (n * tokens + token) * HIDDEN + h, mask=h < HIDDEN, other=0.0)
    tl.store(out + token * HIDDEN + h, sums.to(out.dtype.element_ty), mask=h < HIDDEN)


def combine(out, first_block: int, round: Round) -> None:
    """Launch the sum; nothing where a dense GEMM2 wrote the output itself."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    grid = (sizes.tokens, -(-sizes.blocks * BLOCK // BLOCK_H))
    if plan.path != "dense":
        arguments = (b["rows"], b["token_pair"], b["token_pairs"], out, first_block, sizes.blocks)
        constants = (g.hidden_size, g.top_k, BLOCK_H, plan.pdl)
        round.launch(combine_kernel, grid, arguments, constants, 4)
    elif plan.down.split > 1:
        constants = (g.hidden_size, plan.down.split, BLOCK_H, plan.pdl)
        round.launch(combine_splits_kernel, grid, (b["rows"], out, sizes.tokens), constants, 4)
