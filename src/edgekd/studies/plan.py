"""What a study will do: its grid of cells, with everything checked that can be before the first one trains."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.configs.study import DECIDED, StudyConfig, decided
from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.files import short_hash
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import (
    check_unseen,
    left_to_test,
    run_split,
    take_shots,
    unseen_test,
    without_classes,
)
from edgekd.distill.classification.plan import settle
from edgekd.distill.recipes import RECIPES, Recipe, get_recipe
from edgekd.studies.store import Cell

FRACTIONS = (0.01, 0.1, 1.0)
SHOTS = (1, 4, 16)
ADAPT_IMAGES = (25, 50, 100, 200, 400)


@dataclass(frozen=True, eq=False)
class Test:
    """The test of one column's cells: indices into the study's images, and the classes to choose among.

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
        oracle: cells also test on the unseen images during training; see `edgekd.studies.cell`.
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

    def uses_teacher(self, name: str) -> bool:
        """Return True where a recipe of the study needs the teacher."""
        return recipe_of(self.configs[name]).uses_texts

    @property
    def macro(self) -> bool:
        """True where accuracies are means over classes."""
        return bool(self.unseen)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers of a cell, as JSON; the grid itself may grow."""
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
    """Return a configuration as JSON, without what a study or a cell decides."""
    return config.model_dump(mode="json", exclude=set(DECIDED) - {"smoke", "unseen_classes"})


def cell_config(config: TrainConfig, cell: Cell, folder: Path) -> TrainConfig:
    """Return the settings of a cell's run in `folder`."""
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


def description_file(folder: Path, spec: str) -> Path:
    """Return the file of a study that holds what a command for descriptions printed."""
    return folder.absolute() / f"descriptions-{short_hash(spec)[:8]}.json"


def with_description_file(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the settings with the study's file in place of a command for descriptions."""
    spec = config.descriptions
    if spec is None or not spec.startswith("command:"):
        return config
    return config.model_copy(update={"descriptions": str(description_file(folder, spec))})


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
        unseen = _unseen_names(images, study.unseen_classes or ("50%",), first.split_seed)
    update = {"unseen_classes": unseen}
    configs = {name: config.model_copy(update=update) for name, config in configs.items()}
    domains = _domains(study, images)
    fractions: tuple[float, ...] = (1.0,)
    counts: tuple[int, ...] = (0,)
    numbers: tuple[int | None, ...] = (None,)
    if study.protocol == "low-shot":
        fractions = tuple(sorted(set(study.fractions))) or FRACTIONS
    if study.protocol == "k-shot":
        counts = tuple(sorted(set(map(int, study.shots)))) or SHOTS
    if study.protocol == "adapt":
        numbers = _adapt_counts(study.adapt_images, images, domains)
    # What reads labels alone is trained once, and is in every table of the curve.
    adapts = {
        name: numbers if numbers == (None,) or recipe_of(config).takes_unlabelled else (0,)
        for name, config in configs.items()
    }
    cells = [
        Cell(name, seed, domain, fraction, count, adapt)
        for fraction in fractions
        for count in counts
        for seed in range(study.seeds)
        for domain in domains
        for name in named
        for adapt in adapts[name]
    ]
    _check_keys(cells)
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


def _check_keys(cells: Sequence[Cell]) -> None:
    """Check that no two cells have the same folder, as recipe `a-b` of domain `c` and recipe `a` of domain `b-c` do."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.key.casefold(), cell)
        if other is not cell:
            raise EdgekdError(
                f"The names {other.recipe} {other.column} and {cell.recipe} {cell.column} give one folder, {cell.key}.",
                "Give one of the recipes another name: --recipes NAME=RECIPE.",
            )


def named_recipes(wanted: Sequence[str], baseline: str | None) -> dict[str, str]:
    """Return row name → recipe; `NAME=RECIPE` gives a recipe another name, to have it with other settings too.

    Raises:
        EdgekdError: an unknown recipe, a name taken twice, a baseline that is none of them.
    """
    names: dict[str, str] = {}
    for text in dict.fromkeys(wanted):
        name, equals, recipe = (part.strip() for part in text.partition("="))
        recipe = recipe if equals else name
        message = f'There is no recipe "{recipe}".'
        check_known(recipe, RECIPES, message, " See: edgekd list recipes.")
        if not re.fullmatch(r"\w[\w.+ -]*", name):
            raise EdgekdError(
                f'"{name}" cannot name a row of a study.',
                "Use letters, digits, and . _ + - between.",
            )
        if name in names or (name in RECIPES and name != recipe):
            raise EdgekdError(
                f'The name "{name}" is taken by another recipe.',
                "Write NAME=RECIPE with a new name.",
            )
        names[name] = recipe
    if not names:
        raise EdgekdError("No recipe was named.", "Name some: --recipes erm,kd,vl2v-adip.")
    if baseline is not None:
        message = f'The baseline "{baseline}" is not among the recipes.'
        check_known(baseline, names, message, " Add it to them.")
    return names


def _settings_by_recipe(texts: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return `RECIPE:name=value` strings by recipe."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, setting = text.partition(":")
        if not colon or "=" in name:
            raise EdgekdError(
                f'"{text}" is not a setting of one recipe.',
                "Write --recipe-set RECIPE:name=value, or --set for all.",
            )
        check_known(name, names, f'The study has no recipe "{name}".')
        found.setdefault(name, []).append(setting)
    return found


def _configs(study: StudyConfig, named: Mapping[str, str]) -> dict[str, TrainConfig]:
    """Return name in the study → settled settings of its runs, all on the same images."""
    own = _settings_by_recipe(study.recipe_settings, tuple(named))
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
    wanted = tuple(dict.fromkeys(study.test_domains))
    if study.protocol == "low-shot" and not wanted and len(images.domains) > 1:
        wanted = images.domains[-1:]
    if study.protocol not in ("lodo", "adapt") and not wanted:
        if study.oracle:
            raise EdgekdError(
                f"{images.name} has no domain to leave out, so an oracle has nothing unseen to look at.",
                "Take --oracle out, or give images in domain/class/image folders.",
            )
        return (None,)
    if len(images.domains) < 2:
        raise EdgekdError(
            f"{images.name} has {'no domains' if images.domains == ('all',) else 'one domain'}, so none can be left "
            "out in turn.",
            "Give images in domain/class/image folders.",
        )
    if wanted in ((), ("all",)):
        return images.domains
    for name in wanted:
        check_known(name, images.domains, f'{images.name} has no domain "{name}".')
    return wanted


def _unseen_names(images: ImageSet, wanted: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return class names as given, or a percentage of the classes, drawn by a hash of the seed and the name."""
    if len(wanted) == 1 and (number := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", wanted[0])):
        count = round(float(number[1]) / 100 * len(images.classes))
        drawn = sorted(
            images.classes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()
        )[:count]
        wanted = sorted(drawn, key=images.classes.index)
    names = tuple(dict.fromkeys(wanted))
    check_unseen(TrainConfig(unseen_classes=names), images)
    if len(names) < 2:
        raise EdgekdError(
            f"{len(names)} classes are unseen; among fewer than two every answer is right.",
            "Name two or more: --unseen-classes dog,horse, or a part: --unseen-classes 30%.",
        )
    return names


def _adapt_counts(
    wanted: Sequence[float], images: ImageSet, domains: Sequence[str | None]
) -> tuple[int, ...]:
    """Return numbers of unlabelled images, rising; those beyond half of a domain are left out, with a message."""
    numbers = sorted({int(number) for number in wanted or ADAPT_IMAGES})
    sizes: dict[str, int] = {}
    for place, name in enumerate(images.domains):
        if name in domains:
            own = {images.keys[i] for i in np.flatnonzero(images.domain_of == place)}
            sizes[name] = len(own) // 2
    smallest = min(sizes, key=lambda name: sizes[name])
    kept = tuple(number for number in numbers if number <= sizes[smallest])
    if not kept:
        raise EdgekdError(
            f"Half of the domain {smallest} is {sizes[smallest]} images, fewer than {numbers[0]}.",
            f"Give fewer: --adapt-images {sizes[smallest]}.",
        )
    if beyond := numbers[len(kept) :]:
        say(
            f"study: half of {smallest} is {sizes[smallest]} images; left out: "
            f"{', '.join(map(str, beyond))}"
        )
    return kept


def recipe_of(config: TrainConfig) -> Recipe:
    """Return the recipe that a row of the study runs, with its own numbers."""
    return get_recipe(config.recipe, config.stages)


def default_baseline(configs: Mapping[str, TrainConfig], zero_shot: bool) -> str:
    """Return `erm`, or else the first recipe; for a zero-shot test the first that can name new classes."""
    names = list(configs)
    if zero_shot:
        return next((name for name in names if recipe_of(configs[name]).head == "text"), names[0])
    return "erm" if "erm" in names else names[0]


def _settled(config: TrainConfig, recipe: str, folder: Path) -> TrainConfig:
    """Return the configuration checked as a run's would be, with full paths."""
    for field in DECIDED.keys() & config.model_fields_set:
        raise decided(field)
    whole = settle(config.model_copy(update={"recipe": recipe, "out": folder, "overwrite": True}))
    paths = ("data", "teacher", "student_weights", "captions", "vocabulary", "descriptions")
    return config.model_copy(
        update={"recipe": recipe} | {field: getattr(whole, field) for field in paths}
    )


def _test(images: ImageSet, config: TrainConfig, shots: int) -> Test:
    """Return the test of a column; `shots` is the study's largest number, so that all have the same images."""
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
