"""Trees written by hand in the official layout: what is read, what survives, and how each malformed thing is named."""

import errno
import json

import numpy as np
import pytest
import toy_tree as toy
from safetensors.numpy import save_file

from blockmoe.bench import dataset as trees
from blockmoe.bench.bundled import workloads_of
from blockmoe.bench.dataset import Dataset, DatasetError, append_trace, find_blob, read_traces, select_names, select_workloads
from blockmoe.bench.schema import Definition, Trace, Workload
from blockmoe.geometry import HEADLINE, TINY

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345"
BLOB = {"x": {"type": "safetensors", "path": "./blob/x.safetensors", "tensor_key": "x"}}


@pytest.fixture
def tree(tmp_path):
    return toy.make_tree(tmp_path / "tree", {"good": toy.GOOD}, [(8, "aaaa-first"), (32, "bbbb-second")])


def fault(tree):
    with pytest.raises(DatasetError) as caught:
        Dataset.load([tree])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_official_layout_is_read(tree):
    dataset = Dataset.load([tree])
    assert list(dataset.definitions) == [toy.NAME]
    assert [workload.uuid for workload in dataset.workloads[toy.NAME]] == ["aaaa-first", "bbbb-second"]
    assert [solution.name for solution in dataset.solutions_of(toy.NAME)] == ["good"]
    assert dataset.definitions[toy.NAME].shape("x", {"n": 3}) == (3, 64)


def test_unknown_fields_survive(tree):
    axes = {"n": {"type": "var", "parent": "batch"}, "w": {"type": "const", "value": 64}}
    path = toy.write(toy.definition_path(tree), toy.definition(license="MIT", axes=axes))
    definition = trees.read_json(Definition, path)
    again = json.loads(definition.to_json())
    assert again["license"] == "MIT" and again["axes"]["n"]["parent"] == "batch"

    trace = toy.workload(8, "cccc", origin={"log": [1, 2]})
    trace["note"] = "kept"
    again = json.loads(Trace.model_validate(trace).to_json())
    assert again["note"] == "kept" and again["workload"]["origin"] == {"log": [1, 2]}


def test_blank_lines_and_line_separators_inside_strings_are_no_lines(tree):
    line = json.dumps(toy.workload(8, "dddd", note="a\u2028b\x85c"), ensure_ascii=False)
    toy.write(toy.workloads_path(tree), "", line, "")
    assert [workload.uuid for workload in Dataset.load([tree]).workloads[toy.NAME]] == ["dddd"]


def test_second_tree_may_hold_solutions_and_workloads_of_the_first(tree, tmp_path):
    other = tmp_path / "other"
    toy.write(toy.solution_path(other, "mine"), toy.solution("mine"))
    toy.write(toy.workloads_path(other), toy.workload(5, "cccc-third"))
    dataset = Dataset.load([other, tree])
    assert {solution.name for solution in dataset.solutions_of(toy.NAME)} == {"good", "mine"}
    assert len(dataset.workloads[toy.NAME]) == 3


def test_nan_in_a_trace_is_written_as_the_format_does():
    correctness = {"max_relative_error": "NaN", "max_absolute_error": "Infinity"}
    environment = {"hardware": "cpu", "libs": {}}
    evaluation = {"status": "INCORRECT_NUMERICAL", "environment": environment, "timestamp": "now", "correctness": correctness}
    trace = Trace.model_validate(toy.workload(8, "aaaa") | {"solution": "bad", "evaluation": evaluation})
    again = json.loads(trace.to_json())["evaluation"]["correctness"]
    assert again["max_relative_error"] == "NaN" and again["max_absolute_error"] == "Infinity"


# --- what is malformed ------------------------------------------------------------------------------------------------


def cases(generator):
    """Parametrisation of (name, content, expected) triples."""
    found = list(generator())
    return {"argvalues": [case[1:] for case in found], "ids": [case[0] for case in found]}


def malformed_definitions():
    yield "not a tree of axes", toy.definition(axes={"n": {"type": "variable"}}), "axes.n"
    without = {name: value for name, value in toy.definition().items() if name != "reference"}
    yield "missing reference", without, "reference: Field required"
    yield "no run", toy.definition(reference="def go(x): pass"), "reference: expected a top-level function named run"
    yield "syntax", toy.definition(reference="def run(x:\n  pass"), "syntax error on line 1"
    yield "unknown axis", toy.definition(inputs={"x": {"shape": ["m"], "dtype": "float32"}}), "x: shape names axis 'm'"
    yield "dtype", toy.definition(inputs={"x": {"shape": ["n"], "dtype": "fp32"}}), "inputs.x.dtype"
    yield "negative", toy.definition(axes={"n": {"type": "var"}, "w": {"type": "const", "value": -1}}), "axes.w.value"
    yield "constraint", toy.definition(constraints=["n =="]), "constraints: 'n ==' is not a Python expression"
    yield "path in the name", toy.definition(name="../../etc"), "name: "
    yield "path in the type", toy.definition(op_type=".."), "op_type: "
    yield "two roles", toy.definition(outputs={"x": {"shape": ["n"], "dtype": "float32"}}), "outputs: names ['x'] are inputs"


@pytest.mark.parametrize(("content", "expected"), **cases(malformed_definitions))
def test_malformed_definition_names_file_and_field(tree, content, expected):
    path = toy.write(toy.definition_path(tree), content)
    message = fault(tree)
    assert message.startswith(f"{path}: ") and expected in message


def malformed_workloads():
    w = toy.workload
    yield "half a line", '{"definition": "scale_w64", "workl', "Invalid JSON"
    yield "not an object", "[1]", "object"
    yield "unknown definition", w(8, "x") | {"definition": "scale"}, "definition: unknown definition 'scale'; did you mean scale_w64?"
    yield "missing axis", w(8, "x", axes={}), "workload.axes.n: expected a value, got none"
    yield "unknown axis", w(8, "x", axes={"n": 1, "m": 2}), "workload.axes.m: "
    yield "const axis", w(8, "x", axes={"n": 1, "w": 65}), "workload.axes.w: expected the definition's 64, got 65"
    yield "axis type", w("eight", "x"), "workload.axes.n: "
    yield "negative axis", w(-1, "x"), "workload.axes.n: "
    yield "missing input", w(8, "x", inputs={}), "workload.inputs.x: expected an entry, got none"
    yield "unknown input", w(8, "x", inputs={"x": {"type": "random"}, "z": {"type": "random"}}), "workload.inputs.z: unknown input 'z'"
    yield "input type", w(8, "x", inputs={"x": {"type": "zeros"}}), "workload.inputs.x: "
    yield "no key", w(8, "x", inputs={"x": {"type": "safetensors", "path": "a"}}), "workload.inputs.x.tensor_key: Field required"
    scalar = {"x": {"type": "scalar", "value": 1}}
    yield "scalar for a tensor", w(8, "x", inputs=scalar), "workload.inputs.x: expected a tensor, got the scalar 1"
    yield "no uuid", w(8, ""), "workload.uuid: "
    yield "same uuid", w(8, "aaaa-first"), "workload.uuid: 'aaaa-first' appears twice"


@pytest.mark.parametrize(("line", "expected"), **cases(malformed_workloads))
def test_malformed_workload_names_file_line_and_field(tree, line, expected):
    path = toy.write(toy.workloads_path(tree), toy.workload(4, "aaaa-first"), "", line)
    message = fault(tree)
    assert message.startswith(f"{path}:3: ") and expected in message


def scalar_definition(dtype="int32", **changes):
    inputs = {"x": {"shape": ["n", "w"], "dtype": "float32"}, "k": {"shape": None, "dtype": dtype}}
    return toy.definition(inputs=inputs, reference="def run(x, k):\n    return x * 2\n", **changes)


@pytest.mark.parametrize("value", ["1.5", "1e999", "NaN", "-Infinity"])
def test_integer_scalar_must_be_one(tree, value):
    toy.write(toy.definition_path(tree), scalar_definition())
    line = toy.workload(8, "eeee", inputs={"x": {"type": "random"}, "k": {"type": "scalar", "value": 7}})
    path = toy.write(toy.workloads_path(tree), json.dumps(line).replace("7}", value + "}"))
    assert f"{path}:1: workload.inputs.k: expected int32, got " in fault(tree)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_scalar_beyond_any_float(tree, dtype):
    toy.write(toy.definition_path(tree), scalar_definition(dtype))
    path = toy.write(toy.workloads_path(tree), toy.workload(8, "eeee", inputs={"x": BLOB["x"], "k": {"type": "scalar", "value": 10**400}}))
    assert fault(tree) == f"{path}:1: workload.inputs.k: expected {dtype}, got a number of over 300 digits"


def test_tensor_for_a_scalar(tree):
    toy.write(toy.definition_path(tree), scalar_definition())
    path = toy.write(toy.workloads_path(tree), toy.workload(8, "eeee", inputs={"k": BLOB["x"], "x": {"type": "random"}}))
    assert fault(tree) == f"{path}:1: workload.inputs.k: expected a scalar, got a tensor of ./blob/x.safetensors"


def test_broken_constraint(tree):
    toy.write(toy.definition_path(tree), toy.definition(constraints=["n % 16 == 0", "x.sum() > 0"]))
    message = fault(tree)
    assert ":1: workload.axes: constraint 'n % 16 == 0' does not hold for {'n': 8, 'w': 64}" in message


@pytest.mark.parametrize("path_of", [toy.definition_path, toy.workloads_path, lambda root: toy.solution_path(root, "good")])
def test_git_lfs_pointer_is_named(tree, path_of):
    path = toy.write(path_of(tree), LFS_POINTER)
    assert fault(tree) == f"{path}: a Git-LFS pointer stands here instead of the file; fetch it with `git lfs pull`"


def test_not_utf8(tree):
    toy.definition_path(tree).write_bytes(b'{"name": "\xff"}')
    assert fault(tree).endswith("expected UTF-8 text, got byte 0xff at 10")


def malformed_solutions():
    s = toy.solution
    yield "entry point", s("good", entry_point="main.py"), "spec.entry_point: expected FILE::FUNCTION"
    yield "entry file", s("good", entry_point="other.py::run"), "spec.entry_point: file 'other.py' is not among the sources"
    yield "outside", s("good") | {"sources": [{"path": "../main.py", "content": "x"}]}, "sources.0.path: expected a relative path"
    yield "absolute", s("good") | {"sources": [{"path": "/main.py", "content": "x"}]}, "sources.0.path: expected a relative path"
    yield "twice", s("good") | {"sources": [{"path": "main.py", "content": "x"}] * 2}, "sources: path 'main.py' appears more than once"
    yield "language", s("good", language="fortran"), "spec.language: "
    yield "no hardware", s("good", target_hardware=[]), "spec.target_hardware: "
    yield "no sources", s("good") | {"sources": []}, "sources: "
    yield "definition", s("good") | {"definition": "scale"}, "definition: unknown definition 'scale'; did you mean scale_w64?"
    yield "reserved", s("reference"), "name: expected another name than 'reference'"


@pytest.mark.parametrize(("content", "expected"), **cases(malformed_solutions))
def test_malformed_solution_names_file_and_field(tree, content, expected):
    path = toy.write(toy.solution_path(tree, "good"), content)
    message = fault(tree)
    assert message.startswith(f"{path}: ") and expected in message


def test_names_twice(tree):
    toy.write(toy.solution_path(tree, "other"), toy.solution("good"))
    assert "name: solution 'good' exists already for scale_w64: " in fault(tree)
    toy.write(toy.definition_path(tree).with_name("copy.json"), toy.definition())
    assert f"name: definition {toy.NAME!r} exists already in {tree}" in fault(tree)


def test_tensors_of_a_definition_lie_in_one_tree(tmp_path):
    """Workloads without any may come from another."""
    blob = {"x": {"type": "safetensors", "path": "x.safetensors", "tensor_key": "x"}}
    trees = [toy.make_tree(tmp_path / name, {}, ()) for name in "abc"]
    lines = toy.workload(8, "aaaa", inputs=blob), toy.workload(8, "bbbb", inputs=blob), toy.workload(4, "cccc")
    for tree, line in zip(trees, lines, strict=True):
        toy.write(toy.workloads_path(tree), line)
    a, b, c = trees
    for order in ((a, c), (c, a)):
        assert Dataset.load(order).roots[toy.NAME] == a
    with pytest.raises(DatasetError, match=f"{toy.workloads_path(b)}:1: expected a definition's tensors in one tree, got some in {a} too"):
        Dataset.load([a, b])


def test_no_tree_at_all(tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        assert fault(root) == f"{root}: expected a FlashInfer-Trace tree with a folder `definitions`, found none"


# --- blobs ------------------------------------------------------------------------------------------------------------


def blob_fault(tree, **inputs):
    definition = Definition.model_validate(toy.definition())
    workload = Workload.model_validate(toy.workload(8, "ffff", inputs=inputs or BLOB)["workload"])
    with pytest.raises(DatasetError) as caught:
        find_blob(tree, definition, workload, "x")
    return str(caught.value)


def test_blob_faults_name_file_and_key(tree):
    path = tree / "blob" / "x.safetensors"
    assert blob_fault(tree) == f"{path}: missing, and workload ffff has no recipe to make it from"
    toy.write(path, LFS_POINTER)
    assert blob_fault(tree) == f"{path}: a Git-LFS pointer stands here instead of the tensors; fetch it with `git lfs pull`"
    toy.write(path, "rubbish")
    assert blob_fault(tree).startswith(f"{path}: not a safetensors file")
    save_file({"y": np.zeros((8, 64), np.float32)}, path)
    assert blob_fault(tree) == f"{path}: expected tensor 'x', found ['y']"
    save_file({"x": np.zeros((8, 64), np.float64)}, path)
    assert blob_fault(tree) == f"{path}: x: expected F32 [8, 64], got F64 [8, 64]"
    save_file({"x": np.zeros((9, 64), np.float32)}, path)
    assert blob_fault(tree) == f"{path}: x: expected F32 [8, 64], got F32 [9, 64]"


def test_foreign_recipe_is_no_recipe(tree):
    definition = Definition.model_validate(toy.definition())
    workload = Workload.model_validate(toy.workload(8, "ffff", inputs=BLOB, recipe={"generator": "other"})["workload"])
    with pytest.raises(DatasetError, match="missing, and workload ffff of scale_w64: no recipe of a routing blob"):
        find_blob(tree, definition, workload, "x")


def test_blobs_of_a_read_only_dataset_go_to_the_cache(tmp_path, monkeypatch):
    from blockmoe.bench import bundled

    read_only, cache, write = tmp_path / "dataset", tmp_path / "cache", bundled.write_blob

    def refuse(root, *arguments):
        if root == read_only:
            raise PermissionError(13, "Permission denied")
        return write(root, *arguments)

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(bundled, "write_blob", refuse)
    workload = workloads_of(TINY)[0]
    path = find_blob(read_only, bundled.definition_of(TINY), workload, "routing_logits")
    assert path.is_relative_to(cache / "blockmoe" / "dataset") and not read_only.exists()
    made = path.stat().st_mtime_ns
    assert find_blob(read_only, bundled.definition_of(TINY), workload, "routing_bias") == path
    assert path.stat().st_mtime_ns == made


# --- selecting --------------------------------------------------------------------------------------------------------


def uuids(*patterns, workloads=None):
    workloads = workloads or workloads_of(HEADLINE)
    return [workload.uuid[:8] for workload in select_workloads(workloads, list(patterns))]


def test_workloads_by_uuid_size_and_range():
    assert uuids("5e8dc11c") == ["5e8dc11c"] and uuids("5E8D") == ["5e8dc11c"]
    assert uuids("901") == ["1a4c6ba1"]
    assert uuids("1-14") == ["e05c6c03", "b8f4f012", "8cba5890"]
    assert len(uuids("901-")) == 3
    assert uuids("80", "1", "79-81") == ["e05c6c03", "8f1ff9f1"]  # in the file's order, each once


@pytest.mark.parametrize("pattern", ["2", "80-1", "-", "", "5e8", "abcdef", "²", "1-x", "0-0"])
def test_a_pattern_that_matches_no_workload_is_an_error(pattern):
    with pytest.raises(DatasetError, match="expected a uuid prefix, a size or a range like 1-80; known: e05c6c03 \\(1\\), "):
        uuids(pattern)


def test_short_uuids_of_hand_written_trees():
    workloads = [Workload.model_validate(toy.workload(n, uuid)["workload"]) for n, uuid in ((8, "w1"), (9, "W10"))]
    assert uuids("w1", workloads=workloads) == ["w1"] and uuids("w10", workloads=workloads) == ["W10"]


def test_names_and_patterns():
    known = ["torch_grouped", "blockmoe", "b[1]"]
    assert select_names("solution", ["block*", "torch_grouped"], known) == ["torch_grouped", "blockmoe"]
    assert select_names("solution", ["b[1]"], known) == ["b[1]"]
    for wanted, hint in (("torch_groupd", "did you mean torch_grouped"), ("grouped", "torch_grouped"), ("zzz", "known: torch_grouped, ")):
        with pytest.raises(DatasetError, match=f"unknown solution '{wanted}'; .*{hint}"):
            select_names("solution", [wanted], known)


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_half_written_line_stays_off_the_next(tmp_path):
    trace = Trace.model_validate(toy.workload(8, "aaaa"))
    append_trace(tmp_path, toy.OP, trace)
    path = toy.traces_path(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    append_trace(tmp_path, toy.OP, trace)
    append_trace(tmp_path, toy.OP, trace)
    assert path.read_bytes() == whole + whole[:40] + b"\n" + whole + whole
    traces, faults = read_traces(tmp_path)
    assert len(traces) == 3 and len(faults) == 1 and faults[0].startswith(f"{path}:2: ")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    trace = Trace.model_validate(toy.workload(8, "aaaa"))
    append_trace(tmp_path, toy.OP, trace)
    before = toy.traces_path(tmp_path).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trees.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        append_trace(tmp_path, toy.OP, trace)
    assert caught.value.filename == str(toy.traces_path(tmp_path))
    assert toy.traces_path(tmp_path).read_bytes() == before
