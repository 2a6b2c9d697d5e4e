"""Accuracy drawn: against latency, and suite by suite with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgekd.benchmark.rows import AccuracyRow, LatencyRow, SummaryRow
from edgekd.benchmark.svg import (
    Drawing,
    element,
    joined,
    linear,
    log_ticks,
    logarithmic,
    marker,
    text_width,
    ticks,
    x_axis,
    y_axis,
)
from edgekd.benchmark.table import mark, ms, percent

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
_LABEL_SIZE = 12.5


@dataclass(frozen=True)
class Point:
    """One subject of the picture; `colour` is a class of the style sheet."""

    name: str
    colour: str
    summary: SummaryRow
    latency: LatencyRow

    @property
    def levels(self) -> list[float]:
        """ID and OOD accuracy in percent, as far as known."""
        return [
            100 * value for value in (self.summary.id, self.summary.ood_avg) if value is not None
        ]


def front(points: Sequence[Point]) -> list[Point]:
    """The artifacts that no other beats in both p50 and accuracy (OOD average, else ID), fastest first."""
    found: list[Point] = []
    artifacts = [point for point in points if point.summary.kind == "artifact" and point.levels]
    for point in sorted(artifacts, key=lambda p: (p.latency.p50_ms, -p.levels[-1])):
        if not found or point.levels[-1] > found[-1].levels[-1]:
            found.append(point)
    return found


def pareto(points: Sequence[Point], width: int) -> Drawing:
    """ID (hollow) and OOD average (filled) of every subject against its p50; labels only where `width` has room."""
    points = [point for point in points if point.levels]
    roomy = width >= 560
    height = 420 if roomy else 320
    left, right, top, bottom = 42, width - 12, 26, height - 46
    lows, highs = zip(*(point.latency.p50_ci95_ms for point in points), strict=True)
    low, high = min(lows) / 1.12, max(highs) * 1.12
    if high / low < 4:  # or noise would look like a difference
        low, high = (low * high) ** 0.5 / 2, (low * high) ** 0.5 * 2
    levels = [level for point in points for level in point.levels]
    margin = max(3.0, 0.1 * (max(levels) - min(levels)))
    floor, ceiling = max(0.0, min(levels) - margin), min(102.0, max(levels) + margin)
    x, y = logarithmic(low, high, left, right), linear(floor, ceiling, bottom, top)
    body = [
        x_axis(
            x,
            log_ticks(low, high, 9 if roomy else 5),
            top,
            bottom,
            "p50 of one image, ms (logarithmic)",
            width / 2,
        ),
        y_axis(y, ticks(floor, min(ceiling, 100)), left, right),
        element("text", "top-1, %", x=8, y=13, class_="axis"),
        _front_line(front(points), x, y, right),
    ]
    taken: list[Box] = []
    for point in points:
        at = x(point.latency.p50_ms)
        start, stop = (x(value) for value in point.latency.p50_ci95_ms)
        heights = [y(level) for level in point.levels]
        background = "faint" if point.latency.protocol == "context" else ""
        stem = element(
            "line", x1=at, x2=at, y1=min(heights), y2=max(heights), class_=f"{point.colour} stem"
        )
        whiskers = [
            element("line", x1=start, x2=stop, y1=h, y2=h, class_=f"{point.colour} whisker")
            for h in heights
        ]
        inside, outside = point.summary.id, point.summary.ood_avg
        shapes = [
            marker(point.summary.kind, at, y(100 * value), point.colour, filled=filled)
            for value, filled in ((inside, False), (outside, True))
            if value is not None
        ]
        body.append(element("g", joined([stem, *whiskers, *shapes]), class_=background or None))
        taken += [(at - 7, h - 7, at + 7, h + 7) for h in heights]
        taken += [(start, h - 2, stop, h + 2) for h in heights]
        taken.append((at - 1, min(heights), at + 1, max(heights)))
    if roomy:
        body.append(joined(_labels(points, x, y, taken, (left, top, right, bottom))))
    said = "; ".join(
        f"{point.name}: {' in domain, '.join(f'{level:.1f} %' for level in point.levels)}"
        f"{' out of domain' if point.summary.ood_avg is not None else ''} at {ms(point.latency.p50_ms)} ms"
        for point in points
    )
    return Drawing("Accuracy against latency", said, width, height, joined(body))


def _front_line(points: Sequence[Point], x: object, y: object, right: float) -> Markup:
    """Steps through the artifacts that nothing beats."""
    if not points:
        return Markup("")
    assert callable(x)
    assert callable(y)
    path = f"M{x(points[0].latency.p50_ms):.1f} {y(points[0].levels[-1]):.1f}"
    for point in points[1:]:
        path += f"H{x(point.latency.p50_ms):.1f}V{y(point.levels[-1]):.1f}"
    return element("path", d=f"{path}H{right:.1f}", class_="front")


def _labels(
    points: Sequence[Point], x: object, y: object, taken: list[Box], frame: Box
) -> Iterator[Markup]:
    """Each name at the free place nearest to its OOD point, with a thin line where it had to move away."""
    assert callable(x)
    assert callable(y)
    size = _LABEL_SIZE
    for point in sorted(points, key=lambda p: (-p.levels[-1], p.latency.p50_ms)):
        text = point.name + mark(point.latency)
        wide, at, level = text_width(text, size), x(point.latency.p50_ms), y(point.levels[-1])
        best, cost = (0.0, 0.0), float("inf")
        for dx in (11.0, -11.0 - wide, -wide / 2):
            for dy in (step * size * 0.6 * sign for step in range(26) for sign in (1, -1)):
                box = (
                    at + dx - 2,
                    level + dy - size * 0.6,
                    at + dx + wide + 2,
                    level + dy + size * 0.6,
                )
                out = (
                    box[0] < frame[0] or box[2] > frame[2] or box[1] < frame[1] or box[3] > frame[3]
                )
                price = (
                    1e6 * out
                    + 1e3 * sum(_common(box, other) for other in taken)
                    + abs(dy)
                    + (dx != 11) * 24
                )
                if price < cost:
                    best, cost = (dx, dy), price
        dx, dy = best
        taken.append(
            (at + dx - 2, level + dy - size * 0.6, at + dx + wide + 2, level + dy + size * 0.6)
        )
        if abs(dy) > size * 1.4:
            end = at + (dx - 3 if dx > 0 else dx + wide + 3 if dx < -wide else 0)
            yield element(
                "line", x1=at, y1=level, x2=end, y2=level + dy, class_=f"{point.colour} leader"
            )
        yield element(
            "text", text, x=at + dx, y=level + dy + size * 0.34, class_=f"{point.colour} name"
        )


def _common(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def suite_bars(
    suites: Sequence[str], rows: Sequence[tuple[str, str, AccuracyRow]], width: int
) -> Drawing:
    """Top-1 of every subject on every suite as bars with Wilson intervals.

    Args:
        suites: in the order to be drawn.
        rows: subject's name, colour, its row; those of one suite in the order to be drawn.
    """
    of = {suite: [item for item in rows if item[2].suite == suite] for suite in suites}
    bar, gap, head = 15, 3, 26
    top = 4
    height = top + sum(head + len(found) * (bar + gap) + 8 for found in of.values()) + 36
    gutter = (
        12 + max((text_width(name, 11.5) for name, _, _ in rows), default=0) if width >= 560 else 8
    )
    left, right = int(gutter), width - 52
    x = linear(0, 100, left, right)
    body = [x_axis(x, [0, 25, 50, 75, 100], top, height - 36, "top-1, %", (left + right) / 2)]
    y = float(top)
    for suite, found in of.items():
        n = found[0][2].n if found else 0
        heading = element("tspan", suite, class_="strong") + f"  {n:,} images"
        body.append(element("text", heading, x=left, y=y + 18, class_="group"))
        y += head
        for name, colour, row in found:
            low, high = (x(100 * value) for value in row.top1_ci95)
            end, middle = x(100 * row.top1), y + bar / 2
            if left > 8:
                body.append(
                    element(
                        "text", name, x=left - 7, y=middle + 4, text_anchor="end", class_="value"
                    )
                )
            body.append(
                element(
                    "rect",
                    x=left,
                    y=y,
                    width=max(end - left, 1.0),
                    height=bar,
                    class_=f"{colour} bar",
                )
            )
            body.append(element("line", x1=low, x2=high, y1=middle, y2=middle, class_="interval"))
            body.append(
                element(
                    "text", percent(row.top1), x=max(end, high) + 6, y=middle + 4, class_="value"
                )
            )
            y += bar + gap
        y += 8
    said = "; ".join(f"{name} on {row.suite}: {percent(row.top1)} %" for name, _, row in rows)
    return Drawing("Top-1 accuracy on every suite", said, width, height, joined(body))
