"""Words in PTX, carried out or refused."""

import pytest

pytest.importorskip("triton")

from blockmoe.operator import ptx  # noqa: E402
from blockmoe.operator.ahead import ahead  # noqa: E402

SAY = "\tmov.b32 %r1, %r2; /* blockmoe: {} */\n\t// end inline asm\n"
LOAD = (
    "\t@%p31 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%r387], [%rd4, {%r3342, %r388}], [%r381];\n"
)
ARRIVE = "\t@%p160 mbarrier.arrive.shared::cta.b64 _, [%r2125];\n"


def test_a_load_for_both():
    got = ptx.heard(SAY.format("multicast") + "$L__tmp16:\n" + LOAD + LOAD)
    first, second = (line for line in got.splitlines() if "cp.async" in line)
    assert "complete_tx::bytes.multicast::cluster [%r387], [%rd4, {%r3342, %r388}], [%r381], both;" in first and "@%p31" in first
    assert second + "\n" == LOAD


def test_an_arrival_in_both():
    got = ptx.heard(SAY.format("both") + ARRIVE)
    assert ARRIVE.strip() in got
    assert "mapa.shared::cluster.u32 there, %r2125, other; @%p160 mbarrier.arrive.shared::cluster.b64 _, [there];" in got


WAIT = "\twaitLoop:\n\tmbarrier.try_wait.parity.shared.b64 complete, [%r2299], %r2300;\n"
PRODUCT = "\twgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r1}, %rd1, %rd2, 0, 1, 1;\n"


@pytest.mark.parametrize("operation", [WAIT, PRODUCT])
def test_warps_apart(operation):
    text = SAY.format("apart") + "$L__tmp16:\n\tbar.sync \t2, 128;\n" + operation + "\tbar.sync \t2, 128;\n"
    assert ptx.heard(text) == text.replace("\tbar.sync \t2, 128;\n", "", 1)


def test_nothing_said():
    assert ptx.heard(LOAD + ARRIVE) == LOAD + ARRIVE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SAY.format("both") + LOAD, "both stands before '@%p31 cp.async"),
        (SAY.format("multicast") + ARRIVE, "multicast stands before '@%p160 mbarrier.arrive"),
        (SAY.format("multicast") + LOAD.replace(".2d", ".3d"), "multicast stands before"),
        (SAY.format("both") + "\t@%p1 bra $L__BB0_7;\n" + ARRIVE, "both stands before '@%p1 bra"),
        (SAY.format("both") + "$L__BB0_7:\n" + ARRIVE, "both stands before '$L__BB0_7:'"),
        (SAY.format("both") * 2 + ARRIVE, "both stands before both"),
        (SAY.format("both"), "both stands before nothing"),
        (SAY.format("apart") + WAIT, "apart stands before 'mbarrier.try_wait"),
        (SAY.format("apart") + PRODUCT, "apart stands before 'wgmma.mma_async"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ptx.Unexpected) as caught:
        ptx.heard(text)
    assert str(caught.value).startswith(message)


LOOP = """\
	mov.b32 	%r9, 0;
$L__BB0_2:
	shl.b32 	%r1, %r9, 14;
	add.s32 	%r2, %r8, %r1;
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
    assert first.splitlines()[0] == "\tbar.sync \t15, 256;" and sorted(set(got.splitlines())) == sorted(set(LOOP.splitlines()))
    assert [made for line in then.splitlines() for made in MADE if made in line] == MADE


def test_other_loops_stay():
    text = LOOP.replace("wgmma.mma_async", "mma.sync")
    assert ahead(text) == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ret;\n", "ret;\n\t@%p4 bra \t$L__BB0_2;\n", "come by in another way"),
        ("	mov.b32 	%r9, 0;\n", "	bra.uni 	$L__BB0_9;\n", "come by in another way"),
        ("	fma.rn.f32 	%r12, %r4", "	fma.rn.f32 	%r12, %r2", "is read when the next stage is known"),
        ("	fma.rn.f32 	%r12,", "	mov.b32 	%r8, 1;\n	fma.rn.f32 	%r12,", "one stage expected"),
        ("	selp.b32 	%r9, 0, %r5, %p2;\n", "", "one stage expected"),
        ("	fma.rn.f32 	%r12,", "	mov.b32 	%r3, 1;\n	fma.rn.f32 	%r12,", "is made more than once"),
        ("%rd3, %rd3, %p1, 1, 1;\n	ld", "%rd3, %rd3, %p1, 1, 1;\n$L__BB0_3:\n	ld", None),
        ("	ret;\n", "	st.shared.b32 [%r2], %r12;\n	ret;\n", "read elsewhere"),
        ("	shl.b32 	%r1,", "	ld.shared.b32 	%r13, [%r2];\n	shl.b32 	%r1,", "before it is made"),
        ("	add.s64 	%rd3, %rd1, 46", "	add.s32 	%r9, %r9, 1;\n	add.s64 	%rd3, %rd1, 46", "one stage expected"),
        ("	bar.sync 	15, 256;\n", "	{ .reg .pred p; setp.ne.s32 p, %r7, 0; mov.b32 %r8, 0; }\n", "one stage expected"),
        ("	bar.sync 	15, 256;\n", "	shfl.sync.bfly.b32 	%r7|%p8, %r6, 1, 31, -1;\n	bar.sync 	15, 256;\n", ""),
        ("	mov.b32 	%r9, 0;\n", "	brx.idx 	%r7, $L_table;\n", "come by in another way"),
        ("	mov.b32 	%r9, 0;\n", "$L_table: .branchtargets $L__BB0_1, $L__BB0_2, $L__BB0_4;\n", "come by in another way"),
        ("	add.s32 	%r2, %r8, %r1;\n", "	add.cc.s32 	%r2, %r8, %r1;\n", "one stage expected"),
    ],
)  # fmt: skip
def test_unknown_loops_are_refused(old, new, message):
    assert old in LOOP
    text = LOOP.replace(old, new)
    if message is None:  # of several blocks: none that is looked at
        assert ahead(text) == text
    elif not message:  # two results, neither of which descriptors follow from
        assert ahead(text) != text
    else:
        with pytest.raises(ptx.Unexpected, match=message):
            ahead(text)
