"""Launches carried out on the CPU, with Triton's C launcher and the encoding of descriptors as stubs."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from blockmoe.geometry import HEADLINE, TINY  # noqa: E402
from blockmoe.operator import bound, launch, pipeline, tma  # noqa: E402
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
    compiled = SimpleNamespace(
        run=run, packed_metadata=(4, 1, 0), function=7, metadata=SimpleNamespace(tensordesc_meta=meta), _init_handles=lambda: None
    )
    monkeypatch.setattr(launch, "c_launcher", lambda compiled: lambda *arguments: sent.append(arguments))
    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", encoder)
    monkeypatch.setattr(tma, "_encode_again", lambda made, address, kind, meta: encoder.promoted.append((address, kind.promotion)))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_bound", {})
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
    addresses = tuple(4096 * (i + 1) for i in range(10))
    for _ in range(3):
        assert one.run(addresses)
    w1, w2 = addresses[launch.W1], addresses[launch.W2]
    promoted = [(w1, 256), (w2, 256)] if machine is H100 else []  # 128 is what Triton has encoded already
    assert encoder.addresses == [w1, w2] and encoder.promoted == promoted
    assert len(sent) == 2 * len(one.launches)
    assert one.run(tuple(a + 256 for a in addresses))  # other weights, then the first again
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
        run=SimpleNamespace(launch_cooperative_grid=False, launch_pdl=True), packed_metadata=(16, 1, 999), function=None,
        metadata=SimpleNamespace(tensordesc_meta=[dict(swizzle=3, elem_size=1, elem_type=0, block_size=[64, 128])] * 5),
    )  # fmt: skip
    rewritten, asked, loads = [], [], []

    def load() -> None:
        """The first time there is no memory left for it."""
        loads.append(0)
        if len(loads) == 1:
            raise RuntimeError("out of memory")
        compiled.function = 8

    compiled._init_handles = load
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *arguments, **options: compiled)
    monkeypatch.setattr(launch, "let_hear", lambda kernel: rewritten.append(kernel) or kernel)
    monkeypatch.setattr(launch, "active_clusters", lambda *arguments: asked.append(arguments) or 60)
    plan = choose_plan(HEADLINE, 4096)
    one = launch.Prepared(pipeline.launches(HEADLINE, 4096, plan, 0, 1.0), 0)
    addresses = tuple(4096 * (i + 1) for i in range(10))
    with pytest.raises(RuntimeError, match="out of memory"):
        one.run(addresses)
    assert not sent
    for _ in range(3):
        assert one.run(addresses)
    assert rewritten == [compiled] and asked == [(8, 16 * 32, 999, 2)]
    layers = [arguments for arguments in sent if arguments[4] == 8]
    assert len(layers) == 3 and all(arguments[0] == 60 and arguments[9] == (16, 2, 999) for arguments in layers)


class Driver:
    """cuLaunchKernelEx: what it is told to launch, as the kernel would read it, and the error that it gives."""

    def __init__(self, types):
        self.types = [kind for kind in types if kind != "constexpr"]
        self.error, self.launched = 0, []

    def __call__(self, config, function, parameters, extra):
        config = config._obj
        read = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
        values = [
            at - bound.MAP_OFFSET if kind == "map" else read.get(kind, ctypes.c_uint64).from_address(at).value
            for kind, at in zip([*self.types, "*", "*"], parameters, strict=True)
        ]
        attributes = {one.id: (one.value.number, *one.value.three) for one in config.attributes[: config.count]}
        self.launched.append((list(config.grid), list(config.block), config.shared, config.stream, function.value, attributes, values))
        return self.error


SOURCE = SimpleNamespace(signature={"w": "tensordesc<fp8e4nv[64, 128],L>", "a": "*fp32", "n": "i32", "f": "fp32", "one": "constexpr"})


@pytest.mark.parametrize("cluster", [1, 2])
def test_bound(cluster, monkeypatch):
    """As Triton's launcher would: the map by reference, shape and strides, pointers, numbers, two empty scratch memories."""
    compiled = SimpleNamespace(src=SOURCE, run=SimpleNamespace(launch_cooperative_grid=False))
    types = bound.types_of(compiled)
    assert types == ("map", "i32", "i32", "i64", "i64", "*fp32", "i32", "fp32", "constexpr")
    driver, held = Driver(types), object()
    monkeypatch.setattr(bound, "_driver", lambda: driver)
    maps = {4096 + 256: (held, 7, 128, 128, 1)}
    ready = bound.Ready(None, 66, 9, (), ((0, 256, maps),), ((1, 16),), (-3, 2.5, 1), 4, 1000, cluster, True, types)
    one = bound.Binder(ready).bind((4096, 8192), 5)
    assert one.launch() == 0 and one.launch() == 0
    (grid, block, shared, stream, function, attributes, values), again = driver.launched
    assert driver.launched[1] == again == driver.launched[0]
    assert (grid, block, shared, stream, function) == ([66 * cluster, 1, 1], [128, 1, 1], 1000, 5, 9)
    assert values == [id(held), 7, 128, 128, 1, 8192 + 16, -3, 2.5, 0, 0]
    assert {name: value[0] for name, value in attributes.items()} == ({6: 1} if cluster == 1 else {6: 1, 4: 2, 5: 1})
    assert cluster == 1 or attributes[4][1:] == (2, 1, 1)


@pytest.mark.parametrize("changes", [{"w": "nvTmaDesc"}, {"a": ("i32", "i32")}, {"n": "u64"}])
def test_types_that_are_not_as_known(changes):
    source = SimpleNamespace(signature=SOURCE.signature | changes)
    run = SimpleNamespace(launch_cooperative_grid=False)
    assert bound.types_of(SimpleNamespace(src=source, run=run)) is None
    assert bound.types_of(SimpleNamespace(src=SOURCE, run=SimpleNamespace(launch_cooperative_grid=True))) is None
    assert bound.types_of(SimpleNamespace(run=run)) is None


def test_addresses_that_come_again_are_bound(stub, monkeypatch):
    """From the third time on, by stream; what the driver refuses Triton's launcher gets; no more are kept than MOST_BOUND."""
    sent, _ = stub
    made, launched, errors = [], [], [0]

    class Binder:
        def __init__(self, ready):
            pass

        def bind(self, addresses, stream):
            made.append((addresses, stream))
            return self

        def launch(self):
            launched.append(self)
            return errors[-1]

    monkeypatch.setattr(launch, "Binder", Binder)
    monkeypatch.setattr(launch, "types_of", lambda compiled: ())
    one, _ = prepared()
    addresses, others = (tuple(start + 4096 * i for i in range(10)) for start in (4096, 1 << 20))
    count = len(one.launches)
    for _ in range(3):  # compiled, seen, bound
        assert one.run(addresses)
    assert made == [(addresses, 5)] * count and len(sent) == 2 * count and not launched
    assert one.run(addresses) and len(launched) == count and len(sent) == 2 * count
    assert one.run(others) and len(launched) == count and len(sent) == 3 * count
    one._stream = lambda device: 6
    assert one.run(addresses) and len(launched) == count and len(sent) == 4 * count
    one._stream = lambda device: 5
    errors.append(201)
    assert one.run(addresses) and len(launched) == 2 * count and len(sent) == 5 * count
    monkeypatch.setattr(launch, "MOST_BOUND", 50)
    for n in range(2 * launch.MOST_BOUND):
        assert one.run(tuple(a + 4096 * n for a in others)) and len(launch._bound) <= launch.MOST_BOUND
    for _ in range(3):  # as many sets as are kept, in turn
        for n in range(launch.MOST_BOUND):
            assert one.run(tuple(a + (1 << 30) + 4096 * n for a in others))
    assert sum(bool(bound) for bound in launch._bound.values()) == launch.MOST_BOUND


def test_clusters_that_cannot_run_leave_nothing_half_launched(stub, monkeypatch):
    sent, _ = stub
    launched = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *arguments, **options: launched.append(self))
    loaded = SimpleNamespace(_init_handles=lambda: None)
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *arguments, **options: loaded)

    def refuse(kernel):
        raise Unexpected("ptxas: not this one")

    monkeypatch.setattr(launch, "let_hear", refuse)
    one = launch.Prepared(pipeline.launches(HEADLINE, 4096, choose_plan(HEADLINE, 4096), 0, 1.0), 0)
    with pytest.raises(Unexpected):
        one.run(tuple(4096 * (i + 1) for i in range(10)))
    assert not launched and not sent


def test_an_address_that_tma_cannot_take(stub):
    sent, _ = stub
    one, _ = prepared()
    addresses = tuple(4096 * (i + 1) for i in range(10))
    addresses = (*addresses[: launch.W2], addresses[launch.W2] + 1, *addresses[launch.W2 + 1 :])
    assert not one.run(addresses) and not sent


def test_kept_is_bounded():
    kept = tma.Kept(lambda address: (address,))
    for address in range(1000):
        assert kept[address] == (address,) and len(kept) <= tma.MOST_ADDRESSES


def test_strides_of_a_row_major_tensor():
    kind = tma.Kind(torch.bfloat16, (3, 5, 7), (1, 1, 64), None)
    assert kind.strides == (35, 7, 1)


def test_a_tensor_without_memory(stub):
    """A DTensor's address is 0, which is aligned."""
    one, _ = prepared()
    addresses = [4096 * (i + 1) for i in range(10)]
    addresses[launch.W1] = 0
    for _ in range(2):
        with pytest.raises(TypeError, match="expected tensors with memory of their own, got one at address 0"):
            one.run(tuple(addresses))
    assert not stub[0]


def test_what_is_compiled_beforehand_is_loaded_too(stub, monkeypatch):
    """Nothing can be loaded while a graph is captured."""
    loads = []
    compiled = SimpleNamespace(_init_handles=lambda: loads.append(0))
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *arguments, **options: compiled)
    one, _ = prepared()
    for each in one.launches:
        launch.compile_only(each)
    assert len(loads) == len(one.launches)


def test_a_kernel_that_did_not_load_is_tried_again(stub, monkeypatch):
    """Triton would launch no function: it takes its launcher for a sign that all is loaded."""
    sent, _ = stub
    one, _ = prepared()
    compiled, loads = triton.JITFunction.run(None), []

    def load() -> None:
        loads.append(0)
        if len(loads) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(compiled, "_init_handles", load)
    addresses = tuple(4096 * (i + 1) for i in range(10))
    with pytest.raises(RuntimeError, match="capturing"):
        one.run(addresses)
    assert one.run(addresses) and one.run(addresses) and len(sent) == len(one.launches) and len(loads) > 3


def test_kernels_load_one_at_a_time(stub, monkeypatch):
    """Another thread is handed a kernel whose function is not there yet."""
    compiled, at_once, most = triton.JITFunction.run(None), [], []

    def load() -> None:
        at_once.append(0)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()

    monkeypatch.setattr(compiled, "_init_handles", load)
    addresses, failed = tuple(4096 * (i + 1) for i in range(10)), []

    def call(tokens: int) -> None:
        one, _ = prepared(tokens)
        if not one.run(addresses):
            failed.append(tokens)

    threads = [threading.Thread(target=call, args=(tokens,)) for tokens in (9, 10, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and max(most) == 1 and len(most) >= 6
