"""These tests run Triton's interpreter, which has to be chosen before triton is imported: only in the child session
that tests/operator/test_interpreter.py starts."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_casts
    import torch

    interpreter_casts.install()
    torch.set_num_threads(1)
else:
    collect_ignore_glob = ["test_*.py"]
