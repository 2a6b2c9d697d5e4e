"""Build, load and evaluate vision-language students."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.configs.vl import VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import printable_values, read_object
from edgekd.core.tensors import read_tensors, tensors_hash
from edgekd.distill.inputs.cache import cached_tensors
from edgekd.distill.models.students import make_student
from edgekd.distill.vl.data import Reader, VlData, subset
from edgekd.distill.vl.student import VlStudent, patch_rows
from edgekd.distill.vl.tasks import load_examples
from edgekd.distill.vl.tokens import tokenize

RECORD = "vl_run.json"
WEIGHTS = "student.safetensors"
_MAX_BYTES = 8 * 2**30

Predict = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.float32]]
"""uint8 `[B, S, S, 3]`, int64 tokens → float32 logits."""


def build_student(
    config: VlTrainConfig, rows: NDArray[np.int64], length: int, outputs: int, *, fresh: bool = True
) -> tuple[VlStudent, Preprocess, tuple[int, int]]:
    """Return a student, its preprocessing, and its grid of patches (height, width).

    Args:
        fresh: load the initial weights of `config`; False if trained weights are loaded later.
    """
    whole = make_student(
        config.student,
        pretrained=config.pretrained if fresh else "scratch",
        weights=config.student_weights if fresh else None,
        options=config.student_options,
        size=config.size,
        classes=1,
    )
    exact = {"resize": "squash", "interpolation": "bicubic"}
    preprocess = whole.preprocess.model_copy(update=exact)
    backbone = whole.backbone.eval()
    if not hasattr(backbone, "forward_features"):
        raise EdgekdError(
            f"{config.student} gives no feature map.", "Choose a convolutional network or a ViT."
        )
    with torch.inference_mode():
        found = patch_rows(backbone, torch.zeros(1, 3, config.size, config.size))  # [1, P, c]
    _, patches, channels = found.shape
    side = math.isqrt(patches)
    if side * side != patches:
        raise EdgekdError(
            f"The {patches} patches of {config.student} are not a square grid.", "Choose another."
        )
    student = VlStudent(
        backbone, channels, patches, preprocess, rows, config, outputs=outputs, length=length
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

    def reader(self, data: VlData) -> Reader:
        """Return the reader of examples for this student."""
        length = int(self.record["length"])
        return Reader(data, self.preprocess, tokenize(data.texts, length))


def load_vl_run(folder: Path) -> VlRun:
    """Read a run back, in evaluation mode; an unfinished or damaged one is an `EdgekdError`."""
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
        rows = state["rows"].numpy()
        student, preprocess, _ = build_student(config, rows, length, len(answers), fresh=False)
        student.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise EdgekdError(
            f"The weights in {folder} cannot be loaded ({str(error).splitlines()[0]}).",
            "Train the student again.",
        ) from error
    return VlRun(folder, config, record, student.eval(), preprocess)


@torch.inference_mode()
def frozen_maps(student: VlStudent, reader: Reader, pictures: NDArray[np.int64]) -> Tensor:
    """Return a frozen backbone's maps of pictures, float32 `[n, P, c]`, computed once and cached.

    Too many pictures to hold their maps in memory are an `EdgekdError`.
    """
    if student.backbone is None or student.project is None:
        return torch.zeros(len(pictures), 0, 0)
    n_bytes = 4 * len(pictures) * student.patches * student.project.in_features
    if n_bytes > _MAX_BYTES:
        raise EdgekdError(
            f"The frozen backbone's maps of {len(pictures):,} pictures would take {n_bytes / 2**30:.0f} GiB.",
            "Train on a --fraction of them, at a smaller --size, or without --freeze-backbone.",
        )

    def compute() -> dict[str, Tensor]:
        student.eval()
        parts = np.array_split(pictures, -(-len(pictures) // 64))
        return {"map": torch.cat([student.encode(reader.pixels(part)) for part in parts])}

    keys = [reader.data.images.keys[int(i)] for i in pictures]
    facts = (tensors_hash(student.backbone.state_dict()), reader.preprocess.hash, *keys)
    return cached_tensors("map-1", facts, compute)["map"]


def torch_predict(student: VlStudent) -> Predict:
    """Return the student as a function."""

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits: Tensor = student(torch.from_numpy(images), torch.from_numpy(tokens))
        return logits.numpy()

    return predict


def predictions(
    predict: Predict, reader: Reader, indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices in the order of their pictures, and the predicted answer of each."""
    parts = list(reader.parts(indices))
    answers = [
        predict(reader.pictures(part).numpy(), reader.texts(part).numpy()).argmax(axis=1)
        for part in parts
    ]
    return np.concatenate(parts), np.concatenate(answers)


@torch.inference_mode()
def student_predictions(
    student: VlStudent, reader: Reader, indices: NDArray[np.int64], *, frozen: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return `predictions` of the torch student, which encodes each picture once for all its questions.

    Args:
        frozen: whether the backbone was frozen, so that its maps can be cached.
    """
    pictures = np.unique(reader.data.image_of[indices])
    maps = frozen_maps(student, reader, pictures) if frozen else None
    parts, answers = list(reader.parts(indices)), []
    for part in parts:
        own, back = np.unique(reader.data.image_of[part], return_inverse=True)
        found = (
            student.encode(reader.pixels(own))
            if maps is None
            else maps[np.searchsorted(pictures, own)]
        )
        joint = student.fuse(found[torch.from_numpy(back)], reader.texts(part))
        answers.append(joint.logits.argmax(dim=1).numpy())
    return np.concatenate(parts), np.concatenate(answers)


def accuracy(
    student: VlStudent, reader: Reader, indices: NDArray[np.int64], *, frozen: bool
) -> float:
    """Return the fraction of correct answers, 0–1."""
    shown, answers = student_predictions(student, reader, indices, frozen=frozen)
    return float((answers == reader.data.labels[shown]).mean())


def evaluate_vl(
    run: VlRun, data: str | None = None, predict: Predict | None = None, most: int = 10**9
) -> list[dict[str, Any]]:
    """Measure the accuracy in domain and on the unseen domain, if any, and that of the most frequent training answer.

    Returns per suite `suite`, `n`, `accuracy` (0–1), `majority` (0–1) and `synthetic`. `data` is the same data at
    another place, `predict` another model than the torch student; of each suite at most `most` examples are drawn.
    """
    found, split = load_examples(run.config, data)
    if list(found.answers) != run.record["answers"]:
        raise EdgekdError(
            f"{found.name} has different answers from the run's.", "Give the data of the run."
        )
    reader = run.reader(found)
    majority = int(np.bincount(found.labels[split.train]).argmax())
    rows = []
    unseen = f"ood:{run.config.test_domain}"
    for suite, indices in (("id", split.id_test), (unseen, split.ood_test)):
        if not len(indices):
            continue
        shown = subset(indices, most)
        if predict:
            shown, answers = predictions(predict, reader, shown)
        else:
            frozen = run.config.freeze_backbone
            shown, answers = student_predictions(run.student, reader, shown, frozen=frozen)
        right = found.labels[shown]
        rows.append(
            {
                "suite": suite,
                "n": len(shown),
                "accuracy": float((answers == right).mean()),
                "majority": float((right == majority).mean()),
                "synthetic": found.synthetic,
            }
        )
    return rows
