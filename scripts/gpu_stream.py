"""Check and time the streaming kernels on a GPU: python scripts/gpu_stream.py [--tokens 16,901] [--seconds 95]

First TMA alone: the weights' producer and a consumer that only frees, all experts, by box and depth. Then for each T (routing
of the bundled workload where there is one): route by the pipeline's kernels; GEMM1 and GEMM2 by the pipeline's kernels and by
the streaming ones over the same tile lists, outputs compared; each stage timed cold; the whole call, route to combine.
The work runs in a child process, which names each variant before it begins; a child that says nothing for 20 s, or dies, is
begun anew without the variants it had begun. Every line is flushed; JSONL goes to $OUT (default results/tmp).
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

SILENCE_S = 20
READS = ((128, 16, 6), (128, 16, 6, 2), (128, 16, 6, 1, 256), (128, 16, 6, 2, 256), (64, 16, 12, 2), (64, 16, 12, 4), (128, 16, 3))
STAGES = {(128, 16): 6, (128, 32): 6, (128, 64): 5, (64, 16): 12, (64, 32): 10, (64, 64): 8}  # by rows, block_n


def watch(seconds: float, arguments: list[str]) -> None:
    """Run children until one is through; each leaves out what those before it had begun."""
    end, skip = time.time() + seconds, []
    while time.time() < end - 8:
        command = [sys.executable, "-u", __file__, "--child", "--skip", json.dumps(skip), "--until", str(end - 3), *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: queue.Queue = queue.Queue()

        def read(child=child, lines=lines):
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        at, before = None, len(skip)
        while True:
            try:
                line = lines.get(timeout=max(0.1, min(SILENCE_S, end - time.time())))
            except queue.Empty:
                print(f"silent: killed at {at}", flush=True)
                child.kill()
                break
            if line is None:
                break
            if line.startswith("begin "):
                at = line[6:].strip()
                skip.append(at)
            else:
                print(line, end="", flush=True)
        if child.wait() == 0 or len(skip) == before:
            return
        print(f"child ended with {child.returncode} at {at}", flush=True)


class Session:
    def __init__(self) -> None:
        import gpu_operator as common
        import torch
        from gpu_session import Journal

        from blockmoe.geometry import HEADLINE

        self.g, self.common, self.torch, self.journal = HEADLINE, common, torch, Journal("gpu_stream")
        self.say = self.journal.say
        self.skip, self.summary = set(json.loads(options.skip)), []
        torch.manual_seed(1)
        self.say("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
        self.weights = common.weights(self.g)
        self.timer, self.sms = common.Timer(), torch.cuda.get_device_properties(0).multi_processor_count
        words = 32 * self.g.expert_bytes // 4 + 4096
        self.floor_data = torch.randint(0, 2**31 - 1, (words,), dtype=torch.int32, device="cuda")

    def attempt(self, label: str, work):
        if label in self.skip:
            return
        if time.time() > options.until:
            self.say("no time", label=label)
            return
        print(f"begin {label}", flush=True)
        self.journal.attempt(label, work)  # raises where the context is gone: the next child goes on

    def note(self, tokens: int, stage: str, kernel: str, us: float, mb: float, **more) -> None:
        self.say(stage, tokens=tokens, kernel=kernel, us=us, tb_s=mb / us, **more)
        self.summary.append((tokens, stage, kernel, us, mb / us))

    def tma_alone(self) -> None:
        from stream_read import read_weights

        from blockmoe.operator.launch import Prepared
        from blockmoe.operator.plan import StreamTile

        torch, g = self.torch, self.g
        count = torch.tensor([32], dtype=torch.int32, device="cuda")
        expert = torch.arange(32, dtype=torch.int32, device="cuda")
        for which, mb in enumerate((940.0, 470.0)):  # 32 experts: 939.5 and 469.8 MB
            for tile in READS:

                def one(which=which, mb=mb, tile=tile):
                    w = self.weights[2 * which]
                    ready = Prepared([read_weights(g, which, w.shape, StreamTile(*tile), self.sms)], 0)
                    addresses = [w.data_ptr(), count.data_ptr(), expert.data_ptr(), *[256] * 7]
                    us = self.timer.median_us(lambda: ready.run(addresses))
                    self.note(0, "read", f"W{which + 1} {StreamTile(*tile)}", us, mb)

                self.attempt(f"tma W{which + 1} {tile}", one)

    def tokens(self, tokens: int) -> None:
        inputs, offset = self.common.workload(self.g, tokens)
        pairs, active = self.common.counts(inputs, self.g, offset)
        words = active * self.g.expert_bytes // 4 // 4096 * 4096
        sink, read = self.timer.sink, self.common.read_kernel
        floor = self.timer.median_us(lambda: read[(1056,)](self.floor_data, sink, words, 4096, num_warps=8))
        self.say("floor", tokens=tokens, pairs=pairs, active=active, read_us=floor)
        few, some = ((128, 16), (64, 16)), ((128, 64), (128, 32))
        for block_i, block_n in few if tokens <= 100 else some:
            Setting(self, tokens, inputs, offset, pairs, active, floor, block_i, block_n).all()


class Setting:
    """One T, one number of pairs a tile, one quantisation group."""

    def __init__(self, session, tokens, inputs, offset, pairs, active, floor, block_i, block_n) -> None:
        from blockmoe.operator.launch import Prepared
        from blockmoe.operator.pipeline import stages
        from blockmoe.operator.plan import DownTile, GateUpTile, Plan, StreamTile, choose_plan
        from blockmoe.operator.workspace import layout, slots

        torch, g = session.torch, session.g
        small = block_i == 64
        gate_up = GateUpTile(block_i, block_n, 3 if block_n == 16 else 4, 4 if small else 8)
        down = DownTile(64 if small else 128, block_n, 5 if small else 4, 4)
        plan = Plan("sorted", choose_plan(g, tokens).route, gate_up, down, row_buffer=1 << 30)
        self.s, self.t, self.group, self.block_n, self.pairs, self.floor = session, tokens, block_i, block_n, pairs, floor
        self.tile = StreamTile(block_i, block_n, STAGES[block_i, block_n])
        self.out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device="cuda")
        tensors = [*inputs, *session.weights, self.out, torch.zeros(layout(g, tokens, plan)[1], dtype=torch.uint8, device="cuda")]
        addresses = [t.data_ptr() for t in tensors]
        found = stages(g, tokens, plan, offset, 2.5, sm_count=session.sms, bias_dtype=inputs[1].dtype)
        assert len(found["combine"]) == 1
        self.run = {name: partial(Prepared(launches, 0).run, addresses) for name, launches in found.items()}
        self.plan, self.offset, self.bias_dtype, self.addresses = plan, offset, inputs[1].dtype, addresses
        self.b = {name: slot.of(tensors) for name, slot in slots(g, tokens, plan).items()}
        self.mb = {"gate_up": active * 2 * g.intermediate_size * g.hidden_size / 1e6}
        self.mb |= {"down": self.mb["gate_up"] / 2, "whole": active * g.expert_bytes / 1e6}
        self.best: dict = {}
        self.name = f"T={tokens} group {block_i} x{block_n}"

    def work(self, stage: str, tile):
        from blockmoe.operator.launch import Prepared
        from blockmoe.operator.pipeline import stages

        gate_up = tile if stage == "gate_up" else self.tile  # whose rows are the scales' group
        plan = replace(self.plan, path="stream", gate_up=gate_up, down=tile)
        found = stages(self.s.g, self.t, plan, self.offset, 2.5, sm_count=self.s.sms, bias_dtype=self.bias_dtype)
        return partial(Prepared(found[stage], 0).run, self.addresses)

    def chain(self, first, second):
        steps = (self.run["route"], first, second, self.run["combine"])
        return lambda: [step() for step in steps]

    def time(self, stage: str, kernel: str, work) -> float:
        us = self.s.timer.median_us(work)
        more = dict(over_floor=us / self.floor) if stage == "whole" else {}
        self.s.note(self.t, stage, kernel, us, self.mb[stage], group=self.group, **more)
        return us

    def all(self) -> None:
        self.chain(self.run["gate_up"], self.run["down"])()
        self.s.torch.cuda.synchronize()
        rows = self.b["pair_token"].numel()
        self.old = {n: self.b[n][: self.pairs * (self.b[n].numel() // rows)].clone() for n in ("middle", "middle_scale", "rows")}
        self.old_out = self.out.clone()
        self.s.attempt(f"{self.name} check", self.check)
        self.s.attempt(f"{self.name} existing", self.existing)
        other = 192 - self.group
        for stage in ("gate_up", "down"):
            tiles = [replace(self.tile, burst=2), replace(self.tile, stages=self.tile.stages // 2)]
            tiles += [replace(tile, promotion=256) for tile in tiles]
            if stage == "down":
                tiles.insert(1, replace(self.tile, rows=other, stages=STAGES[other, self.block_n]))
            for tile in tiles:
                self.s.attempt(f"{self.name} {stage} {tile}", lambda stage=stage, tile=tile: self.candidate(stage, tile))
        self.s.attempt(f"{self.name} whole", self.whole)

    def candidate(self, stage: str, tile) -> None:
        us = self.time(stage, f"stream {tile}", self.work(stage, tile))
        if stage not in self.best or us < self.best[stage][0]:
            self.best[stage] = us, tile

    def whole(self) -> None:
        one, two = (self.best.get(stage, (0, self.tile))[1] for stage in ("gate_up", "down"))
        self.time("whole", f"stream {one}; {two}", self.chain(self.work("gate_up", one), self.work("down", two)))

    def existing(self) -> None:
        label = f"pipeline {2 * self.group}x{self.block_n}"
        for stage in ("gate_up", "down"):
            self.time(stage, label, self.run[stage])
        self.time("whole", label, self.chain(self.run["gate_up"], self.run["down"]))

    def check(self) -> None:
        def error(a, b) -> float:
            return ((a.float() - b.float()).norm() / b.float().norm()).item()

        def values(of) -> object:
            return of["middle"].float().view(self.pairs, -1, self.group) * of["middle_scale"].view(self.pairs, -1, 1)

        b, old, torch = self.b, self.old, self.s.torch
        for name in old:
            b[name].view(torch.uint8).fill_(0x7F)  # NaN in e4m3 and bf16, huge in float32
        self.out.fill_(float("nan"))
        self.work("gate_up", self.tile)()
        torch.cuda.synchronize()
        new = {n: b[n][: old[n].numel()].clone() for n in ("middle", "middle_scale")}
        same = (new["middle"].view(torch.uint8) == old["middle"].view(torch.uint8)).float().mean().item()
        scales = error(new["middle_scale"], old["middle_scale"])
        self.s.say("check gate_up", tile=self.tile, same_codes=same, scale_rel=scales, rel_l2=error(values(new), values(old)))
        for name in new:  # GEMM2 over the pipeline's intermediate: a wrong GEMM1 must not hide a right GEMM2
            b[name][: old[name].numel()].copy_(old[name])
        for rows in (self.group, 192 - self.group):
            b["rows"].view(torch.uint8).fill_(0x7F)
            self.work("down", replace(self.tile, rows=rows, stages=STAGES[rows, self.block_n]))()
            torch.cuda.synchronize()
            result = b["rows"][: old["rows"].numel()]
            same = (result == old["rows"]).float().mean().item()
            self.s.say("check down", rows=rows, group=self.group, rel_l2=error(result, old["rows"]), same=same)
        for _ in range(3):
            self.chain(self.work("gate_up", self.tile), self.work("down", self.tile))()
        torch.cuda.synchronize()
        self.s.say("check whole", tile=self.tile, rel_l2=error(self.out, self.old_out))


def child() -> None:
    session = Session()
    session.tma_alone()
    for tokens in options.tokens:
        session.tokens(tokens)
    session.say("events", us=session.timer.median_us(lambda: None))
    print("T | stage | kernel | us | TB/s of weights", flush=True)
    for tokens, stage, kernel, us, rate in sorted(session.summary, key=lambda row: (row[0], row[1], row[3])):
        print(f"{tokens} | {stage} | {kernel} | {us:.1f} | {rate:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[901, 80, 32, 16, 55, 2048])
    parser.add_argument("--seconds", type=float, default=95.0)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--skip", default="[]")
    parser.add_argument("--until", type=float, default=float("inf"))
    options = parser.parse_args()
    if options.child:
        child()
    else:
        watch(options.seconds, ["--tokens", ",".join(str(t) for t in options.tokens)])
