"""The parts of scripts/gpu_stress.py that decide, and the script end to end where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import gpu_session  # noqa: E402
import layer  # noqa: E402
import stress_checks as checks  # noqa: E402

from blockmoe.geometry import HEADLINE, TINY  # noqa: E402
from blockmoe.reference import moe_reference  # noqa: E402

ROOT = Path(__file__).parents[2]
NONE = torch.zeros(9, dtype=torch.bool)


def outcome(change) -> bool:
    """Whether a result passes that differs from the reference by `change`."""
    inputs = layer.make(TINY, 9)
    inputs[0][4, 8:16] = -50.0
    expected = moe_reference(*inputs, 8, 2.5, geometry=TINY)
    out = expected.bfloat16()
    change(out)
    return checks.passes(checks.compare(out, expected, NONE))


def test_what_passes():
    def swap(out):
        out[[0, 1]] = out[[1, 0]]

    def put(token, value):
        return lambda out: out[token].__setitem__(slice(3, 4), value)

    assert outcome(lambda out: None) and outcome(lambda out: out.mul_(1.01))
    assert not outcome(lambda out: out.mul_(1.04))
    assert not outcome(swap)
    assert not outcome(put(2, torch.nan))
    assert not outcome(put(4, 1e-9)) and not outcome(put(4, torch.nan))  # token 4 has no pair


def test_one_wrong_token_among_many_fails_though_the_norm_hides_it():
    expected = torch.randn(4096, 64)
    out = expected.clone()
    out[1000] *= 1.5
    found = checks.compare(out, expected, torch.zeros(4096, dtype=torch.bool))
    assert found["rel_l2"] < 0.03 and not checks.passes(found)
    assert checks.passes(checks.compare(out, expected, torch.arange(4096) == 1000))


@pytest.mark.parametrize("all_off", [False, True])
def test_an_oracle_of_few_tokens_that_are_off_is_asked_of_many(all_off, monkeypatch):
    tensors, offset = checks.Layer(TINY, "trace", torch.device("cpu"), 0).open(40)
    asked = []

    def off(out, tensors, ignored, g, offset, plan, index):
        asked.append(set(index.tolist()))
        return 0.0021 if all_off or len(asked) == 1 else 0.0001

    monkeypatch.setattr(checks, "off_oracle", off)
    monkeypatch.setattr(checks, "MANY_TOKENS", 10)
    ok, worst, facts = checks.verify(tensors, TINY, offset, most=6)
    few, many = asked
    assert {0, 39} <= few < many and len(few) <= 6 < 10 <= len(many) <= 16 and facts["oracle_of_few"] == 0.0021
    assert ok == (not all_off) and worst["oracle"] == (0.0021 if all_off else 0.0001)


def test_few_tokens_that_are_far_off_the_oracle_fail_at_once(monkeypatch):
    tensors, offset = checks.Layer(TINY, "trace", torch.device("cpu"), 0).open(40)
    asked = []
    monkeypatch.setattr(checks, "off_oracle", lambda *given: asked.append(1) or 0.0051)
    assert not checks.verify(tensors, TINY, offset, most=6)[0] and len(asked) == 1


def test_near_ties():
    logits, bias = torch.randn(6, 256), torch.zeros(256)
    logits[0] = 0.0  # exact ties are decided by the index
    logits[1:4] = -6.0
    logits[1:4, :32] = 6.0
    logits[1, 7] += 1e-6  # in float32 a tie with those before it, or the first of all
    logits[2, 7] += 0.1  # first of all
    logits[3, :16], logits[3, 32:48] = 2.0, 2.0 + 1e-6  # which does not matter: the group's other half is chosen
    assert checks.near_ties(logits, bias, HEADLINE).tolist() == [False, True, False, False, False, False]
    assert not checks.near_ties(logits, None, layer.RENORMALIZE).any()


@pytest.mark.parametrize("name", checks.SPECIALS)
def test_special_routings_are_what_they_say(name):
    tensors, _ = checks.Layer(TINY, "trace", torch.device("cpu"), 0).open(20)
    kept = [t.clone() for t in tensors]
    changed = checks.special(tensors, name, 8, TINY)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(tensors, kept, strict=True))
    found = checks.counts(changed, TINY, 8)
    wanted = {"no local pair": (0, 0), "all tokens on one expert": (20, 1), "all tokens on the same experts": (80, 4)}
    if name in wanted:
        assert (found["pairs"], found["active"]) == wanted[name]
    else:
        assert found["pairs"] > 0


def test_shifted_addresses():
    for tensor in (t for t in layer.make(TINY, 5) if t is not None):
        shifted = checks.unaligned(tensor)
        assert shifted.is_contiguous() and shifted.data_ptr() % 16 == tensor.itemsize
        assert torch.equal(shifted.view(torch.uint8), tensor.view(torch.uint8))


def test_a_session_passes_over_failures_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    session = gpu_session.Session("name", 60)
    session.section("one")
    assert session.attempt("raises", lambda: 1 / 0) is None
    assert session.attempt("returns", lambda: session.check("fine", True, {"rel_l2": 0.01}))
    session._seconds = -1
    session.section("two")
    session.attempt("late", lambda: 1)
    assert session.finish() == 1
    out = capsys.readouterr().out
    assert "one | 2 | 1 | 0" in out and "two | 0 | 0 | 1" in out and "failed_or_cut=2" in out
    lines = [json.loads(line) for line in (tmp_path / "name.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["FAILED", "traceback", "check", "cut", "section", "section", "NOT PASSED"]


def test_end_to_end_without_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/gpu_stress.py"), "--device", "cpu"]
    environment = {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "kind=PASSED" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]
