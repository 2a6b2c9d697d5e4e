"""easy-VQA (Zhou 2019, MIT): 5,000 pictures of one coloured shape, 48,248 questions, 13 answers.

Pictures and questions are in the package `easy-vqa`. Three answers in four are yes or no, so a constant answer is right
for about 37 %.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import read_json, sha256_file
from edgekd.data.image_set import ImageSet
from edgekd.data.sources.source import FileReader
from edgekd.distill.vl.data import VlData

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
HELD_OUT = tuple(
    f"{colour} {shape}"
    for s, shape in enumerate(SHAPES)
    for c, colour in enumerate(COLOURS)
    if (c + s) % 4 == 0
)
"""The six combinations left out for the shifted setting: two colours of every shape, no colour in two shapes."""
_UNKNOWN = "unknown"


def load_easy_vqa(*, shifted: bool = False) -> VlData:
    """Load the examples of both parts of easy-VQA, with the published roles `train` and `test`.

    With `shifted`, pictures have the domains `seen` and `held-out` by their combination of colour and shape, and those
    whose questions do not name both (about one in eight) are left out.
    """
    root = _package_folder() / "data"
    rows: list[tuple[str, str, str]] = []  # picture, question, answer
    for part in ("train", "test"):
        entries = read_json(root / part / "questions.json", "question file of easy-vqa")
        rows += [(f"{part}/images/{entry[2]}.png", entry[0], entry[1]) for entry in entries]
    pairs: dict[str, list[tuple[str, str]]] = {}
    for path, question, answer in rows:
        pairs.setdefault(path, []).append((question, answer))
    combination = {path: combination_of(own) for path, own in pairs.items()}
    if shifted:
        rows = [row for row in rows if combination[row[0]] != _UNKNOWN]
    paths = list(dict.fromkeys(path for path, _, _ in rows))
    images = _image_set(root, paths, [combination[path] for path in paths], shifted)

    place = {path: index for index, path in enumerate(paths)}
    questions = tuple(sorted({question for _, question, _ in rows}))
    names = tuple(sorted({answer for _, _, answer in rows}))
    question_of = np.array([questions.index(q) for _, q, _ in rows], dtype=np.int64)
    labels = np.array([names.index(a) for _, _, a in rows], dtype=np.int64)
    return VlData(
        name="easy-vqa",
        task="vqa",
        synthetic=False,
        images=images,
        image_of=np.array([place[path] for path, _, _ in rows], dtype=np.int64),
        texts=questions,
        text_of=question_of,
        labels=labels,
        answers=names,
        statements=tuple(
            tuple(f"{question} {answer}" for answer in names) for question in questions
        ),
        statements_of=question_of,
        truth=labels,
    )


def combination_of(pairs: Sequence[tuple[str, str]]) -> str:
    """Return colour and shape of a picture from its questions and answers, or `unknown`."""
    colour = shape = ""
    for question, answer in pairs:
        denies = " not " in question or question.startswith("is no ")
        words = re.findall("[a-z]+", question)
        if answer in ("yes", "no"):
            if (answer == "yes") == denies:
                continue
        else:
            words.append(answer)
        colour = next((word for word in words if word in COLOURS), colour)
        shape = next((word for word in words if word in SHAPES), shape)
    return f"{colour} {shape}" if colour and shape else _UNKNOWN


def _package_folder() -> Path:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise EdgekdError(
            "The package easy-vqa is not installed.", 'Install it: pip install "edgekd[vqa]".'
        )
    return Path(found.origin).parent


def _image_set(root: Path, paths: list[str], combinations: list[str], shifted: bool) -> ImageSet:
    # The class is the colour. Every colour has a training shape, so the split can be stratified by class.
    colours = [name.split()[0] for name in combinations]
    classes = tuple(sorted(set(colours)))
    domains = ("held-out", "seen") if shifted else ("all",)
    held = [0 if not shifted or name in HELD_OUT else 1 for name in combinations]
    keys = tuple(sha256_file(root / path)[:32] for path in paths)
    return ImageSet(
        name="easy-vqa",
        classes=classes,
        domains=domains,
        labels=np.array([classes.index(name) for name in colours], dtype=np.int64),
        domain_of=np.array(held, dtype=np.int64),
        keys=keys,
        ids=tuple(paths),
        roles=tuple("train" if path.startswith("train/") else "test" for path in paths),
        reader=FileReader(root, tuple(paths)),
    )
