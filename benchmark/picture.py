"""Accuracy against latency in one picture: for each subject a hollow ID point, a filled OOD point, and the gap between.

One hue for each run, one shade for each subject in it, grey for teachers. Labels stand beside their points and never
on one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.benchmark.rows import LatencyRow, Report, SummaryRow
from edgekd.benchmark.table import QUICK_MARK, label, mark
from edgekd.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

_HUES = (
    ("#08519c", "#3182bd", "#5f9fd3"),
    ("#a63603", "#e6550d", "#f08a3c"),
    ("#006d2c", "#31a354", "#5cb872"),
    ("#54278f", "#756bb1", "#938bc8"),
)
"""One triple a run: dark to light for torch student, FP32, INT8."""
_TEACHER = "#525252"
_MARKERS = {"teacher": "s", "torch": "D", "artifact": "o"}


@dataclass(frozen=True)
class _Point:
    summary: SummaryRow
    latency: LatencyRow
    colour: str
    text: str

    @property
    def levels(self) -> list[float]:
        """ID and OOD accuracy in percent, as far as known."""
        return [
            100 * value for value in (self.summary.id, self.summary.ood_avg) if value is not None
        ]


def draw_picture(report: Report, path: Path) -> None:
    """Write the picture as PNG, 1600 × 1000 pixels."""
    figure, _ = build_picture(report)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=160)


def build_picture(report: Report) -> tuple[Figure, list[Text]]:
    """The figure and its direct labels, laid out for its own size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.25), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = _points(report)
    if not points:  # only suites that are neither ID nor OOD
        axes.text(
            0.5,
            0.5,
            "No accuracy in or out of domain was measured.",
            ha="center",
            transform=axes.transAxes,
        )
        axes.set_axis_off()
        return figure, []
    for point in points:
        _draw(axes, point)
    _dress(axes, report, points)
    figure.supxlabel(_footer(report), fontsize=8, color="#525252")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed for this layout
    labels = _place_labels(axes, points)
    return figure, labels


def _points(report: Report) -> list[_Point]:
    latency = {(row.run, row.subject): row for row in report.latency}
    runs = list(dict.fromkeys(row.run for row in report.summary))
    shades: dict[str, int] = {}
    points = []
    several = len(runs) > 1
    for row in report.summary:
        if row.same_as is not None:
            continue
        if row.kind == "teacher":
            colour, name = _TEACHER, label(row)
        else:
            hue = _HUES[runs.index(row.run) % len(_HUES)]
            colour = hue[shades.get(row.run, 0) % len(hue)]
            shades[row.run] = shades.get(row.run, 0) + 1
            name = f"{row.run}: {label(row)}" if several else label(row)
        time = latency[row.run, row.subject]
        points.append(_Point(row, time, colour, name + mark(time)))
    return [point for point in points if point.levels]


def _draw(axes: Axes, point: _Point) -> None:
    x, colour = point.latency.p50_ms, point.colour
    marker = _MARKERS[point.summary.kind]
    # What was only measured as background must not look like a competitor.
    strength = 0.45 if mark(point.latency) else 1.0
    axes.plot(
        [x] * len(point.levels),
        point.levels,
        color=colour,
        linewidth=1.6,
        alpha=0.55 * strength,
        zorder=2,
    )
    low, high = point.latency.p50_ci95_ms
    for level in point.levels:
        axes.plot(
            [low, high],
            [level, level],
            color=colour,
            linewidth=1.2,
            solid_capstyle="butt",
            alpha=strength,
            zorder=2,
        )
    if point.summary.id is not None:
        axes.plot(
            x, 100 * point.summary.id, marker, markersize=9, markerfacecolor="white", markeredgecolor=colour,
            markeredgewidth=2, alpha=strength, zorder=3,
        )  # fmt: skip
    if point.summary.ood_avg is not None:
        axes.plot(
            x, 100 * point.summary.ood_avg, marker, markersize=9, markerfacecolor=colour, markeredgecolor="white",
            markeredgewidth=0.8, alpha=strength, zorder=4,
        )  # fmt: skip


def _dress(axes: Axes, report: Report, points: list[_Point]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    times = [point.latency.p50_ms for point in points]
    levels = [level for point in points for level in point.levels]
    axes.set_xscale("log")
    # Room on the right for labels, and never less than a factor of four in all, or noise would look like a difference.
    stretch = max(max(times) / min(times), 4.0)
    axes.set_xlim(min(times) / stretch**0.12, min(times) * stretch**1.35)
    fine = max(times) / min(times) < 20
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if fine else (1.0, 2.0, 5.0))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    margin = max(3.0, 0.12 * (max(levels) - min(levels)))
    axes.set_ylim(max(0.0, min(levels) - margin), min(101.5, max(levels) + margin))
    axes.set_xlabel("latency of one image, p50 in ms (logarithmic; lower is better)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    domains = list(dict.fromkeys(domain for row in report.summary for domain in row.ood))
    mark = f"\n{QUICK_MARK}" if report.quick else ""
    axes.set_title(
        "Accuracy in and out of domain against latency" + mark,
        loc="left",
        fontsize=13,
        fontweight="bold",
    )
    hollow = Line2D(
        [], [], linestyle="none", marker="o", markersize=8, markerfacecolor="white", label="ID"
    )
    hollow.set(markeredgecolor="#333333", markeredgewidth=2)
    handles = [hollow]
    if domains:
        name = f"OOD: {domains[0]}" if len(domains) == 1 else f"OOD, mean of {', '.join(domains)}"
        handles.append(
            Line2D([], [], linestyle="none", marker="o", markersize=8, color="#333333", label=name)
        )
    axes.legend(
        handles=handles,
        loc="lower right",
        frameon=False,
        ncols=2,
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
    )


def _footer(report: Report) -> str:
    env = report.environment
    images = dict.fromkeys(
        f"{row.suite} n = {row.n:,}"
        for row in report.suites
        if row.suite.split(":")[0] in ("id", "ood")
    )
    shown = list(images)[:4] + ([f"{len(images) - 4} more"] if len(images) > 4 else [])
    background = (
        " · †: measured as background, not comparable"
        if any(mark(row) for row in report.latency)
        else ""
    )
    return f"{env['cpu']}, {env['usable_cores']} cores · {', '.join(shown)}{background}"


def _place_labels(axes: Axes, points: list[_Point]) -> list[Text]:
    """Put each label at the free place nearest to its point; a thin line leads to it when it had to move away."""
    from matplotlib.transforms import Bbox

    to_pixels = axes.transData.transform
    frame = axes.get_window_extent()
    unit = axes.figure.dpi / 72
    taken: list[Bbox] = []
    for point in points:
        for level in point.levels:
            x, y = to_pixels((point.latency.p50_ms, level))
            taken.append(Bbox.from_extents(x - 6 * unit, y - 6 * unit, x + 6 * unit, y + 6 * unit))
            ends = to_pixels([(end, level) for end in point.latency.p50_ci95_ms])
            taken.append(Bbox.from_extents(ends[0][0], y - 2 * unit, ends[1][0], y + 2 * unit))
        (x, top), (_, bottom) = (
            to_pixels((point.latency.p50_ms, f(point.levels))) for f in (max, min)
        )
        taken.append(Bbox.from_extents(x - unit, bottom, x + unit, top))
    labels: list[Text] = []
    for point in sorted(points, key=lambda p: (-p.levels[-1], p.latency.p50_ms)):
        x, y = to_pixels((point.latency.p50_ms, point.levels[-1]))
        values = " → ".join(f"{level:.1f}" for level in point.levels)
        text = axes.annotate(
            f"{point.text}  {values}", (point.latency.p50_ms, point.levels[-1]), xytext=(0, 0),
            textcoords="offset points", fontsize=9, color=point.colour, va="center", ha="left", zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )  # fmt: skip
        size = text.get_window_extent()
        best: tuple[float, float, float, Bbox] | None = None
        for dx, dy in _offsets(size.width, size.height, unit):
            box = Bbox.from_bounds(x + dx, y + dy - size.height / 2, size.width, size.height)
            outside = (
                box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            )
            clashes = sum(_common(box, other) for other in taken)
            cost = (
                clashes * 1e3 + (1e6 if outside else 0.0) + abs(dy) + (20 * unit if dx < 0 else 0.0)
            )
            if best is None or cost < best[0]:
                best = (cost, dx, dy, box)
        assert best is not None
        _, dx, dy, box = best
        text.set_position((dx / unit, dy / unit))
        if abs(dy) > size.height:
            end = box.x0 - 2 * unit if dx > 0 else box.x1 + 2 * unit
            start, stop = axes.transData.inverted().transform([(x, y), (end, y + dy)])
            axes.plot(
                [start[0], stop[0]],
                [start[1], stop[1]],
                color=point.colour,
                linewidth=0.7,
                zorder=1,
            )
        taken.append(box)
        labels.append(text)
    return labels


def _offsets(width: float, height: float, unit: float) -> list[tuple[float, float]]:
    """Where the left middle of a label may stand relative to its point, in pixels."""
    right, left = 9 * unit, -width - 9 * unit
    steps = [0.0] + [sign * step * height * 0.5 for step in range(1, 25) for sign in (1, -1)]
    near = [(-width / 2, sign * (6 * unit + height)) for sign in (-1, 1)]
    return [(right, dy) for dy in steps] + near + [(left, dy) for dy in steps]


def _common(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
