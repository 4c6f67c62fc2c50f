"""The page that sets published figures beside a run: rules of repetition, rows times rate, what is kept by hand."""

from pathlib import Path

import pytest
from make import failed, folder, run

from blockmoe.report import against, api
from blockmoe.report.published import QUARTET, SGLANG1, TRITON1, TRITON2

DATA = Path(__file__).parents[1] / "data"
SIZES = {1: 3, 16: 12, 52: 16, 80: 32, 901: 32, 11948: 32, 14107: 32}


def latencies(**changes):
    base = {name: lambda t, place=place: (1 - 0.1 * place) * (0.1 + t / 1000) for place, name in enumerate(QUARTET)}
    return base | {"deepgemm_moe": lambda t: 0.1 + t / 8000} | changes


@pytest.fixture
def here(tmp_path):
    return api.read([folder(tmp_path / "peers", run(latencies(), SIZES))], regimes="published").sections[0]


@pytest.fixture
def published():
    return against._imported(DATA / "4way_b200_2026-02-02.csv")


def test_rankings_and_gains(published, here):
    assert against.ranking(published, QUARTET)[0] == TRITON2 and against.ranking(published, QUARTET)[-1] == SGLANG1
    assert against.ranking(here, QUARTET) == list(QUARTET[::-1])
    assert "Differs." in against.ranking_table(published, here).notes[-1]  # sglang v2 beats triton v1 on the B200
    gains = {(row[0].text.split()[0], row[1].text): row for row in against.gain_table(published, here).rows}
    assert gains["buffers", "901"][2].text == "1.09" and gains["buffers", "901"][4].text == against.REPEATS
    assert gains["buffers", "10001–14107"][4].text == against.DIFFERS  # 1.00 there, 0.8 / 0.7 here


def test_what_is_left_above_ten_thousand(published, here):
    assert against.kept(published, TRITON2) == pytest.approx((4.67 * 4.99) ** 0.5 / 25.75)
    assert against.kept(here, "deepgemm_moe") > 1.5 * against.kept(here, TRITON1)


def test_slower_by_is_rows_times_rate():
    lines = []
    for peer, rows, us in ((TRITON2, 800, 80.0), ("deepgemm_moe", 100, 8.0)):
        lines.append({"kind": "call", "peer": peer, "tokens": 901, "span_us": 4 * us, "gaps_us": 0.0})
        for stage, flops in (("GEMM1", 200e6), ("GEMM2", 100e6)):
            rate = rows * flops / us / 1e6
            lines.append(dict(kind="stage", peer=peer, tokens=901, stage=stage, us=us, rows=rows, needed=100, tflops=rate))
    stages, causes = against.stage_tables(lines)
    assert [cell.text for cell in causes.rows[0][-3:]] == ["10.00", "8.00", "1.25"]
    assert "80 (8.00)" in [cell.text for cell in stages.rows[0]]


def test_page_keeps_its_conclusions(tmp_path):
    page = tmp_path / "page.md"
    against.write(tmp_path / "results", DATA, page)
    assert page.read_text().count("Not measured yet") == 3 and "None yet: nothing is measured." in page.read_text()
    page.write_text(page.read_text().replace("None yet: nothing is measured.", "It repeats."))
    folder(tmp_path / "results" / "every", run(latencies(), SIZES))
    folder(tmp_path / "results" / "strict", [failed(TRITON2, 1, "INCORRECT_NUMERICAL")])
    against.write(tmp_path / "results", DATA, page)
    text = page.read_text()
    assert "It repeats." in text and text.count("Not measured yet") == 1 and "| triton_fused_moe_v2 | 0 of 1 |" in text
