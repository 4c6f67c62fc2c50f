"""The published B200 figures beside a run of the same solutions on another GPU: which findings repeat, and what the collapse costs.

    python -m blockmoe.report.against results/h100 tests/data docs/hopper-against-published.md

reads results/h100/{every,strict,collapse}; what is missing is said to be. The text between the page's two conclusion marks is
written by hand and kept; everything else is computed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from blockmoe.files import write_whole
from blockmoe.report import api, markdown
from blockmoe.report.importing import import_csv
from blockmoe.report.load import load
from blockmoe.report.model import Section, spread
from blockmoe.report.published import FLASHINFER, FOUR, QUARTET, SGLANG1, SGLANG2, TRITON1, TRITON2, TWO
from blockmoe.report.tables import DASH, Cell, Table, factor, percent

DEEPGEMM = "deepgemm_moe"
GAIN = 1.05  # a gain is one from here on: two processes of the same code differ by less
BANDS = ((1, 32), (50, 80), (901, 901), (10001, 14107))  # where the published report states the gain from preallocation
BEGIN, END = "<!-- conclusions: written by hand -->", "<!-- end of conclusions -->"
STAGES = ("routing", "permute", "GEMM1", "activation", "GEMM2", "combine", "other")
REPEATS, DIFFERS = "repeats", "differs"


def speedups(section: Section, name: str) -> dict[int, float]:
    """Speedup by T of what passed."""
    return {row.tokens: row.cells[name].speedup for row in section.rows if name in row.cells and row.cells[name].passed}


def ratios(section: Section, first: str, second: str, low: int = 1, high: int = 10**9) -> list[float]:
    """How many times faster `first` is, for every T from low to high that both passed."""
    one, other = speedups(section, first), speedups(section, second)
    return [one[t] / other[t] for t in sorted(one.keys() & other.keys()) if low <= t <= high]


def mean(values: Sequence[float]) -> float | None:
    return spread([(None, value) for value in values]).geometric if values else None


def ranking(section: Section, names: Sequence[str]) -> list[str]:
    """Best first, by the geometric mean."""
    means = {name: mean(list(speedups(section, name).values())) for name in names}
    return sorted((name for name in names if means[name]), key=lambda name: -means[name])


def kept(section: Section, name: str) -> float | None:
    """What is left of the speedup at T = 901 above 10,000."""
    found = speedups(section, name)
    above = mean([value for t, value in found.items() if t > 10_000])
    return above / found[901] if above and 901 in found else None


# the tables


def ranking_table(published: Section, here: Section) -> Table:
    """Means of the four solutions, there and here."""
    table = Table("ranking", "Ranking of the four", ["solution", "B200, all", "here, all", "B200, T ≤ 80", "here, T ≤ 80"], [])
    table.columns += ["B200, T > 10,000", "here, T > 10,000"]
    for name in ranking(published, QUARTET):
        cells = [Cell(name)]
        for low, high in ((1, 10**9), (1, 80), (10_001, 10**9)):
            for section in (published, here):
                cells.append(Cell(factor(mean([v for t, v in speedups(section, name).items() if low <= t <= high]))))
        table.rows.append(cells)
    there, now = ranking(published, QUARTET), ranking(here, QUARTET)
    table.notes = [
        "Geometric means of the speedups over the float32 reference, which is itself of the machine: compare orders and ratios.",
        f"Order on the B200: {' > '.join(there)}. Here: {' > '.join(now)}. {_word(there == now).capitalize()}.",
    ]
    return table


def gain_table(published: Section, here: Section) -> Table:
    """Gains of one version over another, by band of T."""
    table = Table("gains", "Gains from version to version", ["what", "T", "B200", "here", "finding"], [], text_columns=2)
    for label, first, second in (
        ("buffers preallocated (triton v2 over v1)", TRITON2, TRITON1),
        ("SwiGLU and quantisation fused (triton v1 over sglang v2)", TRITON1, SGLANG2),
        ("no concatenation, sgl_kernel's quantisation (sglang v2 over v1)", SGLANG2, SGLANG1),
    ):
        for low, high in BANDS:
            there, now = (ratios(section, first, second, low, high) for section in (published, here))
            word = _word((mean(there) >= GAIN) == (mean(now) >= GAIN)) if there and now else DASH
            table.rows.append([Cell(label), Cell(f"{low}–{high}" if low != high else str(low)), _span(there), _span(now), Cell(word)])
    table.notes = [
        "Geometric mean, and the range over the band's workloads.",
        f"A gain is {GAIN} or more; it repeats where both have it or both lack it.",
    ]
    return table


def phase_table(published: Section, here: Section, peer: str) -> Table:
    """Who is ahead at which T: the best fused peer or triton v2."""
    columns = ["T", f"B200: {TRITON2} over {FLASHINFER}", f"here: {TRITON2} over {peer}", "finding"]
    table = Table("phases", "Decode and prefill", columns, [])
    agree = []
    for t in sorted(speedups(published, TRITON2)):
        there, now = ratios(published, TRITON2, FLASHINFER, t, t), ratios(here, TRITON2, peer, t, t)
        if there and now:
            agree.append((there[0] > 1) == (now[0] > 1))
        table.rows.append([Cell(str(t)), _span(there), _span(now), Cell(_word(agree[-1]) if there and now else DASH)])
    table.notes = [
        f"The same one is ahead on {sum(agree)} of {len(agree)} workloads.",
        f"{FLASHINFER} has no kernels for this GPU: {peer} stands in.",
    ]
    return table


def collapse_table(four: Section, two: Section, here: Section) -> Table:
    """What is left of the speedup from T = 901 to above 10,000."""
    table = Table("kept", "From T = 901 to above 10,000", ["solution", "B200: left of the speedup", "here"], [])
    for name in (*QUARTET, FLASHINFER, *(n for n in here.names if n not in QUARTET)):
        there = kept(two if name == FLASHINFER else four, name)
        now = kept(here, name)
        if there or now:
            table.rows.append([Cell(name), Cell(percent(there, 0)), Cell(percent(now, 0))])
    table.notes = [
        "Geometric mean of the speedups above 10,000 over the speedup at 901.",
        "The reference's own cost per row falls there too, so that every solution loses: what one loses beyond the others is its own.",
    ]
    return table


def stage_tables(lines: list[dict], sizes: Sequence[int] = (80, 901, 11948, 14107)) -> list[Table]:
    """Microseconds and rows of every stage, and the products' cost against DeepGEMM's as rows times rate."""
    stages = {(line["tokens"], line["peer"], line["stage"]): line for line in lines if line["kind"] == "stage"}
    calls = {(line["tokens"], line["peer"]): line for line in lines if line["kind"] == "call"}
    first = Table("stages", "Time and rows by stage", ["T", "solution", "span, us", *STAGES, "gaps"], [], text_columns=2)
    second = Table("causes", "Both products beside DeepGEMM's over the local pairs, T ≥ 901", ["T", "solution"], [], text_columns=2)
    second.columns += ["us", "share of the span", "rows handed", "rows needed", "TFLOPS on those handed", "slower by", "= rows", "× rate"]
    for t, peer in sorted(calls, key=lambda key: key[0]):
        if t not in sizes:
            continue
        call = calls[t, peer]
        found = {stage: stages.get((t, peer, stage)) for stage in STAGES}
        cells = [Cell(_stage(found[stage])) for stage in STAGES]
        first.rows.append([Cell(str(t)), Cell(peer), Cell(f"{call['span_us']:.0f}"), *cells, Cell(f"{call['gaps_us']:.0f}")])
        mine, best = _products(stages, t, peer), _products(stages, t, DEEPGEMM)
        if mine and t >= 901:  # below, the products wait for the weights, however many rows there are
            us, rows, needed, rate = mine
            cells = [Cell(f"{us:.0f}"), Cell(percent(us / call["span_us"], 0)), Cell(f"{rows:,}"), Cell(f"{needed:,}"), Cell(f"{rate:.0f}")]
            beside = [us / best[0], rows / best[1], best[3] / rate] if best else []
            second.rows.append([Cell(str(t)), Cell(peer), *cells, *(Cell(f"{value:.2f}") for value in beside or ())])
            second.rows[-1] += [Cell(DASH)] * (0 if best else 3)
    first.notes = ["Microseconds; in brackets the rows that the stage is handed over the local pairs that it needs."]
    second.notes = ["Slower by = rows × rate: the first factor is work that need not be done, the second is how fast it is done."]
    return [first, second]


def strict_table(folder: Path) -> Table:
    """Outcomes under the old tolerance."""
    records = [record for record in load([folder]).records if record.solution != "reference"]
    settings = records[0].settings if records else {}
    limits = ", ".join(f"{name} {settings[name]}" for name in ("rtol", "atol", "required_matched_ratio") if name in settings)
    columns = ["solution", "passed", "matched, least to most", "relative L2, worst"]
    table = Table("strict", f"The old definition's tolerance ({limits})", columns, [])
    for name in sorted({record.solution for record in records}):
        mine = [record for record in records if record.solution == name]
        matched = sorted(record.errors["matched_ratio"] for record in mine if "matched_ratio" in record.errors)
        errors = [record.errors["relative_l2"] for record in mine if "relative_l2" in record.errors]
        span = f"{matched[0]:.1%} to {matched[-1]:.1%}" if matched else DASH
        passed = Cell(f"{sum(record.passed for record in mine)} of {len(mine)}")
        table.rows.append([Cell(name), passed, Cell(span), Cell(f"{max(errors):.4f}" if errors else DASH)])
    return table


# the page


def document(results: Path, published: Path, hand_written: str) -> str:
    four, two = (_imported(published / f"{name}.csv") for name in (FOUR, TWO))
    parts = [
        "# The published B200 figures, and the same solutions on an H100",
        f"Written by `python -m blockmoe.report.against {results} {published} docs/hopper-against-published.md` from what "
        "`scripts/gpu_comparison` measured, but for the conclusions. The published tables, and what their authors derived from "
        "them: [published-reports.md](published-reports.md).",
        "## Conclusions",
        f"{BEGIN}\n{hand_written.strip()}\n{END}",
    ]
    sections: list[tuple[str, Path, Callable[[Path], list[Table]]]] = [
        ("Speedups", results / "every", lambda folder: _speedup_tables(four, two, folder)),
        ("The cause of the collapse", results / "collapse" / "gpu_collapse.jsonl", lambda file: stage_tables(_lines(file))),
        ("Strictly", results / "strict", lambda folder: [strict_table(folder)]),
    ]
    for title, source, tables in sections:
        parts.append(f"## {title}")
        if not source.exists():
            parts.append(f"Not measured yet: there is no {source}.")
            continue
        parts.append(f"From `{source}`.")
        for table in tables(source):
            parts += [f"### {table.title}", markdown.table(table), "  \n".join(table.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(results: Path, published: Path, page: Path) -> Path:
    """Write the page, keeping what stands between its conclusion marks."""
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    hand_written = before.partition(BEGIN)[2].partition(END)[0] or "None yet: nothing is measured."
    return write_whole(page, document(results, published, hand_written))


def _speedup_tables(four: Section, two: Section, folder: Path) -> list[Table]:
    here = api.read([folder], regimes="published").sections[0]
    peer = DEEPGEMM if DEEPGEMM in here.names else here.names[0]
    return [ranking_table(four, here), gain_table(four, here), phase_table(two, here, peer), collapse_table(four, two, here)]


def _imported(table: Path) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        import_csv(table, Path(folder), hardware="NVIDIA B200")
        return api.read([Path(folder)], regimes="published").sections[0]


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _products(stages: dict, tokens: int, peer: str) -> tuple[float, int, int, float] | None:
    """(us, rows handed, rows needed, TFLOPS) of both products."""
    found = [stages.get((tokens, peer, stage)) for stage in ("GEMM1", "GEMM2")]
    if not all(line and line.get("tflops") and line["us"] for line in found):
        return None
    us = sum(line["us"] for line in found)
    return us, found[0]["rows"], found[0]["needed"], sum(line["tflops"] * line["us"] for line in found) / us


def _stage(line: dict | None) -> str:
    if not line:
        return DASH
    return f"{line['us']:.0f}" + (f" ({line['rows'] / line['needed']:.2f})" if line.get("rows") and line.get("needed") else "")


def _span(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(DASH)
    return Cell(f"{mean(values):.2f}" + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""))


def _word(same: bool) -> str:
    return REPEATS if same else DIFFERS


if __name__ == "__main__":
    print(write(*map(Path, sys.argv[1:4])))
