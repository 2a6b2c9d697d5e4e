"""Where a run's weakest file fails: the confusion matrix of its worst suite, and its surest mistakes with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.kept import Kept
from edgekd.benchmark.rows import AccuracyRow, Report
from edgekd.benchmark.subjects import Suite
from edgekd.errors import EdgekdError
from edgekd.images import UnreadableImage

MISTAKES = 12
THUMBNAIL_PX = 112
BUDGET_BYTES = 120_000
"""All thumbnails of a report together; a page must stay small enough to be attached anywhere."""
Thumbnails = Mapping[tuple[str, str, str], str]
"""(run, suite, image's id) → `data:` address of a JPEG."""


@dataclass(frozen=True)
class Mistake:
    """One image classified wrongly. `position` is its place in the suite, `confidence` 0–1."""

    position: int
    image: str
    label: str
    answer: str
    confidence: float
    teacher: str | None
    """The teacher's answer."""


@dataclass(frozen=True, eq=False)
class Failure:
    """The suite a run's files do worst on, and the subject that does so.

    Attributes:
        row: the accuracy row with the lowest top-1.
        classes: names, in the order of the matrix.
        confusion: int64 `[C, C]`, label by answer.
        mistakes: the surest ones, at most two of a kind.
    """

    row: AccuracyRow
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    mistakes: tuple[Mistake, ...]


def failures(kept: Kept) -> list[Failure]:
    """For each run the lowest top-1 of any artifact (of the torch student where there is none) on unseen domains.

    Without unseen domains the ID suite stands in; corrupted and cue-conflict images are left to their own tables.
    """
    return [
        _failure(kept, row)
        for run in _runs(kept.report)
        if (row := _worst(kept.report, run)) is not None
    ]


def _runs(report: Report) -> list[str]:
    return list(dict.fromkeys(row.run for row in report.summary))


def _worst(report: Report, run: str) -> AccuracyRow | None:
    kinds = {row.subject: row.kind for row in report.summary if row.run == run}
    wanted = "artifact" if "artifact" in kinds.values() else "torch"
    own = [row for row in report.accuracy if row.run == run and kinds[row.subject] == wanted]
    outside = [row for row in own if row.suite.startswith("ood:")] or [
        row for row in own if row.suite == "id"
    ]
    return min(outside, key=lambda row: row.top1, default=None)


def _failure(kept: Kept, row: AccuracyRow) -> Failure:
    logits, labels = kept.logits(row.run, row.subject, row.suite), kept.labels(row.run, row.suite)
    classes = kept.classes(row.run, row.suite)
    answers = logits.argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, answers), 1)
    return Failure(
        row, tuple(classes), confusion, tuple(_mistakes(kept, row, logits, labels, classes))
    )


def _mistakes(
    kept: Kept,
    row: AccuracyRow,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
) -> list[Mistake]:
    confidence = np.exp(metrics.log_softmax(logits).max(axis=1))  # [N]
    answers, ids = logits.argmax(axis=1), kept.ids(row.run, row.suite)
    asked = any(one.run == row.run and one.subject == "teacher" for one in kept.report.summary)
    teacher = kept.logits(row.run, "teacher", row.suite).argmax(axis=1) if asked else None
    found: list[Mistake] = []
    kinds: dict[tuple[int, int], int] = {}
    wrong = np.flatnonzero(answers != labels)
    for position in wrong[np.argsort(-confidence[wrong], kind="stable")].tolist():
        kind = (int(labels[position]), int(answers[position]))
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] > 2:
            continue
        told = None if teacher is None else classes[int(teacher[position])]
        names = classes[kind[0]], classes[kind[1]]
        found.append(Mistake(position, ids[position], *names, float(confidence[position]), told))
        if len(found) == MISTAKES:
            break
    return found


def thumbnails(
    found: Sequence[Failure], suites: Sequence[Suite]
) -> dict[tuple[str, str, str], str]:
    """Small JPEGs of the mistakes, 112 pixels at most and without metadata, until the budget is spent.

    An image that can no longer be read has no thumbnail: the measurement is done, and its page must not fail now.
    """
    pictures: dict[tuple[str, str, str], str] = {}
    share = BUDGET_BYTES // max(len(found), 1)
    for failure in found:
        row, left = failure.row, share
        suite = next((s for s in suites if s.name == row.suite and s.run in (None, row.run)), None)
        if suite is None:
            continue
        for mistake in failure.mistakes:
            try:
                picture = _jpeg(
                    suite.images.read(int(suite.indices[mistake.position]), draft=THUMBNAIL_PX)
                )
            except (UnreadableImage, EdgekdError):
                continue
            left -= len(picture)
            if left < 0:
                break
            pictures[row.run, row.suite, mistake.image] = f"data:image/jpeg;base64,{picture}"
    return pictures


def _jpeg(image: Image.Image) -> str:
    """Base64 of a small JPEG; made from the pixels alone, so that no EXIF of the original comes along."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    held = io.BytesIO()
    clean.save(held, "JPEG", quality=80, optimize=True)
    return base64.b64encode(held.getvalue()).decode("ascii")
