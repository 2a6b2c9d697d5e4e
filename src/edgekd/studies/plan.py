"""What a study will do: its grid of cells, with everything checked that can be before the first one trains."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.config import TrainConfig, load_config
from edgekd.data import ImageSet, load_images
from edgekd.distill.plan import settle
from edgekd.distill.recipes import RECIPES
from edgekd.errors import EdgekdError, did_you_mean
from edgekd.files import short_hash
from edgekd.split import Split, make_split

PROTOCOLS = ("lodo",)
_OWN = {
    "recipe": "--recipes", "seed": "--seeds", "test_domain": "--test-domains", "out": "--out", "resume": "nothing",
    "overwrite": "another --out", "smoke": "--set steps=4",
}  # fmt: skip
"""Settings of a run that a study decides, and what to say instead."""


@dataclass(frozen=True)
class Cell:
    """One training and its test. `domain` is the unseen one, None where none is left out."""

    recipe: str
    seed: int
    domain: str | None = None

    @property
    def table(self) -> str:
        """Cells of one table are averaged and compared; the name of the table among the study's."""
        return ""

    @property
    def column(self) -> str:
        """What is unseen."""
        return self.domain or ""

    @property
    def key(self) -> str:
        """A file name, different for every cell."""
        name = "-".join(part for part in (self.recipe, self.column, str(self.seed)) if part)
        plain = re.sub(r"[^\w.+-]", "_", name)
        return plain if plain == name else f"{plain}-{short_hash(name)[:6]}"


@dataclass(frozen=True, eq=False)
class Plan:
    """A study before it runs.

    Attributes:
        configs: recipe → the settings of its runs, but for what a cell adds.
        splits: (table, column) → the split of its cells.
        fingerprint: 16 hex digits over the images' contents and labels.
    """

    protocol: str
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    configs: Mapping[str, TrainConfig]
    cells: tuple[Cell, ...]
    images: ImageSet
    splits: Mapping[tuple[str, str], Split]
    fingerprint: str

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a cell, as JSON; the grid itself may grow."""
        return {
            "protocol": self.protocol,
            "images": self.fingerprint,
            "recipes": {name: plain_settings(config) for name, config in self.configs.items()},
        }


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON, without what a study or a cell decides."""
    return config.model_dump(mode="json", exclude=set(_OWN) - {"smoke"})


def cell_config(config: TrainConfig, cell: Cell, folder: Path) -> TrainConfig:
    """The settings of a cell's run in `folder`."""
    return config.model_copy(
        update={"recipe": cell.recipe, "seed": cell.seed, "test_domain": cell.domain or "none", "out": folder}
    )


def study_folder(protocol: str, data: str | None) -> Path:
    """Where a study goes unless told otherwise; the same for the same words, so that it goes on there."""
    return Path("studies") / f"{protocol}-{Path(data or 'toy').stem}"


def make_plan(
    recipes: Sequence[str],
    *,
    protocol: str,
    seeds: int,
    test_domains: Sequence[str],
    baseline: str | None,
    out: Path,
    options: Mapping[str, Any],
    file: Path | None,
    settings: Iterable[str],
    recipe_settings: Iterable[str],
) -> Plan:
    """Settle and check a study.

    Raises:
        EdgekdError: unknown names, a recipe whose needs cannot be met, images that the protocol cannot split.
    """
    if protocol not in PROTOCOLS:
        raise EdgekdError(f'There is no protocol "{protocol}".', did_you_mean(protocol, PROTOCOLS))
    names = _recipes(recipes, baseline)
    if seeds < 1:
        raise EdgekdError(f"A study over {seeds} seeds has no runs.", "Give --seeds 1 or more; 3 are usual.")
    own = _by_recipe(recipe_settings, names)
    settings = list(settings)
    configs = {
        name: _settled(
            load_config(dict(options), file=file, settings=[*settings, *own.get(name, ())]), name, out / "runs" / name
        )
        for name in names
    }
    first = configs[names[0]]
    for name, config in configs.items():
        for field in ("data", "split_seed"):
            if getattr(config, field) != getattr(first, field):
                raise EdgekdError(
                    f"{name} would run with another {field} than {names[0]}.", "One study compares on the same images."
                )
    images = load_images(first.data)
    domains = _domains(images, test_domains)
    splits = {("", domain): make_split(images, test_domain=domain, seed=first.split_seed) for domain in domains}
    cells = [Cell(name, seed, domain) for seed in range(seeds) for domain in domains for name in names]
    return Plan(
        protocol=protocol,
        recipes=names,
        seeds=tuple(range(seeds)),
        baseline=baseline or ("erm" if "erm" in names else names[0]),
        configs=configs,
        cells=tuple(cells),
        images=images,
        splits=splits,
        fingerprint=_fingerprint(images),
    )


def _recipes(recipes: Sequence[str], baseline: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(recipes))
    if not names:
        raise EdgekdError("No recipe was named.", "Name some: --recipes erm,kd,vl2v-adip.")
    for name in names:
        if name not in RECIPES:
            raise EdgekdError(
                f'There is no recipe "{name}".', did_you_mean(name, RECIPES) + " See: edgekd list recipes."
            )
    if baseline is not None and baseline not in names:
        raise EdgekdError(
            f'The baseline "{baseline}" is not among the recipes.', did_you_mean(baseline, names) + " Add it to them."
        )
    return names


def _by_recipe(texts: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """`RECIPE:name=value` strings by recipe."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, setting = text.partition(":")
        if not colon or "=" in name:
            raise EdgekdError(
                f'"{text}" is not a setting of one recipe.', "Write --recipe-set RECIPE:name=value, or --set for all."
            )
        if name not in names:
            raise EdgekdError(f'The study has no recipe "{name}".', did_you_mean(name, names))
        found.setdefault(name, []).append(setting)
    return found


def _settled(config: TrainConfig, recipe: str, folder: Path) -> TrainConfig:
    """The configuration checked as a run's would be, with full paths."""
    for field, instead in _OWN.items():
        if field in config.model_fields_set:
            raise EdgekdError(f"A study decides {field} itself, and it is set.", f"Take it out; give {instead}.")
    whole = settle(config.model_copy(update={"recipe": recipe, "out": folder, "overwrite": True}))
    paths = ("data", "teacher", "student_weights", "captions", "vocabulary", "descriptions")
    return config.model_copy(update={"recipe": recipe} | {field: getattr(whole, field) for field in paths})


def _domains(images: ImageSet, wanted: Sequence[str]) -> tuple[str, ...]:
    if len(images.domains) < 2:
        raise EdgekdError(
            f"{images.name} has {'no domains' if images.domains == ('all',) else 'one domain'}, so none can be left "
            "out in turn.",
            "Give images in domain/class/image folders.",
        )
    if tuple(wanted) in ((), ("all",)):
        return images.domains
    for name in wanted:
        if name not in images.domains:
            raise EdgekdError(f'{images.name} has no domain "{name}".', did_you_mean(name, images.domains))
    return tuple(dict.fromkeys(wanted))


def _fingerprint(images: ImageSet) -> str:
    digest = hashlib.sha256("\0".join(images.classes).encode())
    for index in sorted(range(len(images)), key=lambda i: (images.keys[i], images.ids[i])):
        place = f"{images.keys[index]}:{images.labels[index]}:{images.domains[images.domain_of[index]]}"
        digest.update(place.encode())
    return digest.hexdigest()[:16]
