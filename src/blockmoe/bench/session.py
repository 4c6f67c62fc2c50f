"""What a contender does inside its own process: import the solution, make inputs, run, check, measure.

One Session lives in one worker process. The timer and the guards bind their functions before the solution is imported.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from blockmoe.bench import correctness, guards, inputs, sealed, timing
from blockmoe.bench.correctness import Judgement, Tolerance, judge, worse
from blockmoe.bench.guards import Tripped
from blockmoe.bench.inputs import Inputs, digest_tensors
from blockmoe.bench.schema import Definition, Solution, Status, Workload, digest
from blockmoe.bench.timing import DeviceTimer, make_timer
from blockmoe.bench.verdicts import Verdict
from blockmoe.bench.watch import Watch

SENT_CHARACTERS = 4000  # sent of an error; the parent keeps fewer
SETTLE_SECONDS = 0.2  # how long a CPU output is watched for late writes while it is checked


class BuildError(Exception):
    """The solution could not be imported."""


def first_line(error: BaseException) -> str:
    """Of an exception, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class Session:
    """A solution, its inputs and its timer. The reference's session also judges the others' outputs."""

    def __init__(self, definition: Definition, root: Path, device: str, mode: str, seed: int, use_cupti: bool = True) -> None:
        self.definition = definition
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)  # tensors say cuda:0, never cuda
            torch.cuda.set_device(self.device)
        self.timer = make_timer(self.device, use_cupti)
        self._sleep = time.sleep
        self._give_back = torch.cuda.empty_cache if self.device.type == "cuda" else None
        self.inputs = Inputs(definition, root, self.device, mode, seed)
        self.solution: Solution | None = None
        self.outputs: list[torch.Tensor] = []
        self.key = sealed.new_key()
        self._arguments: list[Any] = []  # objects of their own on the memory of inputs and outputs, and what must stay so
        self._stamps: list[tuple] = []
        self._timed: dict[int, dict[str, torch.Tensor]] = {}  # the last block's outputs by call
        self._known: dict[int, dict[str, torch.Tensor]] = {}  # the reference's outputs by call, for judging
        modules = [sys.modules[__name__], correctness, guards, inputs, sealed, timing]
        self.watch = Watch(modules, [self, self.inputs, self.timer])
        self.function: Callable[..., Any] | None = None

    # building and opening

    def build(self, solution: Solution, folder: Path) -> None:
        """Write the sources to a folder of their own and import the entry point; raises BuildError."""
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
        self.outputs, self._timed, self._known, self._arguments = [], {}, {}, []
        if self._give_back:
            self._give_back()  # blocks of the workload before fit no other, and all contenders share one card
        self.inputs.open(workload)
        if self.solution.spec.destination_passing_style:
            for name, spec in self.definition.outputs.items():
                shape = self.definition.shape(name, workload.axes)
                self.outputs.append(torch.empty(shape or (), dtype=getattr(torch, spec.dtype), device=self.device))
        live = [*self.inputs.values.values(), *self.outputs]
        self._arguments = [value.detach() if isinstance(value, torch.Tensor) else value for value in live]
        self._stamps = [guards.stamp(argument) for argument in self._arguments]
        return self.inputs.digest()

    # calling

    def _prepare(self, number: int) -> None:
        """Contents of call `number`, poison in the outputs: a stale buffer of an earlier call is poisoned too."""
        self.inputs.load(number)
        for output in self.outputs:
            guards.poison(output)
        if not self.solution.spec.destination_passing_style:
            guards.poison_freed_memory(self.outputs)

    def _invoke(self) -> Any:
        with torch.no_grad():
            return self.function(*self._arguments)

    def _require_arguments(self) -> None:
        """Trips where an argument was pointed at other memory: its values are read from the old."""
        names = [*self.definition.inputs, *self.definition.outputs]
        for name, argument, before in zip(names, self._arguments, self._stamps, strict=False):
            if guards.stamp(argument) != before:
                verdict = Verdict.INPUT_MUTATED if name in self.definition.inputs else Verdict.OUTPUT_REPLACED
                raise Tripped(verdict, f"{name} was given another type, shape or memory")

    def _accept(self, result: Any) -> list[torch.Tensor]:
        """The outputs of a call as plain tensors; trips a guard where they are not, or lie in somebody else's memory."""
        self._require_arguments()
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

    def _settled(self, result: Any, watch_seconds: float) -> tuple[dict[str, torch.Tensor], str]:
        """Outputs as they stood when the call's own stream was done, if nothing writes to them afterwards; and their digest."""
        outputs = self._accept(result)
        at_return = [output.clone() for output in outputs]
        self.timer.synchronize()
        if watch_seconds:
            self._sleep(watch_seconds)
        unwritten = sum(guards.poisoned(output) for output in at_return)
        if unwritten and self.device.type == "cpu":
            self._sleep(SETTLE_SECONDS)
        named = self._named(at_return)
        found = digest_tensors(named)
        if found != digest_tensors(self._named(outputs)):
            raise Tripped(Verdict.WORK_LEFT_BEHIND, "the output changed after the call had returned and its stream was done")
        if unwritten:
            total = sum(output.numel() for output in outputs)
            raise Tripped(Verdict.UNWRITTEN_OUTPUT, f"{unwritten} of {total} elements were not written")
        return named, found

    def _named(self, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.definition.outputs, outputs, strict=True))

    # what the parent asks for

    def check(self, calls: list[int], folder: str) -> dict[str, Any]:
        """Run calls and leave their outputs in FOLDER/CALL.safetensors; inputs are hashed before and after each."""
        digests = {}
        for number in calls:
            self._prepare(number)
            before = self.inputs.digest()
            self.timer.synchronize()
            self.timer.hold()  # so that work on another stream can't be done before the outputs are read on this one
            outputs, digests[number] = self._settled(self._invoke(), SETTLE_SECONDS if self.device.type == "cpu" else 0.0)
            if self.inputs.digest() != before:
                raise Tripped(Verdict.INPUT_MUTATED, "the inputs are not what they were before the call")
            sealed.write(outputs, Path(folder) / f"{number}.safetensors", self.key)
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
            numbers = iter(range(-(10**6), 0))
            host_us = self.timer.host_us(lambda: self._prepare(next(numbers)), self._invoke)
        return {"host_us": host_us}

    def block(self, calls: list[int], lead_in: int | None) -> dict[str, Any]:
        """Time calls one by one, after an untimed call `lead_in`; their outputs are held for `keep` until the next block.

        Which output is looked at is not known here before all are made.
        """
        self._timed = {}
        if lead_in is not None:
            self._prepare(lead_in)
            self._accept(self._invoke())
        outputs, found = {}, []
        for number in calls:
            self.timer.hold()
            self._prepare(number)
            self.timer.flush()
            result = self.timer.timed(number, self._invoke)
            self._timed[number], outputs[number] = self._settled(result, 0.0)
            found.append(self.inputs.digest(weights=False))  # the weights' contents pass from call to call: hashed at the end
        samples = [vars(sample) for sample in self.timer.collect()]
        found.append(self.inputs.digest())
        self.watch.require_untouched()
        return {"samples": samples, "outputs": outputs, "inputs": digest(found), "timer": self.timer.name}

    def keep(self, call: int, path: str | None) -> None:
        """Leave the output of a call of the last block at `path`, or remember it here where there is none."""
        if path:
            sealed.write(self._timed[call], Path(path), self.key)
        else:
            self._note(call, self._timed[call])
        self._timed = {}
        self.watch.require_untouched()

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
            return {"graph_error": first_line(error)[:SENT_CHARACTERS]}
        sealed.write(self._named(outputs), Path(path), self.key)
        return {"graph_ms": ms}

    # the reference's session only

    def remember(self, calls: list[int]) -> dict[str, Any]:
        """Run the reference for calls not remembered yet and keep its outputs here, in this process, for `judge`."""
        digests = {}
        for number in calls:
            if number not in self._known:
                self._prepare(number)
                outputs = self._named(self._accept(self._invoke()))
                self.outputs = []
                self._note(number, outputs)
            digests[number] = digest_tensors(self._known[number])
        return {"outputs": digests}

    def _note(self, number: int, outputs: dict[str, torch.Tensor]) -> None:
        """The reference's outputs of a call, for `judge`; raises ValueError where they are no measure."""
        for name, output in outputs.items():
            if bad := int((~torch.isfinite(output.float())).sum()):
                raise ValueError(f"{name}: {bad} of {output.numel()} elements are NaN or infinite: nothing can be held against it")
        self._known[number] = outputs

    def forget(self) -> None:
        self._known = {}

    def judge(self, files: dict[int, str], key: int, tolerance: Tolerance) -> tuple[Judgement, dict[int, str]]:
        """Compare each call's output file with the remembered reference output; the worst of all calls and outputs.

        The digests of what was judged are the solution's own only if nothing changed its outputs on their way here.
        """
        verdict: Judgement | None = None
        digests: dict[int, str] = {}
        for number, path in files.items():
            try:
                outputs = sealed.read(Path(path), key)
                found = {name: outputs[name] for name in self._known[number]}
            except (OSError, SafetensorError, KeyError) as error:
                return Judgement(Status.RUNTIME_ERROR, f"the output of call {number} is not to be read: {error!r}"), digests
            digests[number] = digest_tensors(found)
            for name, reference in self._known[number].items():
                verdict = worse(verdict, self._told(number, judge(found[name], reference, tolerance), verdict))
        assert verdict is not None
        return verdict, digests

    @staticmethod
    def _told(number: int, judgement: Judgement, earlier: Judgement | None) -> Judgement:
        """With the call's number in its message, and a hint where the calls before it passed."""
        if judgement.passed:
            return judgement
        hint = "; the calls before it passed: is anything of an earlier call kept?" if earlier and earlier.passed else ""
        return replace(judgement, message=f"call {number}: {judgement.message}{hint}")
