"""Reading a FlashInfer-Trace tree: definitions, workloads, solutions, traces, and the tensors that workloads name.

    ROOT/definitions/OP_TYPE/NAME.json        ROOT/workloads/OP_TYPE/NAME.jsonl
    ROOT/solutions/OP_TYPE/NAME/*.json        ROOT/traces/OP_TYPE/NAME.jsonl        ROOT/blob/…/*.safetensors

Solutions of ours may also stand as folders with a manifest (`pack.py`). Whatever is malformed raises DatasetError naming
file, line and field. No torch here.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from blockmoe.bench.schema import Definition, SafetensorsInput, Solution, Trace, Workload
from blockmoe.files import write_whole

_SAFETENSORS_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
}  # fmt: skip


LFS_MARK = "version https://git-lfs"
REFERENCE = "reference"  # what the definition's own reference is called among the contenders
Model = TypeVar("Model", bound=BaseModel)


class DatasetError(ValueError):
    """Something in a tree is missing or malformed; the message names file, line and field."""


def bundled_root() -> Path:
    """The dataset of this project: the checkout's where there is one, else the copy inside the package."""
    checkout = Path(__file__).parents[3] / "dataset"
    return checkout if (checkout / "definitions").is_dir() else Path(__file__).parents[1] / "_dataset"


def bundled_solutions() -> Path:
    """The folder of solution folders that belongs to `bundled_root()`."""
    checkout = Path(__file__).parents[3] / "solutions"
    return checkout if checkout.is_dir() else Path(__file__).parents[1] / "_solutions"


@dataclass
class Dataset:
    """What one or more trees hold. Solutions are keyed by (definition, name)."""

    definitions: dict[str, Definition] = field(default_factory=dict)
    workloads: dict[str, list[Workload]] = field(default_factory=dict)
    solutions: dict[tuple[str, str], Solution] = field(default_factory=dict)
    roots: dict[str, Path] = field(default_factory=dict)  # definition name to the tree that holds its workloads' blobs
    origins: dict[tuple[str, str], Path] = field(default_factory=dict)  # of solutions: file or folder

    @classmethod
    def load(cls, roots: Iterable[Path]) -> Dataset:
        """Read trees; raises DatasetError for a missing tree, a malformed file, or a name defined twice."""
        dataset, roots = cls(), list(roots)
        for root in roots:
            if not any((root / name).is_dir() for name in ("definitions", "workloads", "solutions")):
                raise DatasetError(f"{root}: expected a FlashInfer-Trace tree with a folder `definitions`, found none")
        for read in (dataset._read_definitions, dataset._read_workloads, dataset._read_solutions):
            for root in roots:
                read(root)
        return dataset

    def _read_definitions(self, root: Path) -> None:
        for path in sorted((root / "definitions").rglob("*.json")):
            definition = read_json(Definition, path)
            if definition.name in self.definitions:
                if self.definitions[definition.name] == definition and self.roots[definition.name] != root:
                    continue  # another tree's copy, as `blockmoe pack` makes
                raise DatasetError(f"{path}: name: definition {definition.name!r} exists already in {self.roots[definition.name]}")
            self.definitions[definition.name] = definition
            self.roots[definition.name] = root

    def _read_workloads(self, root: Path) -> None:
        elsewhere = {name: list(workloads) for name, workloads in self.workloads.items()}
        for path in sorted((root / "workloads").rglob("*.jsonl")):
            for line, trace in read_jsonl(Trace, path):
                others = elsewhere.get(trace.definition, [])
                if trace.workload in others:
                    continue
                self._add_workload(path, line, trace)
                if not any(map(_has_blobs, others)):
                    self.roots[trace.definition] = root
                elif _has_blobs(trace.workload):
                    there = self.roots[trace.definition]
                    raise DatasetError(f"{path}:{line}: expected a definition's tensors in one tree, got some in {there} too")

    def _read_solutions(self, root: Path) -> None:
        for path in sorted((root / "solutions").rglob("*.json")):
            self.add_solution(read_json(Solution, path), path)

    def _add_workload(self, path: Path, line: int, trace: Trace) -> None:
        where = f"{path}:{line}"
        definition = self.definitions.get(trace.definition)
        if definition is None:
            raise DatasetError(f"{where}: definition: {unknown('definition', trace.definition, self.definitions)}")
        try:
            check_workload(definition, trace.workload)
        except ValueError as error:
            raise DatasetError(f"{where}: workload.{error}") from None
        known = self.workloads.setdefault(trace.definition, [])
        if any(trace.workload.uuid == other.uuid for other in known):
            raise DatasetError(f"{where}: workload.uuid: {trace.workload.uuid!r} appears twice")
        known.append(trace.workload)

    def add_solution(self, solution: Solution, origin: Path) -> None:
        """Raises DatasetError for a definition that is not here, and for a name that is taken."""
        if solution.definition not in self.definitions:
            raise DatasetError(f"{origin}: definition: {unknown('definition', solution.definition, self.definitions)}")
        if solution.name == REFERENCE:
            raise DatasetError(f"{origin}: name: expected another name than {REFERENCE!r}, which is the definition's own reference")
        if (solution.definition, solution.name) in self.solutions:
            other = self.origins[solution.definition, solution.name]
            raise DatasetError(f"{origin}: name: solution {solution.name!r} exists already for {solution.definition}: {other}")
        self.solutions[solution.definition, solution.name] = solution
        self.origins[solution.definition, solution.name] = origin

    def solutions_of(self, definition: str) -> list[Solution]:
        return [solution for (name, _), solution in self.solutions.items() if name == definition]


# --- reading files --------------------------------------------------------------------------------------------------


def read_json(model: type[Model], path: Path) -> Model:
    """One JSON file as a model; raises DatasetError naming file, line and field."""
    return _parse(model, read_text(path), str(path))


def read_jsonl(model: type[Model], path: Path) -> Iterator[tuple[int, Model]]:
    """(line number, model) of each line that is not blank; raises DatasetError naming file, line and field."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines cuts at U+2028, which JSON may hold
        if line.strip():
            yield number, _parse(model, line, f"{path}:{number}")


def read_text(path: Path) -> str:
    """A text file; raises DatasetError where it can't be read or is a Git-LFS pointer."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}") from None
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from None
    if text.startswith(LFS_MARK):
        raise DatasetError(f"{path}: a Git-LFS pointer stands here instead of the file; fetch it with `git lfs pull`")
    return text


def _parse(model: type[Model], text: str, where: str) -> Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise DatasetError(f"{where}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """`field.path: what is wrong`, of the first fault."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"] if str(part) not in _UNION_TAGS)
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


_UNION_TAGS = {"const", "var", "random", "scalar", "safetensors"}


# --- checking and finding -------------------------------------------------------------------------------------------


def check_workload(definition: Definition, workload: Workload) -> None:
    """Raises ValueError (`field: expected … got …`) where a workload contradicts its definition."""
    values = definition.axis_values(workload.axes)
    for constraint in definition.constraints:
        try:
            holds = eval(constraint, {"__builtins__": {}}, values)  # definitions are code anyway: their reference is run
        except Exception:
            continue  # some speak of tensor contents, which are not known here
        if not holds:
            raise ValueError(f"axes: constraint {constraint!r} does not hold for {values}")
    for name, spec in workload.inputs.items():
        if name not in definition.inputs:
            raise ValueError(f"inputs.{name}: {unknown('input', name, definition.inputs)}")
        is_scalar = definition.inputs[name].shape is None
        if spec.type == "scalar" and not is_scalar:
            raise ValueError(f"inputs.{name}: expected a tensor, got the scalar {spec.value}")
        if spec.type == "scalar":
            _check_scalar(name, definition.inputs[name].dtype, spec.value)
        if spec.type == "safetensors" and is_scalar:
            raise ValueError(f"inputs.{name}: expected a scalar, got a tensor of {spec.path}")
    if missing := [name for name in definition.inputs if name not in workload.inputs]:
        raise ValueError(f"inputs.{missing[0]}: expected an entry, got none")


def _check_scalar(name: str, dtype: str, value: float) -> None:
    try:
        whole = float(value).is_integer()
    except OverflowError:
        raise ValueError(f"inputs.{name}: expected {dtype}, got a number of over 300 digits") from None
    if dtype.startswith("int") and not whole:
        raise ValueError(f"inputs.{name}: expected {dtype}, got {value}")


def find_blob(root: Path, definition: Definition, workload: Workload, name: str) -> Path:
    """Path of the safetensors file behind input `name`, generated first where the workload carries a recipe.

    Raises DatasetError for a missing file, a Git-LFS pointer, a missing key, or a dtype or shape that contradicts the definition.
    """
    spec = workload.inputs[name]
    assert isinstance(spec, SafetensorsInput)
    path = _blob_path(root, definition.name, workload, spec)
    _check_blob(path, spec.tensor_key, definition, workload, name)
    return path


def _blob_path(root: Path, definition: str, workload: Workload, spec: SafetensorsInput) -> Path:
    path = root / spec.path
    if path.exists():
        return path
    if not (workload.model_extra or {}).get("recipe"):
        raise DatasetError(f"{path}: missing, and workload {workload.uuid} has no recipe to make it from")
    from blockmoe.bench.bundled import write_blob  # numpy generators, only needed at first use

    cached = cache_root() / spec.path
    if cached.exists():
        return cached
    try:
        return write_blob(root, definition, workload)
    except OSError:  # a read-only dataset
        return write_blob(cache_root(), definition, workload)
    except ValueError as error:
        raise DatasetError(f"{path}: missing, and {error}") from None


def cache_root() -> Path:
    """Where generated blobs go when the dataset's own folder is read-only."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "blockmoe" / "dataset"


def _check_blob(path: Path, key: str, definition: Definition, workload: Workload, name: str) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK.encode():
            raise DatasetError(f"{path}: a Git-LFS pointer stands here instead of the tensors; fetch it with `git lfs pull`")
    try:
        with safe_open(path, framework="np") as tensors:
            if key not in tensors.keys():  # noqa: SIM118 (not a mapping)
                raise DatasetError(f"{path}: expected tensor {key!r}, found {sorted(tensors.keys())}")
            found = tensors.get_slice(key)
            shape, dtype = tuple(found.get_shape()), found.get_dtype()
    except SafetensorError as error:
        raise DatasetError(f"{path}: not a safetensors file: {error}") from None
    expected = definition.shape(name, workload.axes), _SAFETENSORS_DTYPES.get(definition.inputs[name].dtype)
    if (shape, dtype) != expected:
        raise DatasetError(f"{path}: {key}: expected {expected[1]} {list(expected[0] or ())}, got {dtype} {list(shape)}")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown KIND 'name'`, with the nearest known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or [other for other in names if name in other][:3]
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {listed(names) or 'none'}"
    return f"unknown {kind} {name!r}{hint}"


def listed(names: list[str]) -> str:
    """The first eight of them, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def select_names(kind: str, wanted: list[str], known: Iterable[str]) -> list[str]:
    """Known names that match the wanted names or fnmatch patterns, in known order; raises DatasetError for one that matches none."""
    names = list(known)
    for pattern in wanted:
        if not any(matches(name, pattern) for name in names):
            raise DatasetError(unknown(kind, pattern, names))
    return [name for name in names if any(matches(name, pattern) for pattern in wanted)]


def matches(name: str, pattern: str) -> bool:
    """Whether a name is the wanted one, or fits it as a pattern."""
    return name == pattern or fnmatchcase(name, pattern)


def _has_blobs(workload: Workload) -> bool:
    return any(spec.type == "safetensors" for spec in workload.inputs.values())


def select_workloads(workloads: list[Workload], wanted: list[str]) -> list[Workload]:
    """Workloads matching uuid prefixes, axis values (`80`) or ranges (`1-80`, `901-`); raises DatasetError for one that matches none."""
    chosen = []
    for pattern in wanted:
        matching = [workload for workload in workloads if _matches(workload, pattern)]
        if not matching:
            sizes = ", ".join(f"{workload.uuid[:8]} ({size(workload)})" for workload in workloads[:6])
            more = ", …" if len(workloads) > 6 else ""
            raise DatasetError(f"workload {pattern!r}: expected a uuid prefix, a size or a range like 1-80; known: {sizes}{more}")
        chosen += matching
    return [workload for workload in workloads if workload in chosen]


def _matches(workload: Workload, pattern: str) -> bool:
    low, dash, high = pattern.partition("-")
    if low.isdecimal() and (not dash or high.isdecimal() or not high) and len(pattern) < 12:
        first, last = int(low), int(high or (10**12 if dash else low))
        if first <= size(workload) <= last:
            return True
    uuid = workload.uuid.lower()
    return uuid == pattern.lower() or (len(pattern) >= 4 and uuid.startswith(pattern.lower()))


def size(workload: Workload) -> int:
    """T where the workload has it, else its first variable axis."""
    return workload.axes.get("seq_len", next(iter(workload.axes.values()), 0))


def copy_task(dataset: Dataset, definition: str, root: Path) -> None:
    """Write a definition into another tree, and its workloads unless some stand there: a tree may have its own."""
    op_type = dataset.definitions[definition].op_type
    for kind, suffix in (("definitions", "json"), ("workloads", "jsonl")):
        source = dataset.roots[definition] / kind / op_type / f"{definition}.{suffix}"
        target = root / kind / op_type / source.name
        if source.exists() and not (target.exists() and (kind == "workloads" or target.read_bytes() == source.read_bytes())):
            write_whole(target, source.read_bytes())


def append_trace(folder: Path, op_type: str, trace: Trace) -> None:
    """Append one line to FOLDER/traces/OP_TYPE/DEFINITION.jsonl and have it on disk when this returns."""
    path = folder / "traces" / op_type / f"{trace.definition}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = trace.to_json().encode() + b"\n"
    if path.exists() and path.stat().st_size and not _ends_with_newline(path):  # a run killed in mid-line left half a trace
        line = b"\n" + line
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError as error:  # a full disk: leave no half line behind
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_traces(folder: Path) -> tuple[list[Trace], list[str]]:
    """Every readable trace below FOLDER/traces, and one message for each file and each line that is not (half-written, say)."""
    traces, faults = [], []
    for path in sorted((folder / "traces").rglob("*.jsonl")):
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
            continue
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    traces.append(Trace.model_validate_json(line))
            except ValidationError as error:
                faults.append(f"{path}:{number}: {first_fault(error)}")
    return traces, faults
