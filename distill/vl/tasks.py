"""The three tasks, two of which generate sentences from class and domain names of any sorted images.

Results on generated sentences ("PACS-VE" on PACS) are marked *synthetic*. The sentence of a picture depends only on its
content hash.
"""

from __future__ import annotations

import re

import numpy as np

from edgekd.configs.vl import VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.text_bank import readable
from edgekd.distill.vl.data import VlData, VlSplit, split_examples
from edgekd.distill.vl.easy_vqa import load_easy_vqa

LABELS = ("entailment", "contradiction", "neutral")
CHOICES = 4
_ABOUT_CLASS = ("there is {a} in the picture", "this shows {a}", "one can see {a} here")
_ABOUT_STYLE = ("this is {style} of {a}", "the picture is {style} with {a}")
_NEUTRAL = ("the {name} is old", "the {name} belongs to a child", "the {name} was made in spring")
"""Statements that class and domain names do not decide. Their words reveal the label: compare with `question-only`."""


def load_examples(config: VlTrainConfig, data: str | None = None) -> tuple[VlData, VlSplit]:
    """Return the examples of a run and their split; `data` is their current place."""
    shifted, seed = config.test_domain != "none", config.split_seed
    found = load_vl_data(config.task, data or config.data, shifted=shifted)
    domain, fraction = config.test_domain, config.fraction
    return found, split_examples(found, test_domain=domain, fraction=fraction, seed=seed)


def load_vl_data(task: str, data: str, *, shifted: bool = False) -> VlData:
    """Load the examples of a task: `vqa` of `easy-vqa`, `ve` and `choice` of any images that `edgekd train` takes.

    With `shifted`, one domain (easy-VQA: some colour × shape combinations) will be left out; generated sentences then
    do not name domains, since the unseen one's name would be an unknown word.
    """
    if task == "vqa":
        if data != "easy-vqa":
            raise EdgekdError(
                f'The task vqa needs questions and answers, but "{data}" has none.',
                "Use --data easy-vqa, or --task ve with a folder of images.",
            )
        return load_easy_vqa(shifted=shifted)
    if data == "easy-vqa":
        raise EdgekdError(
            f"easy-vqa has questions, but the task {task} generates its sentences from class folders.",
            "Use --task vqa, or give a folder of images.",
        )
    make = make_entailment if task == "ve" else make_choice
    return make(load_images(data), styles=not shifted)


def article(name: str) -> str:
    """Return a noun with its article: `elephant` → `an elephant`."""
    return f"{'an' if re.match('[aeiou]', name, re.IGNORECASE) else 'a'} {name}"


def make_entailment(images: ImageSet, *, styles: bool) -> VlData:
    """Generate three sentences per picture, one of each label.

    A true sentence names the class, and with `styles` and domains also the domain. A false one names another class or
    domain. A neutral one states an attribute of the class that is not in any folder name.
    """
    styles = styles and len(images.domains) > 1
    rows: list[tuple[str, int]] = []
    for index in range(len(images)):
        rng = _own_rng(images, index, "ve-1")
        name, domain = int(images.labels[index]), int(images.domain_of[index])
        wrong_name, wrong_domain = _other(rng, len(images.classes), name), domain
        if styles and rng.random() < 0.5:
            wrong_name, wrong_domain = name, _other(rng, len(images.domains), domain)
        about_style = styles and rng.random() < 0.5
        rows.append((_sentence(images, rng, name, domain, about_style), 0))
        about_style = styles and wrong_domain != domain
        rows.append((_sentence(images, rng, wrong_name, wrong_domain, about_style), 1))
        rows.append((str(rng.choice(_NEUTRAL)).format(name=readable(images.classes[name])), 2))
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
    """Generate one question per picture: which of up to four captions, of different classes, describes it."""
    count, n_classes = min(CHOICES, len(images.classes)), len(images.classes)
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
        first = n_classes * int(images.domain_of[index]) if styles else 0
        others = rng.permutation([c for c in range(n_classes) if c != name])[: count - 1]
        shown = rng.permutation([name, *others])
        candidates.append(first + shown)
        labels.append(int(np.flatnonzero(shown == name)[0]))
    return VlData(
        name=f"{images.name}-choice (synthetic)",
        task="choice",
        synthetic=True,
        images=images,
        image_of=np.arange(len(images), dtype=np.int64),
        texts=captions,
        text_of=np.array(candidates, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        answers=tuple(f"candidate {number + 1}" for number in range(count)),
        statements=(_class_statements(images),),
        statements_of=np.zeros(len(images), dtype=np.int64),
        truth=images.labels,
    )


def _class_statements(images: ImageSet) -> tuple[str, ...]:
    names = [readable(name) for name in images.classes]
    if len(set(names)) != len(names):
        raise EdgekdError(
            f"Two classes of {images.name} read the same.", "Rename one of their folders."
        )
    return tuple(f"a picture of {article(name)}" for name in names)


def _sentence(
    images: ImageSet, rng: np.random.Generator, name: int, domain: int, about_style: bool
) -> str:
    template = str(rng.choice(_ABOUT_STYLE if about_style else _ABOUT_CLASS))
    own, style = readable(images.classes[name]), readable(images.domains[domain])
    return template.format(a=article(own), style=article(style))


def _own_rng(images: ImageSet, index: int, what: str) -> np.random.Generator:
    return np.random.default_rng([int(images.keys[index], 16), *what.encode()])


def _other(rng: np.random.Generator, count: int, own: int) -> int:
    """Return a random number below `count` other than `own`."""
    return (own + 1 + int(rng.integers(count - 1))) % count
