"""Small drawings as inline SVG: elements, scales and axes. Colours are the page's CSS classes and follow its theme.

Every text is escaped. Drawings are made for a width in pixels and carry a title and a description for those who
cannot see them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

Scale = Callable[[float], float]
COLOURS = 7
"""Classes c0 … c6 of the style sheet; teachers are `ct`."""


def element(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """`<name attribute="…">content</name>`; content and values are escaped, `class_` and `font_size` lose the `_`."""
    said = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, content)


def _value(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, (float, np.floating)) else value


def joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


@dataclass(frozen=True)
class Drawing:
    """One SVG, `width` × `height` in pixels at its natural size."""

    title: str
    description: str
    width: int
    height: int
    body: Markup

    def svg(self, key: str) -> Markup:
        """The element; `key` is unique on the page."""
        head = element("title", self.title, id=f"{key}-t") + element(
            "desc", self.description, id=f"{key}-d"
        )
        return element(
            "svg", head + self.body, viewBox=f"0 0 {self.width} {self.height}", width=self.width, height=self.height,
            role="img", aria_labelledby=f"{key}-t {key}-d",
        )  # fmt: skip


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    """Map `low`–`high` to `start`–`stop`."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def logarithmic(low: float, high: float, start: float, stop: float) -> Scale:
    """Map `low`–`high`, both positive, to `start`–`stop` by the logarithm."""
    flat = linear(float(np.log(low)), float(np.log(high)), start, stop)
    return lambda value: flat(float(np.log(value)))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers inside `low`–`high`."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in found if low - 1e-9 <= value <= high + 1e-9]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside `low`–`high` for a logarithmic axis; evenly spaced ones where the range is short."""
    if high / low < 4:
        return [value for value in ticks(low, high, count) if value > 0]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for subs in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [sub * 10.0**power for power, sub in itertools.product(decades, subs)]
        found = [value for value in found if low <= value <= high]
        if len(found) <= count + 1:
            break
    return found


def x_axis(
    scale: Scale, at: Sequence[float], top: float, bottom: float, label: str = "", centre: float = 0
) -> Markup:
    """Grid lines from `top` to `bottom` with their numbers beneath, and the axis' name."""
    parts = [
        element("line", x1=scale(v), x2=scale(v), y1=top, y2=bottom, class_="rule") for v in at
    ]
    parts += [
        element("text", f"{v:g}", x=scale(v), y=bottom + 16, text_anchor="middle", class_="tick")
        for v in at
    ]
    if label:
        parts.append(
            element("text", label, x=centre, y=bottom + 34, text_anchor="middle", class_="axis")
        )
    return joined(parts)


def y_axis(scale: Scale, at: Sequence[float], left: float, right: float) -> Markup:
    """Grid lines from `left` to `right` with their numbers beside."""
    parts = [
        element("line", x1=left, x2=right, y1=scale(v), y2=scale(v), class_="rule") for v in at
    ]
    parts += [
        element("text", f"{v:g}", x=left - 6, y=scale(v) + 4, text_anchor="end", class_="tick")
        for v in at
    ]
    return joined(parts)


def text_width(text: str, size: float) -> float:
    """A generous estimate of a text's width in pixels in a sans-serif face."""
    return 0.62 * size * len(text)


def marker(
    kind: str, x: float, y: float, colour: str, *, filled: bool, radius: float = 5.5
) -> Markup:
    """Square for a teacher, diamond for a torch student, circle for an artifact."""
    style = f"{colour} {'full' if filled else 'hollow'}"
    if kind == "artifact":
        return element("circle", cx=x, cy=y, r=radius, class_=style)
    if kind == "teacher":
        return element(
            "rect", x=x - radius, y=y - radius, width=2 * radius, height=2 * radius, class_=style
        )
    reach = radius * 1.3
    corners = f"{x:.1f},{y - reach:.1f} {x + reach:.1f},{y:.1f} {x:.1f},{y + reach:.1f} {x - reach:.1f},{y:.1f}"
    return element("polygon", points=corners, class_=style)


def swatch(kind: str, colour: str) -> Markup:
    """A marker for a legend; says nothing to a screen reader, the text beside it does."""
    body = marker(kind, 8, 8, colour, filled=True)
    return element(
        "svg", body, viewBox="0 0 16 16", width=16, height=16, class_="swatch", aria_hidden="true"
    )
