"""`blockmoe warmup`: what it compiles, and one clear line where it can't."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from blockmoe import cli, operator
from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY
from blockmoe.operator import machine


@pytest.fixture
def warmup(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["blockmoe", "warmup", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def two_gpus(monkeypatch):
    """Two devices in name; the list of what would be compiled on them."""
    pytest.importorskip("triton")
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "of_gpu", lambda index, argument: machine.H100)
    monkeypatch.setattr(operator, "warmup", lambda geometry, device, *dtypes: compiled.append((geometry, device, *dtypes)) or 23)
    return compiled


def test_without_a_gpu(warmup, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warmup() == (2, "", "blockmoe: warmup: expected a CUDA device, found none\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--device", "cpu"), "--device: expected cuda or cuda:N, got cpu"),
        (("--device", "cuda:"), "--device: expected cuda or cuda:N, got cuda:"),
        (("--device", "cuda:2"), "--device: expected cuda:0 to cuda:1, got cuda:2"),
        (("--definitions", "other"), "--definitions: unknown definition 'other'; known: "),
    ],
)
def test_refuses_what_is_not_there(warmup, two_gpus, arguments, expected):
    code, out, err = warmup(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"blockmoe: {expected}") and not two_gpus


def test_compiles_for_each_definition(warmup, two_gpus):
    usual = (torch.float32, torch.bfloat16)
    code, out, err = warmup()
    assert (code, err, two_gpus) == (0, "", [(HEADLINE, None, *usual)]) and out.startswith(f"{HEADLINE.definition_name}: 23 kernels in 0.")
    assert warmup("--definitions", TINY.definition_name, "*_renormalize_*", "--device", "cuda:1")[0] == 0
    renormalize = [(g, 1, *usual) for g in GEOMETRIES.values() if g.routing == "renormalize"]
    assert sorted(map(str, two_gpus[1:])) == sorted(map(str, [(TINY, 1, *usual), *renormalize]))
    assert warmup("--logits-dtype", "bfloat16", "--bias-dtype", "float32")[0] == 0
    assert two_gpus[-1] == (HEADLINE, None, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtypes", [(None, None), (torch.bfloat16, torch.float32)])
def test_nothing_is_left_to_compile(monkeypatch, dtypes):
    """What calls with such logits and bias launch."""
    pytest.importorskip("triton")
    from blockmoe.operator import pipeline, plan

    compiled = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(pipeline, "of_gpu", lambda *_: machine.H200)
    monkeypatch.setattr(pipeline, "compile_only", lambda launch: compiled.add(launch.key))
    assert operator.warmup(HEADLINE, 0, *dtypes) == len(compiled)
    logits, bias = (found or usual for found, usual in zip(dtypes, (torch.float32, torch.bfloat16), strict=True))
    for tokens in (1, 5, 14, 20, 80, 300, 901, 3000, 14107):
        chosen = plan.choose_plan(HEADLINE, tokens, machine.H200, clusters=pipeline.known())
        launches = pipeline.launches(HEADLINE, tokens, chosen, 32, 2.5, logits_dtype=logits, bias_dtype=bias)
        assert {launch.key for launch in launches} <= compiled


def test_a_gpu_without_fp8(warmup, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=8, minor=0, multi_processor_count=108))
    machine.of_gpu.cache_clear()
    try:
        assert warmup() == (2, "", "blockmoe: --device: expected a GPU with FP8 (compute capability 8.9 or more), got 8.0\n")
    finally:
        machine.of_gpu.cache_clear()
