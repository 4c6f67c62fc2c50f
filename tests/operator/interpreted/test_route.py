"""Routing: the same experts and weights as the reference, in lists that agree with each other."""

from dataclasses import replace

import layer
import pytest
import torch

from blockmoe.geometry import TINY, MoEGeometry
from blockmoe.operator.launch import interpret
from blockmoe.operator.pipeline import stages
from blockmoe.operator.plan import Plan, PrefillTile, RouteTile, choose_plan
from blockmoe.operator.workspace import counters, layout, sizes, slots
from blockmoe.reference import route as reference_route

MANY = MoEGeometry(256, 32, 8, 256, 256, "deepseek_v3", 8, 4)  # in two parts where the bias is float32 too


def routed(inputs, g: MoEGeometry, offset: int, plan) -> dict[tuple[int, int], float]:
    """(token, local expert) -> weight of every pair, read from the lists; checks the lists on the way."""
    tokens = len(inputs[0])
    memory = torch.full((layout(g, tokens, plan)[1],), 255, dtype=torch.uint8)
    logits, bias = inputs[:2]
    found = stages(g, tokens, plan, offset, 2.5, logits_dtype=logits.dtype, bias_dtype=None if bias is None else bias.dtype)
    tensors = (logits, logits if bias is None else bias, *[None] * 7, memory)
    interpret(found["route"], tensors)
    lists = {name: slot.of(tensors).tolist() for name, slot in slots(g, tokens, plan).items() if slot.dtype.itemsize == 4}
    bound = sizes(g, tokens, plan)
    count = lists["tile_count"][0]
    assert count <= bound.tiles
    chosen = plan.way(layer.pairs_of(inputs, g, offset))
    if len(plan.ways) > 1:
        assert lists["way"] == [plan.ways.index(chosen)]
    height = chosen.gate_up.block_n
    every, plan = plan, chosen
    pairs, row_of = {}, {}
    tiles = list(zip(lists["tile_expert"], lists["tile_begin"], lists["tile_end"], strict=True))[:count]
    assert [t[0] for t in tiles] == sorted(t[0] for t in tiles)
    own = {expert: [t for t, tile in enumerate(tiles) if tile[0] == expert] for expert, _, _ in tiles}
    assert lists["tile_group"][:count] == [4096 * own[expert][0] + len(own[expert]) for expert, _, _ in tiles]
    assert all(not any(lists[name]) for name in counters(bound, every))
    if plan.path == "prefill":
        assert [begin for _, begin, _ in tiles] == [128 * t for t in range(count)]
    for expert, begin, end in tiles:
        assert 0 < end - begin <= height and end <= bound.rows
        listed = lists["pair_token"][begin:end]
        assert listed == sorted(listed)
        for row, token in enumerate(listed, begin):
            if lists["pair_weight"][row] != 0:
                assert (token, expert) not in pairs
                pairs[token, expert], row_of[row] = lists["pair_weight"][row], token
    if plan.path == "prefill":
        earlier, last = {}, {}  # row of the token's pair before, by row in ascending order
        for row in sorted(row_of):
            earlier[row], last[row_of[row]] = last.get(row_of[row], -1), row
        assert {row: lists["before"][row] for row in row_of} == earlier
        assert lists["token_pairs"] == [sum(t == token for t in row_of.values()) for token in range(tokens)]
    elif not plan.dense:
        listed = list(zip(lists["slot_token"], lists["token_pairs"], strict=True))
        assert sorted(token for token, _ in listed) == list(range(tokens))
        some, few = lists["slot_count"]
        assert [n > 0 for _, n in listed] == [slot < some for slot in range(tokens)]
        assert [0 < n <= max(g.top_k // 2, 1) for _, n in listed] == [slot < few for slot in range(tokens)]
        rows = [(lists["token_pair"][slot * g.top_k + n], token) for slot, (token, count) in enumerate(listed) for n in range(count)]
        assert dict(rows) == row_of and len(rows) == len(row_of)
    return pairs


def expected(inputs, g: MoEGeometry, offset: int) -> dict[tuple[int, int], float]:
    experts, weights = reference_route(inputs[0], inputs[1], g, 2.5)
    return {
        (token, expert - offset): weight
        for token, (row, shares) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True))
        for expert, weight in zip(row, shares, strict=True)
        if 0 <= expert - offset < g.num_local_experts and weight != 0
    }


def agree(inputs, g, offset, plan) -> None:
    got, want = routed(inputs, g, offset, plan), expected(inputs, g, offset)
    assert got.keys() == want.keys()
    assert all(got[pair] == pytest.approx(want[pair], rel=1e-5) for pair in want)


@pytest.mark.parametrize("name", ["dense 128 split", "sorted 64", "sorted 128"])
@pytest.mark.parametrize("g", layer.GEOMETRIES, ids=lambda g: g.definition_name[-30:])
@pytest.mark.parametrize("tokens", [1, 5, 50])
def test_as_the_reference(g, name, tokens):
    agree(layer.make(g, tokens, seed=tokens), g, min(8, g.num_experts - g.num_local_experts), layer.PLANS[name])


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("tokens", [1, 50, pytest.param(700, marks=pytest.mark.slow)])
def test_prefill(tokens, once):
    """Aligned tiles, the order of addition, how many pairs a token has."""
    plan = Plan("prefill", RouteTile(16, 16, 16, False, once), PrefillTile(4))
    g = replace(TINY, hidden_size=256, intermediate_size=512)
    agree(layer.make(g, tokens, seed=tokens), g, 8, plan)


@pytest.mark.parametrize("tile", [
    RouteTile(4, 8, 4, False, False, 8), RouteTile(16, 8, 16, False, False, 4), RouteTile(16, 64, 16, False, True, 2),
    RouteTile(4, 2, 4, False, False, 8), RouteTile(4, 16, 4, False, True, 8, 3), RouteTile(4, 2, 4, False, False, 8, 3),
    RouteTile(16, 32, 16, False, True, 8, 6),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["prefill", "stream, small", "either, alone", "sorted 64"])
def test_chunks_of_any_size(name, tile):
    """Chosen and sorted in several steps, or one of the two, none of which is full; first chunks of more tokens, and no others."""
    g = replace(TINY, hidden_size=256, intermediate_size=512)
    plan = replace({**layer.PLANS, **layer.PERSISTENT}[name], route=tile)
    agree(layer.make(g, 75, seed=75), g, 3, plan)


@pytest.mark.parametrize("name", ["stream, small", "either, alone"])
@pytest.mark.parametrize(("few", "tokens", "favour", "height"), [
    (0, 60, 0, 32), (0, 60, 9, 32), (0, 128, 9, 128), (8, 60, 9, 32), (8, 128, 9, 32), (8, 129, 9, 128),
    *(pytest.param(*many, marks=pytest.mark.slow) for many in ((8, 300, 0, 64), (0, 300, 0, 64), (0, 300, 9, 128), (0, 700, 0, 128))),
])  # fmt: skip
def test_tiles_are_as_large_as_routing_makes_them(name, few, tokens, favour, height):
    """Of eight experts that all tokens choose alike, or of two that all choose, if `favour`."""
    g = replace(TINY, hidden_size=256, intermediate_size=512)
    inputs, plan = layer.make(g, tokens, seed=tokens), layer.PERSISTENT[name]
    stream = replace(plan.gate_up if plan.path == "stream" else plan.gate_up.stream, few=few)
    plan = replace(plan, gate_up=stream if plan.path == "stream" else replace(plan.gate_up, stream=stream))
    inputs[0][:, 8:16] -= 10 * favour
    inputs[0][:, 9:11] += 20 * favour
    chosen = plan.way(layer.pairs_of(inputs, g, 8))
    assert chosen.gate_up.block_n == min(height, plan.ways[-1].gate_up.block_n), layer.pairs_of(inputs, g, 8)
    assert chosen.path == ("prefill" if chosen.gate_up.block_n == 128 else "stream")
    agree(inputs, g, 8, plan)


def test_which_tiles():
    plan = layer.PERSISTENT["either, small"]
    for pairs, height in (
        ([0] * 8, 32), ([32] * 8, 32), ([32] * 7 + [33], 64), ([33] + [0] * 7, 64), ([64] * 4 + [65] + [0] * 3, 64),
        ([64] * 2 + [65], 128), ([1, 129], 128),
    ):  # fmt: skip
        assert plan.way(pairs).gate_up.block_n == height, pairs


@pytest.mark.parametrize("g", layer.GEOMETRIES, ids=lambda g: g.definition_name[-30:])
@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 18])
def test_chosen_plans(g, tokens):
    agree(layer.make(g, tokens, seed=tokens), g, min(5, g.num_experts - g.num_local_experts), choose_plan(g, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "chunks"), [(2049, (129, 16, 0)), (4097, (248, 17, 16)), (8193, (256, 48, 15))])
def test_chosen_chunks_of_many_tokens(tokens, chunks):
    """A token behind full chunks; first chunks of a token more than a step; first ones of three steps, others of one."""
    g = MoEGeometry(8, 4, 2, 512, 512)
    plan = choose_plan(g, tokens)
    found = sizes(g, tokens, plan)
    assert plan.path == "prefill" and (found.chunks, found.first_tokens, found.other_tokens) == chunks
    agree(layer.make(g, tokens, seed=tokens), g, 3, plan)


ONCE = [layer.PLANS["dense 32"], layer.PLANS["sorted 64"], layer.PERSISTENT["dense"]]  # the last by warps


@pytest.mark.parametrize("g", [*layer.GEOMETRIES, pytest.param(MANY, marks=pytest.mark.slow)], ids=lambda g: g.definition_name[-30:])
def test_ties_go_to_the_lower_index(g):
    g = replace(g, intermediate_size=256)
    inputs = layer.make(g, 6)
    inputs[0] = torch.randint(0, 2, inputs[0].shape).float() * torch.tensor([0.0, -0.0, 1.0, 0.0, 2.0, 1.0])[:, None]
    if inputs[1] is not None:
        inputs[1] = torch.zeros(g.num_experts)
    for offset in {0, 3 if g.num_experts > g.num_local_experts else 0}:  # 3: beside equal ones that are chosen before
        for plan in ONCE:
            agree(inputs, g, offset, plan)


@pytest.mark.parametrize("g", layer.GEOMETRIES, ids=lambda g: g.definition_name[-30:])
def test_nan_and_infinite_logits(g):
    g = replace(g, intermediate_size=256)
    inputs = layer.make(g, 4)
    inputs[0][0, ::2], inputs[0][1, ::3], inputs[0][2, 5] = float("nan"), float("-inf"), float("inf")
    inputs[0][3, :] = float("nan")
    for plan in ONCE:
        agree(inputs, g, 0, plan)


def test_bfloat16_logits():
    g = replace(TINY, intermediate_size=256)
    inputs = layer.make(g, 9)
    inputs[0] = inputs[0].bfloat16()
    for plan in ONCE:
        agree(inputs, g, 16, plan)
