"""Launches carried out on the CPU, with Triton's C launcher and the encoding of descriptors as stubs."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from blockmoe.geometry import HEADLINE, TINY  # noqa: E402
from blockmoe.operator import launch, pipeline, tma  # noqa: E402
from blockmoe.operator.machine import H100, H200  # noqa: E402
from blockmoe.operator.plan import choose_plan  # noqa: E402
from blockmoe.operator.ptx import Unexpected  # noqa: E402
from blockmoe.operator.workspace import layout  # noqa: E402


class Encoder:
    """`make_tensordesc_arg`, counted."""

    def __init__(self):
        self.addresses = []
        self.promoted = []

    def __call__(self, argument, meta):
        self.addresses.append(argument.base.data_ptr())
        return [f"map at {argument.base.data_ptr()}", *argument.shape, *argument.strides]


@pytest.fixture
def stub(monkeypatch):
    """What was launched, and what encoded; every kernel has been compiled, in name."""
    sent, encoder = [], Encoder()
    run = SimpleNamespace(launch_cooperative_grid=False, launch_pdl=True)
    meta = [dict(swizzle=3, elem_size=1, elem_type=0, block_size=[64, 128])] * 3
    compiled = SimpleNamespace(run=run, packed_metadata=(4, 1, 0), function=7, metadata=SimpleNamespace(tensordesc_meta=meta))
    monkeypatch.setattr(launch, "c_launcher", lambda compiled: lambda *arguments: sent.append(arguments))
    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", encoder)
    monkeypatch.setattr(tma, "_encode_again", lambda made, address, kind, meta: encoder.promoted.append((address, kind.promotion)))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *arguments, **options: compiled)
    driver = SimpleNamespace(get_current_stream=lambda device: 5)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    tma._encoded.cache_clear()
    yield sent, encoder
    tma._encoded.cache_clear()


def prepared(tokens=16, machine=H100):
    plan = choose_plan(TINY, tokens, machine)
    assert plan.path == "stream"
    return launch.Prepared(pipeline.launches(TINY, tokens, plan, 0, 1.0), 0), layout(TINY, tokens, plan)[1]


@pytest.mark.parametrize("machine", [H100, H200], ids=["H100", "H200"])
def test_descriptors_are_encoded_once_an_address(machine, stub):
    sent, encoder = stub
    one, _ = prepared(machine=machine)
    addresses = [4096 * (i + 1) for i in range(10)]
    for _ in range(3):
        assert one.run(addresses)
    w1, w2 = addresses[launch.W1], addresses[launch.W2]
    promoted = [(w1, 256), (w2, 256)] if machine is H100 else []  # 128 is what Triton has encoded already
    assert encoder.addresses == [w1, w2] and encoder.promoted == promoted
    assert len(sent) == 2 * len(one.launches)
    assert one.run([a + 256 for a in addresses])  # other weights, then the first again
    assert one.run(addresses) and encoder.addresses == [w1, w2, w1 + 256, w2 + 256]
    other, _ = prepared(32, machine)  # another T shares what was encoded
    assert other.run(addresses) and other.run(addresses) and len(encoder.addresses) == 4

    layer = next(arguments for arguments in sent if f"map at {w1}" in arguments)
    rows = TINY.num_local_experts * 2 * TINY.intermediate_size
    assert layer[13:18] == (f"map at {w1}", rows, TINY.hidden_size, TINY.hidden_size, 1) and layer[18] == f"map at {w2}"
    assert layer[23] == addresses[launch.HIDDEN] and layer[3:13] == (5, 7, False, True, None, None, (4, 1, 0), None, None, None)


def test_clusters(stub, monkeypatch):
    """Their kernel is compiled, rewritten, and launched from the first time on with as many clusters as run at once."""
    sent, _ = stub
    compiled = SimpleNamespace(
        run=SimpleNamespace(launch_cooperative_grid=False, launch_pdl=True), packed_metadata=(16, 1, 999), function=8,
        metadata=SimpleNamespace(tensordesc_meta=[dict(swizzle=3, elem_size=1, elem_type=0, block_size=[64, 128])] * 5),
    )  # fmt: skip
    rewritten, asked = [], []
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *arguments, **options: compiled)
    monkeypatch.setattr(launch, "let_hear", lambda kernel: rewritten.append(kernel) or kernel)
    monkeypatch.setattr(launch, "active_clusters", lambda *arguments: asked.append(arguments) or 60)
    plan = choose_plan(HEADLINE, 4096)
    one = launch.Prepared(pipeline.launches(HEADLINE, 4096, plan, 0, 1.0), 0)
    addresses = [4096 * (i + 1) for i in range(10)]
    for _ in range(3):
        assert one.run(addresses)
    assert rewritten == [compiled] and asked == [(8, 16 * 32, 999, 2)]
    layers = [arguments for arguments in sent if arguments[4] == 8]
    assert len(layers) == 3 and all(arguments[0] == 60 and arguments[9] == (16, 2, 999) for arguments in layers)


def test_clusters_that_cannot_run_leave_nothing_half_launched(stub, monkeypatch):
    sent, _ = stub
    launched = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *arguments, **options: launched.append(self))
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *arguments, **options: None)

    def refuse(kernel):
        raise Unexpected("ptxas: not this one")

    monkeypatch.setattr(launch, "let_hear", refuse)
    one = launch.Prepared(pipeline.launches(HEADLINE, 4096, choose_plan(HEADLINE, 4096), 0, 1.0), 0)
    with pytest.raises(Unexpected):
        one.run([4096 * (i + 1) for i in range(10)])
    assert not launched and not sent


def test_an_address_that_tma_cannot_take(stub):
    sent, _ = stub
    one, _ = prepared()
    addresses = [4096 * (i + 1) for i in range(10)]
    addresses[launch.W2] += 1
    assert not one.run(addresses) and not sent


def test_kept_is_bounded():
    kept = tma.Kept(lambda address: (address,))
    for address in range(1000):
        assert kept[address] == (address,) and len(kept) <= tma.MOST_ADDRESSES


def test_strides_of_a_row_major_tensor():
    kind = tma.Kind(torch.bfloat16, (3, 5, 7), (1, 1, 64), None)
    assert kind.strides == (35, 7, 1)
