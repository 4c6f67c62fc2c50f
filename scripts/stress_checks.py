"""Parts of gpu_stress.py: inputs of any size as the bench makes them, special routings and scales, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu_session  # noqa: F401  (puts `layer` on the path)
import layer
import torch
from torch import Tensor

from blockmoe.bench.bundled import definition_of
from blockmoe.bench.inputs import Inputs
from blockmoe.bench.schema import Workload
from blockmoe.geometry import MoEGeometry
from blockmoe.operator import api, pipeline, versions
from blockmoe.operator.launch import interpreted
from blockmoe.operator.machine import BY_NAME, H100, Machine, of_gpu
from blockmoe.operator.plan import TOKEN_CHUNK, Plan, choose_plan
from blockmoe.operator.workspace import layout, rounds
from blockmoe.reference import moe_reference, route

FACTOR = 2.5
REFERENCE_LIMIT, ORACLE_LIMIT = 0.03, 2e-3  # relative L2
TOKEN_LIMIT = 0.1  # of one token: rounding gives 0.02 to 0.04, another expert's result 1
SMALLEST = 1e-35  # root mean square of a token's output
FEW_LIMIT, MANY_TOKENS = 5e-3, 256  # where few tokens are off by no more the oracle is asked of so many others
ORACLE_SECONDS, STEP_SECONDS = 0.25, 70e-6  # what the oracle may take, and what 128 of K of one expert take in eager PyTorch
NAMES = (
    "routing_logits", "routing_bias", "hidden_states", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale",
    "gemm2_weights", "gemm2_weights_scale",
)  # fmt: skip


class Layer:
    """A geometry's inputs in one of the bench's modes; the weights are made once."""

    def __init__(self, g: MoEGeometry, mode: str, device: torch.device, seed: int) -> None:
        self.g, self.device = g, device
        self._inputs = Inputs(definition_of(g), Path(), device, mode, seed)

    def open(self, tokens: int) -> tuple[list[Tensor | None], int]:
        """The eight tensors, and the offset of the local experts that get the most pairs."""
        scalars = {"local_expert_offset": 0, "routed_scaling_factor": FACTOR}
        sources = {
            name: {"type": "scalar", "value": scalars[name]} if name in scalars else {"type": "random"}
            for name in self._inputs.definition.inputs
        }
        self._inputs.open(Workload(axes={"seq_len": tokens}, inputs=sources, uuid=f"stress-{tokens}"))
        tensors = [self._inputs.values.get(name) for name in NAMES]
        return tensors, busiest_offset(tensors, self.g)


def busiest_offset(tensors: list[Tensor | None], g: MoEGeometry) -> int:
    experts, _ = route(tensors[0], tensors[1], g, FACTOR)
    counts = torch.bincount(experts.flatten(), minlength=g.num_experts)
    local = g.num_local_experts
    return max(range(0, g.num_experts - local + 1, local), key=lambda offset: int(counts[offset : offset + local].sum()))


def sliced(tensors: list[Tensor | None], index: Tensor | slice) -> list[Tensor | None]:
    """The inputs of some tokens."""
    logits, bias, x, x_scale, *weights = tensors
    return [logits[index].contiguous(), bias, x[index].contiguous(), x_scale[:, index].contiguous(), *weights]


def counts(tensors: list[Tensor | None], g: MoEGeometry, offset: int) -> dict[str, int]:
    """Pairs, active experts and tokens with a pair."""
    experts = route(tensors[0], tensors[1], g, FACTOR)[0]
    local = (experts >= offset) & (experts < offset + g.num_local_experts)
    return {"pairs": int(local.sum()), "active": experts[local].unique().numel(), "tokens_with_pairs": int(local.any(1).sum())}


def near_ties(logits: Tensor, bias: Tensor | None, g: MoEGeometry) -> Tensor:
    """Tokens, bool [T], whose groups or experts hang on the last bits of a float32 sigmoid; exact ties are not among them."""
    if g.routing == "renormalize":  # logits are compared as they are
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    biased = torch.sigmoid(logits.double().masked_fill(logits.isnan(), -torch.inf)) + bias.double()
    margin = 4 * torch.finfo(torch.float32).eps * biased.abs().amax(1).clamp(min=1)
    close = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if g.topk_group < g.n_group:
        groups = biased.view(-1, g.n_group, g.experts_per_group)
        score = groups.topk(min(2, g.experts_per_group), dim=2).values.sum(2)
        ranked = score.sort(dim=1, descending=True, stable=True)
        close |= _hangs(ranked.values, g.topk_group, 2 * margin)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, ranked.indices[:, : g.topk_group], True)
        biased = groups.masked_fill(~kept.unsqueeze(2), -torch.inf).flatten(1)
    return close | _hangs(biased.sort(dim=1, descending=True).values, g.top_k, margin)


def _hangs(ranked: Tensor, taken: int, margin: Tensor) -> Tensor:
    if taken >= ranked.shape[1]:
        return torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    last, next_ = ranked[:, taken - 1 : taken], ranked[:, taken : taken + 1]
    unequal = ((ranked - last).abs() < margin.unsqueeze(1)) & (ranked != last)
    return (last - next_ < margin.unsqueeze(1)).squeeze(1) & unequal.any(1)


def compare(out: Tensor, expected: Tensor, ignored: Tensor) -> dict[str, float]:
    """Relative L2 of all tokens that are not `ignored` and of the worst one; NaNs; elements that ought to be zero."""
    out, expected = out[~ignored].double(), expected[~ignored].double()
    difference, norm = (out - expected).norm(dim=1), expected.norm(dim=1)
    total, some = norm.norm().item(), norm > 0
    told = norm > SMALLEST * expected.shape[1] ** 0.5  # below that bfloat16 has few bits left
    return {
        "rel_l2": difference.norm().item() / (total or 1.0),
        "token": (difference[told] / norm[told]).max().item() if told.any() else 0.0,
        "nan": int(out.isnan().sum()),
        "not_zero": int((out[~some] != 0).sum()),
    }


def passes(found: dict[str, float]) -> bool:
    return found["rel_l2"] <= REFERENCE_LIMIT and found["token"] <= TOKEN_LIMIT and not found["nan"] and not found["not_zero"]


def plan_as_for(name: str) -> None:
    """From here on this process chooses plans as for another machine's memory: such kernels run on any GPU of its compute capability."""
    global of_gpu
    own = of_gpu
    of_gpu = api.of_gpu = pipeline.of_gpu = lambda *given: replace(own(*given), hbm3e=BY_NAME[name].hbm3e)


def machine(device: torch.device) -> Machine:
    """What plans and workspaces depend on; for a CPU an H100, or what `fused_moe` interprets."""
    if device.type != "cuda":
        return Machine(capability=89) if interpreted() else H100
    return of_gpu(torch.cuda.current_device() if device.index is None else device.index)


def plan_of(g: MoEGeometry, tokens: int, device: torch.device, *, tma: bool = True) -> Plan:
    """The plan of a call's first round, as the call chooses it; `tma`: for tensors that begin at multiples of 16 bytes."""
    on_cpu = device.type != "cuda"
    clusters, tma = on_cpu or versions.known(), tma and (on_cpu or versions.gluon())
    return choose_plan(g, min(tokens, TOKEN_CHUNK), machine(device), clusters=clusters, tma=tma)


def poisoned(g: MoEGeometry, tokens: int, device: torch.device, plan: Plan | None = None) -> dict[str, Tensor]:
    """Output and workspace full of NaN."""
    parts = [(t, plan or plan_of(g, t, device)) for t in set(rounds(tokens))]
    size = max((layout(g, t, p)[1] for t, p in parts), default=0)
    return {
        "out": torch.full((tokens, g.hidden_size), torch.nan, dtype=torch.bfloat16, device=device),
        "workspace": torch.full((size,), 255, dtype=torch.uint8, device=device),
    }


def oracle_tokens(tensors: list[Tensor | None], g: MoEGeometry, plan: Plan, most: int) -> Tensor:
    """Which tokens the oracle is computed for: all, or first, last and some between where it would take too long."""
    tokens, device = len(tensors[0]), tensors[2].device
    seconds = STEP_SECONDS * (g.hidden_blocks + g.intermediate_size // plan.gate_up.block_i)  # an expert
    if g.num_local_experts * seconds > ORACLE_SECONDS:
        most = min(most, max(4, int(ORACLE_SECONDS / seconds / g.top_k)))
    if tokens <= most:
        return torch.arange(tokens, device=device)
    between = torch.randperm(tokens, device=device)[: most - 2]
    return torch.cat([torch.tensor([0, tokens - 1], device=device), between]).unique()


def off_oracle(out: Tensor, tensors: list[Tensor | None], ignored: Tensor, g: MoEGeometry, offset: int, plan: Plan, index: Tensor) -> float:
    """Relative L2 of the tokens of `index` beside the oracle."""
    return compare(out[index], layer.oracle(sliced(tensors, index), g, offset, FACTOR, plan), ignored[index])["rel_l2"]


def verify(
    tensors: list[Tensor | None], g: MoEGeometry, offset: int, *, plan: Plan | None = None, most: int = 4096, oracle: bool = True
) -> tuple[bool, dict[str, float], dict[str, object]]:
    """One call over poisoned memory against the reference, and against the oracle: (all well, worst numbers, facts)."""
    tokens, device = len(tensors[0]), tensors[2].device
    memory = poisoned(g, tokens, device, plan)
    out = layer.call(tensors, g, offset, FACTOR, plan, **memory)
    plan = plan or plan_of(g, max(tokens, 1), device, tma=not any(t.data_ptr() % 16 for t in tensors if t is not None))
    plan = plan.way(layer.pairs_of(tensors, g, offset))
    ignored = near_ties(tensors[0], tensors[1], g)
    found = compare(out, moe_reference(*tensors, offset, FACTOR, geometry=g), ignored)
    ok = passes(found) and out is memory["out"]
    worst = {"rel_l2": found["rel_l2"], "token": found["token"]}
    facts = {k: v for k, v in found.items() if k not in worst} | {"ties": int(ignored.sum())}
    if oracle and tokens:
        index = oracle_tokens(tensors, g, plan, most)
        off = off_oracle(out, tensors, ignored, g, offset, plan, index)
        if ORACLE_LIMIT < off <= FEW_LIMIT and len(index) < tokens:  # one code rounded the other way is 0.7 % of a token: of few too much
            facts["oracle_of_few"] = off
            index = torch.cat([index, torch.randperm(tokens, device=device)[:MANY_TOKENS]]).unique()
            off = off_oracle(out, tensors, ignored, g, offset, plan, index)
        worst["oracle"], facts["oracle_tokens"] = off, len(index)
        ok = ok and off <= ORACLE_LIMIT
    return ok, worst, facts | counts(tensors, g, offset) | {"plan": str(plan)}


# What is special, each in place on copies of the inputs; the bias is zero before.


def _only(logits: Tensor, offset: int, g: MoEGeometry, experts: list[int]) -> None:
    """Every token chooses these local experts and no other: the rest of the world scores below them."""
    logits -= 4
    logits[:, offset : offset + g.num_local_experts] = -50.0
    logits[:, [offset + e for e in experts]] = 20.0


def _no_pair(t: list, offset: int, g: MoEGeometry) -> None:
    t[0][:, offset : offset + g.num_local_experts] = -50.0


def _one_expert(t: list, offset: int, g: MoEGeometry) -> None:
    _only(t[0], offset, g, [g.num_local_experts // 3])


def _crowd(t: list, offset: int, g: MoEGeometry) -> None:
    step = g.num_local_experts // g.top_k
    _only(t[0], offset, g, [step * i for i in range(g.top_k)])


def _ragged(t: list, offset: int, g: MoEGeometry) -> None:
    """Odd experts are empty, the others ever more loaded; all are favoured over those elsewhere."""
    local = t[0][:, offset : offset + g.num_local_experts]
    local += torch.linspace(0, 4, g.num_local_experts, device=local.device)
    local[:, 1::2] = -50.0


def _nan(t: list, offset: int, g: MoEGeometry) -> None:
    t[0][torch.rand(t[0].shape, device=t[0].device) < 0.3] = torch.nan
    t[0][0] = torch.nan
    t[0][:, offset] = torch.nan


def _few(t: list, offset: int, g: MoEGeometry) -> None:
    t[0].clamp_(-1, 1).round_()  # most tokens choose some of many experts with the same


def _equal(t: list, offset: int, g: MoEGeometry) -> None:
    t[0].fill_(-3.0)
    t[0][:, max(offset - g.top_k // 2, 0) :] = 0.25  # half of those chosen are local, the first ones


def _infinite(t: list, offset: int, g: MoEGeometry) -> None:
    drawn = torch.rand(t[0].shape, device=t[0].device)
    t[0][drawn < 0.2] = -torch.inf
    t[0][drawn > 0.98] = torch.inf
    t[0][-1] = -torch.inf


def _scales(change: Callable[[Tensor], Tensor]) -> Callable:
    def special(t: list, offset: int, g: MoEGeometry) -> None:
        t[0][:, offset : offset + g.num_local_experts] += 0.5  # pairs for small T too
        for i in (3, 5, 7):
            t[i] = change(t[i])

    return special


SPECIALS: dict[str, Callable[[list, int, MoEGeometry], None]] = {
    "no local pair": _no_pair,
    "all tokens on one expert": _one_expert,
    "all tokens on the same experts": _crowd,
    "ragged and empty experts": _ragged,
    "NaN logits": _nan,
    "infinite logits": _infinite,
    "few different logits": _few,
    "all logits equal from some expert on": _equal,
    "scales 1e-8": _scales(lambda s: s * 1e-8),
    "scales some zero": _scales(lambda s: torch.where(torch.rand_like(s) < 0.3, 0.0, s)),
    "scales all zero": _scales(torch.zeros_like),
    "scales negative": _scales(lambda s: -s.abs()),
    "scales huge": _scales(lambda s: s * 1e4),
}


def special(tensors: list[Tensor | None], name: str, offset: int, g: MoEGeometry) -> list[Tensor | None]:
    """The inputs with a special routing or special scales; weights are shared with `tensors`."""
    changed = list(tensors)
    changed[0] = tensors[0].clone()
    changed[1] = None if tensors[1] is None else torch.zeros_like(tensors[1])
    SPECIALS[name](changed, offset, g)
    return changed


def unaligned(tensor: Tensor | None) -> Tensor | None:
    """A contiguous copy whose address is one element past an aligned one."""
    if tensor is None:
        return None
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)
