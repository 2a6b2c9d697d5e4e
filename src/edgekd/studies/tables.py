"""The tables of a study: a row for each recipe and one for the teacher, and notes.

The conventions are DomainBed's (Gulrajani and Lopez-Paz 2021): a mean over seeds ± the standard error, computed as
`std(x / sqrt(n))` with ddof 0. The average over domains is computed per seed, without weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate.statistics import Pair, paired_interval
from edgekd.core.errors import EdgekdError
from edgekd.core.files import render_template
from edgekd.core.machine import describe, in_cores
from edgekd.data.subsets import left_to_test, take_shots
from edgekd.studies.cell import ID, ID_TUNED, OOD, ORACLE, RETRIEVAL, RETRIEVAL_TEACHER, ZERO_SHOT
from edgekd.studies.plan import Plan, Test, recipe_of
from edgekd.studies.store import NONE_UNLABELLED, Cell, Done, Outcome
from edgekd.targets.timing.intervals import Interval

TEACHER = "teacher zero-shot"


@dataclass(frozen=True)
class Stat:
    """A mean over `seeds` seeds and its standard error in percent (population standard deviation; 0 for one seed)."""

    mean: float
    error: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """A recipe's row. Accuracies are in percent, differences in points; None if there is no value.

    Attributes:
        id: in-domain accuracy, averaged over the columns.
        columns: (column, measure) → accuracy.
        average: the measure `ood` averaged over the columns, for seeds that have all columns.
        oracle: the measure `oracle`, averaged like `average` over the same seeds.
        difference: mean over seeds of `average` minus the baseline's.
        t_interval: 95 % interval of `difference` over seeds, Student's t; None for one seed.
        image_interval: 95 % interval of `difference` over images, paired bootstrap.
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
    """One table: the teacher's row, if there is one, then a row per recipe.

    Attributes:
        title: empty for a study's only table.
        names: measure → its name in the table.
    """

    title: str
    columns: tuple[str, ...]
    measures: tuple[str, ...]
    names: Mapping[str, str]
    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...]


def make_tables(
    plan: Plan, done: Sequence[Done], scores: NDArray[np.float32] | None
) -> list[Table]:
    """Return the study's tables from the finished cells; `scores` are the teacher's on all images."""

    def by_labels_alone(cell: Cell) -> bool:
        """Return whether the recipe uses only labels; it is then in every table of the curve and has no own table."""
        return cell.adapt == 0 and not recipe_of(plan.configs[cell.recipe]).takes_unlabelled

    titles = list(dict.fromkeys(cell.table for cell in plan.cells))
    if len(titles) > 1 and all(
        by_labels_alone(cell) for cell in plan.cells if cell.table == NONE_UNLABELLED
    ):
        titles = [title for title in titles if title != NONE_UNLABELLED]
    names = measures_of(plan)
    shown = tuple(measure for measure in names if measure != ID)
    tables = []
    for title in titles:
        columns = tuple(dict.fromkeys(cell.column for cell in plan.cells if cell.table == title))
        tests = {column: plan.tests[title, column] for column in columns}
        own = [
            _checked(plan, one)
            for one in done
            if one.cell.table == title or by_labels_alone(one.cell)
        ]
        rows = recipe_rows(own, plan.recipes, columns, shown, plan.baseline, macro=plan.macro)
        if scores is not None:
            rows.insert(0, _teacher_row(plan, tests, scores))
        headline = title or ("100 % of the training labels" if plan.protocol == "low-shot" else "")
        notes = tuple(_notes(plan, own, tests))
        tables.append(Table(headline, columns, shown, names, tuple(rows), plan.baseline, notes))
    return tables


def measures_of(plan: Plan) -> dict[str, str]:
    """Return measure → its name in the tables, in order."""
    if plan.protocol == "k-shot":
        return {
            ID: "seen",
            ZERO_SHOT: "unseen zero-shot",
            RETRIEVAL: "unseen retrieval",
            RETRIEVAL_TEACHER: "by teacher's keys",
            OOD: "unseen fine-tuned",
            ID_TUNED: "seen fine-tuned",
        }
    if plan.unseen:
        return {ID: "seen classes", OOD: "unseen classes"}
    if plan.protocol == "adapt":
        return {ID: "ID", OOD: "adapted"}
    return {ID: "ID", OOD: "OOD"} | ({ORACLE: "oracle"} if plan.oracle else {})


def stat(values: Sequence[float]) -> Stat | None:
    """Return mean and standard error of one value per seed, in the unit of the values; None without values."""
    if not values:
        return None
    x = np.asarray(values, dtype=np.float64)
    return Stat(float(x.mean()), float(x.std() / math.sqrt(len(x))), len(x))


def t_interval(differences: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of a mean of paired differences, by Student's t with n − 1 degrees of freedom."""
    from scipy import stats

    if len(differences) < 2:
        return None
    mean, error = np.mean(differences), stats.sem(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return float(mean - half), float(mean + half)


def recipe_rows(
    done: Sequence[Done],
    recipes: Sequence[str],
    columns: Sequence[str],
    measures: Sequence[str],
    baseline: str,
    *,
    macro: bool,
) -> list[Row]:
    """Return a row for every recipe with a finished cell in one table.

    Args:
        measures: shown per column; `id` is averaged over the columns.
        macro: whether accuracies are means over classes.
    """
    outcomes: dict[tuple[str, str], dict[str, dict[int, Outcome]]] = {}
    """(recipe, column) → measure → seed → outcome."""
    for one in done:
        for measure, outcome in one.outcomes.items():
            place = outcomes.setdefault((one.cell.recipe, one.cell.column), {})
            place.setdefault(measure, {})[one.cell.seed] = outcome

    def of_column(recipe: str, column: str, measure: str) -> dict[int, float]:
        by_seed = outcomes.get((recipe, column), {}).get(measure, {})
        return {seed: one.accuracy(macro=macro) for seed, one in sorted(by_seed.items())}

    def per_seed(recipe: str, measure: str) -> dict[int, float]:
        """Return seed → unweighted mean over the columns, for seeds that have all columns."""
        by_column = [of_column(recipe, column, measure) for column in columns]
        whole = [seed for seed in by_column[0] if all(seed in one for one in by_column)]
        return {seed: float(np.mean([one[seed] for one in by_column])) for seed in whole}

    rows = []
    for recipe in recipes:
        seconds = [one.facts["seconds"] for one in done if one.cell.recipe == recipe]
        if not seconds:
            continue
        cells: dict[tuple[str, str], Stat] = {}
        for column in columns:
            seeds = {seed for own in outcomes.get((recipe, column), {}).values() for seed in own}
            for measure in (ID, *measures):
                found = stat(list(of_column(recipe, column, measure).values()))
                # The oracle is shown next to a mean over all seeds, so it needs the same seeds.
                if found and (measure != ORACLE or found.seeds == len(seeds)):
                    cells[column, measure] = found
        average, other = per_seed(recipe, OOD), per_seed(baseline, OOD)
        oracle = per_seed(recipe, ORACLE) if ORACLE in measures else {}
        row = Row(
            name=recipe,
            id=stat(list(per_seed(recipe, ID).values())),
            columns=cells,
            average=stat(list(average.values())),
            seconds=float(np.mean(seconds)),
            oracle=stat(list(oracle.values())) if oracle.keys() == average.keys() else None,
        )
        common = [seed for seed in average if seed in other]
        if recipe != baseline and common:
            differences = [average[seed] - other[seed] for seed in common]
            pairs = []
            for column in columns:
                own, base = (outcomes[name, column][OOD] for name in (recipe, baseline))
                pairs += _pairs(
                    [own[seed] for seed in common], [base[seed] for seed in common], macro
                )
            low, high = paired_interval(pairs)
            row = dataclasses.replace(
                row,
                difference=float(np.mean(differences)),
                t_interval=t_interval(differences),
                image_interval=(100 * low, 100 * high),
            )
        rows.append(row)
    return rows


def _pairs(first: Sequence[Outcome], second: Sequence[Outcome], macro: bool) -> list[Pair]:
    """Return the groups of images that an accuracy averages: all images of a column, or one group per class."""
    a, b = (np.stack([one.correct for one in side]) for side in (first, second))  # [seeds, n]
    if not macro:
        return [(a, b)]
    labels = first[0].labels
    return [(a[:, labels == c], b[:, labels == c]) for c in np.unique(labels)]


def _checked(plan: Plan, done: Done) -> Done:
    """Return the outcomes on the images that every number of shots leaves; other images are an `EdgekdError`."""
    test, left = plan.tests[done.cell.table, done.cell.column], None
    outside = test.ood
    if done.cell.shots:
        seed = plan.configs[done.cell.recipe].split_seed
        shots = take_shots(plan.images, plan.unseen, done.cell.shots, seed)
        left = outside = left_to_test(plan.images, plan.unseen, shots)
    inner = _labels(plan, test.id, test.id_classes)
    outer = _labels(plan, outside, test.ood_classes)
    outcomes = {name: done.outcomes[name] for name in measures_of(plan) if name in done.outcomes}
    for name, one in outcomes.items():
        inside = name in (ID, ID_TUNED)
        if not np.array_equal(np.sort(one.labels), inner if inside else outer):
            raise EdgekdError(
                f"The outcome of the cell {done.cell.key} is for other images than this study tests on.",
                "Remove its line from cells.jsonl, and the cell runs again.",
            )
        if left is not None and not inside:
            common = np.isin(left, test.ood)
            outcomes[name] = Outcome(one.correct[common], one.labels[common])
    return dataclasses.replace(done, outcomes=outcomes)


def _labels(plan: Plan, indices: NDArray[np.int64], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the labels of images as indices into `classes`, sorted."""
    places = {name: place for place, name in enumerate(classes)}
    place_of = np.array([places.get(name, -1) for name in plan.images.classes], dtype=np.int64)
    return np.sort(place_of[plan.images.labels[indices]])


def _teacher_row(plan: Plan, tests: Mapping[str, Test], scores: NDArray[np.float32]) -> Row:
    def accuracy(indices: NDArray[np.int64], classes: tuple[str, ...]) -> Stat:
        columns = np.array([plan.images.classes.index(name) for name in classes])
        labels = plan.images.labels[indices]
        found = Outcome(columns[scores[indices][:, columns].argmax(axis=1)] == labels, labels)
        return Stat(found.accuracy(macro=plan.macro), 0.0, 1)

    def average(found: Mapping[tuple[str, str], Stat]) -> Stat | None:
        # The teacher has no seeds, and the spread over domains is not an error over seeds.
        return Stat(float(np.mean([one.mean for one in found.values()])), 0.0, 1) if found else None

    inside = {(column, ID): accuracy(test.id, test.id_classes) for column, test in tests.items()}
    # With shots, compare with the students' zero-shot accuracy, since the teacher's classifier uses no shots.
    measure = ZERO_SHOT if plan.protocol == "k-shot" else OOD
    outside = {
        (column, measure): accuracy(test.ood, test.ood_classes)
        for column, test in tests.items()
        if len(test.ood)
    }
    return Row(TEACHER, average(inside), inside | outside, average(outside))


def _notes(plan: Plan, done: Sequence[Done], tests: Mapping[str, Test]) -> list[str]:
    """Return notes on protocol, images, split, selection, budget, seeds, definitions and machine."""
    facts, machine = [one.facts for one in done], describe()
    selections: dict[str, dict[str, None]] = {}
    for one in done:
        selections.setdefault(one.facts["selection"], {})[one.cell.recipe] = None
    described = [name for name in plan.recipes if plan.configs[name].descriptions]
    # The teacher's descriptions are those of the first recipe that uses the teacher.
    if next(filter(plan.uses_teacher, plan.recipes), None) in described:
        described.insert(0, TEACHER)
    text = render_template(
        __package__,
        "notes.jinja",
        plan=plan,
        tests=tests,
        config=plan.configs[plan.recipes[0]],
        unseen=", ".join(plan.unseen),
        trained_heads=[n for n in plan.recipes if recipe_of(plan.configs[n]).head != "text"],
        rule=next(iter(tests.values())).rule.partition("; ")[2],
        described=described,
        selections=selections,
        budget=sorted({(one["steps"], one["size"]) for one in facts}),
        tuning=sorted({one["tuning_steps"] for one in facts if "tuning_steps" in one}),
        oracle_places=sorted({one["oracle_places"] for one in facts if "oracle_places" in one}),
        machine=machine,
        cores=in_cores(machine["usable_cores"]),
    )
    return [" ".join(note.split()) for note in text.split("\n\n") if note.strip()]
