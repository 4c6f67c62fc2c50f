"""What every picture is drawn on and with, and its SVG and PNG. Ink and paper are CSS variables in SVG, so that one file reads in light,
dark and print.

Solutions differ in colour (Okabe and Ito's palette, distinct to the colour-blind), marker and line style at once.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FD1", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
INK, PAPER, SOFT = "#1b1f24", "#fffffe", "#8b949f"  # replaced by variables in SVG; SOFT reads on both papers
_STYLE = (
    "<style>svg{--ink:#1b1f24;--paper:#fffffe}"
    "@media (prefers-color-scheme:dark){svg{--ink:#e6e8eb;--paper:#14171b}}"
    "@media print{svg{--ink:#1b1f24;--paper:#fffffe}}</style>"
)
_SETTINGS = {
    "text.parse_math": False,  # names may hold dollars
    "svg.fonttype": "none",
    "svg.hashsalt": "blockmoe",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": SOFT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "hatch.color": SOFT,
}


@dataclass
class Picture:
    key: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib as the pictures are drawn and saved. An SVG's names are written by the reader's fonts: what ours lack is no fault."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def svg(picture: Picture, inline: bool = False) -> str:
    """SVG text; inline, it takes the variables of the page around it and is described for screen readers."""
    buffer = io.StringIO()
    with settings():
        picture.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
    opening, closing = text[: text.index(">") + 1], text[text.index(">") + 1 :]
    if not inline:
        return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}{_STYLE}{closing}'
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    opening = opening.replace("<svg", f'<svg role="img" aria-label="{_attribute(picture.title)}"', 1)
    # Several drawings in one page: their ids must not meet.
    closing = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{picture.key}-", closing)
    return opening + re.sub(r"<metadata>.*?</metadata>", "", closing, flags=re.S)


def png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    with settings():
        picture.figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major")
    axes.set_axisbelow(True)
    return figure, axes


def look(place: int) -> dict[str, object]:
    size = len(COLOURS)
    return {
        "color": COLOURS[place % size],
        "marker": MARKERS[place % size],
        "linestyle": LINES[(place // size + place) % len(LINES)],
        "linewidth": 1.3,
        "markersize": 5,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.5,
    }


def entry(name: str) -> str:
    """The label of a line or bar that the legend is to have under any name: matplotlib hides those that begin with an underscore."""
    return f" {name}"


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), 100 // (longest + 8)))
    drawn = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    for text, label in zip(drawn.get_texts(), labels, strict=True):
        text.set_text(label.removeprefix(" "))


class Between(LogFormatter):
    """Labels between the decades of a short axis, as plain numbers: those that come with it are formulas, which are not read here."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return f"{value:,g}" if super().__call__(value, pos) else ""


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
