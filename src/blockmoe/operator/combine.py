"""The output's last sum, in a fixed order: over a token's pairs, or over the partial sums of a split dense GEMM2.

out[slot_token[s], h] = sum over n < token_pairs[s] of rows[token_pair[s, n], h]      (routing weights are already in the rows)
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockmoe.geometry import BLOCK
from blockmoe.operator.kernel_parts import after_previous_kernel
from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.workspace import Round

BLOCK_H = 1024  # columns a program: 8 bf16 a thread of 4 warps, a 16-byte load


@triton.jit(do_not_specialize=["tokens", "first_block", "blocks"])
def combine_kernel(
    rows, token_pair, token_pairs, slot_token, out, tokens, first_block, blocks,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(PDL)
    columns = blocks * 128
    parts = tl.cdiv(columns, BLOCK_H)
    slot = (tl.program_id(0) // parts) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = (tl.program_id(0) % parts) * BLOCK_H + tl.arange(0, BLOCK_H)
    there = (slot < tokens)[:, None] & (h < columns)[None, :]
    token = tl.load(slot_token + slot, mask=slot < tokens, other=0)
    count = tl.load(token_pairs + slot, mask=slot < tokens, other=0)
    sums = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for n in tl.static_range(TOP_K):
        pair = tl.load(token_pair + slot * TOP_K + n, mask=n < count, other=0).to(tl.int64)
        sums += tl.load(rows + pair[:, None] * columns + h[None, :], mask=there & (n < count)[:, None], other=0.0).to(tl.float32)
    at = out + token.to(tl.int64)[:, None] * HIDDEN + first_block * 128 + h[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=there)


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
    if plan.path != "dense":
        # T = 14107: a token and at most 1024 of a round's 512 columns a program took 331 us, 2.3 times its bytes' time
        block_t, block_h = (4, 512) if plan.path == "wide" else (1 if plan.gate_up.block_n == 16 else 2, BLOCK_H)
        programs = -(-sizes.tokens // block_t) * -(-sizes.blocks * BLOCK // block_h)
        arguments = (b["rows"], b["token_pair"], b["token_pairs"], b["slot_token"], out, sizes.tokens, first_block, sizes.blocks)
        return [round.launch(combine_kernel, programs, arguments, (g.hidden_size, g.top_k, block_t, block_h, plan.pdl), 4)]
    if plan.down.split == 1:
        return []
    programs = sizes.tokens * -(-g.hidden_size // BLOCK_H)
    constants = (g.hidden_size, plan.down.split, BLOCK_H, plan.pdl)
    return [round.launch(combine_splits_kernel, programs, (b["rows"], out, sizes.tokens), constants, 4)]
