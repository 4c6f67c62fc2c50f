"""A FlashInfer-Trace tree small enough to write by hand: y = 2x, in the official layout."""

import json
import os
from pathlib import Path

NAME, OP = "scale_w64", "toy"
GOOD = "def run(x):\n    return x + x\n"


def definition(**changes):
    return {
        "name": NAME,
        "op_type": OP,
        "axes": {"n": {"type": "var"}, "w": {"type": "const", "value": 64}},
        "inputs": {"x": {"shape": ["n", "w"], "dtype": "float32"}},
        "outputs": {"y": {"shape": ["n", "w"], "dtype": "float32"}},
        "reference": "import torch\n\ndef run(x):\n    return x * 2\n",
    } | changes


def workload(n, uuid, **changes):
    fields = {"axes": {"n": n}, "inputs": {"x": {"type": "random"}}, "uuid": uuid} | changes
    return {"definition": NAME, "solution": None, "workload": fields, "evaluation": None}


def solution(name, source=GOOD, **spec):
    fields = {"language": "python", "target_hardware": ["cpu"], "entry_point": "main.py::run", "destination_passing_style": False}
    sources = [{"path": "main.py", "content": source}]
    return {"name": name, "definition": NAME, "author": "tests", "spec": fields | spec, "sources": sources}


def write(path, *lines):
    """JSON values (or raw text) one a line; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def make_tree(root, sources, workloads=((8, "aaaa-first"),), **spec):
    """A whole tree: solutions from a dict of sources, workloads from (n, uuid) pairs."""
    write(definition_path(root), definition())
    write(workloads_path(root), *(workload(n, uuid) for n, uuid in workloads))
    for name, source in sources.items():
        write(solution_path(root, name), solution(name, source, **spec))
    return root


def definition_path(root):
    return root / "definitions" / OP / f"{NAME}.json"


def workloads_path(root):
    return root / "workloads" / OP / f"{NAME}.jsonl"


def solution_path(root, name):
    return root / "solutions" / OP / NAME / f"{name}.json"


def traces_path(root):
    return root / "traces" / OP / f"{NAME}.jsonl"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def workers_of(parent):
    """Pids of the bench's workers below a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and b"blockmoe.bench.worker" in command:
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        os.kill(pid, 0)
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
