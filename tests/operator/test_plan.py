"""The plan: legal and bounded for every T, and the workspace it needs."""

import pytest

from blockmoe.geometry import GEOMETRIES, HEADLINE, MoEGeometry
from blockmoe.operator.plan import CLUSTER_ROWS, MEMORY_BOUND_ROWS, PREFILL_ROWS, choose_plan, plans

pytest.importorskip("triton")
from blockmoe.operator.pipeline import stages  # noqa: E402
from blockmoe.operator.workspace import counters, layout, sizes, slots, workspace_size  # noqa: E402


@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=lambda g: g.definition_name[20:])
def test_every_token_count_has_one_of_few_plans(g, capability):
    known = set(plans(g, capability=capability))
    assert len(known) <= 14
    thresholds = [-(-rows * g.num_experts // g.top_k) for rows in (PREFILL_ROWS, CLUSTER_ROWS, MEMORY_BOUND_ROWS)]
    for tokens in [*range(1, 300), 901, 4096, 11948, 14107, 16384, *thresholds, *(t - 1 for t in thresholds)]:
        plan = choose_plan(g, tokens, capability=capability)
        assert plan in known
        assert plan.path != "dense" or tokens <= plan.gate_up.block_n


@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=lambda g: g.definition_name[20:])
def test_routing_tiles_hold_their_tokens(g):
    for tokens in [1, 2, 7, 8, 9, 512, 513, 901, 2048, 2049, 4096, 14107, 16384]:
        plan = choose_plan(g, tokens)
        tile, chunk_tokens = plan.route, sizes(g, tokens, plan).chunk_tokens
        assert chunk_tokens <= tile.block_t if tile.one_launch else chunk_tokens <= tile.place_t or not tile.once


def test_paths():
    tokens = (1, 7, 8, 901, 3071, 3072)
    found = {t: choose_plan(HEADLINE, t).path for t in (1, 8, 127, 128, 14107)}
    assert found == {1: "stream", 8: "stream", 127: "stream", 128: "prefill", 14107: "prefill"}
    assert [choose_plan(HEADLINE, t).gate_up.flight for t in (128, 6143, 6144, 14107)] == [3, 3, 2, 2]
    assert [choose_plan(HEADLINE, t).dense for t in (1, 16, 17)] == [True, True, False]
    assert [choose_plan(HEADLINE, t).gate_up.cluster for t in (128, 255, 256, 14107)] == [1, 1, 2, 2]
    assert choose_plan(HEADLINE, 14107, clusters=False).gate_up.cluster == 1
    for capability in (89, 100, 120):
        found = [choose_plan(HEADLINE, t, capability=capability).path for t in tokens]
        assert found == ["dense", "dense", "sorted", "sorted", "sorted", "wide"]
    assert [choose_plan(HEADLINE, t, tma=False).path for t in tokens] == ["dense", "dense", "sorted", "sorted", "sorted", "wide"]


UNUSUAL = [MoEGeometry(8, 8, 2, hidden, inter, "renormalize") for hidden in (128, 384, 512, 2944) for inter in (128, 256, 384, 640)]


def test_sizes_that_persistent_kernels_cannot_serve_take_others():
    for g in UNUSUAL:
        paths = {plan.path for plan in plans(g)}
        assert ("stream" in paths) == (g.hidden_size % 256 == 0)
        assert ("prefill" in paths) == (g.hidden_size % 256 == 0 and g.intermediate_size >= 512)
        for tokens in (1, 8, 40, 300, 3000):
            assert stages(g, tokens, choose_plan(g, tokens), 0, 1.0)


def test_a_kernel_refuses_sizes_that_it_cannot_serve():
    for path, tokens, hidden, inter in (("stream", 40, 384, 512), ("stream", 1, 512, 384), ("prefill", 3000, 512, 384)):
        g = MoEGeometry(64, 64, 2, hidden, inter, "renormalize")
        plan = choose_plan(MoEGeometry(64, 64, 2, 512, 512, "renormalize"), tokens)
        assert plan.path == path
        with pytest.raises(AssertionError):
            stages(g, tokens, plan, 0, 1.0)


def test_tiles_of_persistent_kernels_divide_the_sizes():
    for g in (*GEOMETRIES.values(), *UNUSUAL):
        for plan in plans(g):
            tile = plan.gate_up
            if plan.path == "stream":
                assert g.intermediate_size % tile.rows == 0 == g.hidden_size % (tile.rows if tile.dense else 2 * tile.rows)
                assert not tile.dense or g.intermediate_size % 256 == 0
            elif plan.path == "prefill":  # a cluster's programs may have neighbouring columns
                assert g.intermediate_size >= 128 * tile.stages
                assert g.intermediate_size // 128 % tile.cluster == 0 == g.hidden_size % (256 * tile.cluster)


def test_row_bounds_hold_for_the_worst_routing():
    for tokens in (65, 500, 901, 14107):
        plan = choose_plan(HEADLINE, tokens)
        bound = sizes(HEADLINE, tokens, plan)
        assert bound.rows >= tokens * HEADLINE.top_k and bound.chunks * bound.chunk_tokens >= tokens
        even = -(-tokens * HEADLINE.top_k // HEADLINE.num_local_experts // plan.gate_up.block_n)
        assert bound.tiles >= even * HEADLINE.num_local_experts


def test_workspace():
    assert workspace_size(HEADLINE, 0) == 0
    assert workspace_size(HEADLINE, 14107) <= 400e6
    for capability in (90, 100):
        needed = workspace_size(HEADLINE, 2400, capability=capability)  # a plan for fewer may want more
        for t in range(1, 2401, 7):
            assert layout(HEADLINE, t, choose_plan(HEADLINE, t, capability=capability))[1] <= needed
    assert workspace_size(HEADLINE, 1_000_000) == workspace_size(HEADLINE, 16384)
    placed, total = layout(HEADLINE, 901, choose_plan(HEADLINE, 901))
    spans = sorted((offset, offset + count * dtype.itemsize) for offset, count, dtype in placed.values())
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)) and spans[-1][1] <= total
    assert all(offset % 256 == 0 for offset, _, _ in placed.values())


def test_counters_lie_side_by_side():
    for tokens in (1, 80, 500, 901, 14107):
        plan = choose_plan(HEADLINE, tokens)
        named, bound = slots(HEADLINE, tokens, plan), sizes(HEADLINE, tokens, plan)
        whole = named["counters"]
        each = [named[name] for name in counters(bound, plan)]
        assert each and all(whole.offset <= one.offset and one.offset + 4 * one.count <= whole.offset + 4 * whole.count for one in each)
        others = [slot for name, slot in named.items() if name not in counters(bound, plan) and name != "counters"]
        assert not any(whole.offset <= other.offset < whole.offset + 4 * whole.count for other in others)
    assert slots(HEADLINE, 901, choose_plan(HEADLINE, 901, tma=False))["counters"].count == 0
