"""Helpers beside the tests are importable by their plain names, in the child session of the interpreter too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
