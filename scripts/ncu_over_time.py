"""A kernel's memory and multiprocessors over time, from counters of Nsight Compute: python scripts/ncu_over_time.py RAW.csv [--until 231]

    ncu --clock-control none --cache-control none --section PmSampling --pm-sampling-interval 1000 -k regex:'prefill|stream|either' \\
        -s 1 -c 1 -o of python scripts/gpu_one_call.py 901
    ncu -i of.ncu-rep --page raw --print-metric-instances values --csv >RAW.csv     # RAW.csv.xz will do

A line a sample: us since the kernel's programs were launched; DRAM's reads and writes, instructions, and products, each in % of its peak;
multiprocessors at work, in % of the most that a sample has. Last the mean of DRAM's reads, over --until us from the first above 20 %.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import sys
from pathlib import Path

INTERVAL = "profiler__pmsampler_interval_time"  # us
COLUMNS = {  # what a metric's name has in it: a profiler's version puts other words around
    "reads": "dramc__read_throughput.avg.pct",
    "writes": "dramc__write_throughput.avg.pct",
    "instructions": "sm__inst_executed_realtime.avg.pct",
    "products": "sm__pipe_tensor_cycles_active_realtime.avg.pct",
    "at work": "sm__cycles_active.avg",
}


def read(path: Path) -> tuple[float, dict[str, list[float]]]:
    """The interval in us, and each column's samples. Raises ValueError, which names the file, where it has none."""
    csv.field_size_limit(1 << 30)
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt") as lines:
            head, _, values = [row for row in csv.reader(lines) if row][:3]  # names, units, the kernel's
        found = {}
        for column, part in COLUMNS.items():
            value = next(value for name, value in zip(head, values, strict=True) if part in name and ";" in value)
            samples = value[value.index("(") + 1 : value.rindex(")")]
            found[column] = [float(sample.replace(",", "")) for sample in samples.split(";")]
        return float(values[head.index(INTERVAL)].split()[0]), found
    except (ValueError, StopIteration, EOFError, lzma.LZMAError, csv.Error) as error:
        raise ValueError(
            f"{path}: expected a page `raw` of ncu as CSV with metric instances, of section PmSampling; got {str(error) or 'none'}"
        ) from error


def table(interval: float, found: dict[str, list[float]], until: float) -> list[str]:
    work = found["at work"]
    inside = [n for n, sample in enumerate(work) if sample > 0]
    if not inside:
        raise ValueError("expected samples of multiprocessors at work, got none")
    lines = [f"us | {' | '.join(COLUMNS)}"]
    for n in range(inside[0], inside[-1] + 1):
        shares = [found[name][n] for name in COLUMNS if name != "at work"] + [100 * work[n] / max(work)]
        lines.append(f"{interval * (n - inside[0]):.1f} | {' | '.join(f'{share:.1f}' for share in shares)}")
    reads = found["reads"][inside[0] :]
    first = next((n for n, sample in enumerate(reads) if sample > 20), 0)
    mean = reads[first : first + max(1, round(until / interval))]
    lines.append(f"mean of reads over {until:g} us from {interval * first:.1f} us on: {sum(mean) / len(mean):.1f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--until", type=float, default=100.0, help="us (default: 100)")
    asked = parser.parse_args()
    if not asked.until > 0:
        parser.error(f"--until: expected a positive number, got {asked.until}")
    try:
        print("\n".join(table(*read(asked.raw), asked.until)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
