"""A process whose first calls are captured into CUDA graphs, after `warmup` alone: python scripts/captured_first.py

Exit code 0 where each replay gives the bits of an eager call; `gpu_stress.py` runs it.
"""

from __future__ import annotations

import sys

import gpu_session  # noqa: F401  (puts `layer` on the path)
import layer
import torch
from stress_checks import FACTOR, Layer

from blockmoe.geometry import HEADLINE
from blockmoe.operator import warmup


def main() -> int:
    made = Layer(HEADLINE, "trace", torch.device("cuda", 0), 0)
    warmup(HEADLINE)
    wrong = []
    for tokens in (1, 16, 80, 300, 901, 4096, 14107):
        tensors, offset = made.open(tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.call(tensors, HEADLINE, offset, FACTOR)
        out.fill_(torch.nan)
        graph.replay()
        if not torch.equal(out.view(torch.int16), layer.call(tensors, HEADLINE, offset, FACTOR).view(torch.int16)):
            wrong.append(tokens)
    print(f"other bits than an eager call's: T = {wrong or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
