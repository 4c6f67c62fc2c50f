"""Are the operator's kernels those of a commit? python scripts/same_instructions.py COMMIT [--tokens 1,80,901] [--machine h200]

Compiles for sm_90a, without a GPU, what this tree and the commit's launch at so many tokens of the headline geometry, and compares
instructions in their order: a line a kernel, with how many differ, and how many do but for constants (addresses, offsets of arguments).
Exit code 1 where one differs but for those, 2 where a tree does not compile. Measurements of a commit hold for another whose kernels have
the same instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from commit_tree import ROOT, tree_of

COMPILED = """\
import json, sys
sys.path[:0] = ["src", "tests/operator"]
from aot import compiled
from blockmoe.geometry import HEADLINE
from blockmoe.operator import machine
from blockmoe.operator.pipeline import launches
from blockmoe.operator.plan import choose_plan
for tokens in map(int, sys.argv[2:]):
    for launch in launches(HEADLINE, tokens, choose_plan(HEADLINE, tokens, getattr(machine, sys.argv[1])), 0, 2.5):
        print(json.dumps((tokens, launch.kernel.__name__, compiled(launch, 90).sass)), flush=True)
"""


def instructions(sass: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(.*?;)", sass)


def differences(one: list[str], other: list[str]) -> tuple[int, int]:
    """Of two kernels' instructions, place by place: how many differ, and how many do but for constants."""
    places = list(zip(one, other, strict=False))
    more = abs(len(one) - len(other))
    plain = [tuple(re.sub(r"0x[0-9a-f]+", "c", text) for text in pair) for pair in places]
    return more + sum(a != b for a, b in places), more + sum(a != b for a, b in plain)


def kernels(tree: Path, machine: str, tokens: list[int]) -> dict[tuple[int, str], list[str]]:
    command = [sys.executable, "-c", COMPILED, machine.upper(), *map(str, tokens)]
    said = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if said.returncode:
        hint = " (make test installs it)" if "No module named 'triton'" in said.stderr else ""
        print(f"same_instructions: {tree} does not compile: {said.stderr.strip().splitlines()[-1]}{hint}", file=sys.stderr)
        raise SystemExit(2)
    return {(t, name): instructions(sass) for t, name, sass in map(json.loads, said.stdout.splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--tokens", default="1,14,80,901", help="comma-separated: default 1,14,80,901")
    parser.add_argument("--machine", default="h200", choices=("h100", "h200"), help="whose plans: default h200")
    asked = parser.parse_args()
    tokens = [int(t) for t in asked.tokens.split(",") if t.isdecimal()]
    if not tokens or ",".join(map(str, tokens)) != asked.tokens or min(tokens) < 1:
        parser.error(f"--tokens: expected numbers and commas, got {asked.tokens!r}")
    try:
        with tree_of(asked.commit) as tree:
            then = kernels(tree, asked.machine, tokens)
    except ValueError as error:
        parser.error(f"commit: {error}")
    now, failed = kernels(ROOT, asked.machine, tokens), 0
    print("T | kernel | instructions | differ | but for constants")
    for t, name in sorted(now.keys() | then.keys()):
        here, there = now.get((t, name), []), then.get((t, name), [])
        every, others = differences(here, there)
        failed += others > 0
        print(f"{t} | {name} | {len(here)} | {every} | {others}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
