"""Plan the cells of a study, and check everything that can be checked before training."""

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
    """The test of one column: indices into the study's images, and the candidate classes.

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
    """A checked study, before it runs.

    Attributes:
        configs: name in the study → settings of its runs, without those of the cell.
        tests: (table, column) → test of its cells.
        unseen: the classes left out of training.
        fingerprint: 16 hex digits, a hash of the images' contents and labels.
        oracle: whether cells also test on the unseen images during training; see `edgekd.studies.cell`.
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
        """Return whether a recipe of the study needs the teacher."""
        return recipe_of(self.configs[name]).uses_texts

    @property
    def macro(self) -> bool:
        """Whether accuracies are means over classes."""
        return bool(self.unseen)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the results of a cell, as JSON. Cells may be added to the study later."""
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
    """Return a configuration as JSON, without the settings of a study or a cell."""
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
    """Return the file in a study's folder with the output of a command for descriptions."""
    return folder.absolute() / f"descriptions-{short_hash(spec)[:8]}.json"


def with_description_file(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the settings with a command for descriptions replaced by the study's file."""
    spec = config.descriptions
    if spec is None or not spec.startswith("command:"):
        return config
    return config.model_copy(update={"descriptions": str(description_file(folder, spec))})


def make_plan(study: StudyConfig) -> Plan:
    """Return the plan of a study after checking it.

    Raises:
        EdgekdError: unknown names, a recipe whose requirements are not met, images that the protocol cannot split.
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
    # A recipe that uses only labels is trained once and shown in every table of the curve.
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
    """Check that no two cells have the same folder, such as recipe `a-b` on domain `c` and recipe `a` on `b-c`."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.key.casefold(), cell)
        if other is not cell:
            raise EdgekdError(
                f"{other.recipe} {other.column} and {cell.recipe} {cell.column} have the same folder, {cell.key}.",
                "Rename one of the recipes: --recipes NAME=RECIPE.",
            )


def named_recipes(wanted: Sequence[str], baseline: str | None) -> dict[str, str]:
    """Return row name → recipe. `NAME=RECIPE` renames a recipe, so that it can appear with several settings.

    Raises:
        EdgekdError: an unknown recipe, a repeated name, or a baseline that is not among them.
    """
    names: dict[str, str] = {}
    for text in dict.fromkeys(wanted):
        name, equals, recipe = (part.strip() for part in text.partition("="))
        recipe = recipe if equals else name
        message = f'There is no recipe "{recipe}".'
        check_known(recipe, RECIPES, message, " See: edgekd list recipes.")
        if not re.fullmatch(r"\w[\w.+ -]*", name):
            raise EdgekdError(
                f'"{name}" is not a valid row name.',
                "Use letters and digits, separated by . _ + or -",
            )
        if name in names or (name in RECIPES and name != recipe):
            raise EdgekdError(
                f'The name "{name}" is already used by another recipe.',
                "Write NAME=RECIPE with a new name.",
            )
        names[name] = recipe
    if not names:
        raise EdgekdError("No recipe was given.", "For example: --recipes erm,kd,vl2v-adip.")
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
                f'"{text}" is not a setting of a recipe.',
                "Write --recipe-set RECIPE:name=value, or use --set for all recipes.",
            )
        check_known(name, names, f'The study has no recipe "{name}".')
        found.setdefault(name, []).append(setting)
    return found


def _configs(study: StudyConfig, named: Mapping[str, str]) -> dict[str, TrainConfig]:
    """Return name in the study → checked settings of its runs, all on the same images."""
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
                    f"The setting {field} differs between {name} and {first}.",
                    "Use the same images for all recipes of a study.",
                )
    return configs


def _domains(study: StudyConfig, images: ImageSet) -> tuple[str | None, ...]:
    """Return the domains to leave out, one at a time; None leaves none out."""
    wanted = tuple(dict.fromkeys(study.test_domains))
    if study.protocol == "low-shot" and not wanted and len(images.domains) > 1:
        wanted = images.domains[-1:]
    if study.protocol not in ("lodo", "adapt") and not wanted:
        if study.oracle:
            raise EdgekdError(
                f"{images.name} has no domain to leave out, so there are no unseen images for --oracle.",
                "Remove --oracle, or give images in domain/class/image folders.",
            )
        return (None,)
    if len(images.domains) < 2:
        raise EdgekdError(
            f"{images.name} has {'no domains' if images.domains == ('all',) else 'one domain'}, so none can be left "
            "out.",
            "Give images in domain/class/image folders.",
        )
    if wanted in ((), ("all",)):
        return images.domains
    for name in wanted:
        check_known(name, images.domains, f'{images.name} has no domain "{name}".')
    return wanted


def _unseen_names(images: ImageSet, wanted: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return the given class names, or a percentage of the classes, chosen by a hash of seed and name."""
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
            f"The number of unseen classes is {len(names)}, but at least two are needed.",
            "Name them, as in --unseen-classes dog,horse, or give a percentage: --unseen-classes 30%.",
        )
    return names


def _adapt_counts(
    wanted: Sequence[float], images: ImageSet, domains: Sequence[str | None]
) -> tuple[int, ...]:
    """Return the numbers of unlabelled images, sorted; leave out, with a message, those over half of a domain."""
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
            f"Half of the domain {smallest} has {sizes[smallest]} images, fewer than {numbers[0]}.",
            f"Give fewer: --adapt-images {sizes[smallest]}.",
        )
    if beyond := numbers[len(kept) :]:
        say(
            f"study: half of {smallest} has {sizes[smallest]} images; left out: "
            f"{', '.join(map(str, beyond))}"
        )
    return kept


def recipe_of(config: TrainConfig) -> Recipe:
    """Return the recipe of a row of the study, with the row's settings."""
    return get_recipe(config.recipe, config.stages)


def default_baseline(configs: Mapping[str, TrainConfig], zero_shot: bool) -> str:
    """Return `erm`, else the first recipe; for a zero-shot test, the first one with a text head."""
    names = list(configs)
    if zero_shot:
        return next((name for name in names if recipe_of(configs[name]).head == "text"), names[0])
    return "erm" if "erm" in names else names[0]


def _settled(config: TrainConfig, recipe: str, folder: Path) -> TrainConfig:
    """Return the configuration after the checks of a run, with absolute paths."""
    for field in DECIDED.keys() & config.model_fields_set:
        raise decided(field)
    whole = settle(config.model_copy(update={"recipe": recipe, "out": folder, "overwrite": True}))
    paths = ("data", "teacher", "student_weights", "captions", "vocabulary", "descriptions")
    return config.model_copy(
        update={"recipe": recipe} | {field: getattr(whole, field) for field in paths}
    )


def _test(images: ImageSet, config: TrainConfig, shots: int) -> Test:
    """Return the test of a column; `shots` is the largest number in the study, so that all cells have the same test."""
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
