"""Latency drawn from every raw sample: how often which time, and how it went over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.svg import (
    Drawing,
    element,
    joined,
    linear,
    log_ticks,
    logarithmic,
    ticks,
    x_axis,
    y_axis,
)
from edgekd.benchmark.table import ms

Samples = Sequence[NDArray[np.float64]]
"""Milliseconds in the order measured, one array a process."""
_BINS, _COLUMNS = 48, 120
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP = 420, 200, 40, 410, 20


def span(parts: Samples) -> tuple[float, float]:
    """A little more than the range of all samples: nothing lies outside."""
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    middle = (low * high) ** 0.5
    return min(low / 1.05, middle / 1.1), max(high * 1.05, middle * 1.1)


def histogram(
    parts: Samples, limits: tuple[float, float], p50: float, p90: float, name: str, colour: str
) -> Drawing:
    """How many samples fall into each of 48 bins that are equally wide on a logarithmic axis."""
    samples = np.concatenate(list(parts))
    edges = np.geomspace(*limits, _BINS + 1)
    counts = np.histogram(samples, edges)[0]
    bottom = _HEIGHT - 40
    x, y = logarithmic(*limits, _LEFT, _RIGHT), linear(0, float(counts.max()) * 1.04, bottom, _TOP)
    body = [
        x_axis(x, log_ticks(*limits), _TOP, bottom, "ms (logarithmic)", (_LEFT + _RIGHT) / 2),
        y_axis(y, ticks(0, float(counts.max()), 3), _LEFT, _RIGHT),
    ]
    for number in np.flatnonzero(counts):
        start, stop = x(float(edges[number])), x(float(edges[number + 1]))
        height = max(bottom - y(float(counts[number])), 1.5)
        body.append(
            element(
                "rect", x=start + 0.3, y=bottom - height, width=max(stop - start - 0.6, 0.8), height=height,
                class_=f"{colour} bar",
            )
        )  # fmt: skip
    for value, label, anchor, shift in ((p50, "p50", "end", -3), (p90, "p90", "start", 3)):
        body.append(element("line", x1=x(value), x2=x(value), y1=_TOP, y2=bottom, class_="mark"))
        body.append(
            element(
                "text",
                label,
                x=x(value) + shift,
                y=_TOP - 5,
                text_anchor=anchor,
                class_="value small",
            )
        )
    said = (
        f"{len(samples):,} samples from {ms(float(samples.min()))} to {ms(float(samples.max()))} ms, "
        f"p50 {ms(p50)} ms, p90 {ms(p90)} ms"
    )
    return Drawing(f"Latency histogram of {name}", said, _WIDTH, _HEIGHT, joined(body))


def timeline(parts: Samples, limits: tuple[float, float], name: str, colour: str) -> Drawing:
    """Samples in the order measured, against the time the model itself has run.

    Up to 120 samples stand as points. More are drawn as 120 columns, each a line from its smallest to its largest
    sample with a point at its median, so that no outlier disappears.
    """
    samples = np.concatenate(list(parts))
    seconds = np.cumsum(samples) / 1e3
    bottom = _HEIGHT - 40
    x, y = linear(0, float(seconds[-1]), _LEFT, _RIGHT), logarithmic(*limits, bottom, _TOP)
    body = [
        x_axis(
            x,
            ticks(0, float(seconds[-1]), 5),
            _TOP,
            bottom,
            "seconds of own run time",
            (_LEFT + _RIGHT) / 2,
        ),
        y_axis(y, log_ticks(*limits, 3), _LEFT, _RIGHT),
        element("text", "ms", x=8, y=11, class_="axis"),
    ]
    for end in np.cumsum([len(part) for part in parts])[:-1]:
        at = x(float(seconds[end - 1]))
        body.append(element("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="process"))
    columns = np.array_split(np.arange(len(samples)), min(_COLUMNS, len(samples)))
    for column in columns:
        values, at = samples[column], x(float(seconds[column].mean()))
        if len(column) > 1:
            low, high = y(float(values.min())), y(float(values.max()))
            body.append(element("line", x1=at, x2=at, y1=low, y2=high, class_=f"{colour} range"))
        body.append(
            element("circle", cx=at, cy=y(float(np.median(values))), r=1.8, class_=f"{colour} full")
        )
    kind = (
        "each a point"
        if len(columns) == len(samples)
        else f"in {len(columns)} columns from minimum to maximum"
    )
    processes = f", {len(parts)} processes one after another" if len(parts) > 1 else ""
    quarter = max(len(samples) // 4, 1)
    drift = (
        f"median of the first quarter {ms(float(np.median(samples[:quarter])))} ms, of the last "
    )
    drift += f"{ms(float(np.median(samples[-quarter:])))} ms"
    return Drawing(
        f"Latency of {name} over time", f"{len(samples):,} samples, {kind}{processes}; {drift}", _WIDTH, _HEIGHT,
        joined(body),
    )  # fmt: skip
