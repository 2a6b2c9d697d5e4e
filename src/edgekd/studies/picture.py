"""A study's tables as one picture: a panel per table, a group per column, a point with its error per recipe.

The oracle is left out: a point of it beside the others would be read as a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.benchmark.report.charts import COLOURS, LIGHT, dress, new_figure
from edgekd.core.files import replacing
from edgekd.studies.numbers import ORACLE, Table
from edgekd.studies.tables import TEACHER
from edgekd.studies.write import group_titles, group_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_study(tables: Sequence[Table], path: Path) -> None:
    """Write the picture as PNG."""
    tables = [
        dataclasses.replace(t, measures=tuple(m for m in t.measures if m != ORACLE)) for t in tables
    ]
    groups = max(len(group_titles(table)) for table in tables)
    figure = new_figure(max(500, 160 + 108 * groups), 72 + 260 * len(tables))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, sharey=True)[:, 0]
    names = [row.name for table in tables for row in table.rows if row.name != TEACHER]
    handles: dict[str, Any] = {}
    for axes, table in zip(panels, tables, strict=True):
        _draw(axes, table, list(dict.fromkeys(names)))
        found = axes.get_legend_handles_labels()
        handles |= {label: handle for handle, label in zip(*found, strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(5, len(handles)), frameon=False
    )  # fmt: skip
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=160)


def _draw(axes: Axes, table: Table, names: Sequence[str]) -> None:
    titles = group_titles(table)
    dress(axes, y=f"{table.title}: accuracy %" if table.title else "accuracy %")
    axes.grid(False, axis="x")
    axes.axvline(0.5, color=LIGHT["line"], linewidth=1)  # ID on its left
    axes.set_xticks(range(len(titles)), titles)
    axes.set_xlim(-0.5, len(titles) - 0.5)
    for row in table.rows:
        values = [(n, value) for n, value in enumerate(group_values(table, row)) if value]
        if row.name == TEACHER:
            for place, value in values:
                ends = place - 0.4, place + 0.4
                axes.hlines(value.mean, *ends, LIGHT["ct"], linestyles="dashed", label=row.name)
            continue
        number = names.index(row.name)
        shift = 0.7 * ((number + 0.5) / len(names) - 0.5)
        colour = LIGHT[f"c{number % COLOURS}"]
        for place, value in values:
            axes.errorbar(
                place + shift, value.mean, yerr=value.error if value.seeds > 1 else None, fmt="o", color=colour,
                markerfacecolor=colour if place else LIGHT["paper"], markersize=6, capsize=3, label=row.name,
            )  # fmt: skip
            axes.annotate(
                f"{value.mean:.1f}", (place + shift, value.mean + value.error), xytext=(0, 5),
                textcoords="offset points", ha="center", fontsize=7, color=colour,
            )  # fmt: skip
