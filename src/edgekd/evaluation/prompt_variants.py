"""The same images asked in other words: other prompt templates, class names that no image has (`vocab:` suites)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgekd.benchmark.subjects import PromptVariant, Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.load import LoadedRun
from edgekd.distill.classification.predict import student_predict, teacher_predict
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.text_bank import TextBank, readable
from edgekd.evaluation.suites import named_folders

BASES = ("id", "domain", "folder")
"""Families of suites that are asked again."""


@dataclass(frozen=True)
class Words:
    """A changed vocabulary. `templates` None keeps the run's own."""

    name: str
    added: tuple[str, ...]
    templates: tuple[str, ...] | None


def read_words(name: str, path: Path) -> Words:
    """A file of words: a line with `{}` is a template in place of the run's, every other line a class name to add.

    Raises:
        EdgekdError: no such file, nothing in it, a template with several `{}`.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EdgekdError(
            f"{path} is not a readable UTF-8 text file.", "Write one name or template per line."
        ) from error
    told = list(dict.fromkeys(line for line in lines if line))
    templates = tuple(line for line in told if "{}" in line)
    if not told or any(template.count("{}") != 1 for template in templates):
        raise EdgekdError(
            f"{path} holds {'no words' if not told else 'a template with several {}'}.",
            "Write one class name per line, or templates with one {} for the class.",
        )
    return Words(name, tuple(line for line in told if "{}" not in line), templates or None)


def in_other_words(
    runs: Sequence[LoadedRun],
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    given: Sequence[str],
) -> tuple[list[Subject], list[Suite]]:
    """Subjects that can be asked in these words, and the ID and unseen suites once more for each of them.

    Args:
        runs: their banks and students; whose classes are fixed stays as it is.
        given: `NAME=FILE` strings.

    Raises:
        EdgekdError: a file that cannot be used, or no subject that can change its words.
    """
    chosen = [
        read_words(name, Path(path)) for name, path in named_folders(given, "--vocabulary", "FILE")
    ]
    bases = [suite for suite in suites if suite.kind in BASES]
    speaking: dict[tuple[str, str], dict[str, PromptVariant]] = {}
    for loaded in runs:
        for words in chosen:
            for name, variant in _variants(loaded, words, subjects).items():
                speaking.setdefault((loaded.run.name, name), {})[words.name] = variant
    if not speaking:
        raise EdgekdError(
            "None of these models can be asked in other words: their classes are fixed.",
            "Name a run whose student has a text head and whose teacher can embed text.",
        )
    again, found = list(suites), []
    for words in chosen:
        again += [_again(base, words) for base in bases]
    for subject in subjects:
        own = speaking.get((subject.run, subject.name), {})
        names = {
            suite.name: own[words.name]
            for words in chosen
            if words.name in own
            for suite in _of(again, words)
        }
        found.append(replace(subject, variants=names) if names else subject)
    return found, again


def _of(suites: Sequence[Suite], words: Words) -> list[Suite]:
    heads = (f"vocab:{words.name}", f"vocab:{words.name}/")
    return [
        suite
        for suite in suites
        if suite.variant and (suite.name == heads[0] or suite.name.startswith(heads[1]))
    ]


def _again(base: Suite, words: Words) -> Suite:
    title = base.name.partition(":")[2]
    name = f"vocab:{words.name}" + (f"/{title}" if title else "")
    added = _new(words, base.images.classes)
    remarks = [f"the images of {base.name}"]
    if words.added:
        remarks.append(
            f"with {len(added)} class name{'' if len(added) == 1 else 's'} added that no image has"
        )
    if words.templates is not None:
        remarks.append(
            f"with {len(words.templates)} other prompt template{'s' if len(words.templates) > 1 else ''}"
        )
    images = replace(base.images, classes=(*base.images.classes, *added))
    return Suite(
        name,
        images,
        base.indices,
        base.run,
        "vocabulary",
        (", ".join(remarks) + ".",),
        variant=name,
        base=base.name,
    )


def _new(words: Words, classes: Sequence[str]) -> tuple[str, ...]:
    """The added names that are none of the classes."""
    known = {readable(name).casefold() for name in classes}
    return tuple(name for name in words.added if readable(name).casefold() not in known)


def _variants(
    loaded: LoadedRun, words: Words, subjects: Sequence[Subject]
) -> dict[str, PromptVariant]:
    """The run's subjects by name, as they answer in these words; without those that cannot."""
    bank = loaded.bank
    if bank is None:
        return {}
    teacher = load_teacher(loaded.run.teacher)
    if not isinstance(teacher, ClipTeacher):
        return {}
    added = _new(words, bank.classes)
    changed = _bank(teacher, bank, added, words.templates)
    found: dict[str, PromptVariant] = {}
    for subject in subjects:
        if subject.run != loaded.run.name:
            continue
        if subject.kind == "teacher":
            found[subject.name] = (teacher_predict(teacher, changed), changed.classes)
        elif subject.kind == "torch" and loaded.student.embeds and loaded.student.head is None:
            # In the space the student learned: less the common part of the words it was trained with.
            found[subject.name] = (student_predict(loaded.student, changed.head), changed.classes)
        elif subject.with_classes is not None and subject.classes == bank.classes:
            found[subject.name] = (
                subject.with_classes(changed.classes, changed.head.numpy()),
                changed.classes,
            )
    return found


def _bank(
    teacher: ClipTeacher, bank: TextBank, added: tuple[str, ...], templates: tuple[str, ...] | None
) -> TextBank:
    """The run's own vectors where its templates stay, descriptions included; names added have none."""
    if templates is not None:
        made = teacher.text_bank((*bank.classes, *added), templates)
        return replace(made, image_centre=bank.image_centre, text_centre=bank.text_centre)
    if not added:
        return bank
    vectors = teacher.text_bank(added, bank.templates).vectors
    return replace(
        bank, classes=(*bank.classes, *added), vectors=torch.cat([bank.vectors, vectors])
    )
