"""A study's tables: which cells belong together, the teacher's row on top, and what stands under each table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.environment import describe
from edgekd.split import Split
from edgekd.studies.numbers import ID, OOD, Row, Stat, Table, recipe_rows
from edgekd.studies.plan import Plan
from edgekd.studies.store import Done, Outcome

TEACHER = "teacher zero-shot"


def make_tables(plan: Plan, done: Sequence[Done], scores: NDArray[np.float32] | None) -> list[Table]:
    """The study's tables from the cells that are finished.

    Args:
        scores: the teacher's, on all images; see `teacher_scores`.
    """
    tables = []
    for title in dict.fromkeys(cell.table for cell in plan.cells):
        columns = tuple(dict.fromkeys(cell.column for cell in plan.cells if cell.table == title))
        own = [one for one in done if one.cell.table == title]
        splits = {column: plan.splits[title, column] for column in columns}
        rows = recipe_rows(own, plan.recipes, columns, (OOD,), plan.baseline, macro=False)
        if scores is not None:
            rows.insert(0, _teacher_row(plan, splits, scores))
        notes = tuple(_notes(plan, own, splits))
        tables.append(Table(title, columns, (OOD,), tuple(rows), plan.baseline, notes))
    return tables


def _teacher_row(plan: Plan, splits: dict[str, Split], scores: NDArray[np.float32]) -> Row:
    outcome = Outcome(scores.argmax(axis=1) == plan.images.labels, plan.images.labels)

    def on(indices: NDArray[np.int64]) -> float:
        return Outcome(outcome.correct[indices], outcome.labels[indices]).accuracy(macro=False)

    columns = {}
    for column, split in splits.items():
        columns[column, ID] = Stat(on(split.id_test), 0.0, 1)
        columns[column, OOD] = Stat(on(split.ood_test), 0.0, 1)
    inside, outside = ([columns[column, name].mean for column in splits] for name in (ID, OOD))
    return Row(TEACHER, Stat(float(np.mean(inside)), 0.0, 1), columns, Stat(float(np.mean(outside)), 0.0, 1))


def _notes(plan: Plan, done: Sequence[Done], splits: dict[str, Split]) -> list[str]:
    """Protocol, images, split, selection, budget, seeds, what the numbers mean, and the machine."""
    config = plan.configs[plan.recipes[0]]
    sizes = ", ".join(f"{column} {len(split.id_test):,} / {len(split.ood_test):,}" for column, split in splits.items())
    hashes = ", ".join(f"{column} {split.hash}" for column, split in splits.items())
    rule = next(iter(splits.values())).rule.partition("; ")[2]
    selections: dict[str, list[str]] = {}
    for one in done:
        named = selections.setdefault(one.facts["selection"], [])
        if one.cell.recipe not in named:
            named.append(one.cell.recipe)
    chosen = "; ".join(
        f"{how} ({', '.join(names)})" if len(selections) > 1 else how for how, names in selections.items()
    )
    budget = sorted({(one.facts["steps"], one.facts["size"]) for one in done})
    steps = ", ".join(f"{count:,} steps of {config.batch_size} images at {size} px" for count, size in budget)
    machine = describe()
    return [
        "Protocol: leave one domain out. OOD: all images of the unseen domain, top-1 %; ID: the test images of the "
        "source domains, averaged over the unseen domains.",
        f"Data: {plan.images.name}; images tested (ID / OOD): {sizes}.",
        f"Split: {rule} Hashes: {hashes}.",
        f"Selection: {chosen or 'no cell has finished'}. Nothing looks at the unseen images.",
        f"Budget: {config.student}, {steps or 'no cell has finished'}; seeds {', '.join(map(str, plan.seeds))}.",
        "±: standard error over seeds with the population's standard deviation (DomainBed). Differences: OOD average "
        f"less that of {plan.baseline}, in points, with 95 % intervals: over seeds (Student's t), and over images "
        "(paired bootstrap).",
        f"Machine: {machine['cpu']}, {machine['usable_cores']} cores; edgekd {machine['versions']['edgekd']}, torch "
        f"{machine['versions']['torch']}. Seconds are of training alone and depend on what else ran.",
    ]
