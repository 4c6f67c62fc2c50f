"""The page: self-contained, whole without JavaScript, and alive in a real browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from make import SIZES, failed, folder, plain, run, trace

from blockmoe.report import api, canvas, html, plots

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br", "wbr", "input", "img", "hr"}


class Checker(HTMLParser):
    """Nesting, tables and anything that a page could load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.ids, self.rows = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.rows += tag == "tr"
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page")
    sizes = {**SIZES, **{t: 20 for t in range(50, 60)}}  # enough rows for a filter
    traces = run({"alpha": 1.0, "beta_with_a_long_name": lambda t: 1.2 if t < 1000 else 9.0}, sizes)
    traces[1]["evaluation"]["performance"]["extra"]["stages_ms"] = {"route": 0.1, "down": 0.4}
    about = {"command": "blockmoe run --output results", "contenders": [{"name": "alpha", "description": "The first"}]}
    folder(path, [*traces, failed("gamma", 1, "TIMEOUT", "after 60 s"), *run({"alpha": 2.0}, hardware="NVIDIA H200")], about)
    api.write([path], path, ["html"])
    return path / "report.html"


def test_self_contained_and_well_formed(page):
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == [] and checker.loads == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "@import" not in page.read_text() and "url(http" not in page.read_text()


def test_whole_without_javascript(page):
    text = page.read_text()
    body = text[text.index("<body>") : text.rindex("<script>")]
    for word in ("alpha", "TIMEOUT", "after 60 s", "blockmoe run --output results", "The first", "FASTER", "NVIDIA H200"):
        assert word in body
    assert "hidden" not in re.sub(r"aria-hidden|overflow: hidden", "", body.split("<main>")[1].split("<svg")[0])


def test_pictures(tmp_path):
    traces = run({"alpha": 1.0, "beta": 1.5})
    traces[1]["evaluation"]["performance"]["extra"]["stages_ms"] = {"route": 0.1, "down": 0.4}
    drawn = plots.pictures(api.read([folder(tmp_path, traces)]).sections[0])
    assert [picture.key for picture in drawn] == ["latency", "heatmap", "roofline", "stages", "errors"]
    for picture in drawn:
        for inline in (False, True):
            root = ElementTree.fromstring(canvas.svg(picture, inline).encode())
            assert root.tag.endswith("svg")
        assert "var(--ink)" in canvas.svg(picture) and "prefers-color-scheme:dark" in canvas.svg(picture)
        assert canvas.png(picture).startswith(b"\x89PNG")


@pytest.mark.parametrize("reference", [1.5, 4.0, 9.0])
def test_labels_of_a_short_axis_are_numbers(tmp_path, reference):
    """Matplotlib writes those between decades as formulas, and formulas are off: names may hold dollars. An axis that holds a whole decade
    has none between them before matplotlib 3.11."""
    traces = [plain(name, t, latency, reference) for name, latency in (("alpha", 1.1), ("beta", 1.3)) for t in (1, 16, 80)]
    drawn = plots.pictures(api.read([folder(tmp_path, traces)]).sections[0])[0]
    labels = re.findall(r">([^<]*)</text>", canvas.svg(drawn))
    assert drawn.key == "latency" and not any("$" in label for label in labels)
    axis = drawn.figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    ticks = [tick for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if low <= tick.get_loc() <= high]
    assert {1.5: "1.2", 4.0: "2", 9.0: "1"}[reference] in [tick.label1.get_text() for tick in ticks]


@pytest.mark.filterwarnings("error")
def test_pictures_have_names_as_they_are(tmp_path):
    names = ["_mine", "torch__grouped__ds_", "-dash", "名前", "_child0"]
    traces = run({name: 1.0 + place / 10 for place, name in enumerate(names)}, blocks=2)
    for line in traces:
        line["evaluation"]["performance"]["extra"]["stages_ms"] = {"_route": 0.1, "down": 0.4}
    for drawn in plots.pictures(api.read([folder(tmp_path, traces)]).sections[0]):
        axes, legends = drawn.figure.axes[0], drawn.figure.legends
        texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *(text for legend in legends for text in legend.get_texts())]
        wanted = ["_route", "down"] if drawn.key == "stages" else names
        assert canvas.png(drawn) and set(wanted) <= {text.get_text().replace("\n", "") for text in texts}, drawn.key


def test_saved_pictures_are_linked(tmp_path):
    folder(tmp_path, run({"alpha": 1.0, "beta": 1.5}) + run({"alpha": 1.0}, hardware="NVIDIA H200"))
    written = api.write([tmp_path], None, ["md", "svg", "png"])
    assert {path.name for path in written} >= {"report.md", "latency.svg", "latency.png", "latency-2.svg"}
    for link in re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report.md").read_text()):
        assert (tmp_path / link).is_file()


@pytest.mark.parametrize("count", [1, 30])
def test_odd_numbers_of_solutions(tmp_path, count):
    folder(tmp_path, [trace(f"solution_{i}", t, 1 + i / 10, blocks=2) for i in range(count) for t in (1, 80)])
    api.write([tmp_path], tmp_path, ["html"])
    assert "solution_0" in (tmp_path / "report.html").read_text()


# Runs in the page after its own script; tells the frame around it what it found.
PROBE = """
<script>
window.addEventListener("load", () => {
  const found = {errors: window.__errors ?? []};
  const table = document.querySelector("table[data-sortable]");
  const first = () => table.tBodies[0].rows[0].cells[1].textContent;
  const byT = table.tHead.rows[0].cells[1].querySelector("button");
  found.start = first();
  byT.focus();
  found.button = document.activeElement === byT;
  byT.click(); byT.click();
  found.descending = [first(), byT.closest("th").getAttribute("aria-sort")];
  byT.click();
  found.restored = [first(), byT.closest("th").getAttribute("aria-sort")];
  const input = document.querySelector(".filter input");
  input.value = "901";
  input.dispatchEvent(new Event("input"));
  found.filtered = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[1].textContent);
  input.value = "";
  input.dispatchEvent(new Event("input"));
  const cell = table.querySelector("td[data-tip]");
  found.stops = table.querySelectorAll('td[tabindex="0"]').length;
  cell.focus();
  const tip = document.getElementById("tip");
  found.tip = [!tip.hidden, tip.textContent, tip.querySelectorAll("circle").length];
  cell.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
  found.moved = document.activeElement !== cell && document.activeElement.cellIndex === cell.cellIndex;
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
  found.escaped = tip.hidden;
  found.scrollers = [...document.querySelectorAll(".scroll, figure > div")].every((box) => box.tabIndex === 0);
  found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const edge = document.documentElement.clientWidth;
  const outside = [...document.body.querySelectorAll("main *, header *")].filter(
    (element) => element.getBoundingClientRect().right > edge + 1 && !element.parentElement.closest(".scroll, figure > div"));
  found.outside = outside.map((element) => element.outerHTML.slice(0, 80));
  found.width = document.documentElement.clientWidth;
  found.ink = getComputedStyle(document.body).color;
  parent.postMessage("FOUND" + JSON.stringify(found) + "END", "*");
});
</script>
"""
FRAME = """<!doctype html><iframe src="probed.html" width="{width}" height="800" style="border:0"></iframe><pre></pre>
<script>addEventListener("message", (event) => {{ document.querySelector("pre").textContent = event.data; }});</script>"""
CATCH = "<script>window.__errors = []; window.addEventListener('error', (e) => window.__errors.push(e.message));</script>"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1600, True)])
def test_in_a_browser(page, tmp_path, width, dark):
    text = page.read_text()
    probed, framed = tmp_path / "probed.html", tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width))  # a window can't be as narrow as a phone
    probed.write_text(text.replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{PROBE}</body>"))
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/u"]
    command += [*scheme, "--window-size=1700,900", "--virtual-time-budget=2000", "--dump-dom", framed.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    found = json.loads(unescape(re.search(r"FOUND(.*?)END", result.stdout, re.S)[1]))
    assert found["errors"] == []
    assert (found["start"], found["descending"], found["restored"]) == ("1", ["14107", "descending"], ["1", None])
    assert found["filtered"] == ["901"]
    assert found["button"] and found["stops"] == 1 and found["moved"] and found["escaped"] and found["scrollers"]
    shown, words, dots = found["tip"]
    assert shown and "95 % interval" in words and dots == 60
    assert width - 20 <= found["width"] <= width  # less a scroll bar
    assert found["outside"] == [] and not found["wide"]
    assert found["ink"] == ("rgb(230, 232, 235)" if dark else "rgb(27, 31, 36)")


def test_the_headline_is_over_the_workloads_that_it_names(tmp_path):
    """The third passes the easy half only, and the ranking is over that half; over all the second is ahead."""
    latencies = {"alpha": lambda t: 1.0 if t <= 80 else 4.0, "beta": lambda t: 1.1 if t <= 80 else 2.0}
    traces = run(latencies) + [trace("gamma", t, 3.0) if t <= 80 else failed("gamma", t) for t in SIZES]
    said = html._headline(api.read([folder(tmp_path, traces)]).sections[0])
    assert "alpha leads with 20.01x the reference, 1.101 " in said and "times beta, FASTER (geometric means over 3 workloads)" in said
    assert "Over all 6 that both passed it is 0.74" in said
    assert "Over all" not in html._headline(api.read([tmp_path], solutions=["beta", "gamma"]).sections[0])


def test_a_picture_of_one_size_shows_what_it_names(tmp_path):
    """Lines without markers, and the area below the floors, need two ends."""
    section = api.read([folder(tmp_path, run({"alpha": 1.0, "beta": 2.0}, [80]))]).sections[0]
    (axes,) = plots.latency(section)[0].axes
    lines = {line.get_label(): line.get_xdata() for line in axes.get_lines()}
    left, right = axes.get_xlim()
    assert left < 80 < right
    for name in ("reference", "streaming floor"):
        assert list(lines[name]) == pytest.approx([left, right])
    area = axes.collections[0].get_paths()[0].get_extents()
    assert (area.x0, area.x1) == pytest.approx((left, right)) and area.y1 > area.y0


def test_the_area_below_the_floors_is_below_the_higher_one(tmp_path):
    """Between 100 tokens, where reading is the bound, and 10,000, where computing is, the floors cross at 1,000."""
    tokens, height = plots._highest([[(100, 1.0), (10_000, 1.0)], [(100, 0.1), (10_000, 10.0)]])
    assert list(tokens) == pytest.approx([100, 1000, 10_000]) and list(height) == pytest.approx([1.0, 1.0, 10.0])
    tokens, height = plots._highest([[(10, 1.0), (100, 1.0)], [(100, 2.0), (1000, 20.0)]])  # each known for a part
    assert list(tokens) == pytest.approx([10, 100, 1000]) and list(height) == pytest.approx([1.0, 2.0, 20.0])
    tokens, height = plots._highest([[(10, 1.0), (100, 3.0)]])
    assert list(tokens) == pytest.approx([10, 100]) and list(height) == pytest.approx([1.0, 3.0])


def test_a_narrow_roofline_has_labels(tmp_path):
    section = api.read([folder(tmp_path, run({"alpha": 0.9, "beta": 1.1}, [80]))]).sections[0]
    drawn = plots.roofline(section)[0]
    drawn.draw_without_rendering()
    for axis in (drawn.axes[0].xaxis, drawn.axes[0].yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if low <= tick.get_loc() <= high]
        assert any(tick.label1.get_text() for tick in ticks)


def test_captions_say_what_is_not_drawn(tmp_path):
    folder(tmp_path, [trace(f"solution_{i:02}", t, 1 + i / 10, blocks=2) for i in range(17) for t in range(1, 62)])
    captions = {picture.key: picture.caption for picture in plots.pictures(api.read([tmp_path]).sections[0])}
    assert all(" The first 16 of 17 solutions." in captions[key] for key in ("latency", "heatmap", "roofline", "errors"))
    assert captions["heatmap"].endswith(" The first 60 of 61 workloads.")
