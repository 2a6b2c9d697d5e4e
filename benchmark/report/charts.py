"""Charts with matplotlib, as SVG for the page and as report.png.

Charts are drawn in the light palette. In SVG, its colours are replaced by CSS variables, so that charts follow the
page's light or dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray

from edgekd.benchmark.evaluate.metrics import Reliability
from edgekd.benchmark.report.elements import printable
from edgekd.benchmark.report.tables import mark
from edgekd.benchmark.results.metric import ms, percent
from edgekd.benchmark.results.rows import AccuracyRow, LatencyRow, SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROLES = ("paper", "ink", "soft", "line", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "ct")
LIGHT = dict(
    zip(
        _ROLES,
        (
            "#ffffff",
            "#1b1f24",
            "#59636e",
            "#d5dae0",
            "#1f63b5",
            "#b8500a",
            "#24773b",
            "#7b46b8",
            "#b0265c",
            "#0d7480",
            "#7c5a12",
            "#5b6570",
        ),
        strict=True,
    )
)
DARK = dict(
    zip(
        _ROLES,
        (
            "#14181d",
            "#e7ebef",
            "#a3adb8",
            "#353d46",
            "#74adf5",
            "#f79a55",
            "#69c582",
            "#bd95f2",
            "#f680a8",
            "#54c6d2",
            "#d3ad62",
            "#a8b2bc",
        ),
        strict=True,
    )
)
COLOURS = 7
_MARKERS = {"teacher": "s", "torch": "D", "artifact": "o"}
_FONT = 11.5
_ROOMY = 560
"""Minimum width in pixels for panels next to each other and for names of bars."""
Samples = Sequence[NDArray[np.float64]]
"""Milliseconds in measured order, one array per process."""


@dataclass(frozen=True)
class Point:
    """One subject of a chart; `colour` is a key of the palettes."""

    name: str
    colour: str
    summary: SummaryRow
    time: LatencyRow

    @property
    def levels(self) -> list[float]:
        """ID and OOD (else adapted) accuracy in percent, without missing values."""
        row = self.summary
        outside = row.adapted_avg if row.ood_avg is None else row.ood_avg
        return [100 * value for value in (row.id, outside) if value is not None]


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in CSS pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def svg(figure: Figure, key: str, title: str, description: str) -> str:
    """Return a figure as an SVG element with the page's colours and font; `key` must be unique on the page."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.S)
    text = text[text.index(">", text.index("<svg")) + 1 :]
    # Round coordinates to a hundredth of a pixel, but not numbers in text between tags.
    text = re.sub(r'="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"font: [^;\"]*?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)(?=[\")])", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{key}-", text)
    for role, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{role})")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(printable(title))}</title>'
        f'<desc id="{key}-desc">{escape(printable(description))}</desc>{text.strip()}'
    )


def dress(axes: Axes, *, x: str = "", y: str = "") -> None:
    """Style axes with a light grid and no frame, and set their labels."""
    axes.grid(True, color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelsize=_FONT, labelcolor=LIGHT["soft"])
    axes.set_xlabel(x, fontsize=_FONT, color=LIGHT["soft"])
    axes.set_title(y, loc="left", fontsize=_FONT, color=LIGHT["soft"], pad=6)


def logarithmic(axes: Axes, low: float, high: float, axis: str, count: int) -> None:
    """Make axis `x` or `y` logarithmic from `low` to `high`, with about `count` round ticks and no minor ticks."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    if high / low >= 4:
        steps = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))
        ticks = [LogLocator(subs=subs, numticks=99).tick_values(low, high) for subs in steps]
    else:
        ticks = [MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    inside = [[float(v) for v in values if low <= v <= high] for values in ticks]
    chosen = next((values for values in inside if len(values) <= count + 1), inside[-1])
    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
    target = axes.xaxis if axis == "x" else axes.yaxis
    target.set_major_locator(FixedLocator(chosen))
    target.set_minor_locator(NullLocator())
    target.set_major_formatter("{x:g}")


def undominated(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Return for each point whether it is on the Pareto front, where smaller values are better."""

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [not any(beats(one, point) for one in points) for point in points]


def front(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto front of p50 and accuracy (OOD, else ID), fastest first."""
    files = [point for point in points if point.summary.kind == "artifact" and point.levels]
    kept = compress(files, undominated([(p.time.p50_ms, -p.levels[-1]) for p in files]))
    return sorted(kept, key=lambda point: point.time.p50_ms)


def accuracy_figure(points: Sequence[Point], width: float, height: float = 0.0) -> Figure:
    """Draw ID (hollow) and OOD (filled) accuracy against p50, and against size if the sizes differ.

    The latency axis spans the exported files. Subjects outside it are drawn at the edge with their value.
    """
    points = [point for point in points if point.levels]
    roomy = width >= _ROOMY
    panels = 1 + (len({point.summary.size_mb for point in points if point.summary.size_mb}) > 1)
    height = height or (400 if roomy else 300 * panels)
    figure = new_figure(width, height)
    if not points:
        figure.text(0.5, 0.5, "Neither ID nor OOD accuracy was measured.", ha="center")
        return figure
    shape = (1, panels) if roomy else (panels, 1)
    ratios = (3, 2)[:panels] if roomy else None
    grid = figure.subplots(*shape, sharey=True, width_ratios=ratios, squeeze=False).ravel()
    sides = (42 / width, 46 / height, 1 - 12 / width, 1 - 30 / height)
    figure.subplots_adjust(*sides, wspace=0.07, hspace=0.35)
    levels = [level for point in points for level in point.levels]
    margin = max(3.0, 0.1 * (max(levels) - min(levels)))
    for axes, what in zip(grid, ("p50 of one image, ms", "size of the file, MB"), strict=False):
        size = axes is not grid[0]
        dress(axes, x=f"{what} (logarithmic)", y="" if roomy and size else "top-1, %")
        axes.set_ylim(max(0.0, min(levels) - margin), min(102.0, max(levels) + margin))
        _scatter(axes, [p for p in points if not size or p.summary.size_mb], size, roomy)
    return figure


def _scatter(axes: Axes, points: Sequence[Point], size: bool, roomy: bool) -> None:
    """Draw the points of one panel."""
    files = [point for point in points if point.summary.kind == "artifact"] or list(points)
    ends = [(p.summary.size_mb,) * 2 if size else p.time.p50_ci95_ms for p in files]
    low, high = min(end[0] or 1 for end in ends) / 1.15, max(end[1] or 1 for end in ends) * 1.15
    middle = (low * high) ** 0.5
    half = max((high / low) ** 0.5, 1.6)  # in a narrower range, noise would look like a difference
    low, high = middle / half, middle * half
    logarithmic(axes, low, high, "x", 8 if roomy else 4)
    if not size and (best := front(points)):
        steps = [(p.time.p50_ms, p.levels[-1]) for p in best] + [(high, best[-1].levels[-1])]
        dashes = (0, (5, 4))
        axes.step(*zip(*steps, strict=True), where="post", color=LIGHT["soft"], linestyle=dashes)
    for point in points:
        colour, value = (
            LIGHT[point.colour],
            (point.summary.size_mb if size else point.time.p50_ms) or 1,
        )
        strength = 0.5 if mark(point.time) and not size else 1.0
        x = float(np.clip(value, low * 1.02, high / 1.02))
        axes.plot([x] * len(point.levels), point.levels, color=colour, alpha=0.5 * strength)
        if x != value:
            text, side = (
                (f"  ← {ms(value)}", "left") if x > value else (f"{ms(value)} →  ", "right")
            )
            place = (x, point.levels[-1])
            axes.annotate(text, place, ha=side, va="center", fontsize=_FONT - 1, color=colour)
        for level, hollow in zip(point.levels, (point.summary.id is not None, False), strict=False):
            if not size and x == value:
                axes.plot(point.time.p50_ci95_ms, [level] * 2, color=colour, alpha=strength)
            axes.plot(
                x,
                level,
                _MARKERS[point.summary.kind],
                markersize=9,
                alpha=strength,
                markeredgecolor=colour,
                markerfacecolor=LIGHT["paper" if hollow else point.colour],
                markeredgewidth=1.8,
                clip_on=False,
                label="" if hollow else printable(point.name) + mark(point.time),
            )


def bars_figure(
    suites: Sequence[str], rows: Sequence[tuple[str, str, AccuracyRow]], width: float
) -> Figure:
    """Draw top-1 of every subject on every suite as bars with Wilson intervals.

    Args:
        rows: (subject, colour, row).
    """
    roomy = width >= _ROOMY
    height = 46.0 + sum(34 + 18 * sum(row.suite == suite for *_, row in rows) for suite in suites)
    figure = new_figure(width, height)
    gutter = 16 + 6.4 * max((len(name) for name, *_ in rows), default=0) if roomy else 8
    gutter = min(gutter, width / 3)
    axes = figure.add_axes(
        (gutter / width, 36 / height, 1 - (gutter + 50) / width, 1 - 40 / height)
    )
    dress(axes, x="top-1, %")
    axes.grid(False, axis="y")
    axes.set(xlim=(0, 100), ylim=(height - 40, 0), xticks=[0, 25, 50, 75, 100], yticks=[])
    style: dict[str, Any] = {"fontsize": _FONT, "color": LIGHT["ink"], "va": "center"}
    y = 0.0
    for suite in suites:
        own = [item for item in rows if item[2].suite == suite]
        heading = f"{printable(suite)}  {own[0][2].n:,} images" if own else printable(suite)
        axes.text(0, y + 15, heading, fontweight="bold", **style)
        y += 26
        for name, colour, row in own:
            low, high = (100 * end for end in row.top1_ci95)
            value = 100 * row.top1
            axes.barh(y + 7.5, max(value, 0.3), 15, color=LIGHT[colour], alpha=0.85)
            axes.plot([low, high], [y + 7.5] * 2, color=LIGHT["ink"], linewidth=1.4)
            axes.text(max(value, high) + 0.8, y + 7.5, percent(row.top1), **style)
            if roomy:
                axes.text(-0.8, y + 7.5, printable(name), ha="right", **style)
            y += 18
        y += 8
    return figure


def reliability_figure(bins: Reliability, colour: str, width: float = 236) -> Figure:
    """Draw each bin's accuracy as a bar, the hatched gap to its mean confidence, and its share of the images."""
    figure = new_figure(width, 296)
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    figure.subplots_adjust(0.15, 0.14, 0.95, 0.92, hspace=0.3)
    dress(upper, y="accuracy")
    dress(lower, x="confidence", y="images, %")
    some = np.flatnonzero(bins.count)
    middles = (some + 0.5) / len(bins.count)
    accuracy, confidence = bins.accuracy[some], bins.confidence[some]
    upper.bar(middles, np.maximum(accuracy, 0.005), 0.058, color=LIGHT[colour], alpha=0.85)
    upper.bar(
        middles,
        np.abs(accuracy - confidence),
        0.058,
        np.minimum(accuracy, confidence),
        facecolor="none",
        edgecolor=LIGHT["ink"],
        linewidth=0.8,
        hatch="/////",
    )
    upper.plot([0, 1], [0, 1], color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)))
    share = 100 * bins.count / max(int(bins.count.sum()), 1)
    lower.bar(middles, share[some], 0.058, color=LIGHT["soft"], alpha=0.6)
    upper.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
    lower.set_yticks([round(float(share.max()))])
    return figure


def _span(samples: NDArray[np.float64]) -> tuple[float, float]:
    """Return the range of all samples with a margin."""
    low, high = float(samples.min()), float(samples.max())
    middle = (low * high) ** 0.5
    return min(low / 1.05, middle / 1.1), max(high * 1.05, middle * 1.1)


def _small(width: float, x: str, y: str) -> tuple[Figure, Axes]:
    figure = new_figure(width, 200)
    axes = figure.add_axes((0.1, 0.2, 0.87, 0.68))
    dress(axes, x=x, y=y)
    return figure, axes


def histogram_figure(parts: Samples, row: LatencyRow, colour: str, width: float = 420) -> Figure:
    """Draw the histogram of latencies with bins of equal width on a logarithmic axis."""
    figure, axes = _small(width, "ms (logarithmic)", "samples")
    samples = np.concatenate(list(parts))
    logarithmic(axes, *_span(samples), "x", 5)
    counts, edges = np.histogram(samples, np.geomspace(*_span(samples), 49))
    tall = np.where(counts, np.maximum(counts, 0.012 * counts.max()), 0)  # outliers stay visible
    axes.stairs(tall, edges, fill=True, color=LIGHT[colour], alpha=0.85)
    axes.set_ylim(0, 1.12 * counts.max())
    style: dict[str, Any] = {"va": "top", "fontsize": 10.5, "color": LIGHT["ink"]}
    for value, name, side in ((row.p50_ms, "p50 ", "right"), (row.p90_ms, " p90", "left")):
        axes.axvline(value, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (3, 2)))
        axes.text(value, 1.11 * counts.max(), name, ha=side, **style)
    return figure


def timeline_figure(parts: Samples, colour: str, width: float = 420) -> Figure:
    """Draw the samples in measured order against the cumulative run time of the model.

    Up to 120 samples are drawn as points, more as 120 lines from minimum to maximum with a point at the median.
    """
    figure, axes = _small(width, "cumulative run time, s", "ms")
    samples = np.concatenate(list(parts))
    logarithmic(axes, *_span(samples), "y", 3)
    seconds = np.cumsum(samples) / 1e3
    for end in np.cumsum([len(part) for part in parts])[:-1]:
        axes.axvline(seconds[end - 1], color=LIGHT["soft"], linewidth=1, linestyle=(0, (2, 3)))
    columns = np.array_split(np.arange(len(samples)), min(120, len(samples)))
    x = np.asarray([seconds[column].mean() for column in columns])
    low, high, middle = (
        np.asarray([f(samples[column]) for column in columns]) for f in (np.min, np.max, np.median)
    )
    if len(columns) < len(samples):
        lines = np.column_stack([low, high, np.full(len(x), np.nan)]).ravel()
        axes.plot(np.repeat(x, 3), lines, color=LIGHT[colour], linewidth=1.2, alpha=0.45)
    axes.plot(x, middle, "o", markersize=3, color=LIGHT[colour], markeredgewidth=0)
    return figure
