"""Accuracy of a vision-language student on the examples that did not train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.distill.vl.build import VlRun
from edgekd.distill.vl.data import load_vl_data
from edgekd.distill.vl.examples import Reader, make_reader
from edgekd.distill.vl.split import split_examples, spread
from edgekd.distill.vl.student import VlStudent
from edgekd.errors import EdgekdError

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
    for part, pictures, tokens in reader.batches(indices):
        asked.append(part)
        answered.append(predict(pictures.numpy(), tokens.numpy()).argmax(axis=1))
    return np.concatenate(asked), np.concatenate(answered)


def accuracy(student: VlStudent, reader: Reader, indices: NDArray[np.int64]) -> float | None:
    """Share of right answers, 0–1; None without examples."""
    if len(indices) == 0:
        return None
    asked, answered = predictions(torch_predict(student), reader, indices)
    return float((answered == reader.data.labels[asked]).mean())


def evaluate_vl(
    run: VlRun, data: str | None = None, predict: Predict | None = None, most: int = 10**9
) -> list[dict[str, Any]]:
    """Accuracy in domain and, where a domain was left out, there; and of the most frequent training answer.

    Args:
        data: the same data at another place. predict: what answers; None: the torch student.
        most: examples per suite, evenly spaced.

    Returns:
        Per suite `suite`, `n`, `accuracy` (0–1), `majority` (0–1) and `synthetic`.
    """
    config = run.config
    known = load_vl_data(config.task, data or config.data, shifted=config.test_domain != "none")
    if list(known.answers) != run.record["answers"]:
        raise EdgekdError(f"{known.name} has other answers than the run was trained on.", "Give the same data.")
    split = split_examples(known, test_domain=config.test_domain, fraction=config.fraction, seed=config.split_seed)
    reader = make_reader(known, run.preprocess, run.length)
    common = int(np.bincount(known.labels[split.train]).argmax())
    rows = []
    for suite, indices in (("id", split.id_test), ("ood", split.ood_test)):
        if len(indices):
            asked, answered = predictions(predict or torch_predict(run.student), reader, spread(indices, most))
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
