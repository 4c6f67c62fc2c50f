"""Solution folders: manifest, packed form, and what `blockmoe pack` leaves in a tree."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from blockmoe.bench.bundled import definition_of
from blockmoe.bench.dataset import Dataset, DatasetError, bundled_root, bundled_solutions, copy_task
from blockmoe.bench.pack import PACKAGE_FOLDER, add_folders, pack, read_manifest, solution_folders, write_packed
from blockmoe.bench.schema import Solution
from blockmoe.bench.sources import renamed
from blockmoe.geometry import GEOMETRIES, HEADLINE, TINY

MANIFEST = """
name = "mine"
definitions = ["moe_fp8_*"]
author = "tests"
description = "nothing"
geometry_line = true
[spec]
language = "python"
target_hardware = ["cpu"]
entry_point = "main.py::run"
"""
MAIN = "import torch\nGEOMETRY = None\n\ndef run(*args):\n    pass\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "solutions" / "mine"
    (folder / "parts").mkdir(parents=True)
    (folder / "solution.toml").write_text(MANIFEST)
    (folder / "main.py").write_text(MAIN)
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "kernel.cu").write_text("// é\n", encoding="utf-8")
    (folder / "notes.md").write_text("not a source")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "old.py").write_text("not a source either")
    return folder


def bundled():
    """The bundled definitions alone."""
    return Dataset(definitions={name: definition_of(geometry) for name, geometry in GEOMETRIES.items()})


def test_packed_sources_and_round_trip(folder):
    packed = pack(folder, TINY.definition_name)
    assert {source.path: source.content for source in packed.sources} == {
        "main.py": packed.sources[0].content, "parts/__init__.py": "\n", "parts/kernel.cu": "// é\n",
    }  # fmt: skip
    assert packed.name == "mine" and packed.definition == TINY.definition_name and packed.spec.destination_passing_style is True
    assert Solution.model_validate_json(packed.to_json()) == packed


@pytest.mark.parametrize("geometry", [HEADLINE, TINY], ids=["headline", "tiny"])
def test_geometry_line_holds_the_definitions_sizes(folder, geometry):
    namespace = {}
    content = pack(folder, geometry.definition_name).sources[0].content
    exec(content.replace("import torch\n", ""), namespace)
    assert type(geometry)(**namespace["GEOMETRY"]) == geometry
    assert content.count("\n") == MAIN.count("\n")  # line numbers of errors stay true


def test_digest_follows_the_sources(folder):
    before = pack(folder, TINY.definition_name).digest
    assert pack(folder, TINY.definition_name).digest == before
    (folder / "parts" / "kernel.cu").write_text("// other\n")
    assert pack(folder, TINY.definition_name).digest != before


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "mine"', "name = mine", "Invalid value"),
        ('name = "mine"', "", "name: Field required"),
        ('author = "tests"', 'author = "tests"\nauthors = 1', "authors: Extra inputs are not permitted"),
        ('language = "python"', 'language = "python"\ndependancies = ["torch"]', "spec.dependancies: unknown field; known: language, "),
        ('language = "python"', 'language = "basic"', "spec.language: "),
        ("main.py::run", "main.py", "spec.entry_point: expected FILE::FUNCTION"),
        ("main.py::run", "other.py::run", "spec.entry_point: file 'other.py' is not among the sources"),
        ('["moe_fp8_*"]', '["moe_fp9_*"]', "definitions: unknown definition 'moe_fp9_*'"),
    ],
)
def test_manifest_faults_name_file_and_field(folder, old, new, expected):
    path = folder / "solution.toml"
    path.write_text(MANIFEST.replace(old, new))
    with pytest.raises(DatasetError) as caught:
        add_folders(bundled(), folder.parent)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)


def test_source_faults_name_the_file(folder):
    (folder / "main.py").write_text("def run(): pass\n")
    with pytest.raises(DatasetError, match="main.py: geometry_line: expected a line that begins with `GEOMETRY = `"):
        pack(folder, TINY.definition_name)
    (folder / "main.py").write_text(MAIN)
    with pytest.raises(DatasetError, match="main.py: geometry_line: the sizes of definition other are not known"):
        pack(folder, "other")
    (folder / "parts" / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(DatasetError, match="latin.py: expected UTF-8 text, got byte 0xe9 at 2"):
        pack(folder, TINY.definition_name)


def test_missing_manifest(tmp_path):
    with pytest.raises(DatasetError, match="solution.toml: No such file or directory"):
        read_manifest(tmp_path)


def test_two_folders_of_one_name(folder):
    copy = folder.parent / "copy"
    copy.mkdir()
    for name in ("solution.toml", "main.py"):
        (copy / name).write_text((folder / name).read_text())
    with pytest.raises(DatasetError, match="name: solution 'mine' exists already"):
        add_folders(bundled(), folder.parent)


def test_packed_tree_keeps_the_formats_rules_and_stands_beside_the_folders(folder):
    """Loads by itself; a name occurs once in the tree; and where the folders are read too, the copies don't count twice."""
    dataset, tree = bundled(), folder.parents[1] / "tree"
    for path in sorted((bundled_root() / "definitions").rglob("*.json")):
        target = tree / path.relative_to(bundled_root())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    for root in (folder.parent, bundled_solutions()):
        add_folders(dataset, root)
    for name, definition in dataset.definitions.items():
        for solution in dataset.solutions_of(name):
            write_packed(solution, definition.op_type, tree)

    packed = Dataset.load([tree])
    names = [json.loads(path.read_text())["name"] for path in (tree / "solutions").rglob("*.json")]
    assert len(names) == len(set(names)) == len(dataset.solutions)
    for path in (tree / "solutions").rglob("*.json"):
        content = json.loads(path.read_text())
        assert path.stem == content["name"] and path.parent.name == content["definition"]
        assert None not in content.values() and all(source["content"] for source in content["sources"])
    assert {name for _, name in packed.solutions if "__" not in name} == {name for _, name in dataset.solutions}

    add_folders(packed, bundled_solutions())
    own = {read_manifest(path).name for path in solution_folders(bundled_solutions())}
    assert {name for _, name in packed.solutions} == own | {name for name in names if name.startswith("mine")}


def test_copied_definition_is_whole_and_the_datasets_and_workloads_may_be_the_trees_own(tmp_path, most_bytes_a_file):
    dataset, name = Dataset.load([bundled_root()]), TINY.definition_name
    definition, workloads = (tmp_path / kind / "moe" / f"{name}.{end}" for kind, end in (("definitions", "json"), ("workloads", "jsonl")))
    with most_bytes_a_file(1000), pytest.raises(OSError, match="File too large"):
        copy_task(dataset, name, tmp_path)
    assert not definition.exists()
    copy_task(dataset, name, tmp_path)
    before = definition.read_bytes()
    definition.write_bytes(before[:1000])
    workloads.write_text("my own\n")
    copy_task(dataset, name, tmp_path)
    assert definition.read_bytes() == before and workloads.read_text() == "my own\n"


def test_packed_solution_is_whole(tmp_path, most_bytes_a_file):
    solution = pack(bundled_solutions() / "torch_grouped", TINY.definition_name)
    with most_bytes_a_file(1000), pytest.raises(OSError, match="File too large"):
        write_packed(solution, "moe", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- in other tools ---------------------------------------------------------------------------------------------------

IMPORT_AS_OTHERS = """
import importlib, inspect, json, sys
from unittest.mock import MagicMock
for name in ("deep_gemm", "flashinfer", "flashinfer.fused_moe", "sgl_kernel"):
    sys.modules[name] = MagicMock()
sys.modules["blockmoe"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
for package in sys.argv[2:]:
    print(json.dumps(list(inspect.signature(importlib.import_module(package + ".main").run).parameters)))
"""


def written(solution: Solution, folder) -> Solution:
    """What `blockmoe pack` writes, read again."""
    return Solution.model_validate_json(write_packed(solution, "moe", folder / "tree").read_text())


def build(solution: Solution, folder) -> None:
    """The sources as files below `folder`."""
    for source in solution.sources:
        path = folder / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.content)


def test_all_are_imported_as_flashinfer_bench_does(tmp_path):
    """It imports the entry file as a module of a package whose parent is on sys.path; its 0.1.1 calls `run(**inputs)`."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    dataset, packages = bundled(), {}
    add_folders(dataset, bundled_solutions())
    for key, solution in dataset.solutions.items():
        packages[key] = f"package_{len(packages)}"
        build(written(solution, tmp_path), tmp_path / packages[key])
    command = [sys.executable, "-c", IMPORT_AS_OTHERS, tmp_path, *packages.values()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for (definition, name), line in zip(packages, done.stdout.splitlines(), strict=True):
        if name in ("blockmoe", "torch_grouped"):
            task, spec = dataset.definitions[definition], dataset.solutions[definition, name].spec
            assert json.loads(line) == [*task.inputs, *(task.outputs if spec.destination_passing_style else ())]


@pytest.mark.parametrize("entry_file", ["main.py", "parts/main.py"])
def test_neighbours_are_found_before_anything_is_imported(folder, tmp_path, entry_file):
    manifest = MANIFEST.replace("main.py", entry_file).replace("geometry_line = true\n", "")
    (folder / "solution.toml").write_text(manifest)
    (folder / "main.py").unlink()
    main = '"""Of more\nthan a line."""\n\nfrom __future__ import annotations\n\nfrom neighbour import run  # noqa\n'
    (folder / entry_file).write_text(main)
    (folder / "neighbour.py").write_text("def run(): return 'neighbour'\n")
    solution = pack(folder, TINY.definition_name)
    assert main in [source.content for source in solution.sources]  # as it is where this bench runs it
    build(written(solution, tmp_path), tmp_path / "package")
    module = entry_file.removesuffix(".py").replace("/", ".")
    code = f"from package.{module} import __doc__, run; print(run(), 'than' in __doc__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path).split() == ["neighbour", "True"]


def test_neighbours_of_one_name_are_each_solution_s_own(folder, tmp_path):
    """Other tools import several solutions in one process. Also where one imports when it is called, and where what it imports imports."""
    (folder / "solution.toml").write_text(MANIFEST.replace("geometry_line = true\n", ""))
    (folder / "parts" / "kernel.cu").unlink()
    (folder / "__init__.py").write_text("")
    main = "import json, steps, parts.more as more\n\n\n"
    main += "def run():\n    from steps import late\n    return [steps.now(), late(), more.deep()]\n"
    (folder / "main.py").write_text(main)
    for name in ("a", "b"):
        (folder / "steps.py").write_text(f"def now(): return '{name}'\ndef late(): return '{name}'\n")
        (folder / "parts" / "more.py").write_text("from steps import now\n\n\ndef deep(): return now()\n")
        solution = written(pack(folder, HEADLINE.definition_name), tmp_path / name)
        paths = [source.path for source in solution.sources]
        assert {"__init__.py", "main.py"} < set(paths) and not {"steps.py", "parts/more.py"} & set(paths)
        build(solution, tmp_path / f"package_{name}")
    code = "import package_a.main as a, package_b.main as b; print(*a.run(), *b.run())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path).split() == [*"aaabbb"]


@pytest.mark.parametrize("main", [
    "from .steps import run", "from . import steps\nrun = steps.run", "run = __import__('steps').run",
    "run = __import__(f'st{chr(101)}ps').run",
    "exec('from steps import run')", "from pathlib import Path\nexec(Path(__file__).with_name('steps.py').read_text('utf-8-sig'))",
    "import os\nrun = lambda: len(open(f'{os.path.dirname(__file__)}/steps.py').read()) > 9", "from \\\n steps import run",
    "import pack.steps\nrun = pack.steps.run", "from pack.steps import run",
])  # fmt: skip
def test_names_that_may_be_needed_stay(folder, tmp_path, main):
    """As `pack`'s does, beside which there is a kernel."""
    (folder / "solution.toml").write_text(MANIFEST.replace("geometry_line = true\n", ""))
    (folder / "main.py").write_text(main)
    (folder / "pack").mkdir()
    for path, content in {"__init__.py": "", "steps.py": "def run(): return True\n", "kernel.cuh": '#include "kernel.cuh"\n'}.items():
        (folder / "pack" / path).write_text(content)
    (folder / "steps.py").write_text("\ufeffdef run(): return True\n", encoding="utf-8")
    solution = written(pack(folder, HEADLINE.definition_name), tmp_path)
    assert {"pack/steps.py", *(["steps.py"] if "pack" not in main else [])} < {source.path for source in solution.sources}
    build(solution, tmp_path / "package")
    code = "from package.main import run; print(run())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path) == "True\n"


def test_beside_what_is_not_python_names_stay(folder, tmp_path):
    manifest = MANIFEST.replace("main.py::", "parts/kernel.cu::").replace('"python"', '"cuda"').replace("geometry_line = true\n", "")
    (folder / "solution.toml").write_text(manifest)
    solution = pack(folder, HEADLINE.definition_name)
    assert written(solution, tmp_path).sources == solution.sources and "main.py" in [source.path for source in solution.sources]


def test_imports_are_renamed_where_they_stand():
    other = "(\n    b,\n)\nfrom stepson import c\nfrom .steps import d\n"
    content = "é = 1; import os, steps, steps as s; from  steps.a import " + other
    new = "é = 1; import os, steps_1 as steps, steps_1 as s; from steps_1.a import " + other
    assert renamed("main.py", content, {"steps": "steps_1"}) == new
    with pytest.raises(DatasetError, match="main.py: line 1: expected the module on the line"):
        renamed("main.py", "from \\\n steps import a\n", {"steps": "steps_1"})


def test_one_file_is_written_as_it_is(folder, tmp_path):
    (folder / "parts" / "__init__.py").unlink()
    solution = pack(folder, HEADLINE.definition_name)
    assert written(solution, tmp_path).sources == solution.sources


# --- bundle -----------------------------------------------------------------------------------------------------------


def test_digest_follows_the_modules_that_would_be_carried(tmp_path, monkeypatch):
    """What a trace and `--resume` know a solution by changes with the operator, and not with the bench."""
    package = tmp_path / "blockmoe"
    shutil.copytree(PACKAGE_FOLDER, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("blockmoe.bench.pack.PACKAGE_FOLDER", package)

    def digest() -> str:
        return pack(bundled_solutions() / "blockmoe", HEADLINE.definition_name).digest

    before = digest()
    (package / "bench" / "timing.py").write_text("")
    assert digest() == before
    chunks = package / "operator" / "chunks.py"
    chunks.write_text(chunks.read_text().replace("TOKEN_CHUNK = 16384", "TOKEN_CHUNK = 8192"))
    assert digest() != before


RUN_PACKED = """
import sys
sys.modules["blockmoe"] = None  # importing it fails
import importlib.util, pathlib, shutil, torch
spec = importlib.util.spec_from_file_location("main", sys.argv[1])
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
shutil.rmtree(pathlib.Path(sys.argv[1]).parent)  # as a tool does that is done with the solution of another definition
[package] = [name for name in sys.modules if name.startswith("blockmoe_") and "." not in name]
print(*(name.partition(".")[2] for name in sys.modules if name.startswith(package + ".")))
*inputs, offset, factor = torch.load(sys.argv[2])
output = torch.full_like(inputs[2], float("nan"), dtype=torch.bfloat16)
main.run(*inputs, offset, factor, output)
torch.save(output, sys.argv[3])
"""


def test_a_bundle_beside_neighbours_keeps_its_name(folder, tmp_path):
    (folder / "solution.toml").write_text(MANIFEST.replace("geometry_line", "bundle = true\ngeometry_line"))
    (folder / "main.py").write_text("from steps import TINY\nGEOMETRY = None\n\ndef run(): return TINY.hidden_size\n")
    (folder / "steps.py").write_text("from blockmoe.geometry import TINY\n")
    solution = written(pack(folder, HEADLINE.definition_name), tmp_path)
    found = {source.path.split("/")[0] for source in solution.sources} - {"main.py", "parts"}
    [package] = [name for name in found if name.startswith("blockmoe_")]
    [steps] = found - {package}
    assert len(package) == len("blockmoe_") + 16 and steps.startswith("steps_")
    build(solution, tmp_path / "package")
    code = "from package.main import run; print(run())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path) == f"{TINY.hidden_size}\n"


def test_bundled_solution_runs_without_the_package(tmp_path):
    torch = pytest.importorskip("torch")
    import blockmoe

    g, tokens, experts = TINY, 9, TINY.num_local_experts
    dataset = bundled()
    add_folders(dataset, bundled_solutions())
    from_folder = dataset.solutions[g.definition_name, "blockmoe"]
    assert [source.path for source in from_folder.sources] == ["main.py"] and "blockmoe" in from_folder.spec.dependencies
    packed = written(from_folder, tmp_path)

    assert packed.spec.dependencies == ["torch", "triton"] and "bundle" not in packed.model_extra
    package = {source.path.split("/")[0] for source in packed.sources} - {"main.py"}
    assert len(package) == 1 and package.pop().startswith("blockmoe_")
    carried = {source.path.partition("/")[2] for source in packed.sources}
    assert {"__init__.py", "geometry.py", "operator/api.py", "operator/route.py"} <= carried
    assert not {path for path in carried if path.startswith(("bench", "report", "cli", "operator/commands"))}
    build(packed, tmp_path / "built")

    def codes(*shape):
        return torch.randn(*shape).clamp(-2, 2).to(torch.float8_e4m3fn)

    torch.manual_seed(0)
    hidden, inner = g.hidden_size, g.intermediate_size
    inputs = [
        torch.randn(tokens, g.num_experts), (0.1 * torch.randn(g.num_experts)).bfloat16(),
        codes(tokens, hidden), torch.randn(hidden // 128, tokens),
        codes(experts, 2 * inner, hidden), torch.randn(experts, 2 * inner // 128, hidden // 128),
        codes(experts, hidden, inner), torch.randn(experts, hidden // 128, inner // 128),
    ]  # fmt: skip
    torch.save([*inputs, 8, 2.5], tmp_path / "inputs.pt")
    command = [sys.executable, "-c", RUN_PACKED, tmp_path / "built" / "main.py", tmp_path / "inputs.pt", tmp_path / "output.pt"]
    imported = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout.split()
    if find_spec("triton"):
        files = {path.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".") for path in carried} - {""}
        assert set(imported) == files - {"main"} and "operator.prefill.layer" in files
    expected = blockmoe.fused_moe(
        *inputs, local_expert_offset=8, routed_scaling_factor=2.5, top_k=g.top_k, n_group=g.n_group, topk_group=g.topk_group
    )
    assert expected.any() and torch.equal(torch.load(tmp_path / "output.pt").view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import blockmoe.geometry", "bundle: line 3: expected `from blockmoe"),
        ("from blockmoe import __version__", "bundle: line 3: blockmoe is not a"),
        ("def :", "line 3: invalid syntax"),
    ],
)
def test_bundle_refuses_what_it_cannot_rename(folder, line, expected):
    (folder / "solution.toml").write_text(MANIFEST.replace("geometry_line", "bundle = true\ngeometry_line"))
    (folder / "main.py").write_text(MAIN.replace("\n\n", f"\n{line}\n"))
    with pytest.raises(DatasetError, match=f"main.py: {expected}"):
        write_packed(pack(folder, TINY.definition_name), "moe", folder.parent)
