"""The numbers of a study's tables, from finished cells alone.

DomainBed's conventions (Gulrajani and Lopez-Paz 2021): a mean over seeds, ± the standard error with the population's
standard deviation, `std(x / sqrt(n))`, ddof 0; the average over domains is taken per seed, without weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate.statistics import paired_seeds_interval
from edgekd.studies.store import Done, Outcome
from edgekd.targets.timing.intervals import Interval

ID, OOD, ORACLE = "id", "ood", "oracle"


@dataclass(frozen=True)
class Stat:
    """Per cent: a mean over `seeds` seeds and its standard error (population standard deviation; 0 for one seed)."""

    mean: float
    error: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """A recipe's line. Accuracies in per cent, differences in points; None where there is nothing to say.

    Attributes:
        id: in domain, averaged over the columns.
        columns: (column, measure) → accuracy.
        average: the measure `ood` averaged over the columns, of the seeds that have all of them.
        oracle: the same of the measure `oracle`, and of the same seeds; None if one of them lacks it.
        difference: mean over seeds of this average less the baseline's.
        t_interval: its 95 % interval over seeds, Student's t; None for one seed.
        image_interval: its 95 % interval over images, by a paired bootstrap.
        seconds: mean training time.
    """

    name: str
    id: Stat | None
    columns: Mapping[tuple[str, str], Stat]
    average: Stat | None
    difference: float | None = None
    t_interval: Interval | None = None
    image_interval: Interval | None = None
    seconds: float | None = None
    oracle: Stat | None = None


@dataclass(frozen=True)
class Table:
    """One table: a teacher's row, if there is one, then the recipes'. `title` is empty for a study's only table."""

    title: str
    columns: tuple[str, ...]
    measures: tuple[str, ...]
    names: Mapping[str, str]
    """Measure → how the table calls it."""
    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...]


def stat(values: Sequence[float]) -> Stat | None:
    """Mean and standard error of one value per seed, in the values' unit; None without values."""
    if not values:
        return None
    x = np.asarray(values, dtype=np.float64)
    return Stat(float(x.mean()), float(np.std(x / math.sqrt(len(x)))), len(x))


def t_interval(differences: Sequence[float]) -> Interval | None:
    """95 % interval of a mean of paired differences, Student's t with n − 1 degrees of freedom (sample deviation)."""
    n = len(differences)
    if n < 2:
        return None
    from scipy.special import stdtrit

    x = np.asarray(differences, dtype=np.float64)
    half = float(stdtrit(n - 1, 0.975)) * float(x.std(ddof=1)) / math.sqrt(n)
    return float(x.mean()) - half, float(x.mean()) + half


def recipe_rows(
    done: Sequence[Done],
    recipes: Sequence[str],
    columns: Sequence[str],
    measures: Sequence[str],
    baseline: str,
    *,
    macro: bool,
) -> list[Row]:
    """A row for every recipe that has a finished cell.

    Args:
        done: cells of one table.
        measures: shown per column; `id` is averaged over the columns.
        macro: accuracies are means over classes.
    """
    cells = {(one.cell.recipe, one.cell.column, one.cell.seed): one for one in done}
    found = []
    for recipe in recipes:
        own = [one for one in done if one.cell.recipe == recipe]
        if not own:
            continue
        average = _averages(cells, recipe, columns, OOD, macro)
        oracle = _averages(cells, recipe, columns, ORACLE, macro) if ORACLE in measures else {}
        row = Row(
            name=recipe,
            id=stat(list(_averages(cells, recipe, columns, ID, macro).values())),
            columns={
                (column, measure): value
                for column in columns
                for measure in (ID, *measures)
                if (value := stat(_values(own, column, measure, macro))) is not None
            },
            average=stat(list(average.values())),
            seconds=float(np.mean([one.facts["seconds"] for one in own])),
            oracle=stat(list(oracle.values())) if oracle.keys() == average.keys() else None,
        )
        found.append(
            row if recipe == baseline else _compared(row, cells, columns, average, baseline, macro)
        )
    return found


def _values(own: Sequence[Done], column: str, measure: str, macro: bool) -> list[float]:
    cells = [one for one in own if one.cell.column == column]
    values = [
        one.outcomes[measure].accuracy(macro=macro) for one in cells if measure in one.outcomes
    ]
    # It stands beside a mean over all seeds, and some would be another mean.
    return [] if measure == ORACLE and len(values) < len(cells) else values


def _averages(
    cells: Mapping[tuple[str, str, int], Done],
    recipe: str,
    columns: Sequence[str],
    measure: str,
    macro: bool,
) -> dict[int, float]:
    """Seed → unweighted mean over the columns, for the seeds that have every column."""
    averages = {}
    for seed in sorted({seed for name, _, seed in cells if name == recipe}):
        found = [cells.get((recipe, column, seed)) for column in columns]
        values = [
            one.outcomes[measure].accuracy(macro=macro)
            for one in found
            if one and measure in one.outcomes
        ]
        if len(values) == len(columns):
            averages[seed] = float(np.mean(values))
    return averages


def _compared(
    row: Row,
    cells: Mapping[tuple[str, str, int], Done],
    columns: Sequence[str],
    average: Mapping[int, float],
    baseline: str,
    macro: bool,
) -> Row:
    other = _averages(cells, baseline, columns, OOD, macro)
    seeds = [seed for seed in average if seed in other]
    if not seeds:
        return row
    differences = [average[seed] - other[seed] for seed in seeds]
    groups = []
    for column in columns:
        pair = [
            [cells[name, column, seed].outcomes[OOD] for seed in seeds]
            for name in (row.name, baseline)
        ]
        groups += _groups(pair[0], pair[1], macro)
    low, high = paired_seeds_interval(groups)
    return dataclasses.replace(
        row,
        difference=float(np.mean(differences)),
        t_interval=t_interval(differences),
        image_interval=(100 * low, 100 * high),
    )


def _groups(
    first: Sequence[Outcome], second: Sequence[Outcome], macro: bool
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """What an accuracy is an unweighted mean of: all images of a column, or those of each of its classes."""
    a, b = (
        np.stack([outcome.correct for outcome in side]) for side in (first, second)
    )  # [seeds, n]
    if not macro:
        return [(a, b)]
    labels = first[0].labels
    return [(a[:, labels == c], b[:, labels == c]) for c in np.unique(labels)]
