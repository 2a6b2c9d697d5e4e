"""The definition of a number: name, unit, direction, formula and source, written beside the field that holds it.

Tables, gates, charts, the model card, the definitions in every report and the JSON Schema read these definitions and
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

NONE = "–"
Better = Literal["higher", "lower", ""]
Compute = Callable[[NDArray[np.floating], NDArray[np.int64]], float]
"""Logits `[N, C]` and labels `[N]`, N > 0 → the metric's value."""


def percent(value: float | None) -> str:
    """Return a fraction as percent with one decimal."""
    return NONE if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """Return a difference of fractions as signed points; what rounds to zero is +0.0."""
    return NONE if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def ms(value: float | None) -> str:
    """Return milliseconds with three significant digits or more."""
    if value is None:
        return NONE
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def p_value(value: float) -> str:
    """Return a p-value with three decimals, `<0.001` below that."""
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


_FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "%": ("%", percent),
    "points": ("points", points),
    "ms": ("ms", ms),
    "s": ("s", "{:.1f}".format),
    "MB": ("MB", "{:.2f}".format),
    "M": ("M", lambda value: f"{value / 1e6:,.2f}"),
    "mJ": ("mJ", lambda value: f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:.0f}"),
    "W": ("W", "{:.2f}".format),
    "1/s": ("", "{:,.1f}".format),
    "count": ("", "{:,}".format),
    "p": ("", p_value),
    "": ("", "{:.3f}".format),
}
"""Unit → what follows the name in a heading, and how a value is written. `%` and `points` are stored as fractions."""


@dataclass(frozen=True)
class Metric:
    """A number of a report; `metric` declares it as a field of a row.

    Attributes:
        name: as tables show it.
        unit: one of `%` and `points` (stored as fractions), `ms`, `s`, `MB` (10⁶ bytes), `M` (stored as a count), `mJ`
            (stored as joules), `W`, `1/s`, `count`, `p`, or none.
        better: which direction is better, if any.
        missing: why the value can be None.
        interval: name of the field with its 95 % interval.
        gate: whether a gate may use it; by default whatever has a better direction.
        compute: calculates it from logits and labels, for every accuracy row.
        formula: the definition: the docstring under the field.
    """

    name: str
    unit: str = ""
    better: Better = ""
    source: str = ""
    missing: str = "it was not measured"
    interval: str = ""
    gate: bool | None = None
    compute: Compute | None = None
    formula: str = ""

    @property
    def heading(self) -> str:
        """Name, unit and direction, such as `p90 ms ↓`."""
        arrow = {"higher": "↑", "lower": "↓", "": ""}[self.better]
        return " ".join(part for part in (self.name, _FORMATS[self.unit][0], arrow) if part)

    @property
    def gated(self) -> bool:
        """Whether a gate may use it."""
        return bool(self.better) if self.gate is None else self.gate

    def in_unit(self, value: float) -> float:
        """Return a stored value in the unit of gates, without the digits that binary fractions add."""
        return round(100 * value, 9) if self.unit in ("%", "points") else value

    def show(self, value: Any, interval: tuple[float, float] | None = None) -> str:
        """Return a value, or a difference with its `ci95` and p-value, as text with the interval in brackets."""
        if value is None:
            return NONE
        write = _FORMATS[self.unit][1]
        p = getattr(value, "mcnemar_p", None)
        if hasattr(value, "ci95"):
            value, interval = value.value, value.ci95
        if interval is None:
            return write(value)
        end = "" if p is None else f", p {p_value(p)}"
        return f"{write(value)} [{write(interval[0])}, {write(interval[1])}]{end}"

    def shown(self, row: BaseModel, key: str) -> str:
        """Return the field `key` of `row` as text, with its interval where it has one."""
        return self.show(getattr(row, key), getattr(row, self.interval) if self.interval else None)

    @property
    def definition(self) -> str:
        """Formula and source as one sentence."""
        text = " ".join(self.formula.split()).removesuffix(".")
        return f"{text}{f' ({self.source})' if self.source else ''}."

    def __call__(self, schema: dict[str, Any]) -> None:
        """Describe the field in its JSON Schema."""
        units = {"%": "fraction", "points": "difference of fractions", "M": "count", "mJ": "J"}
        more = {"x-better": self.better, "x-source": self.source}
        schema |= {"title": self.name, "x-unit": units.get(self.unit, self.unit)}
        schema |= {key: value for key, value in more.items() if value}


def metric(
    name: str, unit: str = "", better: Better = "", *, default: Any = ..., **more: Any
) -> Any:
    """Declare a metric as a field, `top1: float = metric("top-1", "%", "higher")`; `more`: attributes of `Metric`."""
    return Field(default, json_schema_extra=Metric(name, unit, better, **more))


def metrics_of(row: type[BaseModel]) -> dict[str, Metric]:
    """Return the metrics of a row class by field, in the order in which they are declared."""
    return {
        key: replace(field.json_schema_extra, formula=field.description or "")
        for key, field in row.model_fields.items()
        if isinstance(field.json_schema_extra, Metric)
    }
