"""These tests run Triton's interpreter, which has to be chosen before triton is imported: only in the child session
that tests/operator/test_interpreter.py starts."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_casts
    import torch
    import warp

    interpreter_casts.install()
    warp.install()
    torch.set_num_threads(1)

    @pytest.fixture
    def emulated(monkeypatch):
        """What to emulate Gluon kernels with, to be changed; other kernels are interpreted as ever."""
        from emulator import interpret

        from blockmoe.operator import launch

        how = {"programs": 4, "seed": 0, "changes": {}}
        monkeypatch.setattr(launch, "interpret", lambda launches, tensors: interpret(launches, tensors, **how))
        return how

else:
    collect_ignore_glob = ["test_*.py"]
