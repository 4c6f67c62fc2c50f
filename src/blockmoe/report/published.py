"""The two published reports: what their authors claimed, beside what their own tables say.

    python -m blockmoe.report.published tests/data docs

writes `docs/published-reports.md` and, from the imported tables, `docs/published/*/report.md` with its pictures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blockmoe.files import write_whole
from blockmoe.report import api, markdown
from blockmoe.report.importing import import_csv
from blockmoe.report.model import Contender, Section
from blockmoe.report.sentences import cliff_sentences
from blockmoe.report.tables import Cell, Table

TWO, FOUR = "2way_b200_2026-02-26", "4way_b200_2026-02-02"
FLASHINFER, TRITON2 = "flashinfer_moe", "triton_fused_moe_v2"
SGLANG1, SGLANG2, TRITON1 = "sglang_fp8_blockwise_moe_v1", "sglang_fp8_blockwise_moe_v2", "triton_fused_moe_v1"
PAIR, QUARTET = (FLASHINFER, TRITON2), (SGLANG1, SGLANG2, TRITON1, TRITON2)
HOLDS, WRONG, OPEN = "holds", "wrong", "not in the data"


@dataclass
class Claim:
    """A sentence of a report; `numbers` as printed there, `truth` the same numbers computed from its table."""

    text: str
    numbers: tuple[str, ...] = ()
    truth: Callable[[Section], list[float]] | None = None
    verdict: str = ""
    remark: str = ""
    answer: Callable[[Section], str] | None = None


def judge(claim: Claim, section: Section) -> tuple[str, str]:
    """The computed truth as text, and whether the claim agrees with it at the precision it was stated in."""
    if claim.truth is None:
        return (claim.answer(section) if claim.answer else "–"), claim.verdict
    values = claim.truth(section)
    places = [len(number.partition(".")[2]) for number in claim.numbers]
    agrees = [
        abs(value - float(number)) <= 0.5 * 10**-place + 1e-9 for number, place, value in zip(claim.numbers, places, values, strict=True)
    ]
    shown = ", ".join(
        f"{value:.0f}" if value == int(value) and not place else f"{value + 1e-9:.{max(place, 2)}f}"
        for value, place in zip(values, places, strict=True)
    )
    return shown, HOLDS if all(agrees) else WRONG


def claims_two_way() -> list[Claim]:
    return [
        Claim("38 traces, all passed", ("38",), lambda s: [_passed(s)]),
        Claim("averages", ("27.38", "27.45"), lambda s: _means(s, PAIR)),
        Claim(
            "so the two are nearly tied",
            verdict=HOLDS,
            answer=lambda s: "geometric means " + ", ".join(f"{_of(s, name).overall.geometric:.2f}" for name in PAIR),
            remark="Of arithmetic means only: they hide the collapse above 10,000 tokens. The geometric means are 8 % apart.",
        ),
        Claim("averages, T ≤ 80", ("28.46", "30.53"), lambda s: _means(s, PAIR, "T ≤ 80")),
        Claim("averages, T ≥ 901", ("21.61", "11.04"), lambda s: _means(s, PAIR, "T ≥ 901")),
        Claim("min", ("15.73", "4.82"), lambda s: [_of(s, name).overall.low for name in PAIR]),
        Claim("max", ("35.77", "33.87"), lambda s: [_of(s, name).overall.high for name in PAIR]),
        Claim("wins of 19", ("5", "14"), lambda s: [_of(s, name).wins for name in PAIR]),
        Claim("averages, T 1–16", ("28.8", "30.1"), lambda s: _means(s, PAIR, "T 1–16")),
        Claim("averages, T 32–80", ("28.4", "30.4"), lambda s: _means(s, PAIR, "T 32–80")),
        Claim("averages, T 901–14107", ("21.6", "11.0"), lambda s: _means(s, PAIR, "T 901–14107")),
        Claim("triton v2 wins 14 of the 16 decode sizes", ("14",), lambda s: [len(_won(s, TRITON2, 1, 80))]),
        Claim("… by 5 to 20 %", ("5", "20"), lambda s: _extremes(_won(s, TRITON2, 1, 80))),
        Claim("flashinfer_moe wins 3 of 3 above", ("3",), lambda s: [len(_won(s, FLASHINFER, 901, None))]),
        Claim(
            "… by 43 to 230 %",
            verdict=HOLDS,
            answer=lambda s: ", ".join(f"{value:.1f}" for value in _extremes(_won(s, FLASHINFER, 901, None))),
            remark="230 is 229 in round numbers.",
        ),
        Claim(
            "triton v2 relative to flashinfer_moe at T = 80, 901, 11948, 14107",
            ("0.94", "0.70", "0.30", "0.32"),
            lambda s: _ratios(s, TRITON2, FLASHINFER, (80, 901, 11948, 14107)),
            remark="0.94 is the inverse: at T = 80 triton v2 is ahead, as the same report's table says.",
        ),
        Claim("now, against an earlier run", ("27.38", "27.45"), lambda s: _means(s, PAIR)),
        Claim(
            "… where they had 30.37 and 29.50: the ranking is the same",
            verdict=WRONG,
            answer=lambda s: "then 30.37 > 29.50, now " + " < ".join(f"{value:.2f}" for value in _means(s, PAIR)),
            remark="By the averages that the report ranks by, the order is reversed. The earlier run's table is not given.",
        ),
        Claim(
            "the difference is thermal state and run-to-run noise",
            verdict=OPEN,
            remark="No samples, clocks or temperatures were kept.",
        ),
        Claim(
            "14,107 tokens expand to about 113,000 rows",
            verdict=HOLDS,
            answer=lambda s: f"8 × 14,107 = {8 * 14107:,}",
            remark="Only 16,099 of those pairs are local: most of the rows need not exist.",
        ),
        Claim("the collapse is due to unfused scatter and gather, and a GEMM tuned for decode", verdict=OPEN),
        Claim(
            "decode: triton v2; prefill: flashinfer_moe; mixed: flashinfer_moe",
            verdict=HOLDS,
            answer=lambda s: "; ".join(f"{found.name}: {found.label}" for found in s.conclusion.scenarios),
            remark="By the rules of our conclusion.",
        ),
        Claim(
            "… since flashinfer_moe has no cliff",
            verdict=WRONG,
            answer=lambda s: " ".join(cliff_sentences(s)),
            remark="By our rule (more than half lost between neighbouring sizes) it has one too, a smaller one.",
        ),
    ]


def claims_four_way() -> list[Claim]:
    return [
        Claim("76 traces, all passed", ("76",), lambda s: [_passed(s)]),
        Claim("averages", ("17.69", "23.32", "22.69", "29.48"), lambda s: _means(s, QUARTET)),
        Claim("averages, T ≤ 901", ("19.34", "25.57", "24.79", "32.38"), lambda s: _means(s, QUARTET, "T ≤ 901")),
        Claim(
            "averages, T > 10,000",
            ("3.73", "4.23", "4.82", "4.83"),
            lambda s: _means(s, QUARTET, "T > 10,000"),
        ),
        Claim("min", ("3.61", "4.07", "4.64", "4.67"), lambda s: [_of(s, name).overall.low for name in QUARTET]),
        Claim("max", ("22.35", "30.34", "30.16", "37.58"), lambda s: [_of(s, name).overall.high for name in QUARTET]),
        *_against(SGLANG1, "sglang v1", "1.67", ("1.01", "2.53")),
        *_against(SGLANG2, "sglang v2", "1.26", ("1.01", "1.96")),
        *_against(TRITON1, "triton v1", "1.30", ("1.00", "2.06")),
        Claim(
            "triton v2 wins all 19 workloads, with one tie",
            verdict=WRONG,
            answer=lambda s: f"{_of(s, TRITON2).wins} won, {_of(s, TRITON2).ties} tied, {_lost(s, TRITON2)} lost",
            remark="At T = 52 sglang v2 is ahead, 27.44x to 23.86x.",
        ),
        *(
            Claim(
                f"preallocating buffers (triton v2 over v1), T {low}–{high}" if low != high else f"…, T = {low}",
                numbers,
                lambda s, low=low, high=high, numbers=numbers: _span(s, TRITON2, TRITON1, low, high)[: len(numbers)],
            )
            for low, high, numbers in (
                (1, 32, ("1.09", "2.06")),
                (50, 80, ("1.13", "1.60")),
                (901, 901, ("1.09",)),
                (10001, 14107, ("1.00", "1.01")),
            )
        ),
        Claim(
            "the 2.06x at T = 7 is JIT warm-up on v1's first workload",
            verdict=OPEN,
            answer=lambda s: "T = 7, 14, 15: " + ", ".join(f"{r:.2f}x" for r in _ratios(s, TRITON2, TRITON1, (7, 14, 15))),
            remark="T = 1 comes before it, and the next two sizes show the same gap: not an accident of one workload.",
        ),
        Claim(
            "the gap to flashinfer_moe (about 32x) is about 8 %",
            verdict=OPEN,
            answer=lambda s: f"32 / {_of(s, TRITON2).overall.arithmetic:.2f} = {32 / _of(s, TRITON2).overall.arithmetic:.3f}",
            remark="flashinfer_moe is not in this table; in the 2-way table the averages are 0.3 % apart.",
        ),
        Claim("it comes from 6 launches against one, and from weight transposes", verdict=OPEN),
    ]


def _against(other: str, label: str, average: str, span: tuple[str, str]) -> list[Claim]:
    return [
        Claim(
            f"triton v2 against {label}: on average",
            (average,),
            lambda s: [_of(s, TRITON2).overall.arithmetic / _of(s, other).overall.arithmetic],
            remark="The ratio of the averages, not the average of the ratios.",
        ),
        Claim(f"… range against {label}", span, lambda s: _span(s, TRITON2, other, 1, 14107)),
    ]


def claims_table(title: str, claims: list[Claim], section: Section) -> Table:
    table = Table("claims", title, ["claim", "stated", "computed", "verdict", "remark"], [], text_columns=5)
    for claim in claims:
        computed, verdict = judge(claim, section)
        stated = ", ".join(claim.numbers) or "in words"
        remark = Cell(claim.remark or "")
        table.rows.append([Cell(claim.text), Cell(stated), Cell(computed), Cell(verdict, bold=verdict == WRONG), remark])
    return table


def document(sections: dict[str, Section]) -> str:
    tables = [
        claims_table("2-way, 2026-02-26: flashinfer_moe and triton_fused_moe_v2", claims_two_way(), sections[TWO]),
        claims_table("4-way, 2026-02-02: sglang v1, v2 and triton_fused v1, v2", claims_four_way(), sections[FOUR]),
    ]
    wrong = sum(1 for table in tables for row in table.rows if row[3].text == WRONG)
    total = sum(len(table.rows) for table in tables)
    parts = [
        "# The published reports, checked against their own tables",
        "Two hand-written reports of the headline definition on an NVIDIA B200 gave every workload's speedup and claims "
        "derived from them. The speedups were imported and every claim computed anew; a number holds where it agrees at "
        f"the precision it was stated in. Of {total} claims {wrong} are wrong.",
        f"Written by `python -m blockmoe.report.published tests/data docs`. The full reports: [2-way](published/{TWO}/report.md), "
        f"[4-way](published/{FOUR}/report.md).",
    ]
    for table in tables:
        parts += [f"## {table.title}", markdown.table(table)]
    return "\n\n".join(parts) + "\n"


def write(tables: Path, docs: Path, formats: tuple[str, ...] = ("md", "svg")) -> list[Path]:
    """Import both tables, write their reports and the list of claims; returns the files written."""
    written, sections = [], {}
    for name in (TWO, FOUR):
        with tempfile.TemporaryDirectory() as folder:
            import_csv(tables / f"{name}.csv", Path(folder), hardware="NVIDIA B200")
            written += api.write([Path(folder)], docs / "published" / name, formats, regimes="published")
            sections[name] = api.read([Path(folder)], regimes="published").sections[0]
    return [*written, write_whole(docs / "published-reports.md", document(sections))]


def _of(section: Section, name: str) -> Contender:
    return next(contender for contender in section.contenders if contender.name == name)


def _passed(section: Section) -> int:
    return sum(contender.overall.count for contender in section.contenders)


def _means(section: Section, names: tuple[str, ...], regime: str | None = None) -> list[float]:
    found = [_of(section, name) for name in names]
    return [(c.regimes[regime] if regime else c.overall).arithmetic for c in found]


def _won(section: Section, name: str, low: int, high: int | None) -> list[float]:
    """Margins, in percent, of the workloads that a solution won alone."""
    rows = [row for row in section.rows if row.tokens >= low and (high is None or row.tokens <= high)]
    return [100 * row.margin for row in rows if row.winners == [name]]


def _lost(section: Section, name: str) -> int:
    return sum(1 for row in section.rows if name not in row.winners)


def _extremes(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def _ratios(section: Section, first: str, second: str, sizes: tuple[int, ...]) -> list[float]:
    rows = {row.tokens: row.cells for row in section.rows}
    return [rows[size][first].speedup / rows[size][second].speedup for size in sizes]


def _span(section: Section, first: str, second: str, low: int, high: int) -> list[float]:
    sizes = tuple(row.tokens for row in section.rows if low <= row.tokens <= high)
    return _extremes(_ratios(section, first, second, sizes))


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
