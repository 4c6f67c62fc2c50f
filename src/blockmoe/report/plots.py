"""The report's pictures, each from what a section's traces have the numbers for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from blockmoe.report.canvas import COLOURS, INK, PAPER, SOFT, Between, Picture, canvas, entry, legend, look, settings
from blockmoe.report.model import Row, Section, short, size_of
from blockmoe.report.tables import milliseconds

MOST_ROWS, MOST_SOLUTIONS = 60, 16
AROUND = 1.3  # of T, on either side of the first and last size


def pictures(section: Section) -> list[Picture]:
    """Every picture that this section's traces have the numbers for."""
    wanted: list[tuple[str, str, Callable[[Section], tuple[Figure, str] | None]]] = [
        ("latency", "Latency against T", latency),
        ("speedup", "Speedup over the reference against T", speedup),
        ("heatmap", "Speedup, workload by solution", heatmap),
        ("roofline", "Roofline", roofline),
        ("stages", "Where the time goes", stages),
        ("errors", "Error against the reference", errors),
    ]
    drawn = []
    with settings():
        for key, title, draw in wanted:
            if result := draw(section):
                drawn.append(Picture(key, title, result[1], result[0]))
    return drawn


def latency(section: Section) -> tuple[Figure, str] | None:
    """Latency against T, log-log, over the floors that no measurement can be below."""
    if not section.has_times or not _sized(section):
        return None
    figure, axes = canvas(8.2, 5.2)
    reference = [(row.tokens, row.reference_latency) for row in section.rows if row.tokens and row.reference_latency]
    if reference:
        axes.plot(*zip(*_line(reference), strict=True), color=SOFT, linewidth=1.2, linestyle=(0, (1, 1)), label="reference")
    for place, name in _shown(section):
        points = [(row.tokens, row.cells[name].latency) for row in _timed(section, name)]
        if points:
            axes.plot(*zip(*points, strict=True), label=entry(name), **look(place))
    floors = _floors(section)
    _draw_floors(axes, section, floors)
    axes.set(xscale="log", yscale="log", xlabel="tokens (T)", ylabel="latency, ms")
    _tokens_axis(axes, section)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(Between())
    legend(figure, axes)
    caption = "Median span of a call, both axes logarithmic."
    return figure, caption + (" Nothing can run inside the hatched area below the floors." if floors else "") + _cut(section)


def speedup(section: Section) -> tuple[Figure, str] | None:
    """Speedups against T, with their intervals where samples gave any."""
    if section.has_times or not _sized(section):
        return None
    figure, axes = canvas(8.2, 4.6)
    for place, name in _shown(section):
        rows = [row for row in section.rows if row.tokens and name in row.cells and row.cells[name].passed]
        if rows:
            axes.plot([row.tokens for row in rows], [row.cells[name].speedup for row in rows], label=entry(name), **look(place))
    axes.set(xscale="log", xlabel="tokens (T)", ylabel="speedup over the reference")
    axes.set_ylim(bottom=0)
    _tokens_axis(axes, section)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    legend(figure, axes)
    return figure, "Speedup of every workload; T is logarithmic." + _cut(section)


def heatmap(section: Section) -> tuple[Figure, str] | None:
    """Speedups as text, coloured by their share of the workload's best."""
    passed = [row for row in section.rows if any(cell.passed for cell in row.cells.values())]
    rows = passed[:MOST_ROWS]
    names = [name for _, name in _shown(section)]
    if len(rows) < 2 or len(names) < 2:
        return None
    values = np.full((len(rows), len(names)), np.nan)
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            if name in row.cells and row.cells[name].passed:
                values[i, j] = row.cells[name].speedup
    share = values / np.nanmax(values, axis=1, keepdims=True)
    figure, axes = canvas(1.6 + 1.25 * len(names), 1.2 + 0.27 * len(rows))
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            cell = row.cells.get(name)
            known = cell is not None and cell.passed
            text = f"{cell.speedup:.1f}x" if known else (cell.failure or cell.status if cell else "–")
            colour = INK if not known else "white" if share[i, j] < 0.55 else "black"
            weight = "bold" if name in row.winners else "normal"
            axes.text(j, i, text[:14], ha="center", va="center", color=colour, fontsize=8 if known else 6, fontweight=weight)
    axes.set_xticks(range(len(names)), [_folded(name) for name in names], fontsize=8)
    axes.set_yticks(range(len(rows)), [_row_label(row) for row in rows], fontsize=8)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.03, format=lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    bar.set_label("share of the workload's best", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    caption = "Speedup over the reference; the brighter, the closer to the best of its row, which is bold."
    return figure, caption + _cut(section) + (f" The first {len(rows)} of {len(passed)} workloads." if len(passed) > len(rows) else "")


def roofline(section: Section) -> tuple[Figure, str] | None:
    """FLOP/byte against FLOP/s, under the roofs that the floors imply."""
    known = [
        (place, name, [row.cells[name] for row in _timed(section, name) if row.cells[name].bytes and row.cells[name].flops])
        for place, name in _shown(section)
    ]
    known = [(place, name, cells) for place, name, cells in known if cells]
    if not known:
        return None
    figure, axes = canvas(8.2, 4.8)
    lowest, highest = np.inf, 0.0
    slow = max(cell.flops / cell.latency for _, _, cells in known for cell in cells) < 1e9
    unit, name_of_unit = (1e6, "GFLOP/s") if slow else (1e9, "TFLOP/s")  # FLOPs a millisecond
    for place, name, cells in known:
        intensity = [cell.flops / cell.bytes for cell in cells]
        lowest, highest = min(lowest, *intensity), max(highest, *intensity)
        rate = [cell.flops / cell.latency / unit for cell in cells]
        axes.plot(intensity, rate, label=entry(name), **{**look(place), "linestyle": "none"})
    stream, compute = _rates(section)
    span = np.geomspace(lowest / 1.5, highest * 1.5, 200)
    if stream:
        slope = span * stream / unit
        roof = np.minimum(slope, compute / unit) if compute else slope
        label = f"roof: {stream / 1e6:,.0f} GB/s" + (f", {compute / unit:,.0f} {name_of_unit}" if compute else "")
        axes.plot(span, roof, color=INK, linewidth=1.4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be read", ylabel=name_of_unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(Between())
    legend(figure, axes)
    return figure, "Useful work only: the bytes and FLOPs of the pairs that routing chose." + _cut(section)


def stages(section: Section) -> tuple[Figure, str] | None:
    """Stacked shares of each stage, at up to six sizes for each solution that exposes them."""
    bars = []
    for name in section.names:
        staged = [row for row in section.rows if name in row.cells and row.cells[name].stages]
        chosen = staged if len(staged) <= 6 else [staged[i] for i in np.linspace(0, len(staged) - 1, 6).round().astype(int)]
        bars += [(f"{name}, {size_of(row)}", row.cells[name].stages) for row in chosen]
    if not bars:
        return None
    figure, axes = canvas(8.2, 0.9 + 0.36 * len(bars))
    order = list(dict.fromkeys(stage for _, found in bars for stage in found))
    left = np.zeros(len(bars))
    totals = np.array([sum(found.values()) for _, found in bars])
    for place, stage in enumerate(order):
        width = np.array([found.get(stage, 0.0) for _, found in bars]) / totals
        colour = COLOURS[place % len(COLOURS)]
        axes.barh(range(len(bars)), width, left=left, color=colour, edgecolor=PAPER, linewidth=1, label=entry(stage))
        for i, share in enumerate(width):
            if share > 0.06:
                axes.text(left[i] + share / 2, i, f"{share:.0%}", ha="center", va="center", fontsize=8, color="black")
        left += width
    axes.set_yticks(range(len(bars)), [f"{label} ({milliseconds(total)} ms)" for (label, _), total in zip(bars, totals, strict=True)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.grid(axis="y", visible=False)
    legend(figure, axes)
    return figure, "Share of each stage in the time of one call."


def errors(section: Section) -> tuple[Figure, str] | None:
    """A dot a workload, a median line a solution."""
    measure, label = "relative_l2", "relative L2 error"
    if not any(measure in cell.errors for row in section.rows for cell in row.cells.values()):
        measure, label = "max_absolute_error", "largest absolute error"
    found, endless = [], 0
    for place, name in _shown(section):
        values = [row.cells[name].errors.get(measure, 0.0) for row in section.rows if name in row.cells]
        endless += values.count(np.inf)
        if positive := [value for value in values if 0 < value < np.inf]:
            found.append((place, name, positive))
    if not found:
        return None
    figure, axes = canvas(8.2, 1.0 + 0.42 * len(found))
    for line, (place, _, values) in enumerate(found):
        jitter = line + np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [line]
        axes.plot(values, jitter, **{**look(place), "linestyle": "none", "alpha": 0.75})
        axes.plot([np.median(values)] * 2, [line - 0.32, line + 0.32], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(found)), [name for _, name, _ in found])
    every = [value for _, _, values in found for value in values]
    wide = max(every) > 20 * min(every)  # a log axis of less than a decade or two has hardly a labelled tick
    axes.set(xscale="log" if wide else "linear", xlabel=label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    left_out = f" Infinite ones ({endless}) have no mark." if endless else ""
    return figure, f"A mark for each workload; the line is the median.{left_out}{_cut(section)}"


def _shown(section: Section) -> list[tuple[int, str]]:
    return list(enumerate(section.names[:MOST_SOLUTIONS]))


def _cut(section: Section) -> str:
    """What a caption says where a picture has no room for all."""
    return f" The first {MOST_SOLUTIONS} of {len(section.names)} solutions." if len(section.names) > MOST_SOLUTIONS else ""


def _line(points: Sequence[tuple[int, float]]) -> Sequence[tuple[float, float]]:
    """A curve without markers; of one point, a line across it."""
    return [(tokens * stretch, value) for tokens, value in points for stretch in (1 / AROUND, AROUND)] if len(points) == 1 else points


def _sized(section: Section) -> bool:
    return any(row.tokens for row in section.rows) and bool(section.contenders)


def _timed(section: Section, name: str) -> list[Row]:
    return [row for row in section.rows if row.tokens and name in row.cells and row.cells[name].passed and row.cells[name].latency]


def _tokens_axis(axes: Axes, section: Section) -> None:
    """Ticks at sizes that were measured, as many as there is room for."""
    sizes = sorted({row.tokens for row in section.rows if row.tokens})
    ticks = sizes[-1:]
    for size in reversed(sizes):
        if size * max(1.05, (sizes[-1] / sizes[0]) ** 0.06) <= ticks[-1]:
            ticks.append(size)
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0] / AROUND, sizes[-1] * AROUND)


def _rates(section: Section) -> tuple[float | None, float | None]:
    """Bytes and FLOPs a millisecond that the measured floors stand for; None where no floor of that kind is known."""
    cells = [cell for row in section.rows for cell in row.cells.values() if cell.floor]
    stream = [cell.bytes / cell.floor for cell in cells if cell.bytes and cell.floor_kind.startswith("stream")]
    compute = [cell.flops / cell.floor for cell in cells if cell.flops and cell.floor_kind.startswith("compute")]
    # The largest: short reads don't reach the rate that the machine can hold.
    return max(stream, default=None), max(compute, default=None)


def _floors(section: Section) -> list[tuple[int, float]]:
    """The lowest floor of each T: workloads of one T differ in their routing."""
    floors: dict[int, float] = {}
    for row in section.rows:
        if row.tokens and row.floor:
            floors[row.tokens] = min(row.floor, floors.get(row.tokens, np.inf))
    return sorted(floors.items())


def _draw_floors(axes: Axes, section: Section, floors: Sequence[tuple[int, float]]) -> None:
    """What reading alone and computing alone would take, and the area below the larger of them."""
    if not floors:
        return
    stream, compute = _rates(section)
    kinds = (("streaming floor", "-", _floor_of(section, "streaming", "bytes", stream)),
             ("compute floor", "--", _floor_of(section, "compute", "flops", compute)))  # fmt: skip
    curves = [(name, style, _line(points)) for name, style, points in kinds if points] or [("floor", "-", _line(floors))]
    bottom = min(floor for _, floor in floors) / 2
    tokens, height = _highest([points for _, _, points in curves])
    axes.fill_between(tokens, bottom, np.maximum(height, bottom), facecolor="none", hatch="////", edgecolor=SOFT, linewidth=0, alpha=0.6)
    for name, style, points in curves:
        axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.0, linestyle=style, label=name)
    axes.set_ylim(bottom=bottom)


def _highest(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """The higher of one or two curves, straight between their points where both axes are logarithmic: they may cross between two sizes."""

    def heights(sizes: np.ndarray) -> list[np.ndarray]:
        return [np.interp(sizes, *np.log(points).T, left=-np.inf, right=-np.inf) for points in map(np.array, curves)]

    sizes = np.log(np.unique([tokens for points in curves for tokens, _ in points]))
    with np.errstate(invalid="ignore", divide="ignore"):  # where only one of them is known they don't cross
        first, last = heights(sizes)[0], heights(sizes)[-1]
        before, after = (first - last)[:-1], (first - last)[1:]
        crossings = (sizes[:-1] + before / (before - after) * np.diff(sizes))[before * after < 0]
    sizes = np.union1d(sizes, crossings[np.isfinite(crossings)])
    return np.exp(sizes), np.exp(np.max(heights(sizes), axis=0))


def _floor_of(section: Section, name: str, work: str, rate: float | None) -> list[tuple[int, float]]:
    """The floor of one kind by T: as the trace has it, else work over rate where the other kind was the larger."""
    found: dict[int, float] = {}
    for row in section.rows:
        for cell in row.cells.values():
            known = getattr(cell, f"{name}_floor") or (cell.floor if cell.floor_kind.startswith(name[:6]) else None)
            if row.tokens and known:
                found[row.tokens] = min(known, found.get(row.tokens, np.inf))
            elif row.tokens and rate and getattr(cell, work):
                found.setdefault(row.tokens, getattr(cell, work) / rate)
    return sorted(found.items())


def _row_label(row: Row) -> str:
    return short(row.workload) if row.tokens is None else f"T = {row.tokens:,}"


def _folded(name: str) -> str:
    """A long name on several lines, broken at its underscores."""
    lines = [""]
    for part in re.findall(r"[^_\-]*[_\-]*", name):
        if len(lines[-1]) + len(part) > 13 and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
