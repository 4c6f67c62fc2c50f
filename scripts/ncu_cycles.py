"""Where a kernel's cycles go, from the samples of Nsight Compute: python scripts/ncu_cycles.py SOURCE.csv --kcycles 1948

    ncu --clock-control none --section SourceCounters --section SpeedOfLight -k regex:prefill -s 1 -c 1 -o of \\
        python scripts/gpu_one_call.py 14107
    ncu -i of.ncu-rep --page source --csv >SOURCE.csv     # SOURCE.csv.xz will do; "Elapsed Cycles": ncu -i of.ncu-rep --page details

Warps are sampled alike, from begin to end, so that a role's share of samples is its share of cycles: a role of four warps has all of the
kernel's, --kcycles. Printed are stretches of instructions that were executed equally often and take more than --least of them: loops and
what stands between. In a loop with products (QGMMA) also by part, in cycles an iteration: until the first product of a group is issued,
until the last is, until it is waited for, and the wait.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import re
import sys
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("Source", "Instructions Executed", "# Samples")
SLACK = 0.02  # of how often: the last iteration of a loop leaves out its branch


@dataclass(frozen=True)
class Instruction:
    text: str
    executed: int  # warps times
    samples: int


def read(path: Path) -> list[Instruction]:
    """The instructions of a source page, perhaps compressed by xz. Raises ValueError, which names the file, where it is none."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt") as lines:
            rows = [row for row in csv.reader(lines) if row]
        head = next(n for n, row in enumerate(rows) if all(name in row for name in COLUMNS))
        needed = [rows[head].index(name) for name in COLUMNS]
        code = [Instruction(row[a].strip(), int(row[b]), int(row[c])) for row in rows[head + 1 :] for a, b, c in [needed]]
        if not sum(one.samples for one in code):
            raise ValueError("no samples")
        return code
    except (ValueError, IndexError, StopIteration, EOFError, lzma.LZMAError, csv.Error) as error:
        columns = ", ".join(COLUMNS)
        raise ValueError(f"{path}: expected a page `source` of ncu as CSV, with columns {columns}; got {str(error) or 'none'}") from error


def stretches(code: list[Instruction]) -> list[range]:
    """Neighbours that were executed about as often."""
    found, begin = [], 0
    for at in range(1, len(code) + 1):
        if at == len(code) or abs(code[at].executed - code[begin].executed) > SLACK * code[begin].executed:
            found.append(range(begin, at))
            begin = at
    return found


def parts(code: list[Instruction], inside: range) -> list[tuple[str, range]]:
    """What a loop with groups of products consists of."""
    found, begin, first = [], inside.start, None
    for at in inside:
        if "QGMMA" in code[at].text:
            if first is None:
                found.append(("before", range(begin, at)))
                first = at
            last = at
        elif "WARPGROUP.DEPBAR" in code[at].text and first is not None:
            found += [("issued", range(first, last + 1)), ("beside", range(last + 1, at)), ("waited", range(at, at + 1))]
            begin, first = at + 1, None
    return [*found, ("behind", range(begin, inside.stop))] if found else []


def table(code: list[Instruction], kcycles: float, warps: int, programs: int, least: float) -> list[str]:
    role = sum(one.samples for one in code) / warps * 4  # samples of four warps

    def share(of: range) -> float:
        return sum(code[at].samples for at in of) / role * kcycles

    lines = ["instructions | times a warp | kcycles of a role | cycles a time: by part"]
    for inside in stretches(code):
        if share(inside) < least:
            continue
        times = code[inside.start].executed / programs / 4
        each = [f"{name} {1000 * share(of) / times:.0f}" for name, of in parts(code, inside)] if times else []
        text = re.sub(r"\s+", " ", code[inside.start].text)[:40]
        whole = f"{1000 * share(inside) / times:.0f}" if times else "-"
        line = f"{inside.start} to {inside.stop - 1}, {text} | {times:.0f} | {share(inside):.1f} | {whole}"
        lines.append(f"{line}: {', '.join(each)}" if each else line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kcycles", type=float, required=True, help="of the kernel, in thousands")
    parser.add_argument("--warps", type=int, default=16, help="of a program (default: 16, prefill's)")
    parser.add_argument("--programs", type=int, default=132)
    parser.add_argument("--least", type=float, default=10.0, help="print what takes as many thousand cycles (default: 10)")
    asked = parser.parse_args()
    if min(asked.kcycles, asked.warps, asked.programs) <= 0 or asked.least < 0:
        parser.error(
            "--kcycles, --warps, --programs, --least: expected positive numbers, "
            f"got {asked.kcycles}, {asked.warps}, {asked.programs}, {asked.least}"
        )
    try:
        code = read(asked.source)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(table(code, asked.kcycles, asked.warps, asked.programs, asked.least)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
