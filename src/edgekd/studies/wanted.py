"""What a user wants studied, checked word by word: recipes, domains, classes, parts of the labels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.data.image_set import ImageSet
from edgekd.data.subsets import check_unseen
from edgekd.distill.recipes import RECIPES

ADAPT_IMAGES = (25, 50, 100, 200, 400)


def named_recipes(wanted: Sequence[str], baseline: str | None) -> dict[str, str]:
    """Row name → recipe. `NAME=RECIPE` gives a recipe another name, so that one study can hold it with other settings.

    Every recipe is known, every name taken once, and the baseline is one of them.
    """
    names: dict[str, str] = {}
    for text in dict.fromkeys(wanted):
        name, equals, recipe = (part.strip() for part in text.partition("="))
        recipe = recipe if equals else name
        if recipe not in RECIPES:
            raise EdgekdError(
                f'There is no recipe "{recipe}".',
                did_you_mean(recipe, RECIPES) + " See: edgekd list recipes.",
            )
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
    if baseline is not None and baseline not in names:
        raise EdgekdError(
            f'The baseline "{baseline}" is not among the recipes.',
            did_you_mean(baseline, names) + " Add it to them.",
        )
    return names


def settings_by_recipe(texts: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """`RECIPE:name=value` strings by recipe."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, setting = text.partition(":")
        if not colon or "=" in name:
            raise EdgekdError(
                f'"{text}" is not a setting of one recipe.',
                "Write --recipe-set RECIPE:name=value, or --set for all.",
            )
        if name not in names:
            raise EdgekdError(f'The study has no recipe "{name}".', did_you_mean(name, names))
        found.setdefault(name, []).append(setting)
    return found


def domain_names(images: ImageSet, wanted: Sequence[str]) -> tuple[str, ...]:
    """The domains to leave out in turn; none named, or `all`, takes every one."""
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
            raise EdgekdError(
                f'{images.name} has no domain "{name}".', did_you_mean(name, images.domains)
            )
    return tuple(dict.fromkeys(wanted))


def unseen_names(images: ImageSet, wanted: Sequence[str], seed: int) -> tuple[str, ...]:
    """Class names as given, or a percentage of the classes, drawn by a hash of the seed and the name."""
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


def adapt_counts(
    wanted: Sequence[float], images: ImageSet, domains: Sequence[str | None]
) -> tuple[int, ...]:
    """Return numbers of unlabelled images, rising; those beyond half of a domain are left out, with a message.

    Raises:
        EdgekdError: all of them are beyond.
    """
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
