"""Solution folders and their packed form.

A folder `solutions/NAME/` has a manifest `solution.toml` and its sources:

    name = "torch_grouped"
    definitions = ["moe_fp8_block_scale_*"]     # fnmatch patterns
    author = "blockmoe"
    description = "..."
    geometry_line = true                        # replace the entry file's line `GEOMETRY = ...` by the definition's sizes
    bundle = true                               # the written form carries the modules of this package that the sources import
    [spec]                                      # as in the format
    language = "python"
    target_hardware = ["cpu", "cuda"]
    entry_point = "main.py::run"
    destination_passing_style = false
    dependencies = ["torch"]

The packed form is the format's Solution: one JSON a definition. What `write_packed` writes needs no installed blockmoe where
the manifest says `bundle`: the modules go with it under the package name `blockmoe_DIGEST`, so that they never meet an
installed package. A folder that is run, not written, imports the installed one.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from blockmoe import __version__
from blockmoe.bench.dataset import Dataset, DatasetError, first_fault, read_text, unknown
from blockmoe.bench.schema import BuildSpec, Name, Solution, SourceFile, digest
from blockmoe.bench.sources import finding_neighbours, named_apart, parsed, renamed
from blockmoe.files import write_whole
from blockmoe.geometry import HEADLINE, MoEGeometry

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SIZES_MARK = "__"  # between a packed solution's name and its definition's sizes
PACKAGE = "blockmoe"
PACKAGE_FOLDER = Path(__file__).parents[1]
SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".hpp")
# Of the carried package. Tools import solutions of one digest from the files of the first, and remove those when they like.
CARRIED_INIT = '''\
"""Of blockmoe {version} what this solution needs, all imported at once: when a call wants a module its file may be gone."""

from contextlib import suppress
from importlib import import_module

for name in {names}:
    with suppress(Exception):  # without Triton, or by one whose Gluon is another: calls there want others
        import_module(f"{{__name__}}.{{name}}")
'''


class Manifest(BaseModel):
    """`solution.toml`, checked."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    definitions: list[Name]
    author: Name
    description: Name
    geometry_line: bool = False
    bundle: bool = False
    spec: BuildSpec


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a solution folder; raises DatasetError naming file and field."""
    path = folder / "solution.toml"
    try:
        manifest = Manifest.model_validate(tomllib.loads(read_text(path)))
    except tomllib.TOMLDecodeError as error:
        raise DatasetError(f"{path}: {error}") from None
    except ValidationError as error:
        raise DatasetError(f"{path}: {first_fault(error)}") from None
    if extra := sorted(manifest.spec.model_extra or {}):
        raise DatasetError(f"{path}: spec.{extra[0]}: unknown field; known: {', '.join(BuildSpec.model_fields)}")
    return manifest


def pack(folder: Path, definition: str) -> Solution:
    """The solution of a folder for one definition; raises DatasetError where the folder is not one."""
    manifest = read_manifest(folder)
    entry_file = manifest.spec.entry_point.split("::")[0]
    sources = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix in SOURCE_SUFFIXES and not any(part.startswith(".") for part in relative.parts):
            content = read_text(path)
            if manifest.geometry_line and relative.as_posix() == entry_file:
                content = _with_geometry(content, definition, path)
            sources.append(SourceFile(path=relative.as_posix(), content=content or "\n"))  # the format wants no empty file
    try:
        fields = manifest.model_dump(include={"name", "author", "description", "spec"})
        if manifest.bundle:
            fields["bundle"] = _carried(sources)[0]  # for the digest, and for `write_packed`, which drops it
        return Solution(definition=definition, sources=sources, **fields)
    except ValidationError as error:
        raise DatasetError(f"{folder / 'solution.toml'}: {first_fault(error)}") from None


def _with_geometry(content: str, definition: str, path: Path) -> str:
    geometry = MoEGeometry.from_definition(definition)
    if geometry is None:
        raise DatasetError(f"{path}: geometry_line: the sizes of definition {definition} are not known")
    line = f"GEOMETRY = {asdict(geometry)!r}"
    content, found = re.subn(r"^GEOMETRY = .*$", lambda _: line, content, count=1, flags=re.MULTILINE)
    if not found:
        raise DatasetError(f"{path}: geometry_line: expected a line that begins with `GEOMETRY = `")
    return content


def bundled(solution: Solution) -> Solution:
    """The solution with the modules of this package that its sources import, and those that they import, as its own sources."""
    package, modules = _carried(solution.sources)
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sorted(modules)]
    carried = {"__init__.py": CARRIED_INIT.format(version=__version__, names=names), **modules}
    mine = {source.path: source.content for source in solution.sources}
    sources = mine | {f"{package}/{path}": content for path, content in sorted(carried.items())}
    others = {name for path, content in carried.items() for name in _other_packages(path, content)}
    spec = solution.spec
    spec = spec.model_copy(update={"dependencies": sorted({*spec.dependencies, *others} - {PACKAGE})})
    files = []
    for path, content in sources.items():
        content = renamed(path, content, {PACKAGE: package}) if path.endswith(".py") else content
        files.append(SourceFile(path=path, content=content or "\n"))
    return solution.model_copy(update={"sources": files, "spec": spec})


def _carried(sources: list[SourceFile]) -> tuple[str, dict[str, str]]:
    """The package name `blockmoe_DIGEST`, and by path the modules of this package that sources import, and that those import."""
    modules: dict[str, str] = {}
    new = {source.path: source.content for source in sources if source.path.endswith(".py")}
    while new:
        found = {module for path, content in new.items() for module in _modules_imported(path, content)}
        new = {path: read_text(PACKAGE_FOLDER / path) for path in sorted(found - modules.keys())}
        modules |= new
    return f"{PACKAGE}_{digest(sorted(modules.items()))}", modules


@cache
def _modules_imported(path: str, content: str) -> set[str]:
    return {module for node in _own_imports(path, content) for module in _module_files(path, node)}


def _own_imports(path: str, content: str) -> list[ast.ImportFrom]:
    """The statements that import from this package, wherever they stand."""
    found = []
    for node in ast.walk(parsed(path, content)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and node.module.split(".")[0] == PACKAGE:
            found.append(node)
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise DatasetError(f"{path}: bundle: line {node.lineno}: expected `from {PACKAGE}.... import ...`")
    return found


def _module_files(path: str, node: ast.ImportFrom) -> set[str]:
    """Files below the package that an import statement loads; the package's own __init__.py is not carried."""
    parts = (node.module or "").split(".")[1:]
    found = {"/".join((*parts[:n], "__init__.py")) for n in range(1, len(parts) + 1)}
    found.add("/".join(parts) + ".py")
    found |= {"/".join((*parts, alias.name)) + ".py" for alias in node.names}
    found = {file for file in found if (PACKAGE_FOLDER / file).is_file()}
    if not found:
        raise DatasetError(f"{path}: bundle: line {node.lineno}: {node.module} is not a module that can be carried")
    return found


def _other_packages(path: str, content: str) -> set[str]:
    """Installed packages that a file imports."""
    names = set()
    for node in ast.walk(parsed(path, content)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {PACKAGE}


def solution_folders(root: Path) -> list[Path]:
    """Folders with a manifest directly below `root`."""
    return sorted(path.parent for path in root.glob("*/solution.toml"))


def add_folders(dataset: Dataset, root: Path) -> None:
    """Add every solution folder below `root` to the dataset, for each of its definitions that the manifest names.

    A folder stands in for packed copies of it that the tree holds.
    """
    manifests = {folder: read_manifest(folder) for folder in solution_folders(root)}
    names = {manifest.name for manifest in manifests.values()}
    for definition, name in list(dataset.solutions):
        if name.split(SIZES_MARK)[0] in names:
            del dataset.solutions[definition, name]
    for folder, manifest in manifests.items():
        for pattern in manifest.definitions:
            if not any(fnmatchcase(definition, pattern) for definition in dataset.definitions):
                path = folder / "solution.toml"
                raise DatasetError(f"{path}: definitions: {unknown('definition', pattern, dataset.definitions)}")
        for definition in dataset.definitions:
            if any(fnmatchcase(definition, pattern) for pattern in manifest.definitions):
                dataset.add_solution(pack(folder, definition), folder)


def write_packed(solution: Solution, op_type: str, root: Path) -> Path:
    """Write ROOT/solutions/OP_TYPE/DEFINITION/NAME.json, whole where the manifest says `bundle`, for any tool to import.

    The format wants a name only once in a tree, so that for other definitions than the headline its sizes are appended to it.
    """
    if (solution.model_extra or {}).get("bundle"):
        solution = bundled(solution)
        del solution.model_extra["bundle"]
    solution = finding_neighbours(named_apart(solution, f"{PACKAGE}_"))
    if solution.definition != HEADLINE.definition_name:
        suffix = solution.definition.removeprefix("moe_fp8_block_scale_")
        solution = solution.model_copy(update={"name": f"{solution.name}{SIZES_MARK}{suffix}"})
    path = root / "solutions" / op_type / solution.definition / f"{solution.name}.json"
    return write_whole(path, solution.model_dump_json(indent=2, exclude_none=True) + "\n")
