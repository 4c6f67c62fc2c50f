"""The persistent Gluon kernels in the emulator: right, the same bits in any order, no race, nothing that waits for ever."""

import os
from dataclasses import replace

import layer
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer import EMULATED_TOKENS as TOKENS
from layer import FAR, SMALL, check
from layer import PERSISTENT as PLANS

from blockmoe.geometry import MoEGeometry
from blockmoe.operator.workspace import layout


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.view(torch.int16).clone()


def checked(inputs, geometry: MoEGeometry, plan, *names: str) -> list[torch.Tensor]:
    """The output's bits, and lists of the workspace."""
    placed, size = layout(geometry, len(inputs[0]), plan)
    memory = torch.full((size,), 255, dtype=torch.uint8)
    out = bits(check(inputs, geometry, 2, plan, workspace=memory))
    places = [placed[name] for name in names]
    return [out, *(memory[begin : begin + count * dtype.itemsize].view(dtype) for begin, count, dtype in places)]


QUICK = ("prefill", "dense", "stream 256x32", "stream 256x64", "stream, small", "either, small")
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PLANS]


@pytest.mark.parametrize("name", EACH)
def test_layer_in_any_order(name, emulated):
    """By another number of programs too."""
    inputs, plan = layer.make(SMALL, TOKENS[name]), PLANS[name]
    if ", " in name and len(plan.ways) > 1:  # of several ways the one of that name
        way = {"small": 0, "few": 0, "large": 1, "prefill": 2, "alone": 2}[name.split(", ")[1]]
        pairs = layer.pairs_of(inputs, SMALL, 2)
        assert plan.way(pairs) == plan.ways[way] and (max(pairs) > 32) == (not name.endswith("small"))
    first = bits(check(inputs, SMALL, 2, PLANS[name]))
    assert first.any()
    emulated.update(programs=2, seed=1)
    assert torch.equal(first, bits(check(inputs, SMALL, 2, PLANS[name])))


@pytest.mark.parametrize(("name", "geometry", "orders"), [
    ("prefill, apart", FAR, ((8, 0), (5, 2))),  # its K blocks are no whole rounds of stages
    pytest.param("cluster, apart", replace(FAR, hidden_size=1024), ((10, 0), (10, 1)), marks=pytest.mark.slow),
])  # fmt: skip
def test_rows_told_apart(name, geometry, orders, emulated):
    """Rows that are late or not, whose row before is late or not, in orders (programs, seed) in which somebody comes too early where one
    kind waits for less: test_a_fault_of_rows_told_apart_is_found."""
    inputs, columns, found = layer.make(geometry, 32 * 8), geometry.hidden_size // 256, []
    for programs, seed in orders:
        emulated.update(programs=programs, seed=seed)
        out, added, before = checked(inputs, geometry, PLANS[name], "added", "before")
        assert added.tolist() == [2] * (8 * columns) + [0] * (len(added) - 8 * columns)
        late = (before >= 0) & (torch.arange(len(before)) // 128 - before // 128 <= programs // columns + 2)
        kinds = (2 * late[before] + late)[before >= 0]
        assert kinds.bincount(minlength=4).min() > 25
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.parametrize(("tokens", "apart", "ends"), [(64, 2, 2), (64, 1, 1), (63, 2, 1)])
def test_where_rows_are_told_apart(tokens, apart, ends, emulated):
    """Of two tiles: no more than `apart`, and 32 tokens a tile."""
    geometry, plan = MoEGeometry(8, 2, 2, 256, 512), PLANS["prefill, apart"]
    plan = replace(plan, gate_up=replace(plan.gate_up, apart=apart))
    out, added = checked(layer.make(geometry, tokens), geometry, plan, "added")
    assert out.any() and added.tolist() == [ends] * 2 + [0] * (len(added) - 2)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("routing", ["one expert", "no pair", pytest.param("skewed", marks=pytest.mark.slow)])
def test_routings(name, routing, emulated):
    inputs, emulated["seed"] = layer.make(SMALL, TOKENS[name]), 2
    inputs[1].zero_()
    if routing == "one expert":  # all that is local
        inputs[0][:, 2:6] = torch.tensor([-50.0, 30.0, -50.0, -50.0])
    elif routing == "no pair":
        inputs[0][:, 2:6] = -50.0
    else:
        inputs[0] += torch.linspace(0, 4, SMALL.num_experts)
    out = check(inputs, SMALL, 2, PLANS[name])
    assert out.any() == (routing != "no pair")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "geometry", "tokens"),
    [
        ("prefill", MoEGeometry(8, 4, 3, 256, 512), 1),
        ("prefill", MoEGeometry(8, 8, 2, 1792, 640), 70),  # a page of one run, five K blocks in four stages
        ("prefill", MoEGeometry(8, 2, 2, 768, 768), 129),
        ("cluster", MoEGeometry(8, 3, 2, 1536, 768), 150),
        ("cluster", MoEGeometry(16, 1, 2, 1024, 512), 400),
        ("cluster, many", MoEGeometry(8, 3, 2, 512, 768), 150),
        ("dense", MoEGeometry(24, 24, 3, 768, 256, "renormalize"), 15),
        ("dense", MoEGeometry(8, 8, 2, 512, 768), 16),  # three stages of GEMM2 a tile: the consumers' turn changes
        ("stream 256x32", MoEGeometry(8, 8, 2, 256, 128), 40),
        ("either, small", MoEGeometry(8, 8, 2, 1024, 512), 33),
        ("either, prefill", MoEGeometry(8, 2, 2, 512, 768), 200),  # two tiles of 64 an expert
        ("either, alone", MoEGeometry(8, 2, 2, 768, 512), 200),
        ("stream 256x32", MoEGeometry(8, 8, 2, 768, 128), 90),  # three row blocks: one group of columns
        ("stream, small", MoEGeometry(8, 3, 2, 512, 256), 70),
        ("stream, large", MoEGeometry(8, 2, 2, 512, 256), 170),
        ("stream 256x32", MoEGeometry(8, 6, 5, 512, 128), 60),  # tokens with two rows at most, and with more
        ("either, alone", MoEGeometry(16, 12, 4, 768, 512), 40),
    ],
)
def test_sizes(name, geometry, tokens, emulated):
    emulated.update(seed=tokens, programs=4)
    check(layer.make(geometry, tokens), geometry, geometry.num_experts - geometry.num_local_experts, PLANS[name])


@pytest.mark.parametrize("seed", range(3))
def test_fewer_units_than_programs(seed, emulated):
    """Some look at the ticket before they draw (who does: test_units.py); and none where nobody has a pair."""
    emulated.update(seed=seed, programs=12)
    geometry = MoEGeometry(8, 1, 2, 512, 256)
    inputs = layer.make(geometry, 3)
    inputs[0][:, 3] += 9.0
    assert check(inputs, geometry, 3, PLANS["dense"]).any()
    inputs[0][:, 3] -= 99.0
    assert not check(inputs, geometry, 3, PLANS["dense"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "cluster"])
def test_units_drawn_at_the_last_k_block(name, emulated):
    """As these few K blocks are, the next unit is else drawn at the first."""
    emulated.update(seed=3, changes={"load_gate_up": ("EARLY_1", "1"), "load_down": ("EARLY_2", "1")})
    inputs = layer.make(SMALL, TOKENS[name])
    late = bits(check(inputs, SMALL, 2, PLANS[name]))
    emulated["changes"] = {}
    assert late.any() and torch.equal(late, bits(check(inputs, SMALL, 2, PLANS[name])))


@pytest.mark.parametrize(("name", "tokens", "pairs", "blocks", "others"), [
    ("dense", 9, 9, 4, 1), ("dense", 9, 0, 0, 0), ("stream 256x32", 40, 20, 2, 3), ("stream 256x32", 40, 40, 4, 3),
    ("either, few", 60, 20, 4, 3), ("stream 256x64", 60, 40, 0, 0),
    pytest.param("stream, few", 100, 70, 6, 1, marks=pytest.mark.slow),
    pytest.param("stream, large", 140, 140, 0, 0, marks=pytest.mark.slow),
])  # fmt: skip
def test_few_row_blocks(name, tokens, pairs, blocks, others, emulated):
    """Row blocks of GEMM1 of an expert with so many pairs are more units, each of a share of K: `others` leave their sums to the last."""
    emulated.update(seed=tokens + pairs, programs=18)
    geometry, plan = MoEGeometry(8, 2, 2, 2048, 512 if name.startswith("either") else 256), PLANS[name]
    inputs = layer.make(geometry, tokens)
    inputs[1].zero_()
    inputs[0][:, 2:4] = -50.0
    inputs[0][:pairs, 3] = 50.0
    out, summed = checked(inputs, geometry, plan, "summed")
    assert out.any() == (pairs > 0) and summed.tolist() == [others] * blocks + [0] * (len(summed) - blocks)


EXAMPLES = int(os.environ.get("EMULATED_EXAMPLES", "7"))  # with more, others each time


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 10, suppress_health_check=list(HealthCheck), print_blob=True
)  # fmt: skip
@given(data=st.data())
@pytest.mark.parametrize("apart", [pytest.param(False, id="any plan"), pytest.param(True, marks=pytest.mark.slow, id="rows apart")])
def test_any_layer(apart, data, emulated):
    """Any sizes, routing and number of programs that a plan serves; or tokens enough to tell rows apart, unless they choose few experts."""
    draw = data.draw
    name = draw(st.sampled_from(["prefill, apart", "cluster, apart"] if apart else list(PLANS)), "plan")
    plan = PLANS[name]
    clusters = getattr(plan.ways[-1].gate_up, "cluster", 1) == 2
    unit = 512 if clusters else 256
    inter = 256 if clusters or name == "dense" or getattr(plan.ways[0].gate_up, "burst", 1) == 2 else 128
    least = 512 if plan.ways[-1].path == "prefill" else inter
    experts = draw(st.sampled_from([8, 16, 24]), "experts")
    local = draw(st.integers(1, 8 if apart else experts), "local experts")
    hidden = unit * draw(st.integers(1, 1536 // unit), "hidden units")
    inter *= draw(st.integers(least // inter, 768 // inter), "intermediate units")
    geometry = MoEGeometry(experts, local, draw(st.integers(1, min(5, experts)), "top k"), hidden, inter)
    fewest, most = (32 * local, 32 * local + 31) if apart else (1, 16 if name == "dense" else TOKENS[name])
    tokens = draw(st.integers(fewest, most), "tokens")
    emulated["programs"] = draw(st.integers(1, 3), "programs") * (2 if clusters else 1)
    emulated["seed"] = draw(st.integers(0, 10**6), "order")
    inputs = layer.make(geometry, tokens, draw(st.integers(0, 10**6), "inputs"))
    inputs[0] *= draw(st.sampled_from([0.0, 1.0, 5.0]), "spread")
    offset = draw(st.integers(0, experts - local), "offset")
    assert layer.relative(layer.call(inputs, geometry, offset, plan=plan), layer.oracle(inputs, geometry, offset, 2.5, plan)) < 2e-3
