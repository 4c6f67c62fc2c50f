"""The plan: legal and bounded for every T, and the workspace it needs."""

import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from blockmoe.geometry import GEOMETRIES, HEADLINE, MoEGeometry
from blockmoe.operator.machine import H100, H200, Machine, of_gpu
from blockmoe.operator.plan import CLUSTER_ROWS, EITHER_ROWS, PREFILL_ROWS, PrefillTile, StreamTile, choose_plan, plans, tiles_of

pytest.importorskip("triton")
from blockmoe.operator.pipeline import stages  # noqa: E402
from blockmoe.operator.stream.layer import split_of  # noqa: E402
from blockmoe.operator.stream.units import SPLIT_TILES  # noqa: E402
from blockmoe.operator.workspace import SPLIT_PAIRS, counters, layout, sizes, slots, workspace_size  # noqa: E402


@pytest.mark.parametrize("machine", [Machine(capability=89), H100, H200, Machine(capability=100)], ids=str)
@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=lambda g: g.definition_name[20:])
def test_every_token_count_has_one_of_few_plans(g, machine):
    known = set(plans(g, machine))
    assert len(known) <= 15
    thresholds = [-(-rows * g.num_experts // g.top_k) for rows in (PREFILL_ROWS, CLUSTER_ROWS, EITHER_ROWS)]
    for tokens in [*range(1, 300), 901, 4096, 4097, 8192, 8193, 11948, 14107, 16384, *thresholds, *(t - 1 for t in thresholds)]:
        plan = choose_plan(g, tokens, machine)
        assert plan in known
        assert plan.path != "dense" or tokens <= plan.gate_up.block_n


@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=lambda g: g.definition_name[20:])
def test_routing_tiles_hold_their_tokens(g):
    for tokens in [1, 2, 7, 8, 9, 512, 513, 901, 2048, 2049, 4096, 4097, 8192, 8193, 14107, 16384]:
        plan = choose_plan(g, tokens)
        tile, found = plan.route, sizes(g, tokens, plan)
        most = max(found.first_tokens, found.other_tokens)
        assert most <= tile.block_t if tile.one_launch else most <= tile.place_t or not tile.once


@pytest.mark.parametrize("sm_count", [20, 66, 108, 132, 148, 300])
def test_chunks_share_all_tokens(sm_count):
    some = (17, 200, 901, 2048, 2049, 2112, 2113, 4096, 4097, 4223, 4224, 5000, 8192, 8193, 11948, 14107, 16383, 16384)
    for g, tokens in product(GEOMETRIES.values(), some):
        plan = choose_plan(g, tokens, Machine(sm_count))
        found = sizes(g, tokens, plan)
        counts = [found.first_tokens if chunk < found.first_chunks else found.other_tokens for chunk in range(found.chunks)]
        assert sum(counts[:-1]) < tokens <= sum(counts) and found.chunks <= plan.route.chunks
        assert 0 <= found.other_tokens <= found.first_tokens


def test_what_is_sorted_at_a_time():
    """No more than a chunk may have; up to 4,096 tokens it has what is chosen for at a time."""
    found = {t: choose_plan(HEADLINE, t).route for t in (240, 241, 960, 961, 2048, 2049, 4096, 4097, 8192, 8193)}
    assert {t: (r.block_t, r.place_t, r.once, r.chunks, r.first) for t, r in found.items()} == {
        240: (4, 4, True, 128, 0), 241: (8, 8, True, 128, 0), 960: (8, 8, True, 128, 0), 961: (16, 16, True, 128, 0),
        2048: (16, 16, True, 128, 0), 2049: (16, 16, True, 256, 0), 4096: (16, 16, True, 256, 0), 4097: (16, 32, True, 256, 132),
        8192: (16, 32, True, 256, 132), 8193: (16, 64, True, 256, 132),
    }  # fmt: skip


@pytest.mark.parametrize("machine", [H100, H200], ids=str)
def test_few_experts_of_many_choices(machine):
    """Of 17 to 64 tokens, whose experts may have as many rows as prefill wants, though none more than a small tile."""
    for g in (MoEGeometry(8, 8, 2, 4096, 14336), MoEGeometry(64, 64, 8, 2048, 1024), MoEGeometry(16, 16, 16, 1024, 512)):
        found = [choose_plan(g, tokens, machine) for tokens in range(17, 65)]
        assert {plan.path for plan in found} <= {"stream", "either", "prefill"}
        assert all(plan.path == "stream" for plan in found[:16]) or machine == H100


def test_paths():
    tokens = (1, 7, 8, 901, 3071, 3072)
    found = {t: choose_plan(HEADLINE, t).path for t in (1, 8, 127, 128, 14107)}
    assert found == {1: "stream", 8: "stream", 127: "stream", 128: "prefill", 14107: "prefill"}
    assert {(tile.flight, tile.many) for t in (128, 6143, 14107) for tile in [choose_plan(HEADLINE, t).gate_up]} == {(3, 72)}
    assert [choose_plan(HEADLINE, t).dense for t in (1, 16, 17)] == [True, True, False]
    assert [choose_plan(HEADLINE, t).gate_up.cluster for t in (128, 255, 256, 14107)] == [1, 1, 2, 2]
    assert choose_plan(HEADLINE, 14107, clusters=False).gate_up.cluster == 1
    for capability in (89, 100, 120):
        found = [choose_plan(HEADLINE, t, Machine(capability=capability)).path for t in tokens]
        assert found == ["dense", "dense", "sorted", "sorted", "sorted", "wide"]
    assert [choose_plan(HEADLINE, t, tma=False).path for t in tokens] == ["dense", "dense", "sorted", "sorted", "sorted", "wide"]


def test_little_shared_memory_means_fewer_stages():
    """Of the tallest tiles of GEMM1 alone, and in the same workspace."""
    for capability in (89, 120):
        for t in (1, 4, 5, 7, 8, 192, 193, 448, 449, 1536, 1537, 3071, 3072, 14107):
            much, little = (choose_plan(HEADLINE, t, Machine(capability=capability, shared=kib << 10)) for kib in (227, 99))
            tall = much.gate_up.block_i == 128 and much.path != "wide"
            assert little == (replace(much, gate_up=replace(much.gate_up, stages=3)) if tall else much)
            assert tall == (t in (5, 7, 449, 1536, 1537, 3071)) and layout(HEADLINE, t, little) == layout(HEADLINE, t, much)


def test_how_weights_are_asked_for():
    """By the kind of memory, which between 128 and 1,727 tokens decides more."""
    tiles = {m: [tile for t in (1, 16, 17, 127) for tile in choose_plan(HEADLINE, t, m).gate_up.ways] for m in (H100, H200)}
    asked = {m: [(tile.promotion, tile.burst, tile.flight) for tile in found] for m, found in tiles.items()}
    assert asked[H100] == [(256, 1, 3)] * 5 and asked[H200] == [(128, 1, 4)] * 2 + [(128, 2, None)] * 3
    as_others = dict(promotion=256, burst=1, flight=3)
    assert [replace(tile, **as_others) for tile in tiles[H200]] == tiles[H100]
    assert [str(choose_plan(HEADLINE, t, H200).gate_up) for t in (32, 33)] == ["256x32 6s by twos", "256x32 6s or x64 5s by twos"]
    odd = replace(HEADLINE, intermediate_size=640)  # K blocks of GEMM2
    assert choose_plan(odd, 128, H200) == choose_plan(odd, 128, H100)
    assert {(plan.gate_up.promotion, plan.gate_up.burst) for plan in plans(odd, H200) if plan.path == "stream"} == {(128, 1)}
    for t in (1728, 14107):
        assert choose_plan(HEADLINE, t, H100) == choose_plan(HEADLINE, t, H200)
    either = choose_plan(HEADLINE, 128, H200)
    assert {choose_plan(HEADLINE, t, H200).gate_up for t in (128, 901, 1727)} == {either.gate_up}
    assert str(either.gate_up) == "256x32 5s or x64 5s by twos or 128x256 4s 3 in flight, clusters of 2"
    assert [way.path for way in either.ways] == ["stream", "stream", "prefill"]
    assert choose_plan(HEADLINE, 128, H100) == replace(either.ways[2], gate_up=PrefillTile(4, 1, 3, 72, 56))
    assert choose_plan(HEADLINE, 128, H200, clusters=False).gate_up == replace(either.gate_up, prefill=PrefillTile(4, 1, 3))
    assert choose_plan(replace(HEADLINE, hidden_size=7424), 128, H200).gate_up.prefill.cluster == 1
    for t in (1, 80, 4096):
        assert choose_plan(HEADLINE, t, Machine(capability=100)) == choose_plan(HEADLINE, t, Machine(capability=100, hbm3e=True))


def test_tiles_that_cannot_ask_by_twos():
    for tile in (dict(burst=3), dict(burst=2, flight=1)):
        with pytest.raises(AssertionError):
            StreamTile(128, 32, 6, **tile)
    with pytest.raises(AssertionError, match="dense GEMM2 is two K blocks already"):
        StreamTile(64, 16, 10, dense=True, burst=2)


@pytest.mark.parametrize(("gib", "hbm3e"), [(80, False), (94, False), (96, False), (140, True), (144, True)])
def test_of_gpu(gib, hbm3e, monkeypatch):
    of_memory = dict(total_memory=gib << 30, shared_memory_per_block_optin=99 << 10)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=114, **of_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    of_gpu.cache_clear()
    try:
        assert of_gpu(0) == Machine(114, 90, hbm3e, 99 << 10) and hash(of_gpu(0)) == hash(Machine(114, 90, hbm3e, 99 << 10))
    finally:
        of_gpu.cache_clear()


UNUSUAL = [MoEGeometry(8, 8, 2, hidden, inter, "renormalize") for hidden in (128, 384, 512, 2944) for inter in (128, 256, 384, 640)]


def test_sizes_that_persistent_kernels_cannot_serve_take_others():
    for g, machine in product(UNUSUAL, (H100, H200)):
        paths = {way.path for plan in plans(g, machine) for way in plan.ways}
        assert ("stream" in paths) == (g.hidden_size % 256 == 0)
        assert ("prefill" in paths) == (g.hidden_size % 256 == 0 and g.intermediate_size >= 512)
        for tokens in (1, 8, 40, 300, 3000):
            assert stages(g, tokens, choose_plan(g, tokens, machine), 0, 1.0)


def test_a_kernel_refuses_sizes_that_it_cannot_serve():
    refused = [("stream", 40, 384, 512), ("stream", 1, 512, 384), ("stream", 40, 512, 384), ("prefill", 3000, 512, 384)]
    for (path, tokens, hidden, inter), machine in zip(refused, (H100, H100, H200, H100), strict=True):
        g = MoEGeometry(64, 64, 2, hidden, inter, "renormalize")
        plan = choose_plan(MoEGeometry(64, 64, 2, 512, 512, "renormalize"), tokens, machine)
        assert plan.path == path
        with pytest.raises(AssertionError):
            stages(g, tokens, plan, 0, 1.0)


def test_tiles_of_persistent_kernels_divide_the_sizes():
    for g, machine in product((*GEOMETRIES.values(), *UNUSUAL), (H100, H200)):
        for way in (way for plan in plans(g, machine) for way in plan.ways):
            tile = way.gate_up
            if way.path == "stream":
                assert g.intermediate_size % tile.rows == 0 == g.hidden_size % (tile.rows if tile.dense else 2 * tile.rows)
                assert not (tile.dense or tile.burst == 2) or g.intermediate_size % 256 == 0
            elif way.path == "prefill":  # a cluster's programs may have neighbouring columns
                assert g.intermediate_size >= 128 * tile.stages
                assert g.intermediate_size // 128 % tile.cluster == 0 == g.hidden_size % (256 * tile.cluster)


def test_row_bounds_hold_for_the_worst_routing():
    for tokens in (65, 500, 901, 14107):
        plan = choose_plan(HEADLINE, tokens)
        bound = sizes(HEADLINE, tokens, plan)
        assert bound.rows >= tokens * HEADLINE.top_k and bound.chunks >= tokens / 64
        even = -(-tokens * HEADLINE.top_k // HEADLINE.num_local_experts // plan.gate_up.block_n)
        assert bound.tiles >= even * HEADLINE.num_local_experts


def test_stream_has_room_for_what_routing_gives_it():
    """Of both ways: rows of GEMM2 are fewer than the worst routing's, which takes prefill."""
    plan, draw = choose_plan(HEADLINE, 901, H200), random.Random(0)
    rows = layout(HEADLINE, 901, plan)[0]["rows"][1] // HEADLINE.hidden_size
    drawn = [[draw.randint(0, draw.randint(1, 140)) for _ in range(32)] for _ in range(300)]
    lists = [[64] * 24 + [128] * 8, [80] + [0] * 31, [64] * 32, *drawn]
    found = [(plan.way(pairs).path, sum(pairs)) for pairs in lists]
    assert {path for path, _ in found} == {"stream", "prefill"} and found[0] == ("stream", rows)
    assert all(count <= rows for path, count in found if path == "stream")


def test_few_tiles_of_half_the_pairs_have_room():
    """Where one expert, the only one here, takes all."""
    one = replace(HEADLINE, num_local_experts=1)
    for tokens in (128, 250, 256, 257, 300):
        plan = choose_plan(one, tokens, H200)
        few = plan.way([tokens]).gate_up.block_n == 32
        assert few == (tokens <= 256) == (plan.way([tokens]).path == "stream")
        bound, placed = sizes(one, tokens, plan), layout(one, tokens, plan)[0]
        if few:
            assert min(bound.tiles, *(placed[name][1] for name in ("tile_begin", "tile_expert", "finished"))) >= -(-tokens // 32)
            assert placed["rows"][1] >= tokens * one.hidden_size


@pytest.mark.parametrize("machine", [H100, H200, Machine(114), Machine(114, hbm3e=True), Machine(78, hbm3e=True), Machine(255, hbm3e=True)])
def test_row_blocks_are_shared_only_where_there_is_code_for_it(machine):
    """Few tiles have at most as many pairs as the products of shares of K, by any plan or a way of its own, of any size."""
    draw = random.Random(0)
    drawn = [[0] * draw.randint(0, 31) + [draw.randint(0, 70) for _ in range(draw.randint(1, 6))] for _ in range(400)]
    for g in (*GEOMETRIES.values(), replace(HEADLINE, intermediate_size=256)):
        chosen = {choose_plan(g, tokens, machine) for tokens in range(1, 1000, 7)}
        for plan in chosen | {way for several in chosen for way in several.ways}:
            if plan.path not in ("stream", "either"):
                continue
            tile = plan.gate_up if plan.path == "stream" else plan.gate_up.stream
            split = split_of(tile, g)
            apart = tile.small and tile.small.stages != tile.stages
            for pairs in drawn:
                taken = tile.way(pairs)
                if split > 1 and not (apart and taken.block_n == tile.block_n) and tiles_of(pairs, taken.block_n) <= SPLIT_TILES.value:
                    assert taken.block_n <= SPLIT_PAIRS, (str(plan), pairs)


def test_workspace():
    assert workspace_size(HEADLINE, 0) == 0
    for odd, error in ((-1, ValueError), (1.5, TypeError), ("x", TypeError), (True, TypeError)):
        with pytest.raises(error, match="^tokens: expected .*, got "):
            workspace_size(HEADLINE, odd)
    assert workspace_size(HEADLINE, 14107) <= 400e6
    for capability in (90, 100):
        needed = workspace_size(HEADLINE, 2400, capability=capability)  # a plan for fewer may want more
        for t, hbm3e in product(range(1, 2401, 7), (False, True)):
            assert layout(HEADLINE, t, choose_plan(HEADLINE, t, Machine(capability=capability, hbm3e=hbm3e)))[1] <= needed
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
