"""What other Tritons than the one that ran on a GPU get."""

import pytest

triton = pytest.importorskip("triton")

from blockmoe.geometry import HEADLINE  # noqa: E402
from blockmoe.operator import pipeline, route, versions  # noqa: E402
from blockmoe.operator.plan import choose_plan, plans  # noqa: E402


@pytest.mark.parametrize(
    ("version", "known", "gluon"),
    [("3.6.0", True, True), ("3.6.1", False, True), ("3.8.0+git1", False, True), ("3.9.0", False, False), ("4.0.0", False, False)],
)
def test_what_is_used(monkeypatch, version, known, gluon):
    monkeypatch.setattr(triton, "__version__", version)
    versions.require_triton()
    assert (versions.known(), versions.gluon()) == (known, gluon)


def test_too_old(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(RuntimeError, match=r"triton: expected 3\.6 or newer, got 3\.5"):
        versions.require_triton()


@pytest.mark.parametrize("tokens", [1, 7, 60, 901, 14107])
def test_a_warp_chooses_only_where_it_is_known_to_have_all_experts(monkeypatch, tokens):
    """Later Tritons spread a token's experts over several warps: keys of other tokens would be chosen from."""
    plan = choose_plan(HEADLINE, tokens)

    def by_warp() -> list[bool]:
        place = route.route_kernel.arg_names.index("BY_WARP") - route.route_kernel.arg_names.index("NUM_EXPERTS")
        return [launch.constants[place] for launch in pipeline.stages(HEADLINE, tokens, plan, 0, 1.0)["route"][:1]]

    assert by_warp() == [True]
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    assert by_warp() == [False]


def test_without_gluon_plans_need_none():
    assert {plan.path for plan in plans(HEADLINE, tma=False)} == {"dense", "sorted", "wide"}
