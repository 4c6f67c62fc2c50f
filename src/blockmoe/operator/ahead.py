"""Where a loop's products find their operands, computed an iteration ahead, in the PTX that Triton makes.

A product's operands in shared memory are named by descriptors, 64 bits made of the stage's address. LLVM makes them at the loop's top, and
ptxas behind the barrier there by which consumers take turns: 12 to 19 instructions, most of which wait for each other, while the tensor
cores do. Here what they are made by is moved: before the loop, and to where the next stage is known, beside a product. (T = 14,107, 11,948:
1.4 and 0.9 % fewer cycles, 0.7 and 0.3 to 0.8 % less time; results/h200/operator/ahead.txt. That Gluon's variables hold the next stage's
buffers changes nothing: LLVM sees that they follow from the stage.)

Only blocks that branch to themselves are looked at, where products are made and something is said (`ptx.py`), as in prefill's; one that
doesn't fit is refused. What is moved are integer operations on registers that nobody reads elsewhere, nor before they are made; then
whether an iteration is the last does not matter to them.
"""

from __future__ import annotations

import re

_LABEL = re.compile(r"(\$L__BB\w+):")
_INTEGER = re.compile(r"\s*(?:shl|or|add|sub|bfe|cvt|mul\.lo|mad\.lo)(?:\.(?!cc)\w+)+\s+(%\w+), ([^;{}]*);\s*(?://.*)?$")
_SETS = re.compile(r"\s*(?:@!?%p\d+\s+)?[\w.:]+\s+(\{[^}]*\}|[%\w|]+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
_PRODUCT, _SAID = "wgmma.mma_async", "/* blockmoe:"


class Unexpected(RuntimeError):
    """The PTX is not as known: another Triton, say. The kernel must not be launched as it is."""


def ahead(ptx: str) -> str:
    """`ptx` with the descriptors of every such loop's products made ahead. Raises Unexpected where a loop is not as known."""
    lines = ptx.splitlines()
    for label, (top, end) in reversed(loops(lines).items()):  # the last first: the others stay where they are
        lines[top : end + 1] = _with_descriptors_ahead(label, lines[top : end + 1], lines[:top], lines[end + 1 :])
    return "\n".join(lines) + "\n"


def loops(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Blocks that branch to themselves and have products and a word, by label: their label's line and their branch's."""
    found, label, top = {}, None, 0
    for at, line in enumerate(lines):
        if begins := _LABEL.match(line):
            label, top = begins[1], at
        elif label and re.search(rf"\bbra(\.uni)?\s+{re.escape(label)};", line):
            if all(any(text in inside for inside in lines[top:at]) for text in (_PRODUCT, _SAID)):
                found[label] = top, at
            label = None
    return found


def _with_descriptors_ahead(label: str, loop: list[str], before: list[str], behind: list[str]) -> list[str]:
    last = next(line for line in reversed(before) if ";" in line)
    name = re.compile(rf"{re.escape(label)}\b(?!:)")
    named = [line for line in (*before, *loop, *behind) if label in line and name.search(line.partition("//")[0])]
    if len(named) != 1 or re.search(r"\b(bra|brx|ret)\b", last):
        raise Unexpected(f"{label} is come by in another way")
    products = [at for at, line in enumerate(loop) if _PRODUCT in line]
    wanted = {name for at in products for name in _REGISTER.findall(_operation(loop, at).rpartition("}")[2]) if name.startswith("%rd")}
    moved: list[int] = []
    for at in range(products[-1], 0, -1):
        made = _INTEGER.match(loop[at])
        if made and made[1] in wanted:
            moved.append(at)
            wanted |= set(_REGISTER.findall(made[2]))
    moved.reverse()
    made_here = {_INTEGER.match(loop[at])[1] for at in moved}
    sets = [(at, name) for at, line in enumerate(loop) for name in _set_by(line)]
    changing = [(at, name) for at, name in sets if name in wanted - made_here]
    if len(changing) != 1 or changing[0][0] < products[-1]:
        raise Unexpected(f"{label}: descriptors follow from {sorted(name for _, name in changing)}, one stage expected, set behind them")
    stage = changing[0][0]
    if sorted(name for _, name in sets if name in made_here) != sorted(made_here):
        raise Unexpected(f"{label}: a descriptor is made more than once")
    if made_here & {name for line in loop[stage + 1 :] for name in _REGISTER.findall(line)}:
        raise Unexpected(f"{label}: a descriptor is read when the next stage is known")
    elsewhere = {name for line in (*before, *behind) if ".reg " not in line for name in _REGISTER.findall(line)}
    first = {name: next(at for at, line in enumerate(loop) if name in _REGISTER.findall(line)) for name in made_here}
    if made_here & elsewhere or sorted(first.values()) != moved:
        raise Unexpected(f"{label}: a descriptor is read elsewhere, or before it is made")
    code = [loop[at] for at in moved]
    return [*code, *(line for at, line in enumerate(loop[: stage + 1]) if at not in moved), *code, *loop[stage + 1 :]]


def _set_by(line: str) -> list[str]:
    """Registers that a line may set: of inline assembly in braces all it names."""
    if line.lstrip().startswith("{"):
        return _REGISTER.findall(line)
    found = _SETS.match(line)
    return _REGISTER.findall(found[1]) if found else []


def _operation(loop: list[str], at: int) -> str:
    """The one that begins in a line, to its end."""
    text = loop[at]
    while ";" not in text:
        at += 1
        text += loop[at]
    return text
