"""A loop of products in PTX, whose descriptors are made ahead, or which is refused."""

import pytest

from blockmoe.operator.ahead import Unexpected, ahead

LOOP = """\
	mov.b32 	%r9, 0;
$L__BB0_2:
	shl.b32 	%r1, %r9, 14;
	add.s32 	%r2, %r8, %r1;
	mov.b32 %r6, %r7; /* blockmoe: apart */
	bar.sync 	15, 256;
	bfe.u32 	%r3, %r2, 4, 14;
	cvt.u64.u32 	%rd1, %r3;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r10,%r11}, %rd2, %rd2, 0, 1, 1;
	add.s64 	%rd3, %rd1, 4611686293305294850;
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r10,%r11}, %rd3, %rd3, %p1, 1, 1;
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r10,%r11}, %rd3, %rd3, %p1, 1, 1;
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r10,%r11}, %rd3, %rd3, %p1, 1, 1;
	ld.shared.b32 	%r4, [%r2+16];
	setp.eq.b32 	%p2, %r9, 3;
	selp.b32 	%r9, 0, %r5, %p2;
	fma.rn.f32 	%r12, %r4, %r10, %r12;
	@%p3 bra 	$L__BB0_2;
	ret;
"""
MADE = ["shl.b32 \t%r1", "add.s32 \t%r2", "bfe.u32 \t%r3", "cvt.u64.u32 \t%rd1", "or.b64 \t%rd2", "add.s64 \t%rd3"]


def test_descriptors_are_made_before_the_loop_and_behind_the_stage():
    got = ahead(LOOP)
    before, _, rest = got.partition("$L__BB0_2:\n")
    first, _, then = rest.partition("\tselp.b32 \t%r9, 0, %r5, %p2;\n")
    for made in MADE:
        assert before.count(made) == then.count(made) == 1 and made not in first
    assert first.splitlines()[:2] == ["\tmov.b32 %r6, %r7; /* blockmoe: apart */", "\tbar.sync \t15, 256;"]
    assert sorted(set(got.splitlines())) == sorted(set(LOOP.splitlines()))
    assert [made for line in then.splitlines() for made in MADE if made in line] == MADE


@pytest.mark.parametrize(("old", "new"), [
    ("wgmma.mma_async", "mma.sync"), ("/* blockmoe: apart */", ""), ("	ld.shared", "$L__BB0_3:\n	ld.shared"),
])  # fmt: skip
def test_loops_without_products_or_words_and_of_several_blocks_stay(old, new):
    text = LOOP.replace(old, new)
    assert ahead(text) == text != LOOP


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ret;\n", "ret;\n\t@%p4 bra \t$L__BB0_2;\n", "come by in another way"),
        ("	mov.b32 	%r9, 0;\n", "	bra.uni 	$L__BB0_9;\n", "come by in another way"),
        ("	fma.rn.f32 	%r12, %r4", "	fma.rn.f32 	%r12, %r2", "is read when the next stage is known"),
        ("	fma.rn.f32 	%r12,", "	mov.b32 	%r8, 1;\n	fma.rn.f32 	%r12,", "one stage expected"),
        ("	selp.b32 	%r9, 0, %r5, %p2;\n", "", "one stage expected"),
        ("	fma.rn.f32 	%r12,", "	mov.b32 	%r3, 1;\n	fma.rn.f32 	%r12,", "is made more than once"),
        ("	ret;\n", "	st.shared.b32 [%r2], %r12;\n	ret;\n", "read elsewhere"),
        ("	shl.b32 	%r1,", "	ld.shared.b32 	%r13, [%r2];\n	shl.b32 	%r1,", "before it is made"),
        ("	add.s64 	%rd3, %rd1, 46", "	add.s32 	%r9, %r9, 1;\n	add.s64 	%rd3, %rd1, 46", "one stage expected"),
        ("	bar.sync 	15, 256;\n", "	{ .reg .pred p; setp.ne.s32 p, %r7, 0; mov.b32 %r8, 0; }\n", "one stage expected"),
        ("	bar.sync 	15, 256;\n", "	shfl.sync.bfly.b32 	%r7|%r8, %r6, 1, 31, -1;\n", "one stage expected"),
        ("	mov.b32 	%r9, 0;\n", "	brx.idx 	%r7, $L_table;\n", "come by in another way"),
        ("	mov.b32 	%r9, 0;\n", "$L_table: .branchtargets $L__BB0_1, $L__BB0_2, $L__BB0_4;\n", "come by in another way"),
        ("	add.s32 	%r2, %r8, %r1;\n", "	add.cc.s32 	%r2, %r8, %r1;\n", "one stage expected"),
    ],
)  # fmt: skip
def test_unknown_loops_are_refused(old, new, message):
    assert old in LOOP
    with pytest.raises(Unexpected, match=message):
        ahead(LOOP.replace(old, new))
