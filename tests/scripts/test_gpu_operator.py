"""Plans that are measured beside the chosen one."""

import pytest

pytest.importorskip("triton.experimental.gluon")

import gpu_operator  # noqa: E402

from blockmoe.operator.machine import H100, H200  # noqa: E402


@pytest.mark.parametrize("machine", [H100, H200], ids=["H100", "H200"])
@pytest.mark.parametrize("tokens", [1, 16, 52, 901, 4096])
def test_candidates(tokens, machine, monkeypatch):
    """The chosen plan first, each once, and others beside it."""
    monkeypatch.setattr(gpu_operator, "of_gpu", lambda index: machine)
    found = gpu_operator.candidates(tokens)
    assert next(iter(found.values())) == gpu_operator.choose_plan(gpu_operator.HEADLINE, tokens, machine)
    assert len(set(found.values())) == len(found) > 3
