"""Python sources of a solution as text: what a packed one's need so that other tools can import them, beside other solutions'.

An entry file imports its neighbours by name (`from steps import ...`), as it may where this bench runs it. Other tools import it as a
module of a package, so that the written form first puts the sources' root on the path. And they import several solutions in one
process, where one name stands for one module, so that neighbours are named by what they contain: `steps_DIGEST`.
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
        return ast.parse(content, path)
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


def named_apart(solution: Solution, also: tuple[str, ...] = ()) -> Solution:
    """The solution with its entry file's neighbours named by what they contain. Not: a package that the entry file is in, what begins with
    one of `also`, and names that `import a.b` makes known, that are imported from where a file is (`from .a`), or that stand in a string,
    by which they may be imported or opened."""
    entry_file = solution.spec.entry_point.split("::")[0]
    python = {source.path: source.content for source in solution.sources if source.path.endswith(".py")}
    candidates = {_name(path) for path in python} - {_name(entry_file), "__init__"}
    kept = {name for path, content in python.items() for name in _needed_as_they_are(path, content)}
    names = {name for name in candidates - kept if not name.startswith(also)}
    if not names:
        return solution
    mark = digest(sorted((path, content) for path, content in python.items() if _name(path) in names))
    new = {name: f"{name}_{mark}" for name in sorted(names)}
    files = []
    for source in solution.sources:
        first, *rest = source.path.split("/")
        if rest or source.path in python:
            first = first.replace(_name(first), new.get(_name(first), _name(first)), 1)
        content = renamed(source.path, source.content, new) if source.path in python else source.content
        files.append(source.model_copy(update={"path": "/".join([first, *rest]), "content": content}))
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


def _needed_as_they_are(path: str, content: str) -> set[str]:
    """Names that a file makes known by `import a.b`, imports from where it is, or has in strings."""
    found = set()
    for node in ast.walk(parsed(path, content)):
        if isinstance(node, ast.Import):
            found |= {_top(alias.name) for alias in node.names if "." in alias.name and not alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            found |= {_top(node.module), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.split(r"[./]", node.value, maxsplit=1)[0])
    return found


def _with_first(path: str, content: str, text: str) -> str:
    """Python with `text` before its first statement but for docstring and `from __future__` imports, which stay first."""
    tree = parsed(path, content)
    first = [node for node in tree.body[:1] if ast.get_docstring(tree, clean=False) is not None]
    first += [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    lines = content.split("\n")
    at = max((node.end_lineno for node in first), default=0)
    return "\n".join([*lines[:at], *([""] if at else []), *text.rstrip("\n").split("\n"), *lines[at:]])
