"""What the emulator says of kernels in which a wait, a fence or a barrier is missing, or something else is wrong. Apart, so that two cores
share the work."""

import layer
import pytest
import torch
from emulator import Fault
from emulator.language import arange
from layer import EMULATED_TOKENS as TOKENS
from layer import FAR, SMALL, check
from layer import PERSISTENT as PLANS

from blockmoe.geometry import MoEGeometry
from blockmoe.operator.plan import PrefillTile

# A plan, a change to a function's source, and what the emulator says of it.
FAULTS = [
    ("cluster", "meet", "CLUSTER > 1", "CLUSTER > 2", "initialised"),  # "may not be ... yet", or "no mbarrier has been": by order
    ("cluster", "meet", "wait_until(", "(", "may not be initialised yet"),
    ("cluster", "meet", 'sem="release"', 'sem="relaxed"', "may not be initialised yet"),
    ("cluster", "barriers_made", "gl.inline_asm_elementwise(FENCE", "(lambda *_, **__: 0)(FENCE", "may not be initialised yet"),
    ("cluster", "free", "CLUSTER > 1", "CLUSTER > 2", "deadlock"),
    ("cluster", "load_weights", "say(MULTICAST)", "pass", "deadlock"),
    ("cluster", "drain", "mbarrier.wait(empty", "(empty", "not known to be done"),
    ("prefill", "prefill_kernel", "gdc_wait()", "pass", "behind the kernel before"),
    ("stream 256x32", "stream_kernel", "gdc_wait()", "pass", "behind the kernel before"),
    ("either, small", "either_kernel", "gdc_wait()", "pass", "behind the kernel before"),
    ("prefill", "gathered", "fence_async_shared()", "pass", "without a fence between"),
    ("prefill", "gathered", "async_copy.wait_group(PENDING)", "pass", "not known to be done"),
    ("prefill", "gather", "LATER, LATER - 1 - left, STAGES", "LATER, LATER - left, STAGES", "not known to be done"),
    ("prefill", "gather", "mbarrier.wait(empty", "(empty", "may not have read that yet"),
    ("prefill", "store_codes", "cp.async.bulk.wait_group 0; fence.proxy.async;", "/* rcp.approx */", "reading may not have read that yet"),
    ("prefill", "store_codes", "gl.inline_asm_elementwise(WAIT", "tma.store_wait(0); (lambda *_, **__: 0)(WAIT", "not known to be done"),
    ("prefill", "store_codes", 'sem="release"', 'sem="relaxed"', "not known to be done"),
    ("prefill", "store_codes", "barrier()", "pass", "not known to be done"),
    ("prefill", "store_codes", "mbarrier.wait(coded.index(0), n & 1)", "pass", "not known to be done"),
    ("prefill", "store_codes", "mbarrier.wait(coded.index(1), large_tiles & 1)", "pass", "not known to be done"),
    ("prefill", "gate_up_consumer", "fence_async_shared()", "pass", "without a fence between"),
    ("prefill", "gate_up_consumer", "mbarrier.wait(sent", "(sent", "may not have read that yet"),
    ("prefill", "wait_until_finished", "zeros + INTER // K", "zeros + INTER // K - 1", "reads workspace"),
    ("prefill", "load_scales", "wait_for_rows(there, units)", "pass", "not known to be done"),
    ("prefill", "load_down", "wait_for_rows(there, units)", "pass", "not known to be done"),
    ("prefill", "draw", "wait_until_finished(finished, tile, INTER)", "pass", "not known to be done"),
    ("prefill", "finished_rows", "x.index(STAGES - 1)", "x.index(STAGES - 2)", "consume (0): a store writes"),
    ("prefill", "acquire", "full.index(stage), 2 * K * K)", "full.index(stage), K * K)", "shared memory, byte 66560"),
    ("prefill", "multiply", "phase = (step // STAGES) & 1", "phase = 0 * step", "not known to be done"),
    ("prefill", "multiply", "phase ^= wraps", "pass", "not known to be done"),
    ("prefill", "give_turn", "_say(", "(", "deadlock"),
    ("prefill", "take_turn", "_say(", "(", "where somebody has arrived and nobody waited since"),
    ("prefill", "begin_turns", "give_turn(GROUP, gl.to_tensor(1))", "pass", "deadlock"),
    ("prefill", "end_turns", "take_turn(GROUP, gl.to_tensor(1))", "pass", "were not waited for"),
    ("prefill", "add_some", "wait_until(at", "(at", "not known to be done"),
    ("prefill, apart", "add_rows", "1 + second", "1 + 0 * second", "not known to be done"),
    ("prefill, apart", "add_rows", "gl.where(now == last, 2, 1)", "2", "not known to be done"),
    ("prefill", "put_half", "mbarrier.wait(done.index(HALF), uses & 1)", "pass", "not known to be done"),
    ("prefill", "down_consumer", "mbarrier.wait(taken", "(taken", "may not have read that yet"),
    ("prefill", "write_zeros", "fence_async_shared()", "pass", "without a fence between"),
    ("prefill", "tell", "mbarrier.wait(heard", "(heard", "may not have read that yet"),
    ("prefill", "put_part", "HIDDEN // 4", "HIDDEN", "is not within"),
    ("dense", "two_sums", "fence_async_shared()", "pass", "without a fence between"),
    ("dense", "hand_over", "mbarrier.wait(taken", "(taken", "may not have read that yet"),
    ("dense", "join", "mbarrier.wait(given", "(given", "not known to be done"),
    ("dense", "two_sums", "mbarrier.wait(asked", "(asked", "not known to be done"),
    ("dense", "one_sum", "mbarrier.wait(full", "(full", "not known to be done"),
    ("dense", "load_weights", "mbarrier.wait(empty", "(empty", "may not have read that yet"),
    ("stream, small", "load_weights", "empty.index((it + j) % STAGES), (((it + j) // STAGES)",
     "empty.index(it % STAGES), ((it // STAGES)", "may not have read that yet"),
    ("dense", "tiles_finished", "barrier()", "pass", "not known to be done"),
    ("dense", "tiles_finished", "known <= tile", "known < 0", "not known to be done"),
    ("dense", "consumer", "barrier()\n            if DENSE", "if DENSE", "not known to be done"),
    ("stream 256x32", "teller", "mbarrier.wait(stored", "(stored", "not known to be done"),
    ("stream 256x32", "tell_stored", 'finished + tile, 1, sem="release"', 'finished + tile, 1, sem="relaxed"', "not known to be done"),
    ("stream 256x32", "teller", '0, 1), 1, sem="release"', '0, 1), 1, sem="relaxed"', "not known to be done"),
    ("stream, large", "pairs_producer", "wait_until(finished", "(finished", "not known to be done"),
    ("stream 256x32", "last_sum", "wait_until(written + group", "(written + group", "reads workspace"),
    ("stream 256x32", "pairs_producer", "wait_until(finished", "(finished", "not known to be done"),
    ("stream 256x32", "add_part", "pair >= 0", "pair >= -1", "is not within"),
    ("stream 256x32", "load_pairs", "increment_count=False", "increment_count=True", "the phase does not end"),
    ("stream 256x32", "load_pairs", "async_copy.mbarrier_arrive(full.index(at), increment_count=False)",
     "mbarrier.arrive(full.index(at), count=64)", "its copies, whose write is not known to be done"),
]  # fmt: skip


def first_fault(inputs, plan, said, emulated, geometry=SMALL) -> None:
    """In one of a dozen orders at the latest the emulator says that."""
    found = []
    while len(found) < 12 and not any(said in text for text in found):
        emulated["seed"] = len(found)
        try:
            layer.call(inputs, geometry, 2, plan=plan)
            found.append("none")
        except Fault as fault:
            found.append(str(fault))
    assert said in found[-1], found


@pytest.mark.parametrize(
    ("name", "function", "old", "new", "said"),
    [pytest.param(*fault, marks=[pytest.mark.slow] if n % 6 else []) for n, fault in enumerate(FAULTS)],
)
def test_a_fault_is_found(name, function, old, new, said, emulated):
    emulated["changes"] = {function: (old, new)}
    first_fault(layer.make(SMALL, TOKENS[name]), PLANS[name], said, emulated)


@pytest.mark.parametrize(
    ("function", "old", "new", "said"),
    [
        ("add_shares", "wait_until(summed", "(summed", "not known to be done"),
        pytest.param("add_shares", "once + others, once", "once + others - 1, once", "not known to be done", marks=pytest.mark.slow),
        ("tell_stored", '>> shares), 1, sem="release"', '>> shares), 1, sem="relaxed"', "not known to be done"),
        pytest.param("gate_up_unit", "* others + share, ROWS", "* others, ROWS", "a store writes workspace", marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_shares_is_found(function, old, new, said, emulated):
    """Of an expert with one tile, whose two row blocks are four shares of K each."""
    geometry = MoEGeometry(8, 2, 2, 2048, 256)
    inputs = layer.make(geometry, 20)
    inputs[1].zero_()
    inputs[0][:, 2:4] = torch.tensor([-50.0, 50.0])
    emulated["programs"] = 18
    emulated["changes"] = {function: (old, new)}
    first_fault(inputs, PLANS["stream 256x32"], said, emulated, geometry)


@pytest.mark.parametrize(
    ("function", "old", "new", "programs"),
    [
        ("add_rows", "(least >> (2 * now)) & 3", "((least >> (2 * now)) & 3) * now", 8),
        ("add_rows", "1 + second", "1 + second * late", 8),
        pytest.param("add_rows", "1 + second", "1 + second * (1 - late)", 8, marks=pytest.mark.slow),
        pytest.param("add_rows", "mask=earlier >= 0, other=-1), near", "mask=earlier >= 0, other=-1), near - 1", 5, marks=pytest.mark.slow),
        pytest.param("read_targets", "earlier, near", "earlier, near - 1", 8, marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_rows_told_apart_is_found(function, old, new, programs, emulated):
    """In the layout of test_rows_told_apart."""
    emulated.update(programs=programs, changes={function: (old, new)})
    first_fault(layer.make(FAR, 32 * 8), PLANS["prefill, apart"], "not known to be done", emulated, FAR)


def test_a_program_that_ends_too_early_is_found(emulated):
    """Without a pair all zeros are written at the end."""
    inputs = layer.make(SMALL, 60)
    inputs[0][:, 2:6] = -50.0
    inputs[1].zero_()
    emulated["changes"] = {"write_zeros": ("tma.store_wait(0)", "pass")}
    first_fault(inputs, PLANS["prefill"], "ended while this was under way: program", emulated)


def test_a_role_that_looks_in_vain_is_found(emulated):
    emulated["changes"] = {"tell_stored": ('gl.atomic_add(finished + tile, 1, sem="release")', "pass")}
    first_fault(layer.make(SMALL, 9), PLANS["dense"], "waits for ever: counters of workspace", emulated)


@pytest.mark.slow
def test_fences_are_missed_where_neither_side_has_one(emulated):
    """The writer's or the reader's is enough; that of shared memory alone is neither."""
    inputs = layer.make(SMALL, 150)
    of_writer = {"store_codes": ("fence.proxy.async;", "fence.proxy.async.shared::cta;")}
    of_reader = {"load_down": ("proxy_fence()", "pass")}
    for changes in (of_writer, of_reader):
        emulated["changes"] = changes
        check(inputs, SMALL, 2, PLANS["prefill"])
    emulated["changes"] = of_writer | of_reader
    first_fault(inputs, PLANS["prefill"], "without a fence between", emulated)


def test_more_k_blocks_than_stages_that_are_all_on_their_way_are_a_deadlock(emulated):
    """Which PrefillTile refuses: consumers free a stage when the next one is full."""
    with pytest.raises(AssertionError, match="a consumer frees a stage when the next one is full"):
        PrefillTile(4, flight=4)
    geometry = MoEGeometry(8, 4, 3, 768, 512)
    emulated["changes"] = {"gather": ("LATER: gl.constexpr = FLIGHT - 1", "LATER: gl.constexpr = FLIGHT")}
    with pytest.raises(Fault, match="deadlock"):
        check(layer.make(geometry, 60), geometry, 2, PLANS["prefill"])


def test_an_array_of_integers_that_overflows_is_found():
    with pytest.raises(Fault, match="add: 2147483648 does not fit into 32 bits"):
        arange(0, 2) + (2**31 - 1)
