"""Parts of gpu_curve.py that need no GPU: what the curve promises, its table, its picture. Reads the JSONL's points.

A point: family, tokens, pairs, active, plan, us, us_per_pair, graph_us, floor_us, mhz (since the tenth run on an H200), neighbours {label:
{plan, us}}.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

RISE, SLOWER = 1.05, 1.03  # time per pair over the least of any smaller T; span over that of a neighbouring plan
COLOURS = {"uniform": "#0072B2", "zipf": "#D55E00", "one expert": "#009E73", "same experts": "#CC79A7", "all local": "#4D4D4D"}
MARKERS = {"uniform": "o", "zipf": "s", "one expert": "^", "same experts": "D"}


def load(path: Path) -> list[dict]:
    """The points of a run, in its order."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in lines if line["kind"] == "point"]


def by_family(points: Iterable[dict]) -> dict[str, list[dict]]:
    """Each family's points with pairs, by T."""
    found: dict[str, list[dict]] = {}
    for point in sorted(points, key=lambda p: p["tokens"]):
        if point["pairs"]:
            found.setdefault(point["family"], []).append(point)
    return found


def rises(points: Iterable[dict]) -> list[dict]:
    """Points whose time per pair is more than 5 % above that of some smaller T of their family."""
    found = []
    for family, row in by_family(points).items():
        least = row[0]
        for point in row[1:]:
            ratio = point["us_per_pair"] / least["us_per_pair"]
            if ratio > RISE:
                found.append({"family": family, "tokens": point["tokens"], "than_tokens": least["tokens"], "ratio": ratio})
            if ratio < 1:
                least = point
    return found


def better_plans(points: Iterable[dict]) -> list[dict]:
    """Points at which a neighbour's plan was faster by more than 3 %."""
    return [
        {"family": p["family"], "tokens": p["tokens"], "neighbour": label, "ratio": p["us"] / other["us"], "plan": other["plan"]}
        for p in points
        for label, other in p["neighbours"].items()
        if p["us"] > SLOWER * other["us"]
    ]


def table(points: list[dict]) -> str:
    """One line a point; > marks a rise, < a better neighbour."""
    marked = {(f["family"], f["tokens"]): ">" for f in rises(points)}
    for fault in better_plans(points):
        key = fault["family"], fault["tokens"]
        marked[key] = marked.get(key, "").rstrip("<") + "<"
    lines = ["family | T | pairs | active | span us | graph us | us a pair | MHz | floor us | x floor | neighbours us | flags"]
    for family, row in by_family(points).items():
        for p in row:
            others = ", ".join(f"{label} {other['us']:.1f}" for label, other in p["neighbours"].items()) or "-"
            graph = f"{p['graph_us']:.1f}" if p["graph_us"] else "-"
            mhz = f"{p['mhz']:.0f}" if p.get("mhz") else "-"
            lines.append(
                f"{family} | {p['tokens']} | {p['pairs']} | {p['active']} | {p['us']:.1f} | {graph} | {p['us_per_pair']:.4g} | "
                f"{mhz} | {p['floor_us']:.1f} | {p['us'] / p['floor_us']:.2f} | {others} | {marked.get((family, p['tokens']), '')}"
            )
    return "\n".join(lines)


def picture(points: list[dict]) -> str:
    """SVG: spans over their floors, and time per pair, both against T. Equal points give equal text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "blockmoe", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure, (spans, each) = plt.subplots(1, 2, figsize=(11, 4.6))
        for family, row in by_family(points).items():
            tokens = [p["tokens"] for p in row]
            look = {"color": COLOURS.get(family), "marker": MARKERS.get(family, "v"), "markersize": 4, "linewidth": 1.3}
            spans.plot(tokens, [p["us"] for p in row], label=family, **look)
            spans.plot(tokens, [p["floor_us"] for p in row], color=COLOURS.get(family), linewidth=0.8, linestyle=":")
            each.plot(tokens, [p["us_per_pair"] for p in row], label=family, **look)
            flagged = {f["tokens"] for f in rises(points) if f["family"] == family}
            rest = [p for p in row if p["tokens"] in flagged]
            each.scatter(*([p[key] for p in rest] for key in ("tokens", "us_per_pair")), s=90, facecolors="none", edgecolors="red")
        spans.set(xlabel="tokens (T)", ylabel="span, us", title="One call; dotted: floor")
        each.set(xlabel="tokens (T)", ylabel="us a pair", title="Time per pair; red ring: more than 5 % above a smaller T")
        for axes in (spans, each):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        spans.legend(frameon=False)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
