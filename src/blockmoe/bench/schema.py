"""The FlashInfer-Trace format: definition, workload, solution, trace.

Every model keeps fields that it does not know, so that reading and writing a file loses nothing. Fields of ours stand in
the `extra` dictionaries, which other readers of the format skip; `docs/traces.md` lists them. No torch here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from enum import Enum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(min_length=1)]
FileName = Annotated[str, Field(min_length=1, pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # it becomes part of a path
Count = Annotated[int, Field(ge=0)]
DType = Literal[
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1", "int64", "int32", "int16", "int8", "bool"
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")

    def to_json(self) -> str:
        """One line of JSON; NaN and infinities are written as strings, as the format does."""
        return self.model_dump_json(exclude_none=False)


def digest(*parts: object) -> str:
    """Hex digest (16 characters) of JSON-serialisable parts; equal content gives an equal digest on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- definition -----------------------------------------------------------------------------------------------------


class AxisConst(_Model):
    type: Literal["const"]
    value: Count
    description: str | None = None


class AxisVar(_Model):
    type: Literal["var"]
    description: str | None = None


Axis = Annotated[AxisConst | AxisVar, Field(discriminator="type")]


class TensorSpec(_Model):
    """Shape as axis names (None for a scalar) and dtype."""

    shape: list[Name] | None
    dtype: DType
    description: str | None = None


class Definition(_Model):
    """A task: axes, inputs and outputs in call order, and the reference's source with a `run` function."""

    name: FileName
    op_type: FileName
    axes: dict[Name, Axis]
    inputs: dict[Name, TensorSpec]
    outputs: dict[Name, TensorSpec]
    reference: Name
    tags: list[Name] = Field(default_factory=list)
    description: str | None = None
    constraints: list[Name] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Definition:
        try:
            tree = ast.parse(self.reference)
        except SyntaxError as error:
            raise ValueError(f"reference: expected Python source, got a syntax error on line {error.lineno}") from None
        if not any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            raise ValueError("reference: expected a top-level function named run")
        if both := set(self.inputs) & set(self.outputs):
            raise ValueError(f"outputs: names {sorted(both)} are inputs already")
        for name, spec in (self.inputs | self.outputs).items():
            for axis in spec.shape or ():
                if axis not in self.axes:
                    raise ValueError(f"{name}: shape names axis {axis!r}, which axes does not define")
        for constraint in self.constraints:
            try:
                ast.parse(constraint, mode="eval")
            except SyntaxError:
                raise ValueError(f"constraints: {constraint!r} is not a Python expression") from None
        return self

    def axis_values(self, var_values: dict[str, int]) -> dict[str, int]:
        """Every axis by name; raises ValueError naming a missing, unknown or contradicted axis."""
        values = {}
        for name, axis in self.axes.items():
            if axis.type == "const":
                values[name] = axis.value
                if var_values.get(name, axis.value) != axis.value:
                    raise ValueError(f"axes.{name}: expected the definition's {axis.value}, got {var_values[name]}")
            elif name in var_values:
                values[name] = var_values[name]
            else:
                raise ValueError(f"axes.{name}: expected a value, got none")
        if unknown := sorted(set(var_values) - set(self.axes)):
            raise ValueError(f"axes.{unknown[0]}: the definition {self.name} has no such axis")
        return values

    def shape(self, name: str, var_values: dict[str, int]) -> tuple[int, ...] | None:
        """The concrete shape of an input or output; None for a scalar."""
        spec = self.inputs.get(name) or self.outputs[name]
        if spec.shape is None:
            return None
        values = self.axis_values(var_values)
        return tuple(values[axis] for axis in spec.shape)


# --- workload -------------------------------------------------------------------------------------------------------


class RandomInput(_Model):
    type: Literal["random"]


class ScalarInput(_Model):
    type: Literal["scalar"]
    value: bool | int | float


class SafetensorsInput(_Model):
    type: Literal["safetensors"]
    path: Name
    tensor_key: Name


InputSpec = Annotated[RandomInput | ScalarInput | SafetensorsInput, Field(discriminator="type")]


class Workload(_Model):
    """One set of inputs: values of the variable axes, and where each input comes from."""

    axes: dict[str, Count]
    inputs: dict[str, InputSpec]
    uuid: Name


# --- solution -------------------------------------------------------------------------------------------------------


class SourceFile(_Model):
    path: Name
    content: Name

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"expected a relative path inside the solution, got {path!r}")
        return path


class BuildSpec(_Model):
    language: Literal["python", "triton", "cpp", "cuda", "tilelang"]
    target_hardware: Annotated[list[str], Field(min_length=1)]
    entry_point: Name
    dependencies: list[Name] = Field(default_factory=list)
    destination_passing_style: bool = True
    binding: Literal["tvm-ffi", "torch"] | None = None

    @field_validator("entry_point")
    @classmethod
    def _two_parts(cls, entry_point: str) -> str:
        if entry_point.count("::") != 1:
            raise ValueError(f"expected FILE::FUNCTION, got {entry_point!r}")
        return entry_point


class Solution(_Model):
    """One implementation: its sources and how to call them."""

    name: Name
    definition: Name
    author: Name
    spec: BuildSpec
    sources: Annotated[list[SourceFile], Field(min_length=1)]
    description: str | None = None

    @model_validator(mode="after")
    def _entry_file_exists(self) -> Solution:
        paths = [source.path for source in self.sources]
        if repeated := {path for path in paths if paths.count(path) > 1}:
            raise ValueError(f"sources: path {sorted(repeated)[0]!r} appears more than once")
        if (entry := self.spec.entry_point.split("::")[0]) not in paths:
            raise ValueError(f"spec.entry_point: file {entry!r} is not among the sources {paths}")
        return self

    @property
    def digest(self) -> str:
        """Of the sources, how they are called, and, where `bundle` names them, the modules of this package."""
        sources = [(source.path, source.content) for source in self.sources]
        bundle = (self.model_extra or {}).get("bundle")
        return digest(self.name, self.definition, self.spec.model_dump(), sources, *([bundle] if bundle else []))


# --- trace ----------------------------------------------------------------------------------------------------------


class Status(str, Enum):
    PASSED = "PASSED"
    INCORRECT_SHAPE = "INCORRECT_SHAPE"
    INCORRECT_NUMERICAL = "INCORRECT_NUMERICAL"
    INCORRECT_DTYPE = "INCORRECT_DTYPE"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    COMPILE_ERROR = "COMPILE_ERROR"
    TIMEOUT = "TIMEOUT"


class Correctness(_Model):
    """Largest errors over all elements; `extra` holds rel-L2, cosine, matched ratios and the worst row."""

    max_relative_error: float = 0.0
    max_absolute_error: float = 0.0
    extra: dict[str, Any] | None = None


class Performance(_Model):
    """Times in milliseconds; `extra` holds every sample, intervals, host time, graph replay and the floor."""

    latency_ms: Annotated[float, Field(ge=0)] = 0.0
    reference_latency_ms: Annotated[float, Field(ge=0)] = 0.0
    speedup_factor: Annotated[float, Field(ge=0)] = 0.0
    extra: dict[str, Any] | None = None


class Environment(_Model):
    """Hardware name and library versions; `extra` holds timer, clocks, temperature, power, driver, commit."""

    hardware: Name
    libs: dict[str, str] = Field(default_factory=dict)
    extra: dict[str, Any] | None = None


class Evaluation(_Model):
    """`extra` holds the verdict, its message, the settings, digests and the resume key."""

    status: Status
    environment: Environment
    timestamp: Name
    log: str = ""
    correctness: Correctness | None = None
    performance: Performance | None = None
    extra: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _parts_match_status(self) -> Evaluation:
        expected = {Status.PASSED: (True, True), Status.INCORRECT_NUMERICAL: (True, False)}.get(self.status, (False, False))
        for name, part, wanted in zip(("correctness", "performance"), (self.correctness, self.performance), expected, strict=True):
            if (part is not None) != wanted:
                raise ValueError(f"{name}: expected {'a value' if wanted else 'none'} with status {self.status.value}")
        return self

    @property
    def verdict(self) -> str:
        """The guard that was tripped where there is one, else the status."""
        return (self.extra or {}).get("verdict") or self.status.value


class Trace(_Model):
    """(definition, workload, solution, evaluation); a line of a workload file has neither solution nor evaluation."""

    definition: Name
    workload: Workload
    solution: str | None = None
    evaluation: Evaluation | None = None

    @property
    def speedup(self) -> float:
        """Speedup over the reference, NaN unless the evaluation passed."""
        performance = self.evaluation.performance if self.evaluation else None
        return performance.speedup_factor if performance else math.nan
