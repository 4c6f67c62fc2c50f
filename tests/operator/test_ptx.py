"""Words in PTX, carried out or refused."""

import pytest

pytest.importorskip("triton")

from blockmoe.operator import ptx  # noqa: E402

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
