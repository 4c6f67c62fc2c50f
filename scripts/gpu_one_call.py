"""One call of the operator for a profiler, the second of two, L2 cold: python scripts/gpu_one_call.py TOKENS

    ncu --clock-control none --section SourceCounters --section SpeedOfLight -k regex:prefill -s 1 -c 1 -o of \\
        python scripts/gpu_one_call.py 14107                  # then scripts/ncu_cycles.py
    ncu --clock-control none --cache-control none --section PmSampling --pm-sampling-interval 1000 -k regex:'prefill|stream|either' \\
        -s 1 -c 1 -o of python scripts/gpu_one_call.py 300              # then scripts/ncu_over_time.py
"""

from __future__ import annotations

import argparse

import gpu_operator as operator
import torch
from gpu_prefill import Variant

from blockmoe.geometry import HEADLINE
from blockmoe.operator.machine import of_gpu
from blockmoe.operator.plan import TOKEN_CHUNK, choose_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=int, help=f"1 to {TOKEN_CHUNK}: with the bundled workload's routing where there is one")
    tokens = parser.parse_args().tokens
    if not 1 <= tokens <= TOKEN_CHUNK:
        parser.error(f"tokens: expected 1 to {TOKEN_CHUNK}, got {tokens}")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    torch.manual_seed(0)
    inputs, offset = operator.workload(HEADLINE, tokens)
    plan = choose_plan(HEADLINE, tokens, of_gpu(0))
    call, timer = Variant((*inputs, *operator.weights(HEADLINE)), offset, plan), operator.Timer()
    call.events(timer, False)  # the first call was Variant's
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
