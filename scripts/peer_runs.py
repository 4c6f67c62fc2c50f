"""What the scripts that run peers on a GPU share: a journal, solutions by name, the bench's inputs, children that may die.

The journal is $OUT/SCRIPT.jsonl (default results/tmp), and $OUT/SCRIPT.log holds tracebacks and everything printed, SCRIPT being
the script that was started.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT", ROOT / "results" / "tmp"))
SCRIPT = Path(sys.argv[0]).stem
JOURNAL, LOG = OUT / f"{SCRIPT}.jsonl", OUT / f"{SCRIPT}.log"


def say(kind: str, **fields) -> None:
    fields = {"kind": kind, **fields}
    with JOURNAL.open("a") as file:
        file.write(json.dumps(fields, default=str) + "\n")
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()), flush=True)


def attempt(label: str, work):
    """The work's result, or None with the traceback in the log. A broken CUDA context ends this process."""
    import torch

    try:
        result = work()
        torch.cuda.synchronize()
        return result
    except Exception as error:
        say("failed", label=label, error=f"{type(error).__name__}: {str(error)[:200]}")
        with LOG.open("a") as file:
            file.write(f"--- {label}\n{traceback.format_exc()}\n")
    try:
        torch.cuda.synchronize()
    except Exception:
        say("context lost", label=label)
        os._exit(3)
    return None


def load(name: str):
    """A solution's module; helper modules beside it are imported afresh."""
    folder = ROOT / "solutions" / name
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# the bench's inputs and the reference's outputs


class Bench:
    def __init__(self, tokens: list[int], seed: int) -> None:
        import torch

        from blockmoe.bench.bundled import definition_of, workloads_of
        from blockmoe.bench.dataset import bundled_root
        from blockmoe.bench.inputs import MODES, Inputs
        from blockmoe.geometry import HEADLINE

        torch.backends.cuda.matmul.allow_tf32 = False
        self.geometry, self.tokens = HEADLINE, tokens
        by_tokens = {workload.axes["seq_len"]: workload for workload in workloads_of(HEADLINE)}
        self.workloads = {count: by_tokens[count] for count in tokens}
        definition = definition_of(HEADLINE)
        self.inputs = {mode: Inputs(definition, bundled_root(), torch.device("cuda"), mode, seed) for mode in MODES}
        self.references: dict[tuple[str, int], torch.Tensor] = {}

    def open(self, mode: str, tokens: int) -> list:
        from blockmoe.reference import moe_reference

        inputs = self.inputs[mode]
        inputs.open(self.workloads[tokens])
        if (mode, tokens) not in self.references:
            reference = moe_reference(**inputs.values, geometry=self.geometry)
            self.references[mode, tokens] = reference.bfloat16()
        return list(inputs.values.values())


def caller(module, arguments: list, tokens: int, hidden: int, **override):
    """A call without arguments that returns the output, whichever way the solution passes it."""
    import torch

    parameters = inspect.signature(module.run).parameters
    takes_output = "output" in parameters or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if not takes_output:
        return partial(module.run, *arguments, **override)
    output = torch.full((tokens, hidden), float("nan"), dtype=torch.bfloat16, device="cuda")

    def call():
        module.run(*arguments, output, **override)
        return output

    return call


# children


def run_pending(pending: list[str], command: list[str], until: float) -> None:
    """`command`, with the names still to be run put behind --peers, in children one after the other until all are done.

    A child says "begin" for each name; where it dies, the next one goes on behind the name that it died in.
    """
    while pending and time.time() < until:
        begun = read()
        status = 1
        try:
            with LOG.open("a") as log:
                status = subprocess.run([*command, "--peers", ",".join(pending)], stderr=log, timeout=until + 30 - time.time()).returncode
        except subprocess.TimeoutExpired:
            say("timeout", pending=pending)
            break
        if status == 0:
            break
        started = [line["peer"] for line in read()[len(begun) :] if line["kind"] == "begin"]
        say("child ended", status=status, during=started[-1] if started else None)
        if not started:  # no GPU, or something that all peers need
            break
        pending = pending[len(started) :]


def read() -> list[dict]:
    """The journal's lines so far."""
    return [json.loads(line) for line in JOURNAL.read_text().splitlines()] if JOURNAL.exists() else []
