"""Suites with other prompt templates or additional class names (`vocab:` suites)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgekd.benchmark.subjects import PromptVariant, Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import read_text
from edgekd.distill.classification.load_run import LoadedRun
from edgekd.distill.classification.predict import student_predict, teacher_predict
from edgekd.distill.models.teachers import ClipTeacher, load_teacher
from edgekd.distill.text_bank import TextBank, readable
from edgekd.evaluation.suites import named_folders

_BASES = ("id", "domain", "folder")
"""Families of suites that are classified again with each variant."""


@dataclass(frozen=True)
class VariantSpec:
    """A prompt variant. `templates` is None for the run's own."""

    name: str
    added: tuple[str, ...]
    templates: tuple[str, ...] | None

    def new(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return the added names that are not among the classes."""
        known = {readable(name).casefold() for name in classes}
        return tuple(name for name in self.added if readable(name).casefold() not in known)

    def suite(self, base: Suite) -> Suite:
        """Return the images of `base` as `vocab:NAME`, or `vocab:NAME/DOMAIN` for an unseen domain."""
        title = base.name.partition(":")[2]
        name = f"vocab:{self.name}" + (f"/{title}" if title else "")
        added = self.new(base.images.classes)
        remark = f"the images of {base.name}"
        if self.added:
            names = "name" if len(added) == 1 else "names"
            remark += f", with {len(added)} added class {names} that no image has"
        if self.templates is not None:
            word = "templates" if len(self.templates) > 1 else "template"
            remark += f", with {len(self.templates)} other prompt {word}"
        images = replace(base.images, classes=(*base.images.classes, *added))
        return Suite(
            name,
            images,
            base.indices,
            base.run,
            "vocabulary",
            (f"{remark}.",),
            variant=name,
            base=base.name,
        )

    def bank(self, teacher: ClipTeacher, bank: TextBank) -> TextBank:
        """Return the text bank of a run with this variant; added names have no descriptions."""
        added = self.new(bank.classes)
        classes = (*bank.classes, *added)
        if self.templates is not None:
            made = teacher.text_bank(classes, self.templates)
            return replace(made, image_centre=bank.image_centre, text_centre=bank.text_centre)
        if not added:
            return bank
        vectors = teacher.text_bank(added, bank.templates).vectors
        return replace(bank, classes=classes, vectors=torch.cat([bank.vectors, vectors]))


def read_variant(name: str, path: Path) -> VariantSpec:
    """Read a prompt variant: lines with `{}` are templates that replace the run's, all others are class names to add.

    Raises:
        EdgekdError: the file is missing or empty, or a template has several `{}`.
    """
    text = read_text(path, "vocabulary", "Write one name or template per line.")
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    templates = tuple(line for line in lines if "{}" in line)
    if not lines or any(template.count("{}") != 1 for template in templates):
        raise EdgekdError(
            f"{path} holds {'a template with several {}' if lines else 'no words'}.",
            "Write one class name per line, or templates with one {} for the class.",
        )
    return VariantSpec(name, tuple(line for line in lines if "{}" not in line), templates or None)


def with_prompt_variants(
    runs: Sequence[LoadedRun],
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    given: Sequence[str],
) -> tuple[list[Subject], list[Suite]]:
    """Return the subjects with their variants, and the suites with copies of the ID and unseen ones for each variant.

    Args:
        runs: their text banks and students; models with fixed classes are unchanged.
        given: `NAME=FILE` strings.

    Raises:
        EdgekdError: a file cannot be used, or all subjects have fixed classes.
    """
    named = named_folders(given, "--vocabulary", "FILE")
    variants = [read_variant(name, Path(path)) for name, path in named]
    bases = [suite for suite in suites if suite.kind in _BASES]
    more: list[Suite] = []
    changed: dict[int, dict[str, PromptVariant]] = {}
    for variant in variants:
        again = [variant.suite(base) for base in bases]
        more += again
        for loaded in runs:
            for number, model in _models(loaded, variant, subjects).items():
                changed.setdefault(number, {}).update((suite.name, model) for suite in again)
    if not changed:
        raise EdgekdError(
            "None of these models can use other prompts, since their classes are fixed.",
            "Give a run whose student has a text head and whose teacher can embed text.",
        )
    with_variants = [replace(one, variants=changed.get(n, {})) for n, one in enumerate(subjects)]
    return with_variants, [*suites, *more]


def _models(
    loaded: LoadedRun, variant: VariantSpec, subjects: Sequence[Subject]
) -> dict[int, PromptVariant]:
    """Return index → model with the variant, for the run's subjects without fixed classes."""
    teacher = load_teacher(loaded.run.teacher) if loaded.bank is not None else None
    if loaded.bank is None or not isinstance(teacher, ClipTeacher):
        return {}
    bank = variant.bank(teacher, loaded.bank)
    found: dict[int, PromptVariant] = {}
    for number, subject in enumerate(subjects):
        if subject.run != loaded.run.name:
            continue
        if subject.kind == "teacher":
            found[number] = (teacher_predict(teacher, bank), bank.classes)
        elif subject.kind == "torch" and loaded.student.embeds and loaded.student.head is None:
            # In the student's space: minus the mean of the texts it was trained with.
            found[number] = (student_predict(loaded.student, bank.head), bank.classes)
        elif subject.with_classes is not None and subject.classes == loaded.bank.classes:
            found[number] = (subject.with_classes(bank.classes, bank.head.numpy()), bank.classes)
    return found
