"""Of the experts that a token has pairs with, a lane each, which come before: PTX, by one vote of the warp instead of a scan of five steps.

Triton's scans would do, and do where a lane is not known to have an expert (`place_kernel`'s BALLOTS).
"""

from __future__ import annotations

import triton
import triton.language as tl

# $1: a row, -1 where the token has none with this expert
UP_TO_HERE = tl.constexpr("""{
.reg .pred p;
.reg .b32 all, lower;
setp.ge.s32 p, $1, 0;
vote.sync.ballot.b32 all, p, 0xffffffff;
mov.u32 lower, %lanemask_le;
and.b32 lower, all, lower;
popc.b32 $0, lower;
}""")
EARLIER = tl.constexpr("""{
.reg .pred p;
.reg .b32 all, lower, at;
setp.ge.s32 p, $1, 0;
vote.sync.ballot.b32 all, p, 0xffffffff;
mov.u32 lower, %lanemask_lt;
and.b32 lower, all, lower;
bfind.u32 at, lower;
shfl.sync.idx.b32 $0, $1, at, 31, 0xffffffff;
setp.eq.s32 p, lower, 0;
@p mov.b32 $0, -1;
}""")


@triton.jit
def pairs_up_to_here(row):
    """How many of a token's `row` [32 experts, ...], an expert a lane, are rows (not -1), of the experts up to each."""
    return tl.inline_asm_elementwise(UP_TO_HERE, "=&r,r", [row], tl.int32, is_pure=False, pack=1)


@triton.jit
def earlier_row(row):
    """Of a token's `row` [32 experts, ...], an expert a lane, that of the last expert before each that has one (not -1), else -1."""
    return tl.inline_asm_elementwise(EARLIER, "=&r,r", [row], tl.int32, is_pure=False, pack=1)
