"""The inputs of a workload, as a pure function of (seed, definition, workload, call number).

Every process of a run makes the same inputs by itself; `digest` proves it. A workload's tensors live in one set of buffers
whose contents change before every call, so that a solution that remembers an earlier call is found out:

- inputs with a variable axis (activations, their scales) are drawn anew;
- scales and biases of fixed shape are drawn anew;
- weights (e4m3, fixed shape, shared by all workloads of a definition) have the signs of whole experts flipped;
- routing logits from a file have their rows (tokens) permuted: pairs and active experts stay what they are.

Nothing is left to torch's default dtype and device: a solution may set them, and its process makes the same inputs still.

Call 0 uses a file's rows in their own order. Distributions of mode `trace`: those of the format (float32 and bfloat16 from
N(0,1), e4m3 from N(0,1) clamped to +-2). Mode `realistic`: what quantising Gaussian weights and activations with outliers
gives (positive scales, outputs of order 1).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from blockmoe.bench.dataset import find_blob
from blockmoe.bench.schema import Definition, Workload

MODES = ("trace", "realistic")
CHUNK = 1 << 24  # elements drawn at once: bounds the float32 scratch beside an e4m3 tensor to 64 MB
_INTEGER_RANGES = {torch.int8: 128, torch.int16: 1024, torch.int32: 1024, torch.int64: 1024}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

WEIGHT_SIGMA = 0.02  # of the weights that `realistic` scales stand for; outputs come out near 1
WEIGHT_CODES = 100.0  # their e4m3 values' standard deviation: a 128x128 block's largest of 16,384 is about 4.2 sigma, near 448
OUTLIER_CHANNELS = 1 / 256  # share of hidden channels 16 times larger than the others


class Inputs:
    """Live input buffers of one workload on one device.

    `values` holds tensors and Python scalars in the definition's order. Raises ValueError for a mode that the definition
    doesn't have, DatasetError for a blob that can't be had.
    """

    def __init__(self, definition: Definition, root: Path, device: torch.device, mode: str, seed: int) -> None:
        if mode not in MODES:
            raise ValueError(f"inputs: expected one of {', '.join(MODES)}, got {mode!r}")
        if mode == "realistic" and "hidden_states_scale" not in definition.inputs:
            raise ValueError(f"inputs: realistic inputs are made for FP8 block-scale MoE definitions, not for {definition.name}")
        self.definition, self.root, self.device, self.mode, self.seed = definition, root, device, mode, seed
        self.workload: Workload | None = None
        self.values: dict[str, Any] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._flipped: dict[str, torch.Tensor] = {}
        self._files: dict[str, torch.Tensor] = {}
        self.call: int | None = None

    def open(self, workload: Workload) -> None:
        """Make the buffers of a workload and fill them for call 0; weights made for an earlier workload are kept."""
        self.workload, self.call = workload, None
        self._files, self.values = {}, {}
        for name, spec in self.definition.inputs.items():
            source = workload.inputs[name]
            if source.type == "scalar":
                self.values[name] = source.value
            elif source.type == "safetensors":
                path = find_blob(self.root, self.definition, workload, name)
                with safe_open(path, framework="pt") as tensors:
                    self._files[name] = tensors.get_tensor(source.tensor_key).to(self.device)
                self.values[name] = self._files[name].clone()
            elif spec.shape is None:
                self.values[name] = _draw((1,), getattr(torch, spec.dtype), self._generator(name, 0)).item()
            elif self._is_weight(name):
                self.values[name] = self._weight(name)
            else:
                shape = self.definition.shape(name, workload.axes)
                self.values[name] = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device)
        self.load(0)

    def load(self, call: int) -> None:
        """Change the buffers, in place, to the contents of call `call` (any integer)."""
        if call == self.call:
            return
        self.call = call
        for name, weight in self._weights.items():
            self._flip_signs(name, weight, call)
        drawn = set()
        if self.mode == "realistic":
            drawn = self._realistic(call)
        for name, value in self.values.items():
            if name in drawn or name in self._weights or not isinstance(value, torch.Tensor):
                continue
            if name in self._files:
                if name == "routing_logits" and call != 0:
                    order = torch.randperm(len(value), generator=self._generator("tokens", call, "cpu"), device="cpu")
                    torch.index_select(self._files[name], 0, self._moved(order), out=value)
                else:
                    value.copy_(self._files[name])
            else:
                _draw_into(value, self._generator(name, call))

    def digest(self, weights: bool = True) -> str:
        """Hex digest of the inputs as they stand in the buffers; without the weights, 1.4 GB at the headline sizes, if so asked."""
        return digest_tensors({name: value for name, value in self.values.items() if weights or name not in self._weights})

    @property
    def keeps_routing(self) -> bool:
        """Whether all calls have the same pairs and active experts: logits and bias come from files, neither is drawn anew."""
        return all(name in self._files for name in ("routing_logits", "routing_bias") if name in self.values)

    # how each kind of contents is made

    def _is_weight(self, name: str) -> bool:
        spec = self.definition.inputs[name]
        return spec.dtype.startswith("float8") and all(self.definition.axes[axis].type == "const" for axis in spec.shape or ())

    def _weight(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            spec = self.definition.inputs[name]
            sizes = tuple(self.definition.axes[axis].value for axis in spec.shape)
            weight = torch.empty(sizes, dtype=getattr(torch, spec.dtype), device=self.device)
            spread = (1.0, 2.0) if self.mode == "trace" else (WEIGHT_CODES, 448.0)
            _draw_into(weight, self._generator(name, 0, shared=True), *spread)
            self._weights[name] = weight
            self._flipped[name] = torch.zeros(len(weight), dtype=torch.bool, device="cpu")
        return self._weights[name]

    def _flip_signs(self, name: str, weight: torch.Tensor, call: int) -> None:
        wanted = torch.zeros(len(weight), dtype=torch.bool, device="cpu")
        if call != 0:
            wanted = _uniform(len(weight), self._generator("signs " + name, call, "cpu", shared=True)) < 0.5
        sign = torch.where(wanted != self._flipped[name], 0x80, 0).to(torch.uint8)
        weight.view(torch.uint8).bitwise_xor_(self._moved(sign).view(-1, *[1] * (weight.dim() - 1)))  # one launch, not one an expert
        self._flipped[name] = wanted

    def _moved(self, small: torch.Tensor) -> torch.Tensor:
        """On the device, without the host's waiting for it: a timed call is enqueued before its inputs are there."""
        return small.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else small

    def _realistic(self, call: int) -> set[str]:
        """Draw activations with their scales, and weight scales; returns the names drawn."""
        drawn = {"hidden_states", "hidden_states_scale"}
        _draw_quantised_rows(self.values["hidden_states"], self.values["hidden_states_scale"], self._generator("hidden_states", call))
        for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
            scale = self.values[name]
            scale.normal_(generator=self._generator(name, call)).mul_(0.25).exp_().mul_(WEIGHT_SIGMA / WEIGHT_CODES)
            drawn.add(name)
        if isinstance(bias := self.values.get("routing_bias"), torch.Tensor) and "routing_bias" not in self._files:
            _draw_into(bias, self._generator("routing_bias", call), 0.05)
            drawn.add("routing_bias")
        return drawn

    def _generator(self, name: str, call: int, device: str | None = None, shared: bool = False) -> torch.Generator:
        """A generator of its own for each (input, call); `shared` ones are equal for all workloads of the definition."""
        owner = "" if shared else self.workload.uuid
        text = f"{self.seed} {self.definition.name} {owner} {name} {call}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        return torch.Generator(device or self.device).manual_seed(number)


def _draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    value = torch.empty(shape, dtype=dtype, device=generator.device)
    _draw_into(value, generator)
    return value


def _uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [count] from [0, 1), on the generator's device."""
    return torch.rand(count, dtype=torch.float32, device=generator.device, generator=generator)


def _draw_into(value: torch.Tensor, generator: torch.Generator, sigma: float = 1.0, limit: float = 2.0) -> None:
    """Fill with the format's distribution for the dtype; `sigma` scales a float's, `limit` clamps an 8-bit float's."""
    flat = value.view(-1)
    if value.dtype == torch.bool:
        flat.copy_(_uniform(len(flat), generator) < 0.5)
    elif value.dtype in _INTEGER_RANGES:
        bound = _INTEGER_RANGES[value.dtype]
        flat.copy_(torch.randint(-bound, bound, flat.shape, generator=generator, device=value.device))
    else:
        for piece in flat.split(CHUNK):
            drawn = torch.empty(piece.shape, dtype=torch.float32, device=value.device).normal_(0.0, sigma, generator=generator)
            piece.copy_(drawn.clamp_(-limit, limit) if value.dtype in _FP8 else drawn)


def _draw_quantised_rows(values: torch.Tensor, scales: torch.Tensor, generator: torch.Generator) -> None:
    """Rows of N(0,1) with outlier channels, quantised to e4m3 with a scale for each 1x128. values [T, H], scales [H/128, T]."""
    tokens, hidden = values.shape
    channel = torch.where(_uniform(hidden, generator) < OUTLIER_CHANNELS, 16.0, 1.0)
    rows = max(1, CHUNK // max(1, hidden))
    for start in range(0, tokens, rows):
        end = min(start + rows, tokens)
        x = torch.empty(end - start, hidden, dtype=torch.float32, device=values.device).normal_(generator=generator).mul_(channel)
        blocks = x.view(end - start, -1, 128)
        scale = blocks.abs().amax(2).clamp_(min=1e-12).div_(448.0)  # [rows, H/128]
        values[start:end] = (blocks / scale.unsqueeze(2)).view(end - start, hidden).to(values.dtype)
        scales[:, start:end] = scale.T


def digest_tensors(values: dict[str, Any]) -> str:
    """Hex digest of tensors and scalars by name: column and row sums of their bytes taken as 64-bit words, hashed.

    Sums keep it at memory speed on the device (hashing 1.4 GB on the host would take seconds); a change of any one word,
    or a swap of two, changes it.
    """
    state = hashlib.blake2b(digest_size=8)
    for name, value in values.items():
        state.update(name.encode())
        if isinstance(value, torch.Tensor):
            state.update(f"{tuple(value.shape)} {value.dtype}".encode())
            for sums in _word_sums(value):
                state.update(sums.cpu().numpy().tobytes())
        else:
            state.update(repr(value).encode())
    return state.hexdigest()


def _word_sums(value: torch.Tensor) -> list[torch.Tensor]:
    data = value.detach().contiguous().view(-1).view(torch.uint8)
    width, full = 4096, len(data) // 8
    words = data[: full * 8]
    if words.storage_offset() % 8 or words.data_ptr() % 8:
        words = words.clone()
    words = words.view(torch.int64)
    whole = full // width * width
    sums = []
    for piece in words[:whole].split(width * 4096):
        table = piece.view(-1, width)
        sums += [table.sum(0), table.sum(1)]
    return [*sums, words[whole:], data[full * 8 :]]
