"""The steps around DeepGEMM's two grouped products, in Triton: routing, gather, SwiGLU with quantisation, combination.

For T tokens, E experts of which L are local, H hidden and I intermediate columns:

    route              logits [T, E] float32, bias [E] bfloat16 -> per (token, slot): local expert or -1, its position among
                       the expert's pairs, its weight, all [T, TOP_K]; pairs of each expert, counts [L]
    gather             hidden [T, H] e4m3, scales [H/128, T] -> rows, row scales
    swiglu_quantise    GEMM1 out [rows, 2I] bfloat16 (up, then gate) -> codes [rows, I] e4m3, code scales
    combine            GEMM2 out [rows, H] bfloat16 -> output [T, H] bfloat16

Row r of a pair (expert e, position p) is e * max_rows + p in the masked layout; in the contiguous one experts follow each
other, each at a multiple of ALIGN rows. Scales are MN-major, as the products want them: [L, K/128, max_rows] masked,
[K/128, row_bound] contiguous. Only local pairs have rows; positions come from an atomic counter, so that a row's place may
change from call to call but not the order of any sum.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128  # one scale stands for 1x128 of an activation row
COLUMNS = 1024  # of a row, by one program of gather and combine: 7 programs a token at H = 7168


@triton.jit(do_not_specialize=["tokens", "offset", "factor"])
def route_kernel(
    logits, bias, experts, positions, weights, counts, tokens, offset, factor,
    E: tl.constexpr, L: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One token a program. Ties go to the lower index; a NaN logit counts as -inf."""
    token = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    index = group[:, None] * SIZE + member[None, :]  # [GROUPS, SIZE]
    logit = tl.load(logits + token * E + index)
    logit = tl.where(logit == logit, logit, float("-inf"))
    score = 1.0 / (1.0 + tl.exp(-logit))
    biased = score + tl.load(bias + index).to(tl.float32)

    first = tl.max(biased, 1)
    first_member = tl.min(tl.where(biased == first[:, None], member[None, :], SIZE), 1)
    second = tl.max(tl.where(member[None, :] == first_member[:, None], float("-inf"), biased), 1)
    best_two = first + second  # [GROUPS]
    column = tl.reshape(best_two, (GROUPS, 1))
    line = tl.reshape(best_two, (1, GROUPS))
    ahead = (line > column) | ((line == column) & (group[None, :] < group[:, None]))
    kept = tl.sum(ahead.to(tl.int32), 1) < TOP_GROUPS
    biased = tl.where(kept[:, None], biased, float("-inf"))

    slots = tl.arange(0, TOP_K)
    chosen = tl.zeros((TOP_K,), tl.int32)
    share = tl.zeros((TOP_K,), tl.float32)
    for slot in range(TOP_K):
        best = tl.max(tl.max(biased, 1), 0)
        # an expert that was chosen or dropped is at -inf, below every finite sum
        expert = tl.min(tl.min(tl.where(biased == best, index, E), 1), 0)
        share = tl.where(slots == slot, tl.sum(tl.sum(tl.where(index == expert, score, 0.0), 1), 0), share)
        chosen = tl.where(slots == slot, expert, chosen)
        biased = tl.where(index == expert, float("-inf"), biased)
    share = share / (tl.sum(share, 0) + 1e-20) * factor

    local = chosen - offset
    here = (local >= 0) & (local < L)
    position = tl.atomic_add(counts + local, tl.full((TOP_K,), 1, tl.int32), mask=here)
    pair = token * TOP_K + slots
    tl.store(experts + pair, tl.where(here, local, -1))
    tl.store(positions + pair, position, mask=here)
    tl.store(weights + pair, share)


@triton.jit
def first_rows(counts, L: tl.constexpr, ALIGN: tl.constexpr):
    """Where each expert's rows begin in the contiguous layout, [L]."""
    count = tl.load(counts + tl.arange(0, L))
    padded = (count + ALIGN - 1) // ALIGN * ALIGN
    return tl.cumsum(padded, 0) - padded


@triton.jit
def row_of(expert, position, starts, max_rows, L: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        row = expert.to(tl.int64) * max_rows + position
    else:
        row = tl.sum(tl.where(tl.arange(0, L) == expert, starts, 0), 0).to(tl.int64) + position
    return row


@triton.jit
def scale_place(expert, position, row, block, bound, K_BLOCKS: tl.constexpr, MASKED: tl.constexpr):
    """bound: max_rows in the masked layout, row_bound in the contiguous one."""
    return (expert.to(tl.int64) * K_BLOCKS + block) * bound + position if MASKED else block.to(tl.int64) * bound + row


@triton.jit(do_not_specialize=["tokens", "bound"])
def gather_kernel(
    hidden, hidden_scale, experts, positions, counts, rows, row_scales, ends, tokens, bound,
    L: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Reads a part of a token once, writes it to each of its rows. The first program also writes where experts' rows end."""
    token = tl.program_id(0).to(tl.int64)
    starts = first_rows(counts, L, ALIGN)
    if not MASKED:  # noqa: SIM102  (a constant and a value: no `and` of the two)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(ends + tl.arange(0, L), starts + tl.load(counts + tl.arange(0, L)))
    local = tl.max(tl.load(experts + token * TOP_K + tl.arange(0, TOP_K)), 0)
    if local >= 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        block = tl.program_id(1) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
        values = tl.load(hidden + token * H + column)
        scales = tl.load(hidden_scale + block.to(tl.int64) * tokens + token)
        for slot in range(TOP_K):
            expert = tl.load(experts + token * TOP_K + slot)
            if expert >= 0:
                position = tl.load(positions + token * TOP_K + slot)
                row = row_of(expert, position, starts, bound, L, MASKED)
                tl.store(rows + row * H + column, values)
                tl.store(row_scales + scale_place(expert, position, row, block, bound, H // BLOCK, MASKED), scales)


@triton.jit(do_not_specialize=["bound"])
def swiglu_quantise_kernel(
    x, experts, positions, counts, codes, scales, bound,
    L: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The rows of one token, BLOCKS blocks of each."""
    token = tl.program_id(0).to(tl.int64)
    local = tl.max(tl.load(experts + token * TOP_K + tl.arange(0, TOP_K)), 0)
    if local >= 0:
        starts = first_rows(counts, L, ALIGN)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
        for slot in range(TOP_K):
            expert = tl.load(experts + token * TOP_K + slot)
            if expert >= 0:
                position = tl.load(positions + token * TOP_K + slot)
                row = row_of(expert, position, starts, bound, L, MASKED)
                up = tl.load(x + row * (2 * I) + column).to(tl.float32)
                gate = tl.load(x + row * (2 * I) + I + column).to(tl.float32)
                c = gate * tl.sigmoid(gate) * up
                scale = tl.maximum(tl.max(tl.abs(c), 1), 1e-10) / 448.0
                tl.store(codes + row * I + column, (c / scale[:, None]).to(codes.dtype.element_ty))
                tl.store(scales + scale_place(expert, position, row, block, bound, I // BLOCK, MASKED), scale)


@triton.jit(do_not_specialize=["bound"])
def combine_kernel(
    result, experts, positions, counts, weights, output, bound,
    L: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weighted sum over a token's rows in the order of its slots; zeros where it has none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    local = tl.max(tl.load(experts + token * TOP_K + tl.arange(0, TOP_K)), 0)
    if local >= 0:
        starts = first_rows(counts, L, ALIGN)
        for slot in range(TOP_K):
            expert = tl.load(experts + token * TOP_K + slot)
            if expert >= 0:
                position = tl.load(positions + token * TOP_K + slot)
                row = row_of(expert, position, starts, bound, L, MASKED)
                total += tl.load(weights + token * TOP_K + slot) * tl.load(result + row * H + column).to(tl.float32)
    tl.store(output + token * H + column, total.to(tl.bfloat16))


def route(logits, bias, offset: int, factor: float, p, groups: int, top_groups: int) -> None:
    tokens, experts = logits.shape
    p.counts.zero_()
    route_kernel[(tokens,)](
        logits, bias, p.experts, p.positions, p.weights, p.counts, tokens, offset, factor,
        E=experts, L=len(p.counts), GROUPS=groups, TOP_GROUPS=top_groups, TOP_K=p.experts.shape[1], num_warps=1,
    )  # fmt: skip


def gather(hidden: torch.Tensor, hidden_scale: torch.Tensor, p) -> None:
    tokens, size = hidden.shape
    gather_kernel[(tokens, size // COLUMNS)](
        hidden, hidden_scale, p.experts, p.positions, p.counts, p.rows, p.row_scales, p.ends, tokens, p.bound,
        L=len(p.counts), H=size, TOP_K=p.experts.shape[1], COLUMNS=COLUMNS, BLOCK=BLOCK, ALIGN=p.align, MASKED=p.masked,
        num_warps=2,
    )  # fmt: skip


def swiglu_quantise(tokens: int, p) -> None:
    middle = p.codes.shape[-1]
    blocks = 16 if tokens > 256 else 2  # few tokens: more programs than SMs
    swiglu_quantise_kernel[(tokens, middle // (BLOCK * blocks))](
        p.gate_up, p.experts, p.positions, p.counts, p.codes, p.code_scales, p.bound,
        L=len(p.counts), I=middle, TOP_K=p.experts.shape[1], BLOCK=BLOCK, BLOCKS=blocks, ALIGN=p.align, MASKED=p.masked,
        num_warps=4,
    )  # fmt: skip


def combine(output: torch.Tensor, p) -> None:
    tokens, size = output.shape
    combine_kernel[(tokens, size // COLUMNS)](
        p.result, p.experts, p.positions, p.counts, p.weights, output, p.bound,
        L=len(p.counts), H=size, TOP_K=p.experts.shape[1], COLUMNS=COLUMNS, ALIGN=p.align, MASKED=p.masked, num_warps=4,
    )  # fmt: skip
