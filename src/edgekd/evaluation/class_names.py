"""Map class names of images to those of a model: spelling, and ImageNet's WordNet ids and class numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.readers import plain_name
from edgekd.data.image_set import ImageSet

_WNID = re.compile(r"n\d{8}")


def spoken_as(images: ImageSet, classes: Sequence[str], name: str) -> ImageSet:
    """Return the same images with class names as in `classes`.

    Names are equal if they differ only in case, spaces, underscores and hyphens. WordNet ids (`n01440764`) and class
    numbers (0–999) of ImageNet's 1,000 classes match each other.

    Raises:
        EdgekdError: a class is not among `classes`, or two classes would be the same.
    """
    if set(images.classes) <= set(classes):
        return images
    words = called(images.classes, classes)
    missing = [own for own, word in zip(images.classes, words, strict=True) if word is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EdgekdError(
            f'The images of {name} have a class "{missing[0]}"{more}, which the model does not have.',
            did_you_mean(missing[0], classes),
        )
    found = tuple(word for word in words if word is not None)
    if len(set(found)) < len(found):
        raise EdgekdError(f"Two class folders of {name} are one class of the model.", "Merge them.")
    return replace(images, classes=found)


def called(names: Sequence[str], classes: Sequence[str]) -> list[str | None]:
    """Return the entry of `classes` that matches each of `names`, or None; see `spoken_as`.

    WordNet ids and class numbers are only looked up if all `names` have that form.
    """
    plain = {plain_name(known): known for known in classes}
    words: list[str | None] = [None] * len(names)
    if len(plain) == len(classes):
        words = [plain.get(plain_name(name)) for name in names]
    if None not in words:
        return words
    numbers, known = _imagenet_numbers(names), _imagenet_numbers(classes)
    if not numbers or not known:
        return words
    of_number = dict(zip(known, classes, strict=True))
    return [of_number.get(number) for number in numbers]


def _imagenet_numbers(classes: Sequence[str]) -> list[int] | None:
    """Return class numbers 0–999 of WordNet ids or numbers; None for other names."""
    if all(name.isdecimal() and len(name) < 20 and int(name) < 1000 for name in classes):
        return [int(name) for name in classes]
    if not all(_WNID.fullmatch(name) and name in _wordnet_table() for name in classes):
        return None
    return [_wordnet_table()[name] for name in classes]


@cache
def _wordnet_table() -> dict[str, int]:
    """WordNet id → ImageNet's class number."""
    from timm.data import ImageNetInfo

    return {wnid: number for number, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
