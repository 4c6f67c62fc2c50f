"""`fused_moe`: validate, plan, allocate, launch. The public face of the operator.

The same operator is `torch.ops.blockmoe.fused_moe` for torch.compile, which the Python function calls while a graph is
being traced and skips otherwise (the dispatcher costs host time).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from blockmoe.geometry import BLOCK, MoEGeometry, Routing
from blockmoe.operator.chunks import power_of_two_at_least
from blockmoe.operator.machine import Machine, of_gpu
from blockmoe.operator.plan import Plan, choose_plan
from blockmoe.operator.versions import gluon, known, require_triton
from blockmoe.operator.workspace import layout, rounds

E4M3 = torch.float8_e4m3fn
_signature = attrgetter("shape", "dtype", "device")
_is_contiguous = torch.Tensor.is_contiguous
_address = torch.Tensor.data_ptr
_calls: dict[tuple, _Call] = {}  # by everything that validation looks at
MOST_CALLS = 1024
NAMESPACE = __name__.split(".")[0]  # of the torch operator: another where a packed solution carries this package renamed


def fused_moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    *,
    local_expert_offset: int,
    routed_scaling_factor: float,
    routing: Routing = "deepseek_v3",
    top_k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """The FP8 block-scale mixture-of-experts layer for the local experts, bfloat16 [T, H].

    Shapes, with E experts of which L are local, hidden size H, intermediate size I (both multiples of 128):
    routing_logits [T, E] float32 or bfloat16; routing_bias [E] bfloat16 or float32 (None for "renormalize");
    hidden_states [T, H] e4m3 with hidden_states_scale [H/128, T] float32; gemm1_weights [L, 2I, H] e4m3 (rows up,
    then gate) with scale [L, 2I/128, H/128] float32; gemm2_weights [L, H, I] e4m3 with scale [L, H/128, I/128]. All
    contiguous. Local experts are local_expert_offset ... local_expert_offset + L - 1. `out` receives the result;
    `workspace` is uint8 memory of at least `workspace_size` bytes; both are allocated where None. No host
    synchronisation; no size depends on the routing; the result is the same bit for bit from call to call.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong device, shape, stride or size; nothing is
    launched then. Autograd records nothing, so that no gradient comes back. While torch.compile traces, `workspace` is
    not used: the graph's own memory is.
    """
    if torch.compiler.is_compiling():
        arguments = (
            routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
            gemm2_weights, gemm2_weights_scale, local_expert_offset, routed_scaling_factor, routing, top_k, n_group,
            topk_group,
        )  # fmt: skip
        if out is None:
            return getattr(torch.ops, NAMESPACE).fused_moe(*arguments)
        getattr(torch.ops, NAMESPACE).fused_moe_out(*arguments, out)
        return out

    inputs = (
        routing_logits, hidden_states if routing_bias is None else routing_bias, hidden_states, hidden_states_scale,
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
    )  # fmt: skip
    try:
        key = (
            *map(_signature, inputs), routing_bias is None, local_expert_offset, routed_scaling_factor, routing, top_k, n_group,
            topk_group, plan, *map(type, (local_expert_offset, routed_scaling_factor, top_k, n_group, topk_group)),  # 8.0 and True: refused
        )  # fmt: skip
        call = _calls[key] if all(map(_is_contiguous, inputs)) else None
    except (KeyError, AttributeError, TypeError):
        call = None
    if call is None:
        call = _prepare(
            routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
            gemm2_weights, gemm2_weights_scale, local_expert_offset, routed_scaling_factor, routing, top_k, n_group,
            topk_group, plan,
        )  # fmt: skip
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        _calls[key] = call
    if out is None:
        out = torch.empty_like(hidden_states, dtype=torch.bfloat16)
    else:
        if not isinstance(out, torch.Tensor) or _signature(out) != call.out or not _is_contiguous(out):
            _check("out", out, call.out[0], (torch.bfloat16,), call.device)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # who saved it for a backward is told
    if workspace is None:
        workspace = torch.empty(call.workspace, dtype=torch.uint8, device=call.device)
    else:
        _check_workspace(workspace, call.workspace, call.device)
    if call.rounds is None:
        from blockmoe.reference import moe_reference

        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as the kernels, which record nothing and compute as they do
            return out.copy_(moe_reference(routing_logits, routing_bias, *inputs[2:], *call.scalars, geometry=call.geometry))
    done = True
    if call.device.type == "cpu":
        call.interpret(inputs, out, workspace)
    elif len(call.rounds) == 1 and call.device.index == torch.cuda.current_device():
        done = call.rounds[0].run((*map(_address, inputs), out.data_ptr(), workspace.data_ptr()))
    else:
        with torch.cuda.device(call.device):
            done = all(one.run((*map(_address, part), workspace.data_ptr())) for part, one in call.parts(inputs, out))
    if not done:  # pointers that TMA can't take
        return fused_moe(
            routing_logits, routing_bias, *inputs[2:], local_expert_offset=local_expert_offset,
            routed_scaling_factor=routed_scaling_factor, routing=routing, top_k=top_k, n_group=n_group, topk_group=topk_group,
            out=out, plan=call.plan_without_tma,
        )  # fmt: skip
    return out


def trtllm_fp8_block_scale_moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int = 0,
    *,
    do_finalize: bool = True,
    output: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    tune_max_num_tokens: int | None = None,
) -> torch.Tensor:
    """`fused_moe` under the argument names and order of FlashInfer's function of this name; `output` is its `out`.

    routing_method_type must be 1 (renormalize) or 2 (DeepSeek-V3, with groups): FlashInfer's default, 0, is refused. So are other weight
    layouts than the plain one, and do_finalize=False. enable_pdl and tune_max_num_tokens change no result there, and nothing here.
    """
    for name, expected, got in (
        ("use_shuffled_weight", False, use_shuffled_weight), ("weight_layout", 0, weight_layout), ("do_finalize", True, do_finalize),
    ):  # fmt: skip
        if got != expected:
            raise ValueError(f"{name}: expected {expected}, got {got}")
    if routing_method_type not in (1, 2):
        raise ValueError(f"routing_method_type: expected 1 (renormalize) or 2 (DeepSeek-V3), got {routing_method_type}")
    for name, tensor, axis, got in (
        ("num_experts", routing_logits, 1, num_experts), ("local_num_experts", gemm1_weights, 0, local_num_experts),
        ("intermediate_size", gemm2_weights, 2, intermediate_size),
    ):  # fmt: skip
        shape = getattr(tensor, "shape", ())  # what is no tensor, or has other dimensions, `fused_moe` says
        if len(shape) > axis and shape[axis] != got:
            raise ValueError(f"{name}: expected {shape[axis]} as the tensors have it, got {got}")
    return fused_moe(
        routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
        gemm2_weights, gemm2_weights_scale, local_expert_offset=local_expert_offset,
        routed_scaling_factor=1.0 if routed_scaling_factor is None else routed_scaling_factor,
        routing="deepseek_v3" if routing_method_type == 2 else "renormalize",
        top_k=top_k, n_group=n_group or 1, topk_group=topk_group or 1, out=output,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _geometry(*values: Any) -> MoEGeometry:
    geometry = MoEGeometry(*values)
    if geometry.num_experts > 1024:
        raise ValueError(f"num_experts: expected at most 1024, got {geometry.num_experts}")
    if geometry.n_group > 1:
        for name in ("num_experts", "n_group"):
            value = getattr(geometry, name)
            if value != power_of_two_at_least(value):
                raise ValueError(f"{name}: expected a power of two where experts are grouped, got {value}")
    return geometry


class _Call:
    """What calls with tensors of the same sizes, types and device share; `rounds` is None where there is no kernel."""

    def __init__(self, geometry: MoEGeometry, device: torch.device, tokens: int, offset: int, factor: float) -> None:
        self.geometry = geometry
        self.device = device
        self.scalars = (offset, factor)
        self.out = (torch.Size((tokens, geometry.hidden_size)), torch.bfloat16, device)
        self.workspace = 0
        self.plan_without_tma: Plan | None = None  # for pointers that TMA can't take
        self.rounds: list | None = None

    def parts(self, inputs: Sequence[torch.Tensor], out: torch.Tensor):
        """The nine tensors of each round, and its launches."""
        logits, bias, x, x_scale, *weights = inputs
        begin = 0
        for tokens, one in zip(rounds(len(out)), self.rounds or (), strict=True):
            part = slice(begin, begin + tokens)
            begin += tokens
            yield (logits[part], bias, x[part], x_scale[:, part].contiguous(), *weights, out[part]), one

    def interpret(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        from blockmoe.operator.launch import interpret

        for part, launches in self.parts(inputs, out):
            interpret(launches, (*part, workspace))


def _prepare(logits, bias, x, x_scale, w1, w1_scale, w2, w2_scale, offset, factor, routing, top_k, n_group, topk_group, plan) -> _Call:
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, as choose_plan gives it, got {type(plan).__name__}")
    geometry = _validate(
        logits, bias, x, x_scale, w1, w1_scale, w2, w2_scale, offset, factor, routing, top_k, n_group, topk_group
    )  # fmt: skip
    tokens, device = len(x), x.device
    offset, factor = int(offset), float(factor)
    call = _Call(geometry, device, tokens, offset, factor)
    explain = os.environ.get("BLOCKMOE_EXPLAIN", "0") not in ("", "0")
    if device.type == "cpu" and not _interpreted():
        if explain:
            print(f"blockmoe: {geometry.definition_name} T={tokens}: on a CPU, the float32 reference")
        return call
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"hidden_states: expected a tensor of a CPU or a CUDA device, got one on {device}")
    require_triton()
    machine = of_gpu(device.index) if device.type == "cuda" else Machine(capability=89)  # the interpreter knows neither PDL nor Gluon
    counts = rounds(tokens)
    plans = [plan or choose_plan(geometry, t, machine, clusters=known(), tma=gluon()) for t in counts]
    call.workspace = max((layout(geometry, t, p)[1] for t, p in zip(counts, plans, strict=True)), default=0)
    if plans:
        call.plan_without_tma = choose_plan(geometry, counts[0], machine, clusters=known(), tma=False)
    if explain and plans:
        print(f"blockmoe: {geometry.definition_name} T={tokens}: {plans[0]}; workspace {call.workspace / 1e6:.1f} MB")

    from blockmoe.operator.launch import Prepared  # imports triton
    from blockmoe.operator.pipeline import launches

    bias_dtype = None if bias is None else bias.dtype
    found = [
        launches(geometry, t, p, offset, factor, sm_count=machine.sm_count, logits_dtype=logits.dtype, bias_dtype=bias_dtype)
        for t, p in zip(counts, plans, strict=True)
    ]
    call.rounds = found if device.type == "cpu" else [Prepared(one, device.index) for one in found]
    return call


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def _check(name: str, tensor: Any, shape: tuple, dtypes: tuple, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as hidden_states, got {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous strides, got {tensor.stride()}")


_FLOATS = (torch.float32, torch.bfloat16)


def _validate(
    logits, bias, x, x_scale, w1, w1_scale, w2, w2_scale, offset, factor, routing, top_k, n_group, topk_group
) -> MoEGeometry:  # fmt: skip
    for name, tensor, dims in (
        ("routing_logits", logits, 2), ("hidden_states", x, 2), ("gemm1_weights", w1, 3), ("gemm2_weights", w2, 3),
    ):  # fmt: skip
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got {tensor.dim()}")
    tokens, hidden = x.shape
    local, _, intermediate = w2.shape
    experts = logits.shape[1]
    if routing == "renormalize":
        n_group = topk_group = 1
    for name, value in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    geometry = _geometry(experts, local, top_k, hidden, intermediate, routing, n_group, topk_group)

    device = x.device
    blocks_h, blocks_i = hidden // BLOCK, intermediate // BLOCK
    _check("routing_logits", logits, (tokens, experts), _FLOATS, device)
    _check("hidden_states", x, (tokens, hidden), (E4M3,), device)
    _check("hidden_states_scale", x_scale, (blocks_h, tokens), (torch.float32,), device)
    _check("gemm1_weights", w1, (local, 2 * intermediate, hidden), (E4M3,), device)
    _check("gemm1_weights_scale", w1_scale, (local, 2 * blocks_i, blocks_h), (torch.float32,), device)
    _check("gemm2_weights", w2, (local, hidden, intermediate), (E4M3,), device)
    _check("gemm2_weights_scale", w2_scale, (local, blocks_h, blocks_i), (torch.float32,), device)
    if routing == "deepseek_v3":
        _check("routing_bias", bias, (experts,), _FLOATS, device)
    elif bias is not None:
        raise ValueError("routing_bias: expected None for renormalize, got a tensor")
    for name, value, kinds, expected in (
        ("local_expert_offset", offset, int, "an integer"), ("routed_scaling_factor", factor, (int, float), "a number"),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0 <= offset <= experts - local:
        raise ValueError(f"local_expert_offset: expected 0 to {experts - local}, got {offset}")
    return geometry


def _check_workspace(workspace: Any, needed: int, device: torch.device) -> None:
    if not isinstance(workspace, torch.Tensor):
        raise TypeError(f"workspace: expected a tensor, got {type(workspace).__name__}")
    if workspace.dtype != torch.uint8:
        raise TypeError(f"workspace: expected torch.uint8, got {workspace.dtype}")
    if workspace.device != device or not workspace.is_contiguous():
        contiguous = "" if workspace.is_contiguous() else "not contiguous "
        raise ValueError(f"workspace: expected contiguous memory on {device}, got {contiguous}on {workspace.device}")
    if workspace.numel() < needed:
        raise ValueError(f"workspace: expected at least {needed} bytes, got {workspace.numel()}")
    if workspace.data_ptr() % 16:
        raise ValueError(f"workspace: expected 16-byte alignment, got address {workspace.data_ptr():#x}")


_ARGUMENTS = (
    "Tensor routing_logits, Tensor? routing_bias, Tensor hidden_states, Tensor hidden_states_scale, "
    "Tensor gemm1_weights, Tensor gemm1_weights_scale, Tensor gemm2_weights, Tensor gemm2_weights_scale, "
    "int local_expert_offset, float routed_scaling_factor, str routing, int top_k, int n_group, int topk_group"
)
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"fused_moe({_ARGUMENTS}) -> Tensor")
_library.define(f"fused_moe_out({_ARGUMENTS}, Tensor(a!) out) -> ()")


def _fused_moe_op(*arguments: Any) -> torch.Tensor:
    return _fused_moe_named(*arguments, out=None)


def _fused_moe_out_op(*arguments: Any) -> None:
    _fused_moe_named(*arguments[:-1], out=arguments[-1])


def _fused_moe_named(*arguments: Any, out: torch.Tensor | None) -> torch.Tensor:
    tensors, (offset, factor, routing, top_k, n_group, topk_group) = arguments[:8], arguments[8:]
    return fused_moe(
        *tensors, local_expert_offset=offset, routed_scaling_factor=factor, routing=routing, top_k=top_k,
        n_group=n_group, topk_group=topk_group, out=out,
    )  # fmt: skip


_library.impl("fused_moe", _fused_moe_op, "CompositeExplicitAutograd")
_library.impl("fused_moe_out", _fused_moe_out_op, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::fused_moe", lib=_library)
def _fused_moe_fake(logits, bias, hidden_states, *rest: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape, dtype=torch.bfloat16)


@torch.library.register_fake(f"{NAMESPACE}::fused_moe_out", lib=_library)
def _fused_moe_out_fake(*arguments: Any) -> None:
    return None
