"""The persistent Gluon kernels in the emulator: right, the same bits in any order, no race, nothing that waits for ever."""

import os

import layer
import pytest
import torch
from emulator import Fault, interpret
from emulator.language import arange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer import check

from blockmoe.geometry import MoEGeometry
from blockmoe.operator import launch
from blockmoe.operator.plan import Plan, PrefillTile, RouteTile, StreamTile

TWO = RouteTile(16, 4, 4, False)
PLANS = {
    "prefill": Plan("prefill", TWO, PrefillTile(4, 1)),
    "cluster": Plan("prefill", TWO, PrefillTile(4, 2)),
    "dense": Plan("stream", RouteTile(16, 16, 16, True), StreamTile(64, 16, 10, dense=True, flight=3)),
    "stream 128x16": Plan("stream", TWO, StreamTile(64, 16, 5, flight=2)),
    "stream 256x32": Plan("stream", TWO, StreamTile(128, 32, 6, flight=3, groups=2)),
    "stream 256x64": Plan("stream", TWO, StreamTile(128, 64, 5, flight=4, groups=2)),
}
TOKENS = {"prefill": 150, "cluster": 280, "dense": 9, "stream 128x16": 30, "stream 256x32": 60, "stream 256x64": 120}
SMALL = MoEGeometry(8, 4, 3, 512, 512)


@pytest.fixture
def emulated(monkeypatch):
    """What to emulate Gluon kernels with, to be changed; other kernels are interpreted as ever."""
    how = {"programs": 4, "seed": 0, "changes": {}}
    monkeypatch.setattr(launch, "interpret", lambda launches, tensors: interpret(launches, tensors, **how))
    return how


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.view(torch.int16).clone()


@pytest.mark.parametrize("name", PLANS)
def test_layer_in_any_order(name, emulated):
    """By another number of programs too."""
    inputs = layer.make(SMALL, TOKENS[name])
    first = bits(check(inputs, SMALL, 2, PLANS[name]))
    assert first.any()
    emulated.update(programs=2, seed=1)
    assert torch.equal(first, bits(check(inputs, SMALL, 2, PLANS[name])))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("routing", ["one expert", "no pair", "skewed"])
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


@pytest.mark.parametrize(
    ("name", "geometry", "tokens"),
    [
        ("prefill", MoEGeometry(8, 4, 3, 256, 512), 1),
        ("prefill", MoEGeometry(8, 8, 2, 1792, 640), 70),  # a page of one run, five K blocks in four stages
        ("prefill", MoEGeometry(8, 2, 2, 768, 768), 129),
        ("cluster", MoEGeometry(8, 3, 2, 1536, 768), 150),
        ("cluster", MoEGeometry(16, 1, 2, 1024, 512), 400),
        ("dense", MoEGeometry(24, 24, 3, 768, 256, "renormalize"), 15),
        ("stream 128x16", MoEGeometry(8, 8, 2, 256, 128), 40),
        ("stream 256x32", MoEGeometry(8, 8, 2, 768, 128), 90),  # three row blocks: one group of columns
        ("stream 256x64", MoEGeometry(8, 2, 2, 1024, 384), 200),
    ],
)
def test_sizes(name, geometry, tokens, emulated):
    emulated.update(seed=tokens, programs=4)
    check(layer.make(geometry, tokens), geometry, geometry.num_experts - geometry.num_local_experts, PLANS[name])


EXAMPLES = int(os.environ.get("EMULATED_EXAMPLES", "10"))  # with more, others each time


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 10, suppress_health_check=list(HealthCheck), print_blob=True
)  # fmt: skip
@given(data=st.data())
def test_any_layer(data, emulated):
    """Any sizes, routing and number of programs that a plan serves."""
    draw = data.draw
    name = draw(st.sampled_from(list(PLANS)), "plan")
    plan = PLANS[name]
    unit = 256 * plan.gate_up.cluster if plan.path == "prefill" else 256
    inter = 256 if name in ("cluster", "dense") else 128
    least = 512 if plan.path == "prefill" else inter
    experts = draw(st.sampled_from([8, 16, 24]), "experts")
    local = draw(st.integers(1, experts), "local experts")
    hidden = unit * draw(st.integers(1, 1536 // unit), "hidden units")
    inter *= draw(st.integers(least // inter, 768 // inter), "intermediate units")
    geometry = MoEGeometry(experts, local, draw(st.integers(1, 3), "top k"), hidden, inter)
    tokens = draw(st.integers(1, 15 if name == "dense" else TOKENS[name]), "tokens")
    emulated["programs"] = draw(st.integers(1, 3), "programs") * (2 if name == "cluster" else 1)
    emulated["seed"] = draw(st.integers(0, 10**6), "order")
    inputs = layer.make(geometry, tokens, draw(st.integers(0, 10**6), "inputs"))
    inputs[0] *= draw(st.sampled_from([0.0, 1.0, 5.0]), "spread")
    offset = draw(st.integers(0, experts - local), "offset")
    assert layer.relative(layer.call(inputs, geometry, offset, plan=plan), layer.oracle(inputs, geometry, offset, 2.5, plan)) < 2e-3


# A plan, a change to a function's source, and what the emulator says of it.
FAULTS = [
    ("cluster", "meet", "CLUSTER > 1", "CLUSTER > 2", "no mbarrier has been initialised"),
    ("cluster", "meet", "wait_until(", "(", "may not be initialised yet"),
    ("cluster", "meet", 'sem="release"', 'sem="relaxed"', "may not be initialised yet"),
    ("cluster", "meet", "gl.inline_asm_elementwise(FENCE", "(lambda *_, **__: 0)(FENCE", "may not be initialised yet"),
    ("cluster", "free", "CLUSTER > 1", "CLUSTER > 2", "deadlock"),
    ("cluster", "load_weights", "say(MULTICAST)", "pass", "deadlock"),
    ("cluster", "drain", "mbarrier.wait(empty", "(empty", "not known to be done"),
    ("prefill", "prefill_kernel", "gdc_wait()", "pass", "behind the kernel before"),
    ("stream 256x32", "stream_kernel", "gdc_wait()", "pass", "behind the kernel before"),
    ("prefill", "gathered", "fence_async_shared()", "pass", "without a fence between"),
    ("prefill", "gather", "async_copy.wait_group(1)", "pass", "not known to be done"),
    ("prefill", "stored", "cp.async.bulk.wait_group 0; fence.proxy.async;", "/* rcp.approx */", "reading may not have read that yet"),
    ("prefill", "stored", "gl.inline_asm_elementwise(WAIT", "tma.store_wait(0); (lambda *_, **__: 0)(WAIT", "not known to be done"),
    ("prefill", "stored", 'sem="release"', 'sem="relaxed"', "not known to be done"),
    ("prefill", "stored", "barrier()", "pass", "not known to be done"),
    ("prefill", "gate_up_consumer", "fence_async_shared()", "pass", "without a fence between"),
    ("prefill", "gate_up_consumer", "barrier()\n            tma", "tma", "not known to be done"),
    ("prefill", "wait_until_finished", "2 * (INTER // K)", "2 * (INTER // K) - 1", "reads workspace"),
    ("prefill", "load_scales", "wait_until_finished(finished, tile, INTER, GENERIC)", "pass", "not known to be done"),
    ("prefill", "load_middle_scales", "mbarrier.wait(second.index(0), 0)", "pass", "load_middle_scales (4): a store writes"),
    ("prefill", "finished_rows", "x.index(STAGES - 1)", "x.index(STAGES - 2)", "consume (0): a store writes"),
    ("prefill", "acquire", "full.index(stage), 2 * K * K)", "full.index(stage), K * K)", "shared memory, byte 65536"),
    ("prefill", "multiply", "((step + k) // STAGES) & 1)", "0)", "not known to be done"),
    ("prefill", "add_rows", "wait_until(added", "(added", "not known to be done"),
    ("prefill", "add_rows", "mbarrier.wait(done.index(1), large_tiles & 1)", "pass", "not known to be done"),
    ("prefill", "down_consumer", "mbarrier.wait(taken", "(taken", "may not have read that yet"),
    ("prefill", "write_zeros", "fence_async_shared()", "pass", "without a fence between"),
    ("prefill", "tell", "mbarrier.wait(heard", "(heard", "may not have read that yet"),
    ("prefill", "put_part", "HIDDEN // 4", "HIDDEN", "is not within"),
    ("dense", "two_sums", "fence_async_shared()", "pass", "without a fence between"),
    ("dense", "two_sums", "mbarrier.wait(asked", "(asked", "not known to be done"),
    ("dense", "one_sum", "mbarrier.wait(full", "(full", "not known to be done"),
    ("dense", "load_weights", "mbarrier.wait(empty", "(empty", "may not have read that yet"),
    ("dense", "tiles_finished", "barrier()", "pass", "not known to be done"),
    ("dense", "tiles_finished", "known <= tile", "known < 0", "not known to be done"),
    ("stream 256x32", "consumer", "barrier()\n        gl.atomic_add(finished", "gl.atomic_add(finished", "not known to be done"),
    ("stream 256x32", "consumer", "wait_until(written", "(written", "reads workspace"),
    ("stream 256x32", "pairs_producer", "wait_until(finished", "(finished", "not known to be done"),
    ("stream 256x32", "combine", "pair >= 0", "pair >= -1", "is not within"),
    ("stream 256x32", "load_pairs", "increment_count=False", "increment_count=True", "the phase does not end"),
    ("stream 256x32", "load_pairs", "async_copy.mbarrier_arrive(full.index(at), increment_count=False)",
     "mbarrier.arrive(full.index(at), count=32)", "its copies, whose write is not known to be done"),
]  # fmt: skip


def first_fault(inputs, plan, said, emulated) -> None:
    """In one of a dozen orders at the latest the emulator says that."""
    found = []
    while len(found) < 12 and not any(said in text for text in found):
        emulated["seed"] = len(found)
        try:
            layer.call(inputs, SMALL, 2, plan=plan)
            found.append("none")
        except Fault as fault:
            found.append(str(fault))
    assert said in found[-1], found


@pytest.mark.parametrize(("name", "function", "old", "new", "said"), FAULTS)
def test_a_fault_is_found(name, function, old, new, said, emulated):
    emulated["changes"] = {function: (old, new)}
    first_fault(layer.make(SMALL, TOKENS[name]), PLANS[name], said, emulated)


def test_a_program_that_ends_too_early_is_found(emulated):
    """Without a pair all zeros are written at the end."""
    inputs = layer.make(SMALL, 60)
    inputs[0][:, 2:6] = -50.0
    inputs[1].zero_()
    emulated["changes"] = {"write_zeros": ("tma.store_wait(0)", "pass")}
    first_fault(inputs, PLANS["prefill"], "ended while this was under way: program", emulated)


def test_a_role_that_looks_in_vain_is_found(emulated):
    emulated["changes"] = {"consumer": ('gl.atomic_add(finished + tile, 1, sem="release")', "pass")}
    first_fault(layer.make(SMALL, 9), PLANS["dense"], "waits for ever: counters of workspace", emulated)


def test_fences_are_missed_where_neither_side_has_one(emulated):
    """The writer's or the reader's is enough; that of shared memory alone is neither."""
    inputs = layer.make(SMALL, 150)
    of_writer = {"stored": ("fence.proxy.async;", "fence.proxy.async.shared::cta;")}
    of_reader = {"load_down": ("wait_until_finished(finished, tile, INTER, PROXY)", "wait_until_finished(finished, tile, INTER, GENERIC)")}
    for changes in (of_writer, of_reader):
        emulated["changes"] = changes
        check(inputs, SMALL, 2, PLANS["prefill"])
    emulated["changes"] = of_writer | of_reader
    first_fault(inputs, PLANS["prefill"], "without a fence between", emulated)


def test_an_array_of_integers_that_overflows_is_found():
    with pytest.raises(Fault, match="add: 2147483648 does not fit into 32 bits"):
        arange(0, 2) + (2**31 - 1)
