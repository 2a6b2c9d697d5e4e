"""The definition of a number: name, unit, direction, formula and source, written beside the field that holds it.

Tables, gates, charts, the definitions in every report and the JSON Schema read these definitions and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, GetJsonSchemaHandler

NONE = "–"
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
    """A number of a report, as metadata of its field: `top1: Annotated[float, Metric("top-1", "%", "higher", …)]`.

    Attributes:
        name: as tables show it.
        unit: one of `%` and `points` (stored as fractions), `ms`, `s`, `MB` (10⁶ bytes), `M` (stored as a count), `mJ`
            (stored as joules), `W`, `1/s`, `count`, `p`, or none.
        better: which direction is better; empty where neither is.
        formula: the definition, without a full stop.
        source: the paper or document that defines it.
        missing: why the value can be None.
        interval: name of the field with its 95 % interval.
        gate: whether a gate may use it; by default whatever has a better direction.
        compute: calculates it from logits and labels; the evaluation then fills the field of every accuracy row.
    """

    name: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    formula: str = ""
    source: str = ""
    missing: str = "it was not measured"
    interval: str = ""
    gate: bool | None = None
    compute: Compute | None = None

    @property
    def heading(self) -> str:
        """Name, unit and direction, such as `p90 ms ↓`."""
        arrow = {"higher": "↑", "lower": "↓", "": ""}[self.better]
        return " ".join(part for part in (self.name, _FORMATS[self.unit][0], arrow) if part)

    @property
    def gated(self) -> bool:
        return bool(self.better) if self.gate is None else self.gate

    @property
    def is_share(self) -> bool:
        """Whether gates and tables show it times 100."""
        return self.unit in ("%", "points")

    def in_unit(self, value: float) -> float:
        """Return a stored value in the unit of gates, without the digits that binary fractions add."""
        return round(100 * value, 9) if self.is_share else value

    def show(self, value: Any, interval: tuple[float, float] | None = None) -> str:
        """Return a value, or a difference that carries its `ci95`, as text with its interval in brackets."""
        if value is None:
            return NONE
        write = _FORMATS[self.unit][1]
        if hasattr(value, "ci95"):
            value, interval = value.value, value.ci95
        if interval is None:
            return write(value)
        return f"{write(value)} [{write(interval[0])}, {write(interval[1])}]"

    def shown(self, row: BaseModel, key: str) -> str:
        """Return the field `key` of `row` as text, with its interval where it has one."""
        return self.show(getattr(row, key), getattr(row, self.interval) if self.interval else None)

    @property
    def definition(self) -> str:
        """Formula and source as one sentence."""
        return f"{self.formula}{f' ({self.source})' if self.source else ''}."

    def __get_pydantic_json_schema__(
        self, core: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        unit = {"%": "fraction", "points": "difference of fractions", "M": "count", "mJ": "J"}
        return handler(core) | {
            "title": self.name,
            "description": self.definition,
            "x-unit": unit.get(self.unit, self.unit),
            "x-better": self.better,
        }


def metrics_of(row: type[BaseModel]) -> dict[str, Metric]:
    """Return the metrics of a row class by field, in the order in which they are declared."""
    return {
        key: found
        for key, field in row.model_fields.items()
        for found in field.metadata
        if isinstance(found, Metric)
    }
