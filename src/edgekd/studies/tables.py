"""A study's tables: which cells belong together, the teacher's row on top, and what stands under each table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.core.machine import describe
from edgekd.studies.numbers import ID, OOD, ORACLE, Row, Stat, Table, recipe_rows, stat
from edgekd.studies.plan import NONE_UNLABELLED, Cell, Plan, Test, recipe_of
from edgekd.studies.shots import ID_TUNED, RETRIEVAL, RETRIEVAL_TEACHER, ZERO_SHOT, on_common_images
from edgekd.studies.store import Done, Outcome
from edgekd.studies.teacher import uses_teacher

TEACHER = "teacher zero-shot"


def make_tables(
    plan: Plan, done: Sequence[Done], scores: NDArray[np.float32] | None
) -> list[Table]:
    """The study's tables from the cells that are finished.

    Args:
        scores: the teacher's, on all images; see `teacher_scores`.
    """
    tables = []
    titles = list(dict.fromkeys(cell.table for cell in plan.cells))
    # A recipe of labels alone stands in every table of the curve, and has none of its own.
    if len(titles) > 1 and not any(
        cell.table == NONE_UNLABELLED and recipe_of(plan.configs[cell.recipe]).takes_unlabelled
        for cell in plan.cells
    ):
        titles = [title for title in titles if title != NONE_UNLABELLED]
    for title in titles:
        columns = tuple(dict.fromkeys(cell.column for cell in plan.cells if cell.table == title))
        own = [on_common_images(plan, one) for one in done if in_table(plan, one.cell, title)]
        tests = {column: plan.tests[title, column] for column in columns}
        names = measures_of(plan)
        shown = tuple(measure for measure in names if measure != ID)
        rows = recipe_rows(own, plan.recipes, columns, shown, plan.baseline, macro=plan.macro)
        if scores is not None:
            rows.insert(0, _teacher_row(plan, tests, scores))
        headline = title or ("100 % of the training labels" if plan.protocol == "low-shot" else "")
        notes = tuple(_notes(plan, own, tests))
        tables.append(Table(headline, columns, shown, names, tuple(rows), plan.baseline, notes))
    return tables


def in_table(plan: Plan, cell: Cell, title: str) -> bool:
    """Whether a cell stands in a table: its own, or every one of the curve for a recipe of labels alone."""
    alone = cell.adapt == 0 and not recipe_of(plan.configs[cell.recipe]).takes_unlabelled
    return cell.table == title or alone


def measures_of(plan: Plan) -> dict[str, str]:
    """What the tables show, in order, and how they call it."""
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


def _teacher_row(plan: Plan, tests: dict[str, Test], scores: NDArray[np.float32]) -> Row:
    def accuracy(indices: NDArray[np.int64], classes: tuple[str, ...]) -> Stat:
        columns = np.array([plan.images.classes.index(name) for name in classes])
        labels = plan.images.labels[indices]
        found = Outcome(columns[scores[indices][:, columns].argmax(axis=1)] == labels, labels)
        return Stat(found.accuracy(macro=plan.macro), 0.0, 1)

    inside = {(column, ID): accuracy(test.id, test.id_classes) for column, test in tests.items()}
    # With shots this stands beside the students' zero-shot: the teacher's classifier has seen none of them.
    measure = ZERO_SHOT if plan.protocol == "k-shot" else OOD
    outside = {
        (column, measure): accuracy(test.ood, test.ood_classes)
        for column, test in tests.items()
        if len(test.ood)
    }
    means = [stat([value.mean for value in found.values()]) for found in (inside, outside)]
    # Its spread over domains is not an error over seeds, of which it has none.
    averages = [None if mean is None else Stat(mean.mean, 0.0, 1) for mean in means]
    return Row(TEACHER, averages[0], inside | outside, averages[1])


def _protocol(plan: Plan) -> str:
    if plan.protocol == "k-shot":
        return (
            f"Protocol: k-shot. The classes {', '.join(plan.unseen)} do not train at first. Then a few images of each "
            "are shown: retrieval caches them (Tip-Adapter on the student's embeddings, or on its features and without "
            "texts where it has a trained head; by teacher's keys: on the teacher's of ten views of each), fine-tuning "
            "goes on from the same run on the seen classes and these "
            "images. All numbers of images are tested on the same ones, those that the largest leaves. Unseen classes "
            "are chosen among the unseen, seen ones among the seen; macro accuracy, the mean over classes, in %."
        )
    if plan.unseen:
        linear = [name for name in plan.recipes if recipe_of(plan.configs[name]).head != "text"]
        without = (
            f" A trained head knows its own classes alone: no zero-shot for {', '.join(linear)}."
            if linear
            else ""
        )
        return (
            f"Protocol: class-disjoint. The classes {', '.join(plan.unseen)} never train. Unseen classes: all their "
            "images, zero-shot through the text head, chosen among the unseen classes; seen classes: their test "
            f"images, chosen among the seen ones. Macro accuracy, the mean over classes, in %.{without}"
        )
    if plan.protocol == "adapt":
        return (
            "Protocol: adapt. One domain has no labels: of one half of it the first images by content hash train "
            "without any, and its other half is tested: top-1 %. That is adaptation: the domain is not unseen. ID: the "
            "test images of the other domains. Recipes that read labels alone saw none of it."
        )
    what = (
        "leave one domain out"
        if plan.protocol == "lodo"
        else "low-shot, the tests are those of all labels"
    )
    return (
        f"Protocol: {what}. OOD: all images of the unseen domain, top-1 %; ID: the test images of the source domains"
        f"{', averaged over the unseen domains' if len(plan.tests) > 1 else ''}."
    )


def _texts(plan: Plan) -> list[str]:
    """Which rows have descriptions of the classes in their prompts; the teacher's are those of the first it teaches."""
    with_them = [name for name in plan.recipes if plan.configs[name].descriptions]
    if not with_them:
        return []
    taught = [name for name in plan.recipes if uses_teacher(plan, name)]
    rows = [TEACHER] * (taught[0] in with_them) + with_them
    return [
        f"Descriptions of the classes stand behind the prompts, in training and in every test, of: {', '.join(rows)}."
    ]


def _oracle(done: Sequence[Done]) -> str:
    """What the columns of the oracle are, and that they are no result."""
    counts = sorted({one.facts["oracle_places"] for one in done if ORACLE in one.outcomes})
    where = f"{' or '.join(map(str, counts))} places" if counts else "places"
    return (
        f"Oracle: for each run the best accuracy on the unseen domain among the weights that it keeps and those at "
        f"{where} of its last stage, chosen by looking at these very images: not a result that a user can have. "
        "– where one of the runs was trained without --oracle."
    )


def _notes(plan: Plan, done: Sequence[Done], tests: dict[str, Test]) -> list[str]:
    """Protocol, images, split, selection, budget, seeds, what the numbers mean, and the machine."""
    config = plan.configs[plan.recipes[0]]
    sizes = ", ".join(
        f"{column} {len(test.id):,} / {len(test.ood):,}".strip() for column, test in tests.items()
    )
    hashes = ", ".join(f"{column} {test.hash}".strip() for column, test in tests.items())
    rule = next(iter(tests.values())).rule.partition("; ")[2]
    selections: dict[str, list[str]] = {}
    for one in done:
        named = selections.setdefault(one.facts["selection"], [])
        if one.cell.recipe not in named:
            named.append(one.cell.recipe)
    named_apart = [f"{how} ({', '.join(names)})" for how, names in selections.items()]
    chosen = "; ".join(named_apart if len(selections) > 1 else selections)
    budget = sorted({(one.facts["steps"], one.facts["size"]) for one in done})
    steps = ", ".join(
        f"{count:,} steps of {config.batch_size} images at {size} px" for count, size in budget
    )
    tuning = sorted({one.facts["tuning_steps"] for one in done if "tuning_steps" in one.facts})
    if tuning:
        steps += f", fine-tuning {', '.join(f'{count:,}' for count in tuning)} more"
    machine = describe()
    tested = "tested" if tuning else "unseen"
    nothing = "Nothing but the oracle" if plan.oracle else "Nothing"
    what = "fine-tuned accuracy on what is unseen" if tuning else "accuracy on what is unseen"
    return [
        _protocol(plan),
        f"Data: {plan.images.name}; images tested ({'seen / unseen' if plan.unseen else 'ID / OOD'}): {sizes}.",
        f"Split: {rule} {'Hashes' if len(tests) > 1 else 'Hash'}: {hashes}.",
        *_texts(plan),
        f"Selection: {chosen or 'no cell has finished'}. {nothing} looks at the {tested} images.",
        *([_oracle(done)] if plan.oracle else []),
        f"Budget: {config.student}, {steps or 'no cell has finished'}; seeds {', '.join(map(str, plan.seeds))}.",
        f"±: standard error over seeds with the population's standard deviation (DomainBed). − {plan.baseline}: the "
        f"{what} less the baseline's, in points, with 95 % intervals: over seeds (Student's t), and over images "
        "(paired bootstrap).",
        f"Machine: {machine['cpu']}, {machine['usable_cores']} cores; edgekd {machine['versions']['edgekd']}, torch "
        f"{machine['versions']['torch']}. Seconds are of training alone and depend on what else ran.",
    ]
