"""Guards on their own: poison, plainness, digests, sealed files, the watch."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from blockmoe.bench import guards, inputs, sealed, timing
from blockmoe.bench.contender import Failed
from blockmoe.bench.group import Group
from blockmoe.bench.guards import Tripped
from blockmoe.bench.inputs import digest_tensors
from blockmoe.bench.watch import Watch

CPU = torch.device("cpu")
POISONED = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32]


@pytest.mark.parametrize("dtype", POISONED, ids=str)
def test_poison_is_counted_and_is_no_result(dtype):
    tensor = torch.empty(3, 5, dtype=dtype)
    guards.poison(tensor)
    assert guards.poisoned(tensor) == 15
    if dtype.is_floating_point:
        assert tensor.float().isnan().all()
    tensor[1:] = torch.zeros(2, 5).to(dtype)
    assert guards.poisoned(tensor) == 5


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.bool], ids=str)
def test_narrow_integers_are_never_taken_for_poison(dtype):
    tensor = torch.arange(-128, 128).to(dtype)
    guards.poison(tensor)
    assert guards.poisoned(tensor) == 0
    assert torch.equal(tensor, torch.arange(-128, 128).to(dtype))


def inference_tensor():
    with torch.inference_mode():
        return torch.ones(4)


def test_plain_tensors_are_accepted_and_poisoned():
    for tensor in (torch.ones(4), inference_tensor(), torch.empty(0, 4), torch.ones(4, requires_grad=True)):
        assert guards.require_plain("y", tensor, CPU) is tensor
        guards.poison(tensor)


@pytest.mark.parametrize(
    "value",
    [
        None, 1.0, torch.nn.Parameter(torch.ones(4)), torch.ones(4, 4).t(), torch.ones(4).to_sparse(), torch.ones(4, device="meta"),
        torch._efficientzerotensor(4), torch._to_functional_tensor(torch.ones(4)), torch.ones(4, dtype=torch.complex64).conj(),
    ],
    ids=["none", "number", "subclass", "strided", "sparse", "device", "zero", "functional", "conjugate"],
)  # fmt: skip
def test_others_are_not(value):
    with pytest.raises(Tripped):
        guards.require_plain("y", value, CPU)


def test_a_batched_tensor_is_not_plain():
    def inside(row):
        with pytest.raises(Tripped):
            guards.require_plain("y", row, CPU)
        return row

    torch.func.vmap(inside)(torch.ones(3, 4))


def test_digest_sees_one_bit_anywhere_and_a_swap():
    tensor = torch.randint(256, (5, 40_001), dtype=torch.uint8)
    before = digest_tensors({"x": tensor})
    assert digest_tensors({"x": tensor.clone()}) == before
    for place in (0, 7, 8, 32_768, 200_000, tensor.numel() - 1):
        tensor.view(-1)[place] ^= 1
        assert digest_tensors({"x": tensor}) != before
        tensor.view(-1)[place] ^= 1
    assert digest_tensors({"x": tensor}) == before
    assert digest_tensors({"x": tensor.flip(0)}) != before
    assert digest_tensors({"x": tensor.view(40_001, 5)}) != before


def test_sealed_outputs_are_read_with_their_key_alone(tmp_path):
    outputs = {"y": torch.randn(33, 7).bfloat16(), "empty": torch.empty(0, 3), "one": torch.tensor(2.0)}
    key, path = sealed.new_key(), tmp_path / "5.safetensors"
    sealed.write(outputs, path, key)
    found = sealed.read(path, key)
    assert all(torch.equal(found[name], outputs[name]) for name in outputs)
    assert not torch.equal(sealed.read(path, key + 1)["y"], outputs["y"])
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_one_key_have_streams_of_their_own(tmp_path):
    """Else rows that are known to be zero in one output would uncover another."""
    zeros = {"y": torch.zeros(64)}
    for name in ("1", "2"):
        sealed.write(zeros, tmp_path / f"{name}.safetensors", 7)
    assert (tmp_path / "1.safetensors").read_bytes()[-256:] != (tmp_path / "2.safetensors").read_bytes()[-256:]


def replaced(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *arguments: None)


@pytest.mark.parametrize(
    ("owner", "name", "verdict"),
    [
        (time, "perf_counter", "TIMER_TAMPERED"), (torch.cuda, "synchronize", "TIMER_TAMPERED"), (torch.Tensor, "clone", "BENCH_TAMPERED"),
        (inputs, "digest_tensors", "BENCH_TAMPERED"), (inputs.Inputs, "load", "BENCH_TAMPERED"), (guards, "poisoned", "BENCH_TAMPERED"),
    ],
)  # fmt: skip
def test_watch_names_what_was_replaced(monkeypatch, owner, name, verdict):
    watch = Watch([guards, inputs, timing], [])
    watch.require_untouched()
    replaced(monkeypatch, owner, name)
    with pytest.raises(Tripped, match=name) as tripped:
        watch.require_untouched()
    assert tripped.value.verdict.value == verdict


def test_watch_sees_the_timer_itself():
    timer = timing.HostTimer()
    watch = Watch([timing], [timer])
    timer.timed(0, lambda: None)
    watch.require_untouched()
    timer._clock = lambda: 0.0
    with pytest.raises(Tripped, match="_clock"):
        watch.require_untouched()


def test_watch_allows_what_libraries_do():
    watch = Watch([guards, inputs, timing], [])
    torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(3))
    torch.set_default_device("cpu")
    try:
        watch.require_untouched()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(("elements", "caught"), [(64, True), (63, False)])
def test_few_elements_can_be_equal_by_chance(elements, caught):
    """Two calls gave the same, and the reference's did not."""
    reference = SimpleNamespace(findings=SimpleNamespace(outputs={1000: "a", 1001: "b"}))
    contender = SimpleNamespace(findings=SimpleNamespace(outputs={1000: "c", 1001: "c"}))
    with pytest.raises(Failed, match="1000 and 1001") if caught else nullcontext():
        Group._require_fresh(SimpleNamespace(_elements=elements, reference=reference), contender)
