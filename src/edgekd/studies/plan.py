"""What a study will do: its grid of cells, with everything checked that can be before the first one trains."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.configs.study import DECIDED, StudyConfig, decided
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.files import short_hash
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import left_to_test, run_split, take_shots, unseen_test, without_classes
from edgekd.distill.classification.plan import settle
from edgekd.distill.recipes import Recipe, get_recipe
from edgekd.studies.wanted import (
    adapt_counts,
    domain_names,
    named_recipes,
    settings_by_recipe,
    unseen_names,
)

NONE_UNLABELLED = "no unlabelled images"
FRACTIONS = (0.01, 0.1, 1.0)
SHOTS = (1, 4, 16)


@dataclass(frozen=True)
class Cell:
    """One training and its test. `recipe` is its name in the study, `domain` the unseen one, None where none is."""

    recipe: str
    seed: int
    domain: str | None = None
    fraction: float = 1.0
    """Of the training labels."""
    shots: int = 0
    """Images of each unseen class that may be looked at."""
    adapt: int | None = None
    """Images of the unseen domain that train without labels, where the other half of it is tested."""

    @property
    def table(self) -> str:
        """Cells of one table are averaged and compared; the name of the table among the study's."""
        if self.adapt is not None:
            return (
                f"{self.adapt} unlabelled images of the new domain"
                if self.adapt
                else NONE_UNLABELLED
            )
        if self.shots:
            return f"{self.shots} image{'' if self.shots == 1 else 's'} of each unseen class"
        return "" if self.fraction == 1 else f"{100 * self.fraction:g} % of the training labels"

    @property
    def column(self) -> str:
        """What is unseen."""
        return self.domain or ""

    @property
    def key(self) -> str:
        """A file name, different for every cell."""
        part = "" if self.fraction == 1 else f"{self.fraction:g}"
        shots = f"{self.shots}shot" if self.shots else ""
        adapt = f"{self.adapt}unlabelled" if self.adapt is not None else ""
        name = "-".join(
            word for word in (self.recipe, self.column, part, shots, adapt, str(self.seed)) if word
        )
        plain = re.sub(r"[^\w.+-]", "_", name)
        return plain if plain == name else f"{plain}-{short_hash(name)[:6]}"


@dataclass(frozen=True, eq=False)
class Test:
    """What the cells of one column are tested on: indices into the study's images, and the classes to choose among.

    `id_classes` and `ood_classes` are the same for unseen domains and disjoint for unseen classes.
    """

    id: NDArray[np.int64]
    ood: NDArray[np.int64]
    id_classes: tuple[str, ...]
    ood_classes: tuple[str, ...]
    hash: str
    rule: str


@dataclass(frozen=True, eq=False)
class Plan:
    """A study before it runs.

    Attributes:
        configs: name in the study → the settings of its runs, but for what a cell adds.
        tests: (table, column) → what its cells are tested on.
        unseen: the classes that never train.
        fingerprint: 16 hex digits over the images' contents and labels.
        oracle: cells also look at the unseen images on the way; see `edgekd.studies.oracle`.
    """

    protocol: str
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    configs: Mapping[str, TrainConfig]
    cells: tuple[Cell, ...]
    images: ImageSet
    tests: Mapping[tuple[str, str], Test]
    unseen: tuple[str, ...]
    fingerprint: str
    oracle: bool = False

    @property
    def macro(self) -> bool:
        """Whether accuracies are means over classes."""
        return bool(self.unseen)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a cell, as JSON; the grid itself may grow."""
        return {
            "protocol": self.protocol,
            "images": self.fingerprint,
            "unseen_classes": list(self.unseen),
            "recipes": {
                name: plain_settings(config)
                | ({"recipe": config.recipe} if config.recipe != name else {})
                for name, config in self.configs.items()
            },
        }


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON, without what a study or a cell decides."""
    return config.model_dump(mode="json", exclude=set(DECIDED) - {"smoke", "unseen_classes"})


def cell_config(config: TrainConfig, cell: Cell, folder: Path) -> TrainConfig:
    """The settings of a cell's run in `folder`."""
    return config.model_copy(
        update={
            "seed": cell.seed,
            "test_domain": cell.domain or "none",
            "label_fraction": cell.fraction,
            "shots": cell.shots,
            "adapt": cell.adapt,
            "out": folder,
        }
    )


def make_plan(study: StudyConfig) -> Plan:
    """Settle and check a study.

    Raises:
        EdgekdError: unknown names, a recipe whose needs cannot be met, images that the protocol cannot split.
    """
    named = named_recipes(study.recipes, study.baseline)
    configs = _configs(study, named)
    first = next(iter(configs.values()))
    images = load_images(first.data)
    unseen: tuple[str, ...] = ()
    if study.by_class:
        unseen = unseen_names(images, study.unseen_classes or ("50%",), first.split_seed)
    configs = {
        name: config.model_copy(update={"unseen_classes": unseen})
        for name, config in configs.items()
    }
    domains = _domains(study, images)
    parts = (
        (1.0,) if study.protocol != "low-shot" else tuple(sorted(set(study.fractions))) or FRACTIONS
    )
    counts = (
        (0,) if study.protocol != "k-shot" else tuple(sorted(set(map(int, study.shots)))) or SHOTS
    )
    numbers: tuple[int | None, ...] = (None,)
    if study.protocol == "adapt":
        numbers = adapt_counts(study.adapt_images, images, domains)
    # What reads labels alone is trained once, and is in every table of the curve.
    adapts = {
        name: (0,) if numbers != (None,) and not recipe_of(config).takes_unlabelled else numbers
        for name, config in configs.items()
    }
    cells = [
        Cell(name, seed, domain, part, count, adapt)
        for part in parts
        for count in counts
        for seed in range(study.seeds)
        for domain in domains
        for name in named
        for adapt in adapts[name]
    ]
    tests: dict[tuple[str, str], Test] = {}
    for cell in cells:
        if (cell.table, cell.column) not in tests:
            config = cell_config(next(iter(configs.values())), cell, study.folder)
            tests[cell.table, cell.column] = _test(images, config, max(counts))
    return Plan(
        protocol=study.protocol,
        recipes=tuple(named),
        seeds=tuple(range(study.seeds)),
        baseline=study.baseline or default_baseline(configs, study.protocol == "class-disjoint"),
        configs=configs,
        cells=tuple(cells),
        images=images,
        tests=tests,
        unseen=unseen,
        fingerprint=_fingerprint(images),
        oracle=study.oracle,
    )


def _configs(study: StudyConfig, named: Mapping[str, str]) -> dict[str, TrainConfig]:
    """Return name in the study → settled settings of its runs, all on the same images."""
    own = settings_by_recipe(study.recipe_settings, tuple(named))
    configs = {
        name: _settled(study.train_config(own.get(name, ())), recipe, study.folder / "runs" / name)
        for name, recipe in named.items()
    }
    first = next(iter(configs))
    for name, config in configs.items():
        for field in ("data", "split_seed"):
            if getattr(config, field) != getattr(configs[first], field):
                raise EdgekdError(
                    f"{name} would run with another {field} than {first}.",
                    "One study compares on the same images.",
                )
    return configs


def _domains(study: StudyConfig, images: ImageSet) -> tuple[str | None, ...]:
    """Return the domains to leave out in turn; None stands for none."""
    if study.protocol in ("lodo", "adapt"):
        return domain_names(images, study.test_domains or ("all",))
    if study.protocol == "low-shot" and (study.test_domains or len(images.domains) > 1):
        return domain_names(images, study.test_domains or images.domains[-1:])
    if study.oracle:
        raise EdgekdError(
            f"{images.name} has no domain to leave out, so an oracle has nothing unseen to look at.",
            "Take --oracle out, or give images in domain/class/image folders.",
        )
    return (None,)


def recipe_of(config: TrainConfig) -> Recipe:
    """The recipe that a row of the study runs, with its own numbers."""
    return get_recipe(config.recipe, config.stages)


def default_baseline(configs: Mapping[str, TrainConfig], zero_shot: bool) -> str:
    """`erm`, or else the first recipe; for a zero-shot test the first that can name new classes."""
    names = list(configs)
    if zero_shot:
        return next((name for name in names if recipe_of(configs[name]).head == "text"), names[0])
    return "erm" if "erm" in names else names[0]


def _settled(config: TrainConfig, recipe: str, folder: Path) -> TrainConfig:
    """The configuration checked as a run's would be, with full paths."""
    for field in DECIDED.keys() & config.model_fields_set:
        raise decided(field)
    whole = settle(config.model_copy(update={"recipe": recipe, "out": folder, "overwrite": True}))
    paths = ("data", "teacher", "student_weights", "captions", "vocabulary", "descriptions")
    return config.model_copy(
        update={"recipe": recipe} | {field: getattr(whole, field) for field in paths}
    )


def _test(images: ImageSet, config: TrainConfig, shots: int) -> Test:
    """`shots`: the largest number of the study, so that every number is tested on the same images."""
    own = without_classes(images, config.unseen_classes)
    split = run_split(config.model_copy(update={"shots": 0}), own)
    unseen = config.unseen_classes
    places = {name: index for index, name in enumerate(images.ids)}
    inside = np.array([places[own.ids[i]] for i in split.id_test], dtype=np.int64)
    outside = unseen_test(images, unseen) if unseen else split.ood_test
    if shots:
        outside = left_to_test(images, unseen, take_shots(images, unseen, shots, config.split_seed))
    return Test(inside, outside, own.classes, unseen or images.classes, split.hash, split.rule)


def _fingerprint(images: ImageSet) -> str:
    digest = hashlib.sha256("\0".join(images.classes).encode())
    for index in sorted(range(len(images)), key=lambda i: (images.keys[i], images.ids[i])):
        place = (
            f"{images.keys[index]}:{images.labels[index]}:{images.domains[images.domain_of[index]]}"
        )
        digest.update(place.encode())
    return digest.hexdigest()[:16]
