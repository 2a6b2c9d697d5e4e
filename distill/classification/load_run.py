"""Load a finished run: the student, its text bank, its images and their split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgekd.configs.train import TrainConfig, read_config
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Run, read_run
from edgekd.core.tensors import read_tensors
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import Split, read_split
from edgekd.data.subsets import run_images
from edgekd.data.unlabelled import NO_DATA, label_free
from edgekd.distill.models.students import TEACHER_ENCODER, Student, encoder_student, make_student
from edgekd.distill.models.teachers import load_teacher
from edgekd.distill.text_bank import TextBank, read_text_bank
from edgekd.distill.text_files import DESCRIPTIONS_FILE, Descriptions, stored_descriptions


@dataclass(frozen=True)
class LoadedRun:
    """A loaded run. `bank` is None for students with a linear head."""

    run: Run
    folder: Path
    config: TrainConfig
    student: Student
    bank: TextBank | None

    @property
    def vectors(self) -> Tensor | None:
        """Return the class vectors, float32 `[C, D]`; None for a head on features."""
        if not self.student.embeds:
            return None
        if self.student.head is not None:
            return self.student.head.weight.detach()
        return self.bank.head if self.bank else None

    def descriptions(self, classes: Sequence[str]) -> Descriptions | None:
        """Return descriptions of any classes in the way of the run's own; None if its prompts have none."""
        spec, stored = self.config.descriptions, self.folder / DESCRIPTIONS_FILE
        return stored_descriptions(stored, spec, classes, may_run=False) if spec else None

    def check_labelled(self) -> None:
        """Refuse a run without labelled images to test on."""
        if self.run.data == NO_DATA:
            raise EdgekdError(
                f"{self.run.name} was trained without labels, so it has no test images of its own.",
                "Give labelled images: --data DIR, or edgekd benchmark --ood NAME=DIR.",
            )

    def images(self, override: str | None = None) -> ImageSet:
        """Return the run's images without those of unseen classes."""
        if override is None and self.run.data == NO_DATA:
            return self._label_free()[0]
        return run_images(load_images(override or self.run.data), self.config)

    def data(self, override: str | None = None) -> tuple[ImageSet, Split]:
        """Return the run's images and its stored split; `override` is the current place of the images."""
        if override is None and self.run.data == NO_DATA:
            return self._label_free()
        images = self.images(override)
        return images, read_split(self.folder / "split.json", images)

    def _label_free(self) -> tuple[ImageSet, Split]:
        config, split = self.config, self.folder / "split.json"
        names, limit = tuple(self.run.classes), config.unlabelled_images
        return label_free(config.unlabelled, names, limit, config.split_seed, split)


def load_run(folder: Path) -> LoadedRun:
    """Load a run folder; an unfinished or damaged one is an `EdgekdError`."""
    run = read_run(folder)
    config = read_config(folder / "config.json")
    bank_path = folder / "text_bank.safetensors"
    bank = read_text_bank(bank_path) if bank_path.exists() else None
    path = folder / "student.safetensors"
    hint = "Train the run again with --overwrite."
    state, _ = read_tensors(path, "student", hint)
    wrong = EdgekdError(f"{path} does not have the weights of this run's {config.student}.", hint)
    projector, head = state.get("projector.weight"), state.get("head.weight")
    if any(layer is not None and layer.ndim != 2 for layer in (projector, head)):
        raise wrong
    if config.student == TEACHER_ENCODER:
        classes = len(run.classes) if head is not None else None
        student = encoder_student(load_teacher(config.teacher), classes=classes)
    else:
        student = make_student(
            config.student,
            pretrained="scratch",
            options=config.student_options,
            size=config.size,
            dim=len(projector) if projector is not None else None,
            classes=len(head) if head is not None else None,
            projector="linear" if "neck.0.weight" not in state else config.projector or "mlp",
        )
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise wrong from error
    student.preprocess = run.preprocess
    return LoadedRun(run, folder, config, student.eval(), bank)


@torch.no_grad()
def continue_from(folder: Path, student: Student, classes: Sequence[str]) -> None:
    """Copy the weights of the finished run in `folder` into a student for `classes`.

    Rows of a trained head are copied by the name of their class; rows of new classes stay as they are. A student of
    other parts is an `EdgekdError`.
    """
    run = read_run(folder)
    state, _ = read_tensors(folder / "student.safetensors", "student", "Train that run again.")
    own = student.state_dict()
    pairs = [(classes.index(name), row) for row, name in enumerate(run.classes) if name in classes]
    for name in [name for name in state if name.startswith("head.")]:
        if len(state[name]) != len(run.classes):
            raise EdgekdError(
                f"The head of {folder} does not match its classes.", "Train that run again."
            )
        if name in own:
            rows = own[name].clone()
            rows[[new for new, _ in pairs]] = state[name][[old for _, old in pairs]]
            state[name] = rows
    # The scale calibrates the finished run; this run fits its own.
    state["scale"] = own["scale"]
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise EdgekdError(
            f"The student of {folder} ({run.recipe}) does not have the parts that this recipe needs.",
            f"Start from it with --recipe {run.recipe}.",
        ) from error
