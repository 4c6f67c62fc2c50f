"""Is the operator right on a second GPU, and on two at once? python scripts/gpu_devices.py [--seconds 200]

    second   tensors on cuda:1 while cuda:0 is current: the bits that cuda:0 gives, cuda:0 still current; tensors on both: an error
    graph    captured on cuda:1, with other routing replayed there while cuda:0 computes
    threads  a thread a GPU, each sizes in another order, launched by both at once; by then all kernels are loaded
    bench    `blockmoe warmup`, `doctor` and `run` with --device cuda:1; `run`'s memory is on cuda:1, none on cuda:0
    example  examples/expert_parallel.py by two processes and NCCL

Two GPUs of one kind. Exit code 1 where a check fails or is cut off by --seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import gpu_session
import layer
import torch
from stress_checks import FACTOR, Layer, sliced, verify
from torch import Tensor

from blockmoe.bench.environment import nvidia_smi
from blockmoe.geometry import HEADLINE

ROOT = gpu_session.ROOT
SIZES = (0, 1, 7, 16, 33, 80, 130, 300, 901, 2048, 4096, 14107, 20000)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def bits(out: Tensor) -> Tensor:
    return out.view(torch.int16).cpu()


class Devices:
    def __init__(self, session: gpu_session.Session) -> None:
        self.session = session
        self.tensors, self.offset = Layer(HEADLINE, "realistic", FIRST, 0).open(max(SIZES))
        self.there = [t.to(SECOND) for t in self.tensors]

    def call(self, tensors: list[Tensor], **memory: Tensor) -> Tensor:
        return layer.call(tensors, HEADLINE, self.offset, FACTOR, **memory)

    def part(self, tokens: int, device: torch.device) -> list[Tensor]:
        return sliced(self.tensors if device == FIRST else self.there, slice(tokens))

    def second(self) -> None:
        for tokens in SIZES:
            self.session.attempt(f"T={tokens}", lambda tokens=tokens: self._second(tokens))
        mixed = self.part(16, FIRST)
        mixed[4] = self.there[4]
        try:
            self.call(mixed)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        self.session.check("weights elsewhere", said.startswith("gemm1_weights: expected device cuda:0"), said=said)

    def _second(self, tokens: int) -> None:
        here, there = self.part(tokens, FIRST), self.part(tokens, SECOND)
        ok, worst, facts = verify(there, HEADLINE, self.offset, oracle=False)
        out = self.call(there)
        same = out.device == SECOND and torch.equal(bits(out), bits(self.call(here)))
        self.session.check(f"T={tokens}", ok and same and torch.cuda.current_device() == 0, worst, same=same, **facts)

    def graph(self) -> None:
        for tokens in (16, 901, 4096):
            self.session.attempt(f"T={tokens}", lambda tokens=tokens: self._graph(tokens))

    def _graph(self, tokens: int) -> None:
        here, there = ([t.clone() if n < 4 else t for n, t in enumerate(self.part(tokens, device))] for device in (FIRST, SECOND))
        self.call(there)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(SECOND):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = self.call(there)
        there[0].copy_(there[0].flip(0))
        here[0].copy_(here[0].flip(0))
        torch.cuda.synchronize(SECOND)
        for _ in range(20):
            graph.replay()
            beside = self.call(here)
        torch.cuda.synchronize(SECOND)
        self.session.check(f"T={tokens}", torch.equal(bits(out), bits(beside)) and torch.cuda.current_device() == 0)

    def threads(self) -> None:
        expected = {t: bits(self.call(self.part(t, FIRST))) for t in SIZES if t}
        wrong: list[str] = []

        def work(device: torch.device) -> None:
            order = random.Random(device.index)
            for _ in range(10):
                for tokens in order.sample(sorted(expected), len(expected)):
                    if not torch.equal(bits(self.call(self.part(tokens, device))), expected[tokens]):
                        wrong.append(f"{device} T={tokens}")

        def guarded(device: torch.device) -> None:
            try:
                work(device)
            except Exception as error:  # a thread's own would go unseen
                wrong.append(f"{device}: {type(error).__name__}: {error}")

        both = [threading.Thread(target=guarded, args=(device,)) for device in (FIRST, SECOND)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        self.session.check(f"{20 * len(expected)} calls", not wrong, wrong=wrong[:10])

    def bench(self) -> None:
        self._blockmoe("warmup", "--definitions", HEADLINE.definition_name, "--device", "cuda:1")
        self._blockmoe("warmup", "--definitions", HEADLINE.definition_name, "--device", "cuda:1", "--logits-dtype", "bfloat16")
        self._blockmoe("doctor")
        uuids = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in (FIRST, SECOND)]
        states = [nvidia_smi(uuid) for uuid in uuids]
        self.session.check("nvidia-smi by uuid", uuids[0] != uuids[1] and all(states), states=states)
        with tempfile.TemporaryDirectory() as folder:
            asked = ("--workloads", "1", "901", "--solutions", "blockmoe", "--device", "cuda:1", "--preset", "quick", "--timeout", "60")
            free, least, over = self._free(), self._free(), threading.Event()

            def watch() -> None:
                while not over.wait(0.05):
                    least[:] = map(min, least, self._free())

            watching = threading.Thread(target=watch)
            watching.start()
            self._blockmoe("run", *asked, "--output", f"{folder}/run")
            over.set()
            watching.join()
            taken = [(before - after) // 2**20 for before, after in zip(free, least, strict=True)]
            traces = [json.loads(line) for file in Path(folder, "run/traces").rglob("*.jsonl") for line in file.read_text().splitlines()]
            passed = sum(one["solution"] == "blockmoe" and one["evaluation"]["status"] == "PASSED" for one in traces)
            self.session.check("where it ran", passed == 2 and taken[0] < 64 and taken[1] > 1400, passed=passed, taken_mib=taken)

    def _free(self) -> list[int]:
        """Bytes, on each GPU."""
        return [torch.cuda.mem_get_info(device)[0] for device in (FIRST, SECOND)]

    def example(self) -> None:
        self._run([sys.executable, str(ROOT / "examples/expert_parallel.py"), "cuda"], "expert_parallel.py")

    def _blockmoe(self, *words: str) -> None:
        self._run([sys.executable, "-m", "blockmoe", *words], f"blockmoe {words[0]}")

    def _run(self, command: list[str], label: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
        said = re.sub(rf"{ROOT}/|{tempfile.gettempdir()}/\w+/", "", done.stdout + done.stderr).strip().splitlines()
        self.session.check(label, done.returncode == 0, code=done.returncode, said=said[-12:])


SECTIONS = ("second", "graph", "threads", "bench", "example")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no check after this")
    asked = parser.parse_args()
    if torch.cuda.device_count() < 2:
        parser.error(f"expected two GPUs, found {torch.cuda.device_count()}")
    session = gpu_session.Session("gpu_devices", asked.seconds)
    session.say("on", gpu=torch.cuda.get_device_name(0), torch=torch.__version__)
    devices = session.attempt("inputs", lambda: Devices(session))
    for name in SECTIONS if devices else ():
        session.section(name)
        session.attempt(name, getattr(devices, name))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
