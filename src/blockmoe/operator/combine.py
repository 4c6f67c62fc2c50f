"""The output's last sum, in a fixed order: over a token's pairs, or over the partial sums of a split dense GEMM2.

out[t, h] = sum over n < token_pairs[t] of rows[token_pair[t, n], h]      (routing weights are already in the rows)
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.geometry import BLOCK
from blockmoe.operator.kernel_parts import after_previous_kernel
from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.workspace import Round

BLOCK_H = 1024  # columns a program: 8 bf16 a thread of 4 warps, a 16-byte load


@triton.jit(do_not_specialize=["first_block", "blocks"])
def combine_kernel(
    rows, token_pair, token_pairs, out, first_block, blocks,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    columns = blocks * 128
    parts = tl.cdiv(columns, BLOCK_H)
    token = (tl.program_id(0) // parts).to(tl.int64)
    h = (tl.program_id(0) % parts) * BLOCK_H + tl.arange(0, BLOCK_H)
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
    PARTS: tl.constexpr = tl.cdiv(HIDDEN, BLOCK_H)
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    h = (tl.program_id(0) % PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for n in tl.static_range(SPLIT):
        sums += tl.load(rows + (n * tokens + token) * HIDDEN + h, mask=h < HIDDEN, other=0.0)
    tl.store(out + token * HIDDEN + h, sums.to(out.dtype.element_ty), mask=h < HIDDEN)


def combine(out: Slot, first_block: int, round: Round) -> list[Launch]:
    """The sum; nothing where a dense GEMM2 wrote the output itself."""
    g, plan, sizes, b = round.geometry, round.plan, round.sizes, round.memory
    programs = sizes.tokens * -(-sizes.blocks * BLOCK // BLOCK_H)
    if plan.path != "dense":
        arguments = (b["rows"], b["token_pair"], b["token_pairs"], out, first_block, sizes.blocks)
        return [round.launch(combine_kernel, programs, arguments, (g.hidden_size, g.top_k, BLOCK_H, plan.pdl), 4)]
    if plan.down.split == 1:
        return []
    constants = (g.hidden_size, plan.down.split, BLOCK_H, plan.pdl)
    return [round.launch(combine_splits_kernel, programs, (b["rows"], out, sizes.tokens), constants, 4)]
