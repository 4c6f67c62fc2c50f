"""The generated routing: exact counts, a margin no rounding can cross, a realistic skew, and pinned bits."""

import hashlib

import numpy as np
import pytest
import torch

from blockmoe.bench.bundled import workloads_of
from blockmoe.bench.routing_logits import MARGIN, routing_inputs
from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY, MoEGeometry
from blockmoe.reference import route

ALL_19 = "50f1c9d7a5bb1807"  # of the logits and biases of the 19 headline workloads, in order
CASES = [(geometry, workload) for geometry in GEOMETRIES.values() for workload in workloads_of(geometry)]


def case_id(value):
    return value.definition_name if isinstance(value, MoEGeometry) else f"T{value.axes['seq_len']}"


def generate(geometry, workload):
    recipe = workload.recipe
    offset = workload.inputs["local_expert_offset"].value
    return routing_inputs(geometry, workload.axes["seq_len"], offset, recipe["pairs"], recipe["active_experts"], recipe["seed"])


def loads_of(geometry, offset, expert_ids):
    """Pairs of each local expert."""
    local = expert_ids[(expert_ids >= offset) & (expert_ids < offset + geometry.num_local_experts)] - offset
    return np.bincount(local, minlength=geometry.num_local_experts)


def margins(geometry, logits, bias):
    """Least gap between chosen and rejected scores, and between kept and dropped group scores, in float64."""
    scores = 1.0 / (1.0 + np.exp(-logits.astype(np.float64))) + bias
    if geometry.routing == "renormalize":
        scores = logits.astype(np.float64)
    group_gap = np.inf
    if geometry.topk_group < geometry.n_group:
        groups = scores.reshape(len(scores), geometry.n_group, -1)
        group_scores = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
        ranked = np.sort(group_scores, axis=1)
        least_kept, best_dropped = ranked[:, -geometry.topk_group], ranked[:, -geometry.topk_group - 1]
        group_gap = (least_kept - best_dropped).min()
        kept = group_scores >= least_kept[:, None]
        scores = np.where(np.repeat(kept, geometry.experts_per_group, axis=1), scores, -np.inf)
    ranked = np.sort(scores, axis=1)
    return (ranked[:, -geometry.top_k] - ranked[:, -geometry.top_k - 1]).min(), group_gap


@pytest.mark.parametrize(("geometry", "workload"), CASES, ids=case_id)
def test_every_workload_has_its_pairs_and_active_experts(geometry, workload):
    logits, bias = generate(geometry, workload)
    assert logits.shape == (workload.axes["seq_len"], geometry.num_experts) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and np.abs(logits).max() < 8.4
    assert torch.equal(torch.from_numpy(bias).bfloat16().float(), torch.from_numpy(bias))

    expert_ids, _ = route(torch.from_numpy(logits), torch.from_numpy(bias), geometry, 1.0)
    loads = loads_of(geometry, workload.inputs["local_expert_offset"].value, expert_ids.numpy())
    assert loads.sum() == workload.recipe["pairs"]
    assert (loads > 0).sum() == workload.recipe["active_experts"]
    assert min(margins(geometry, logits, bias)) >= MARGIN > 1e-4


def test_bits_are_the_same_everywhere():
    state = hashlib.blake2b(digest_size=8)
    for workload in workloads_of(HEADLINE):
        for array in generate(HEADLINE, workload):
            state.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    assert state.hexdigest() == ALL_19


@pytest.mark.parametrize("workload", workloads_of(HEADLINE)[-3:], ids=case_id)
def test_load_is_skewed_as_in_real_routing(workload):
    logits, bias = generate(HEADLINE, workload)
    expert_ids, _ = route(torch.from_numpy(logits), torch.from_numpy(bias), HEADLINE, 1.0)
    everywhere = np.bincount(expert_ids.flatten().numpy(), minlength=256) / (8 * workload.axes["seq_len"] / 256)
    assert 3 < everywhere.max() < 9
    loads = loads_of(HEADLINE, workload.inputs["local_expert_offset"].value, expert_ids.numpy())
    assert 1.8 < loads.max() / loads.mean() < 5 and loads.min() < 0.6 * loads.mean()


def test_shortcuts_choose_wrongly():
    """Routing that forgets the groups, or the bias, is caught by these logits."""
    logits, bias = map(torch.from_numpy, generate(HEADLINE, workloads_of(HEADLINE)[16]))
    right = route(logits, bias, HEADLINE, 1.0)[0].sort(1).values
    ungrouped = route(logits, bias, MoEGeometry(256, 32, 8, 7168, 2048), 1.0)[0].sort(1).values
    unbiased = route(logits, torch.zeros(256), HEADLINE, 1.0)[0].sort(1).values
    assert (right != ungrouped).any(1).float().mean() > 0.3
    assert (right != unbiased).any(1).float().mean() > 0.5


@pytest.mark.parametrize(("tokens", "pairs", "active"), [(0, 0, 0), (1, 4, 4), (9, 0, 0), (9, 9, 1), (9, 36, 4), (9, 36, 8)])
def test_extremes(tokens, pairs, active):
    logits, bias = routing_inputs(TINY, tokens, 16, pairs, active, seed=3)
    expert_ids, _ = route(torch.from_numpy(logits), torch.from_numpy(bias), TINY, 1.0)
    loads = loads_of(TINY, 16, expert_ids.numpy())
    assert (loads.sum(), (loads > 0).sum()) == (pairs, active)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((9, 25, 9, 4), "local_expert_offset"),
        ((9, 4, 9, 4), "local_expert_offset"),  # would straddle two groups
        ((9, 8, 37, 8), "pairs"),
        ((9, 8, 9, 9), "active_experts"),
        ((9, 8, 3, 4), "active_experts"),
        ((9, 8, 0, 1), "active_experts"),
    ],
)
def test_impossible_counts_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        routing_inputs(TINY, *arguments, seed=1)
