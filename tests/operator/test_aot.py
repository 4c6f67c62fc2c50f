"""Every kernel of every plan compiles for Hopper and Blackwell without a GPU; on Hopper with wgmma and without spills. On 8.9 and 12.0
none needs more shared memory than they have."""

import itertools
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402
from layer import SHARED_LIMIT  # noqa: E402

from blockmoe.geometry import HEADLINE, TINY, MoEGeometry  # noqa: E402
from blockmoe.operator import pipeline  # noqa: E402
from blockmoe.operator.machine import H100, H200, Machine  # noqa: E402
from blockmoe.operator.plan import RouteTile, choose_plan, plans  # noqa: E402

RENORMALIZE = MoEGeometry(512, 128, 10, 2048, 512, "renormalize")


def launches(g: MoEGeometry, found) -> dict:
    """By name and constants, so that each compiles once."""
    each = [launch for plan in found for launch in aot.launches(g, 1, plan)]
    return {launch.key: launch for launch in each}


CHOSEN = [*plans(HEADLINE, H100), *plans(HEADLINE, H200)]
HOPPER = launches(HEADLINE, [*CHOSEN, choose_plan(HEADLINE, 14107, clusters=False), choose_plan(HEADLINE, 901, tma=False)])
HOPPER |= launches(HEADLINE, [choose_plan(HEADLINE, 901, H200, clusters=False)])
HOPPER |= launches(RENORMALIZE, [choose_plan(RENORMALIZE, 100)])
BLACKWELL = launches(HEADLINE, [choose_plan(HEADLINE, t, Machine(capability=100)) for t in (1, 80, 8192)])
LITTLE = {c: launches(HEADLINE, plans(HEADLINE, Machine(142, c, shared=99 << 10))) for c in (89, 120)}
QUICK = {*launches(HEADLINE, plans(HEADLINE, H200)), *list(BLACKWELL)[-2:]}
QUICK |= {key for key in LITTLE[89] if key[0] == "gate_up_kernel"}  # the others, which are much like these, are slow tests


def keys(found: dict) -> list:
    marks = {key: [] if key in QUICK else pytest.mark.slow for key in found}
    return [pytest.param(key, id=f"{key[0]}-{'x'.join(str(c) for c in key[1])}", marks=marks[key]) for key in found]


SIZES_OF = {"map": 128, "i32": 4, "i64": 8, "fp32": 4}  # of pointers, and of Triton's two scratch memories: 8


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each of the kernel's parameters."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)[1]
    found = re.findall(r"\.param (?:\.align \d+ \.b8 \w+\[(\d+)\]|\.[a-z](\d+))", entry)
    assert len(found) == entry.count(".param")
    return [int(array or bits) // (1 if array else 8) for array, bits in found]


@pytest.mark.parametrize("key", keys(HOPPER))
def test_hopper(key):
    usage = aot.compiled(HOPPER[key], 90)
    # the persistent kernels keep a few arguments of their warps on the stack, and a counter a stage
    assert usage.stack <= {"prefill_kernel": 64, "either_kernel": 64, "stream_kernel": 8}.get(usage.kernel, 0)
    assert usage.registers <= 255 and usage.shared <= SHARED_LIMIT
    if usage.kernel.startswith(("gate_up", "down", "prefill", "stream", "either")):
        assert "QGMMA" in usage.sass and "HMMA" not in usage.sass.replace("QGMMA", "")
    assert usage.types and parameter_sizes(usage.ptx) == [SIZES_OF.get(kind, 8) for kind in (*usage.types, "*", "*") if kind != "constexpr"]
    if HOPPER[key].cluster > 1:
        assert "UTMALDG.2D.MULTICAST" in usage.sass and "SYNCS.ARRIVE.TRANS64.RED" in usage.sass
        found = behind_turns(usage.sass)  # of both loops of both consumers; else 12 and 19
        assert len(found) == 4 and max(found) <= 1


def behind_turns(sass: str) -> list[int]:
    """How many operations that addresses are made by stand between a loop's label and its first product: `ahead` moves those."""
    found = []
    for block in re.split(r"^\.L_x_\d+:", sass, flags=re.MULTILINE):
        operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", block, re.MULTILINE)
        before = operations[: operations.index("QGMMA")] if "QGMMA" in operations else []
        if "BAR" in before and len(before) < 40:
            found.append(sum(name in ("ULEA", "USHF", "USGXT", "R2UR", "UIADD3") for name in before))
    return found


@pytest.mark.parametrize("key", keys(BLACKWELL))
def test_blackwell(key):
    usage = aot.compiled(BLACKWELL[key], 100)
    if usage.kernel.startswith(("gate_up", "down")):
        assert "UTC" in usage.sass  # tcgen05


@pytest.mark.parametrize("key", keys(LITTLE[89]))
def test_ada(key):
    assert aot.compiled(LITTLE[89][key], 89).shared <= 99 << 10


@pytest.mark.parametrize("key", keys(LITTLE[120]))
def test_blackwell_of_little_shared_memory(key):
    assert aot.compiled(LITTLE[120][key], 120).shared <= 99 << 10


SIZES = [*((HEADLINE, t) for t in (1, 7, 60, 901, 4096, 14107)), (TINY, 16)]
SIZES += [(MoEGeometry(384, 48, 8, 7168, 2048), t) for t in (500, 4096, 8192)] + [(RENORMALIZE, t) for t in (901, 4096, 8192)]
TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
ROUTING = [
    pytest.param(g, tokens, *types, id=f"{g.num_experts}-{tokens}-{types[0].itemsize}-{types[1].itemsize}", marks=marks)
    for (g, tokens), (types, marks) in itertools.product(SIZES, zip(TYPES, ([], pytest.mark.slow, pytest.mark.slow), strict=True))
]


def routing(g: MoEGeometry, tokens: int, logits: torch.dtype, bias: torch.dtype, machine: Machine = H100, **more) -> aot.Usage:
    launch = pipeline.launches(g, tokens, choose_plan(g, tokens, machine, **more), 0, 1.0, logits_dtype=logits, bias_dtype=bias)[0]
    return aot.compiled(launch, machine.capability)


@pytest.mark.parametrize("g, tokens, logits, bias", ROUTING)
def test_a_token_is_chosen_for_by_one_warp(g, tokens, logits, bias):
    """Else `choose_largest` would look at parts of several tokens: Triton chooses the layout."""
    usage = routing(g, tokens, logits, bias)
    (several, parts, lanes), thread, warp, program = aot.token_layout(usage)
    assert warp == [1, 1, 32] and program == [several, 1, 1] and thread[0] == 1
    assert lanes == 32 * thread[2] and parts % thread[1] == 0
    assert usage.ptx.count("redux.sync.max.s32 t, h0,") == g.top_k and usage.stack == 0
    assert usage.ptx.count("%laneid") == (g.topk_group < g.n_group)
    assert tokens <= 2048 or g.num_experts > 256 or usage.registers <= 64  # two programs of 16 warps fit a multiprocessor


@pytest.mark.parametrize("g, tokens, machine, tma", [
    *((HEADLINE, tokens, H200, True) for tokens in (80, 600, 901, 4096, 8192, 14107)), (HEADLINE, 901, H100, False),
    (HEADLINE, 14107, Machine(capability=80), False), (TINY, 40, H100, True), (MoEGeometry(64, 3, 8, 7168, 2048), 901, H200, True),
], ids=str)  # fmt: skip
def test_a_lane_has_an_expert_where_a_warp_votes(g, tokens, machine, tma):
    """Else `ballots` would count others: Triton chooses the layout."""
    plan = choose_plan(g, tokens, machine, tma=tma)
    bias = torch.bfloat16 if g.routing == "deepseek_v3" else None
    usage = aot.compiled(pipeline.launches(g, tokens, plan, 0, 1.0, bias_dtype=bias)[1], machine.capability)
    layouts = re.findall(r"elementwise_inline_asm .* : tensor<32x\d+x\d+xi32, (#\w+)>", usage.ttgir)
    assert len(layouts) == (2 if plan.path == "either" else 1)
    assert usage.ptx.count("%lanemask_l") == plan.route.place_t // 4 * len(layouts)
    for name in layouts:
        layout = re.search(rf"^{name} = #ttg.blocked<{{(.*?)}}>", usage.ttgir, re.MULTILINE)[1]
        assert "sizePerThread = [1, 1, 1], threadsPerWarp = [32, 1, 1], warpsPerCTA = [1, 4, 1]" in layout


@pytest.mark.parametrize("g, more", [
    (HEADLINE, {"tma": False}), (HEADLINE, {"machine": Machine(capability=80)}), (MoEGeometry(300, 300, 8, 7168, 2048), {}),
    (MoEGeometry(512, 32, 8, 7168, 2048, "deepseek_v3", 2, 1), {}), (MoEGeometry(1024, 32, 8, 7168, 2048), {}),
], ids=["unaligned", "no TMA", "rows that are no whole reads", "a group of more than a read", "many experts"])  # fmt: skip
def test_where_it_may_not_be_it_is_not(g, more):
    logits = torch.float32 if g.n_group == 2 else torch.bfloat16
    assert "redux.sync" not in routing(g, 60, logits, logits, **more).ttgir


@pytest.mark.parametrize("route", [RouteTile(16, 16, 4, True), RouteTile(4, 4, 16, True)], ids=str)
def test_nor_where_warps_and_tokens_are_not_as_many(route):
    plan = replace(choose_plan(HEADLINE, 4), route=route)
    [launch] = pipeline.launches(HEADLINE, 4, plan, 0, 1.0)[:1]
    assert "redux.sync" not in aot.compiled(launch, 90).ttgir
