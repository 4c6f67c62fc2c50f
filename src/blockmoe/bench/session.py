"""What a contender does inside its own process: import the solution, make inputs, run, check, measure.

One Session lives in one worker process. The timer and the guards bind their functions before the solution is imported.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from blockmoe.bench import guards
from blockmoe.bench.correctness import Judgement, Tolerance, judge, worse
from blockmoe.bench.guards import TimerWatch, Tripped
from blockmoe.bench.inputs import Inputs, digest_tensors
from blockmoe.bench.schema import Definition, Solution, Workload
from blockmoe.bench.timing import DeviceTimer, make_timer
from blockmoe.bench.verdicts import Verdict

SETTLE_SECONDS = 0.2  # how long a CPU output is watched for late writes while it is checked


class BuildError(Exception):
    """The solution could not be imported."""


class Session:
    """A solution, its inputs and its timer. The reference's session also judges the others' outputs."""

    def __init__(self, definition: Definition, root: Path, device: str, mode: str, seed: int, use_cupti: bool = True) -> None:
        self.definition = definition
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)  # tensors say cuda:0, never cuda
            torch.cuda.set_device(self.device)
        self.timer = make_timer(self.device, use_cupti)
        self.watch = TimerWatch()
        self._sleep = time.sleep
        self.inputs = Inputs(definition, root, self.device, mode, seed)
        self.solution: Solution | None = None
        self.function: Callable[..., Any] | None = None
        self.outputs: list[torch.Tensor] = []
        self._known: dict[int, dict[str, torch.Tensor]] = {}  # the reference's outputs by call, for judging

    # building and opening

    def build(self, solution: Solution) -> None:
        """Write the sources to a folder of their own and import the entry point; raises BuildError."""
        folder = Path(tempfile.mkdtemp(prefix="blockmoe-solution-"))
        for source in solution.sources:
            path = folder / source.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source.content, encoding="utf-8")
        file, name = solution.spec.entry_point.split("::")
        sys.path.insert(0, str(folder))
        try:
            spec = importlib.util.spec_from_file_location(f"blockmoe_solution_{solution.digest}", folder / file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # torch.library and dataclasses look a function's module up by name
            spec.loader.exec_module(module)
            function = getattr(module, name)
        except (Exception, SystemExit) as error:
            raise BuildError(f"{type(error).__name__}: {error}") from error
        expected = len(self.definition.inputs) + (len(self.definition.outputs) if solution.spec.destination_passing_style else 0)
        try:
            inspect.signature(function).bind(*range(expected))
        except TypeError:
            raise BuildError(f"{file}::{name}: expected a function of {expected} positional arguments") from None
        except ValueError:
            pass  # a built-in without a signature
        self.solution, self.function = solution, function
        self.watch.require_untouched()

    def open(self, workload: Workload) -> str:
        """Make a workload's inputs and outputs; returns the digest of the inputs of call 0."""
        self.outputs, self._known = [], {}
        self.inputs.open(workload)
        if self.solution.spec.destination_passing_style:
            for name, spec in self.definition.outputs.items():
                shape = self.definition.shape(name, workload.axes)
                self.outputs.append(torch.empty(shape or (), dtype=getattr(torch, spec.dtype), device=self.device))
        return self.inputs.digest()

    # calling

    def _prepare(self, number: int) -> None:
        """Contents of call `number`, poison in the outputs: a stale buffer of an earlier call is poisoned too."""
        self.inputs.load(number)
        for output in self.outputs:
            guards.poison(output)

    def _invoke(self) -> Any:
        with torch.no_grad():
            if self.solution.spec.destination_passing_style:
                return self.function(*self.inputs.values.values(), *self.outputs)
            return self.function(*self.inputs.values.values())

    def _accept(self, result: Any) -> list[torch.Tensor]:
        """The outputs of a call as plain tensors; trips a guard where they are not, or lie in somebody else's memory."""
        names = list(self.definition.outputs)
        if self.solution.spec.destination_passing_style:
            return self.outputs
        if isinstance(result, dict):
            result = [result.get(name) for name in names]
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if len(results) != len(names):
            raise Tripped(Verdict.NOT_A_PLAIN_TENSOR, f"expected {len(names)} outputs, got {len(results)}")
        for name, value in zip(names, results, strict=True):
            guards.require_plain(name, value, self.device)
            for other, tensor in self.inputs.values.items():
                if isinstance(tensor, torch.Tensor) and guards.overlaps(value, tensor):
                    raise Tripped(Verdict.OUTPUT_ALIASES_INPUT, f"{name} shares memory with input {other}")
            if any(guards.overlaps(value, earlier) for earlier in self.outputs):
                raise Tripped(Verdict.OUTPUT_ALIASES_EARLIER_OUTPUT, f"{name} shares memory with the output of the call before")
        self.outputs = results  # kept until the next call's outputs are accepted, so that their memory is not handed out again
        return results

    def _settled(self, result: Any, watch_seconds: float) -> list[torch.Tensor]:
        """Outputs as they stood when the call's own stream was done, if nothing writes to them afterwards."""
        outputs = self._accept(result)
        at_return = [output.clone() for output in outputs]
        self.timer.synchronize()
        if watch_seconds:
            self._sleep(watch_seconds)
        names = self.definition.outputs
        unwritten = sum(guards.poisoned(output) for output in at_return)
        if unwritten and self.device.type == "cpu":
            self._sleep(SETTLE_SECONDS)
        if digest_tensors(dict(zip(names, at_return, strict=True))) != digest_tensors(dict(zip(names, outputs, strict=True))):
            raise Tripped(Verdict.WORK_LEFT_BEHIND, "the output changed after the call had returned and its stream was done")
        if unwritten:
            total = sum(output.numel() for output in outputs)
            raise Tripped(Verdict.UNWRITTEN_OUTPUT, f"{unwritten} of {total} elements were not written")
        return at_return

    # what the parent asks for

    def check(self, calls: list[int], folder: str) -> dict[str, Any]:
        """Run calls and leave their outputs in FOLDER/CALL.safetensors; inputs are hashed before and after each."""
        digests = {}
        for number in calls:
            self._prepare(number)
            before = self.inputs.digest()
            self.timer.synchronize()
            outputs = self._settled(self._invoke(), SETTLE_SECONDS if self.device.type == "cpu" else 0.0)
            if self.inputs.digest() != before:
                raise Tripped(Verdict.INPUT_MUTATED, "the inputs are not what they were before the call")
            named = dict(zip(self.definition.outputs, outputs, strict=True))
            digests[number] = digest_tensors(named)
            self._save(named, Path(folder) / f"{number}.safetensors")
        self.watch.require_untouched()
        return {"outputs": digests}

    def warm(self, calls: list[int]) -> dict[str, Any]:
        """Untimed calls; on CUDA also the eager host time of a call."""
        for number in calls:
            self._prepare(number)
            self._accept(self._invoke())
        self.timer.synchronize()
        host_us = None
        if isinstance(self.timer, DeviceTimer):
            numbers = iter(range(-10**6, 0))
            host_us = self.timer.host_us(lambda: self._prepare(next(numbers)), self._invoke)
        return {"host_us": host_us}

    def block(self, calls: list[int], keep: int | None, path: str | None, lead_in: int | None) -> dict[str, Any]:
        """Time calls one by one; the output of call `keep` is left at `path`, or remembered here where there is none.

        `lead_in` is an untimed call ahead of them.
        """
        if lead_in is not None:
            self._prepare(lead_in)
            self._accept(self._invoke())
        digests = {}
        for number in calls:
            self._prepare(number)
            self.timer.flush()
            result = self.timer.timed(number, self._invoke)
            outputs = dict(zip(self.definition.outputs, self._settled(result, 0.0), strict=True))
            digests[number] = digest_tensors(outputs)
            if number == keep and path:
                self._save(outputs, Path(path))
            elif number == keep:
                self._known[number] = outputs
        samples = [vars(sample) for sample in self.timer.collect()]
        self.watch.require_untouched()
        return {"samples": samples, "outputs": digests, "inputs": self.inputs.digest(), "timer": self.timer.name}

    def graph(self, calls: list[int], path: str) -> dict[str, Any]:
        """Capture a call in a CUDA graph and time its replays; the last call's output is left at `path`."""
        try:
            self._prepare(calls[0])
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._accept(self._invoke())
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                result = self._invoke()
            outputs = self._accept(result)
            ms = self.timer.replay_ms(self._prepare, captured, calls)
        except Tripped:
            raise
        except Exception as error:
            return {"graph_error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        self._save(dict(zip(self.definition.outputs, outputs, strict=True)), Path(path))
        return {"graph_ms": ms}

    @staticmethod
    def _save(outputs: dict[str, torch.Tensor], path: Path) -> None:
        partial = path.with_suffix(".partial")
        save_file({name: output.detach().cpu() for name, output in outputs.items()}, partial)
        partial.rename(path)

    # the reference's session only

    def remember(self, calls: list[int]) -> dict[str, Any]:
        """Run the reference for calls not remembered yet and keep its outputs here, in this process, for `judge`."""
        digests = {}
        for number in calls:
            if number not in self._known:
                self._prepare(number)
                outputs = self._accept(self._invoke())
                self.outputs = []
                self._known[number] = dict(zip(self.definition.outputs, outputs, strict=True))
            digests[number] = digest_tensors(self._known[number])
        return {"outputs": digests}

    def forget(self) -> None:
        self._known = {}

    def judge(self, files: dict[int, str], tolerance: Tolerance) -> Judgement:
        """Compare each call's output file with the remembered reference output; the worst of all calls and outputs."""
        verdict: Judgement | None = None
        for number, path in files.items():
            found = load_file(path)
            for name, reference in self._known[number].items():
                verdict = worse(verdict, judge(found[name], reference, tolerance))
        assert verdict is not None
        return verdict
