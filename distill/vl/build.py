"""From settings to a student, and from a run folder back to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.configs.vl import VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_tensors
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import printable_values, read_object, read_tensors
from edgekd.distill.students import make_student
from edgekd.distill.vl.data import check_task
from edgekd.distill.vl.student import VlStudent, patch_rows

RECORD = "vl_run.json"
WEIGHTS = "student.safetensors"


def build_student(
    config: VlTrainConfig, rows: NDArray[np.int64], length: int, outputs: int, *, fresh: bool = True
) -> tuple[VlStudent, Preprocess, tuple[int, int]]:
    """A student, how its pictures are prepared, and its grid of patches (height, width).

    Args:
        fresh: load the first weights that `config` names; False where trained ones follow.
    """
    whole = make_student(
        config.student,
        pretrained=config.pretrained if fresh else "scratch",
        weights=config.student_weights if fresh else None,
        options=config.student_options,
        size=config.size,
        classes=1,
    )
    preprocess = whole.preprocess.model_copy(
        update={"resize": "squash", "interpolation": "bicubic"}
    )
    backbone = whole.backbone.eval()
    if not hasattr(backbone, "forward_features"):
        raise EdgekdError(
            f"{config.student} gives no map of features.", "Choose a convolution network or a ViT."
        )
    with torch.inference_mode():
        found = patch_rows(backbone, torch.zeros(1, 3, config.size, config.size))  # [1, P, c]
    side = math.isqrt(found.shape[1])
    if side * side != found.shape[1]:
        raise EdgekdError(
            f"{config.student} gives {found.shape[1]} patches, which are no square.",
            "Choose another.",
        )
    student = VlStudent(
        backbone,
        found.shape[2],
        found.shape[1],
        preprocess,
        rows,
        task=check_task(config.task),
        outputs=outputs,
        length=length,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        blind=config.blind,
    )
    return student, preprocess, (side, side)


@dataclass(frozen=True)
class VlRun:
    """A finished run."""

    folder: Path
    config: VlTrainConfig
    record: dict[str, Any]
    student: VlStudent
    preprocess: Preprocess

    @property
    def length(self) -> int:
        """Tokens per text."""
        return int(self.record["length"])


def save_weights(student: VlStudent, path: Path) -> None:
    """Write the student, and nothing of the teacher, as safetensors."""
    write_tensors(path, student.state_dict())


def load_vl_run(folder: Path) -> VlRun:
    """Read a run back, in evaluation mode.

    Raises:
        EdgekdError: no finished run there, or weights that do not fit its record.
    """
    folder = Path(folder)
    record = printable_values(read_object(folder / RECORD, "vision-language run"))
    settings, length = record.get("config"), record.get("length")
    answers, accuracy = record.get("answers"), record.get("val_accuracy")
    if (
        not isinstance(settings, dict)
        or not isinstance(length, int)
        or not isinstance(answers, list)
        or not isinstance(accuracy, (int, float))
        or not isinstance(record.get("edgekd"), str)
        or not all(isinstance(answer, str) for answer in answers)
        or not 0 < length <= 10_000
    ):
        raise EdgekdError(
            f"The vision-language run at {folder} is damaged.", "Train the student again."
        )
    config = VlTrainConfig.restore(settings, folder / RECORD)
    state, _ = read_tensors(folder / WEIGHTS, "student", "Train the student again.")
    try:
        student, preprocess, _ = build_student(
            config, state["rows"].numpy(), length, len(answers), fresh=False
        )
        student.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise EdgekdError(
            f"The weights in {folder} cannot be loaded ({str(error).splitlines()[0]}).",
            "Train the student again.",
        ) from error
    return VlRun(folder, config, record, student.eval(), preprocess)
