"""Python sources of a solution as text: what a packed one's need so that other tools can import them, beside other solutions'.

An entry file imports its neighbours by name (`from steps import ...`), as it may where this bench runs it. Other tools import it as a
module of a package, so that the written form first puts the sources' root on the path. And they import several solutions in one
process, where one name stands for one module, so that neighbours are named by what they contain, `steps_DIGEST`, where nothing but
imports that can be rewritten may need their names.
"""

from __future__ import annotations

import ast
import re

from blockmoe.bench.dataset import DatasetError
from blockmoe.bench.schema import Solution, digest

FINDS_NEIGHBOURS = """\
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[{depth}]))  # where a tool imports this file only, its neighbours are found
"""


def parsed(path: str, content: str) -> ast.Module:
    """The syntax tree of a file; raises DatasetError naming file and line."""
    try:
        return ast.parse(content.removeprefix("\ufeff"), path)
    except SyntaxError as error:
        raise DatasetError(f"{path}: line {error.lineno}: {error.msg}") from None


def renamed(path: str, content: str, names: dict[str, str]) -> str:
    """Python that imports modules by new names, and knows those of `import` by the old ones; line numbers stay."""
    found = []
    for node in ast.walk(parsed(path, content)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (name := _top(node.module)) in names:
            found.append((node, rf"from\s+{name}\b", f"from {names[name]}"))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if (name := _top(alias.name)) in names:
                    known = "" if alias.asname else f" as {alias.name}"
                    found.append((alias, rf"{name}\b", names[name] + known))
    lines = [line.encode() for line in content.split("\n")]  # columns are of bytes
    for node, old, new in sorted(found, key=lambda each: -each[0].col_offset):
        line = lines[node.lineno - 1]
        after, changed = re.subn(old, lambda _, new=new: new, line[node.col_offset :].decode(), count=1)
        if not changed:
            raise DatasetError(f"{path}: line {node.lineno}: expected the module on the line where its import begins")
        lines[node.lineno - 1] = line[: node.col_offset] + after.encode()
    return b"\n".join(lines).decode()


def named_apart(solution: Solution, carried: str) -> Solution:
    """The solution with modules and packages (of Python alone) that lie beside its entry file at the root named by what they contain.

    As they are stay: names that begin with `carried`, a bundle's; that stand in a string or in a source that is not Python, by which they
    may be imported or opened; that `import a.b` makes known, or that are imported from where a file is (`from .a`). And all where a file is
    not Python as it is known here, or an import can't be rewritten.
    """
    entry_file = solution.spec.entry_point.split("::")[0]
    python = {source.path: source.content for source in solution.sources if source.path.endswith(".py")}
    others = {source.path: source.content for source in solution.sources if source.path not in python}
    modules = {_name(path) for path in python if "/" not in path}
    packages = {_name(path) for path in python if path.count("/") == 1 and path.endswith("/__init__.py")} - set(map(_name, others))
    names = {name for name in (modules | packages) - {_name(entry_file), "__init__"} if not name.startswith(carried)}
    if not entry_file.endswith(".py") or not names or (modules & packages & names):
        return solution
    try:
        for path, content in python.items():
            names -= _needed(names, path, content)
        names = {name for name in names if not any(name in content for content in others.values())}
        mark = digest(sorted((path, content) for path, content in python.items() if _name(path) in names))
        new = {name: f"{name}_{mark}" for name in names}
        contents = {path: renamed(path, content, new) for path, content in python.items()}
    except DatasetError:
        return solution
    paths = {path: new.get(_name(path), _name(path)) + path[len(_name(path)) :] for path in python}
    files = [
        source.model_copy(update={"path": paths[source.path], "content": contents[source.path]}) if source.path in python else source
        for source in solution.sources
    ]
    return solution.model_copy(update={"sources": files})


def finding_neighbours(solution: Solution) -> Solution:
    """The solution with `FINDS_NEIGHBOURS` before what its entry file does first; the same where it has one Python file."""
    entry_file = solution.spec.entry_point.split("::")[0]
    if not entry_file.endswith(".py") or sum(source.path.endswith(".py") for source in solution.sources) == 1:
        return solution
    text = FINDS_NEIGHBOURS.format(depth=entry_file.count("/"))
    files = [
        source.model_copy(update={"content": _with_first(source.path, source.content, text)}) if source.path == entry_file else source
        for source in solution.sources
    ]
    return solution.model_copy(update={"sources": files})


def _top(module: str | None) -> str:
    return (module or "").split(".")[0]


def _name(path: str) -> str:
    """The module or package below the root that a file is, or is in."""
    return path.split("/")[0].removesuffix(".py")


def _needed(names: set[str], path: str, content: str) -> set[str]:
    """Those of some modules' names that a file may need for more than imports that `renamed` rewrites."""
    tree = parsed(path, content)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {_top(alias.name) for alias in node.names if "." in alias.name and not alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            found |= {_top(node.module), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.JoinedStr):  # what it begins may be a name
            begun = (re.split(r"\W", piece.value)[-1] for piece in node.values if isinstance(piece, ast.Constant))
            found |= {name for start in begun if start for name in names if name.startswith(start)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= {name for name in names if name in node.value}
    return names & found


def _with_first(path: str, content: str, text: str) -> str:
    """Python with `text` before its first statement but for docstring and `from __future__` imports, which stay first."""
    tree = parsed(path, content)
    first = [node for node in tree.body[:1] if ast.get_docstring(tree, clean=False) is not None]
    first += [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    lines = content.split("\n")
    at = max((node.end_lineno for node in first), default=0)
    return "\n".join([*lines[:at], *([""] if at else []), *text.rstrip("\n").split("\n"), *lines[at:]])
