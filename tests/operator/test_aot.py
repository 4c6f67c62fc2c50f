"""Every kernel of every plan compiles for Hopper and Blackwell without a GPU; on Hopper with wgmma and without spills."""

import pytest

pytest.importorskip("triton")

import aot  # noqa: E402
from layer import SHARED_LIMIT  # noqa: E402

from blockmoe.geometry import HEADLINE, MoEGeometry  # noqa: E402
from blockmoe.operator.plan import choose_plan, plans  # noqa: E402

RENORMALIZE = MoEGeometry(512, 128, 10, 2048, 512, "renormalize")


def launches(g: MoEGeometry, found) -> dict:
    """By name and constants, so that each compiles once."""
    each = [launch for plan in found for launch in aot.launches(g, 1, plan)]
    return {launch.key: launch for launch in each}


HOPPER = launches(HEADLINE, [*plans(HEADLINE), choose_plan(HEADLINE, 14107, clusters=False), choose_plan(HEADLINE, 901, tma=False)])
HOPPER |= launches(RENORMALIZE, [choose_plan(RENORMALIZE, 100)])
BLACKWELL = launches(HEADLINE, [choose_plan(HEADLINE, t, capability=100) for t in (1, 80, 8192)])


@pytest.mark.parametrize("key", HOPPER, ids=lambda key: f"{key[0]}-{'x'.join(str(c) for c in key[1])}")
def test_hopper(key):
    usage = aot.compiled(HOPPER[key], 90)
    # the persistent kernels keep a few arguments of their warps on the stack, and a counter a stage
    assert usage.stack <= {"prefill_kernel": 64, "stream_kernel": 8}.get(usage.kernel, 0)
    assert usage.registers <= 255 and usage.shared <= SHARED_LIMIT
    if usage.kernel.startswith(("gate_up", "down", "prefill", "stream")):
        assert "QGMMA" in usage.sass and "HMMA" not in usage.sass.replace("QGMMA", "")
    if HOPPER[key].cluster > 1:
        assert "UTMALDG.2D.MULTICAST" in usage.sass and "SYNCS.ARRIVE.TRANS64.RED" in usage.sass


@pytest.mark.parametrize("key", BLACKWELL, ids=lambda key: f"{key[0]}-{'x'.join(str(c) for c in key[1])}")
def test_blackwell(key):
    usage = aot.compiled(BLACKWELL[key], 100)
    if usage.kernel.startswith(("gate_up", "down")):
        assert "UTC" in usage.sass  # tcgen05
