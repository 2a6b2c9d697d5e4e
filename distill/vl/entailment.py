"""Sentences generated from class and domain names: visual entailment and multiple choice on any sorted images.

On PACS this is "PACS-VE". Nobody wrote these sentences about the pictures, so every result on them is
marked *synthetic*. Which sentence a picture gets follows from its content hash alone.
"""

from __future__ import annotations

import re

import numpy as np

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet
from edgekd.distill.prompts import readable
from edgekd.distill.vl.data import VlData

LABELS = ("entailment", "contradiction", "neutral")
_ABOUT_CLASS = ("there is {a} in the picture", "this shows {a}", "one can see {a} here")
_ABOUT_STYLE = ("this is {style} of {a}", "the picture is {style} with {a}")
_UNDECIDED = ("the {name} is old", "the {name} belongs to a child", "the {name} was made in spring")
"""What no class or domain name decides. A student can learn to know these by their words alone: compare with the
student that does not see the picture."""
CHOICES = 4


def article(name: str) -> str:
    """`elephant` → `an elephant`."""
    return f"{'an' if re.match('[aeiou]', name, re.IGNORECASE) else 'a'} {name}"


def make_entailment(images: ImageSet, *, styles: bool) -> VlData:
    """Three sentences per picture, one of each label.

    A true one names its class, and its domain where `styles` and there are domains; a false one another class or
    another domain; an undecided one an attribute of its class that no folder name tells.
    """
    styles = styles and len(images.domains) > 1
    rows: list[tuple[str, int]] = []
    for index in range(len(images)):
        rng = _own_rng(images, index, "ve-1")
        name, domain = int(images.labels[index]), int(images.domain_of[index])
        wrong_name, wrong_domain = _other(rng, len(images.classes), name), domain
        if styles and rng.random() < 0.5:
            wrong_name, wrong_domain = name, _other(rng, len(images.domains), domain)
        rows.append((_sentence(images, rng, name, domain, styles), 0))
        about_style = styles and wrong_domain != domain
        rows.append((_sentence(images, rng, wrong_name, wrong_domain, styles, about_style), 1))
        rows.append((str(rng.choice(_UNDECIDED)).format(name=readable(images.classes[name])), 2))
    texts = tuple(sorted({text for text, _ in rows}))
    place = {text: number for number, text in enumerate(texts)}
    image_of = np.repeat(np.arange(len(images), dtype=np.int64), 3)
    return VlData(
        name=f"{images.name}-ve (synthetic)",
        task="ve",
        synthetic=True,
        images=images,
        image_of=image_of,
        texts=texts,
        text_of=np.array([place[text] for text, _ in rows], dtype=np.int64),
        labels=np.array([label for _, label in rows], dtype=np.int64),
        answers=LABELS,
        statements=(_class_statements(images),),
        statements_of=np.zeros(len(rows), dtype=np.int64),
        truth=images.labels[image_of],
    )


def make_choice(images: ImageSet, *, styles: bool) -> VlData:
    """One question per picture: which of up to four captions is its own; the others name other classes."""
    count = min(CHOICES, len(images.classes))
    styles = styles and len(images.domains) > 1
    captions = tuple(
        f"{article(readable(domain)) if styles else 'a picture'} of {article(readable(name))}"
        for domain in (images.domains if styles else ("",))
        for name in images.classes
    )
    candidates, labels = [], []
    for index in range(len(images)):
        rng = _own_rng(images, index, "choice-1")
        name = int(images.labels[index])
        first = len(images.classes) * int(images.domain_of[index]) if styles else 0
        others = rng.permutation([c for c in range(len(images.classes)) if c != name])[: count - 1]
        shown = rng.permutation([name, *others])
        candidates.append(first + shown)
        labels.append(int(np.flatnonzero(shown == name)[0]))
    numbers = np.arange(len(images), dtype=np.int64)
    return VlData(
        name=f"{images.name}-choice (synthetic)",
        task="choice",
        synthetic=True,
        images=images,
        image_of=numbers,
        texts=captions,
        text_of=np.array(candidates, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        answers=tuple(f"candidate {number + 1}" for number in range(count)),
        statements=(_class_statements(images),),
        statements_of=np.zeros(len(images), dtype=np.int64),
        truth=images.labels,
    )


def _class_statements(images: ImageSet) -> tuple[str, ...]:
    if len(set(map(readable, images.classes))) != len(images.classes):
        raise EdgekdError(
            f"Two classes of {images.name} read the same.", "Rename one of their folders."
        )
    return tuple(f"a picture of {article(readable(name))}" for name in images.classes)


def _sentence(
    images: ImageSet,
    rng: np.random.Generator,
    name: int,
    domain: int,
    styles: bool,
    about_style: bool | None = None,
) -> str:
    if about_style is None:
        about_style = styles and rng.random() < 0.5
    template = str(rng.choice(_ABOUT_STYLE if about_style else _ABOUT_CLASS))
    return template.format(
        a=article(readable(images.classes[name])), style=article(readable(images.domains[domain]))
    )


def _own_rng(images: ImageSet, index: int, what: str) -> np.random.Generator:
    return np.random.default_rng([int(images.keys[index], 16), *what.encode()])


def _other(rng: np.random.Generator, count: int, own: int) -> int:
    """A number below `count` that is not `own`."""
    return (own + 1 + int(rng.integers(count - 1))) % count
