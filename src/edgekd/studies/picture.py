"""A study's tables as one picture: a panel per table, a group per column, a point with its error per recipe.

Without the oracle: a point of it beside the others would be read as a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.files import replacing
from edgekd.studies.numbers import ORACLE, Row, Stat, Table
from edgekd.studies.tables import TEACHER
from edgekd.studies.write import group_titles, group_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HUES = (
    "#3182bd",
    "#e6550d",
    "#31a354",
    "#756bb1",
    "#d6a500",
    "#c51b8a",
    "#17becf",
    "#8c6d31",
    "#636363",
    "#843c39",
)
_TEACHER = "#525252"


def draw_study(tables: Sequence[Table], path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = [
        dataclasses.replace(t, measures=tuple(m for m in t.measures if m != ORACLE)) for t in tables
    ]
    groups = max(len(group_titles(table)) for table in tables)
    figure = Figure(
        figsize=(max(7.0, 2.2 + 1.5 * groups), 1.0 + 3.6 * len(tables)),
        dpi=160,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, squeeze=False, sharey=True)
    names = list(
        dict.fromkeys(row.name for table in tables for row in table.rows if row.name != TEACHER)
    )
    for axes, table in zip(panels[:, 0], tables, strict=True):
        _draw(axes, table, names)
    handles: dict[str, Any] = {}
    for axes in panels[:, 0]:
        handles |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(5, len(handles)),
        frameon=False,
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")


def _draw(axes: Axes, table: Table, names: Sequence[str]) -> None:
    titles = group_titles(table)
    for row in table.rows:
        values = group_values(table, row)
        if row.name == TEACHER:
            for place, value in enumerate(values):
                if value is not None:
                    axes.hlines(
                        value.mean,
                        place - 0.4,
                        place + 0.4,
                        _TEACHER,
                        linestyles="dashed",
                        label=row.name,
                    )
            continue
        number = names.index(row.name)
        shift = 0.7 * ((number + 0.5) / len(names) - 0.5)
        _points(axes, row, values, shift, _HUES[number % len(_HUES)])
    axes.axvline(0.5, color="#d0d0d0", linewidth=1)  # ID on its left
    axes.set_xticks(range(len(titles)), titles)
    axes.set_xlim(-0.5, len(titles) - 0.5)
    axes.set_ylabel("accuracy %")
    axes.grid(axis="y", color="#ececec")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if table.title:
        axes.set_title(table.title, loc="left", fontsize=10)


def _points(axes: Axes, row: Row, values: Sequence[Stat | None], shift: float, colour: str) -> None:
    for place, value in enumerate(values):
        if value is None:
            continue
        axes.errorbar(
            place + shift, value.mean, yerr=value.error if value.seeds > 1 else None, fmt="o", color=colour,
            markerfacecolor="white" if place == 0 else colour, markersize=6, capsize=3, label=row.name,
        )  # fmt: skip
        axes.annotate(
            f"{value.mean:.1f}", (place + shift, value.mean + value.error), xytext=(0, 5), textcoords="offset points",
            ha="center", fontsize=7, color=colour,
        )  # fmt: skip
