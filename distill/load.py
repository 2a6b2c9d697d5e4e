"""Read a finished run back: the student, its text bank, and the images it was split on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edgekd.configs.train import TrainConfig, read_config
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Run, read_run
from edgekd.core.readers import read_tensors
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import Split, read_split
from edgekd.data.subsets import run_images
from edgekd.data.unlabelled import NO_DATA, label_free
from edgekd.distill.descriptions import DESCRIPTIONS_FILE, Descriptions, kept_descriptions
from edgekd.distill.prompts import TextBank, read_text_bank
from edgekd.distill.students import TEACHERS_TOWER, Student, make_student
from edgekd.distill.teacher import load_teacher
from edgekd.distill.tower import tower_student


@dataclass(frozen=True)
class LoadedRun:
    """A run in memory. `bank` is None for students with a linear head."""

    run: Run
    folder: Path
    config: TrainConfig
    student: Student
    bank: TextBank | None

    @property
    def vectors(self) -> Tensor | None:
        """The class vectors that embeddings are multiplied with, float32 `[C, D]`; None for a head on features."""
        if not self.student.embeds:
            return None
        if self.student.head is not None:
            return self.student.head.weight.detach()
        return self.bank.head if self.bank else None

    def described(self, classes: Sequence[str]) -> Descriptions | None:
        """Sentences about any classes as the run has them about its own; None if its prompts have none."""
        if not self.config.descriptions:
            return None
        kept = self.folder / DESCRIPTIONS_FILE
        return kept_descriptions(kept, self.config.descriptions, classes, may_run=False)

    def check_labelled(self) -> None:
        """Refuse a run that has no labelled images of its own to test on."""
        if self.run.data == NO_DATA:
            raise EdgekdError(
                f"{self.run.name} was trained without labels, so it has no test images of its own.",
                "Give labelled images: --data DIR, or edgekd benchmark --ood NAME=DIR.",
            )

    def images(self, override: str | None = None) -> ImageSet:
        """The run's images, those of classes that never trained left out."""
        if override is None and self.run.data == NO_DATA:
            return self._label_free()[0]
        return run_images(load_images(override or self.run.data), self.config)

    def data(self, override: str | None = None) -> tuple[ImageSet, Split]:
        """The run's images and its written-down split; `override` says where the images lie now."""
        if override is None and self.run.data == NO_DATA:
            return self._label_free()
        images = self.images(override)
        return images, read_split(self.folder / "split.json", images)

    def _label_free(self) -> tuple[ImageSet, Split]:
        config = self.config
        return label_free(
            config.unlabelled,
            tuple(self.run.classes),
            config.unlabelled_images,
            config.split_seed,
            self.folder / "split.json",
        )


def load_run(folder: Path) -> LoadedRun:
    """Load a run folder.

    Raises:
        EdgekdError: unfinished or damaged run.
    """
    run = read_run(folder)
    config = read_config(folder / "config.json")
    bank_path = folder / "text_bank.safetensors"
    bank = read_text_bank(bank_path) if bank_path.exists() else None
    path = folder / "student.safetensors"
    state, _ = read_tensors(path, "student", "Train the run again with --overwrite.")
    projector, head = state.get("projector.weight"), state.get("head.weight")
    if any(layer is not None and layer.ndim != 2 for layer in (projector, head)):
        raise EdgekdError(
            f"{path} does not hold the weights of this run's {config.student}.",
            "Train the run again with --overwrite.",
        )
    if config.student == TEACHERS_TOWER:
        student = tower_student(
            load_teacher(config.teacher), classes=len(run.classes) if head is not None else None
        )
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
        raise EdgekdError(
            f"{path} does not hold the weights of this run's {config.student}.",
            "Train the run again with --overwrite.",
        ) from error
    student.preprocess = run.preprocess
    return LoadedRun(run, folder, config, student.eval(), bank)
