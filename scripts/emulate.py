"""The operator's Gluon kernels on the CPU, at a published size: python scripts/emulate.py --tokens 7 --programs 12 [--orders 2]

Under TRITON_INTERPRET=1, which the script sets: Triton's interpreter routes, tests/operator/emulator runs the kernel of the plan that an
H100 would get (--machine h200: an H200), by so many programs, in so many orders. A race, a deadlock, an access out of bounds, other bits in
another order, or a result further than 2e-3 from the oracle ends it with exit code 1. With --favour 8 all tokens choose the first eight
local experts, with --favour 1 the first and no other. The headline geometry takes 3 GiB and, at T = 1,030, four minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "operator"))

import interpreter_casts  # noqa: E402
import layer  # noqa: E402
import torch  # noqa: E402
import warp  # noqa: E402
from emulator import Fault, interpret  # noqa: E402
from emulator.machine import MOST_PROGRAMS  # noqa: E402

from blockmoe.geometry import GEOMETRIES, HEADLINE  # noqa: E402
from blockmoe.operator import launch  # noqa: E402
from blockmoe.operator.machine import BY_NAME  # noqa: E402
from blockmoe.operator.plan import choose_plan  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--definition", default=HEADLINE.definition_name, choices=sorted(GEOMETRIES), metavar="NAME", help="default: the headline"
    )
    parser.add_argument("--machine", default="h100", choices=BY_NAME, help="whose plan: default h100")
    parser.add_argument("--tokens", type=int, default=7)
    parser.add_argument("--programs", type=int, default=8, help="even where the plan has clusters")
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--favour", type=int, default=0, help="local experts that all tokens choose, and no other: default 0 (as it comes)")
    asked = parser.parse_args()
    if asked.tokens < 1 or asked.programs < 1 or asked.orders < 1:
        parser.error("--tokens, --programs, --orders: expected at least 1")
    if not 0 <= asked.favour <= GEOMETRIES[asked.definition].num_local_experts:
        parser.error(f"--favour: expected 0 to {GEOMETRIES[asked.definition].num_local_experts} local experts, got {asked.favour}")
    if asked.programs > MOST_PROGRAMS:
        parser.error(f"--programs: expected at most {MOST_PROGRAMS}, got {asked.programs}")
    geometry, how = GEOMETRIES[asked.definition], {"programs": asked.programs}
    plan = choose_plan(geometry, asked.tokens, BY_NAME[asked.machine])
    if asked.programs % getattr(plan.ways[-1].gate_up, "cluster", 1):
        parser.error(f"--programs: expected an even number for {plan}, got {asked.programs}")
    launch.interpret = lambda launches, tensors: interpret(launches, tensors, **how)
    interpreter_casts.install()
    warp.install()
    torch.set_num_threads(1)
    print(f"T = {asked.tokens}: {plan}; {asked.programs} programs", flush=True)
    inputs, offset, found = layer.make(geometry, asked.tokens), (geometry.num_experts - geometry.num_local_experts) // 2, []
    if asked.favour:
        inputs[0] -= 4.0  # their groups too
        inputs[0][:, offset : offset + geometry.num_local_experts] = -50.0
        inputs[0][:, offset : offset + asked.favour] = 20.0
        if inputs[1] is not None:
            inputs[1].zero_()
    pairs = layer.pairs_of(inputs, geometry, offset)
    if asked.favour:
        print(f"pairs of each expert: {', '.join(str(n) for n in pairs if n)}", flush=True)
    way = plan.way(pairs)
    if way != plan:
        print(f"routing takes {way}", flush=True)
    oracle = layer.oracle(inputs, geometry, offset, 2.5, plan)
    for how["seed"] in range(asked.orders):
        begun = time.monotonic()
        try:
            found.append(layer.call(inputs, geometry, offset, plan=plan).view(torch.int16).clone())
        except Fault as fault:
            print(f"order {how['seed']}: {fault}")
            return 1
        off = layer.relative(found[-1].view(torch.bfloat16), oracle)
        same = torch.equal(found[0], found[-1])
        print(
            f"order {how['seed']}: {off:.1e} from the oracle, {'the same' if same else 'OTHER'} bits, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        if off > 2e-3 or not same:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
