"""Accuracy of a vision-language student on the examples that did not train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.distill.vl.build import VlRun
from edgekd.distill.vl.data import VlData, load_vl_data
from edgekd.distill.vl.examples import Reader, make_reader
from edgekd.distill.vl.frozen import frozen_maps
from edgekd.distill.vl.split import split_examples, spread
from edgekd.distill.vl.student import VlStudent

Predict = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.float32]]
"""uint8 `[B, S, S, 3]`, int64 tokens → float32 logits."""


def torch_predict(student: VlStudent) -> Predict:
    """The student as a plain function."""

    def predict(images: NDArray[np.uint8], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return student(torch.from_numpy(images), torch.from_numpy(tokens)).numpy()  # type: ignore[no-any-return]

    return predict


def predictions(
    predict: Predict, reader: Reader, indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indices in the order of their pictures, the answer predicted for each)."""
    asked, answered = [], []
    for part in reader.parts(indices):
        asked.append(part)
        answered.append(
            predict(reader.pictures(part).numpy(), reader.texts(part).numpy()).argmax(axis=1)
        )
    return np.concatenate(asked), np.concatenate(answered)


@torch.inference_mode()
def student_answers(
    student: VlStudent, reader: Reader, indices: NDArray[np.int64], *, frozen: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `predictions`, of the torch student, which looks at a picture once for all its questions.

    Args:
        frozen: the backbone did not train, so what it sees may have been kept.
    """
    pictures = np.unique(reader.data.image_of[indices])
    maps = frozen_maps(student, reader, pictures) if frozen else None
    asked, answered = [], []
    for part in reader.parts(indices):
        own, back = np.unique(reader.data.image_of[part], return_inverse=True)
        looked = (
            student.look(reader.pixels(own))
            if maps is None
            else maps[np.searchsorted(pictures, own)]
        )
        asked.append(part)
        answered.append(
            student.read(looked[torch.from_numpy(back)], reader.texts(part))
            .logits.argmax(dim=1)
            .numpy()
        )
    return np.concatenate(asked), np.concatenate(answered)


def accuracy(
    student: VlStudent, reader: Reader, indices: NDArray[np.int64], *, frozen: bool
) -> float | None:
    """Share of right answers, 0–1; None without examples."""
    if len(indices) == 0:
        return None
    asked, answered = student_answers(student, reader, indices, frozen=frozen)
    return float((answered == reader.data.labels[asked]).mean())


def evaluate_vl(
    run: VlRun, data: str | VlData | None = None, predict: Predict | None = None, most: int = 10**9
) -> list[dict[str, Any]]:
    """Accuracy in domain and, where a domain was left out, there; and of the most frequent training answer.

    Args:
        data: the same data at another place, or loaded already. predict: what answers; None: the torch student.
        most: examples per suite, drawn.

    Returns:
        Per suite `suite`, `n`, `accuracy` (0–1), `majority` (0–1) and `synthetic`.
    """
    config = run.config
    shifted = config.test_domain != "none"
    known = (
        data
        if isinstance(data, VlData)
        else load_vl_data(config.task, data or config.data, shifted=shifted)
    )
    if list(known.answers) != run.record["answers"]:
        raise EdgekdError(
            f"{known.name} has other answers than the run was trained on.", "Give the same data."
        )
    split = split_examples(
        known, test_domain=config.test_domain, fraction=config.fraction, seed=config.split_seed
    )
    reader = make_reader(known, run.preprocess, run.length)
    common = int(np.bincount(known.labels[split.train]).argmax())
    rows = []
    for suite, indices in (("id", split.id_test), ("ood", split.ood_test)):
        if len(indices):
            shown = spread(indices, most)
            if predict:
                asked, answered = predictions(predict, reader, shown)
            else:
                asked, answered = student_answers(
                    run.student, reader, shown, frozen=config.freeze_backbone
                )
            right = known.labels[asked]
            rows.append(
                {
                    "suite": f"{suite}:{config.test_domain}" if suite == "ood" else suite,
                    "n": len(asked),
                    "accuracy": float((answered == right).mean()),
                    "majority": float((right == common).mean()),
                    "synthetic": known.synthetic,
                }
            )
    return rows
