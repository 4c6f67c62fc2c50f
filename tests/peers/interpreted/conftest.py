"""These tests run Triton's interpreter, which has to be chosen before triton is imported: only in the child session that
tests/peers/test_peers.py starts."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path[:0] = [str(TESTS / "peers"), str(TESTS / "operator")]
    import fake_libraries
    import interpreter_casts
    import torch

    interpreter_casts.install()
    fake_libraries.install()
    torch.set_num_threads(1)
else:
    collect_ignore_glob = ["test_*.py"]
