"""Where a run's weakest file fails: the confusion matrix of its worst suite, and its most confident errors."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.report.metric import percent
from edgekd.benchmark.report.rows import AccuracyRow
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.report.sections import Cell, Cells, Gallery, Item, Picture, Table, table
from edgekd.benchmark.report.storage import RawResults
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.images import UnreadableImage

ERRORS = 12
THUMBNAIL_PX = 112
BUDGET_BYTES = 120_000
"""All thumbnails of a report together: a page must stay small enough to be attached anywhere."""
MATRIX_CLASSES = 16
"""Larger matrices are cut to the classes with the most errors; the others share a column."""


@dataclass(frozen=True)
class Error:
    """One image classified wrongly. `position` is its place in the suite, `confidence` 0–1."""

    position: int
    image: str
    label: str
    predicted: str
    confidence: float
    teacher: str | None
    """The teacher's prediction."""


@dataclass(frozen=True, eq=False)
class Failure:
    """The suite on which a run's files are least accurate, and the subject that is so.

    Attributes:
        row: the accuracy row with the lowest top-1.
        classes: names, in the order of the matrix.
        confusion: int64 `[C, C]`, label by prediction.
        errors: the most confident ones, at most two of a kind.
    """

    row: AccuracyRow
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    errors: tuple[Error, ...]


def failures(raw: RawResults) -> list[Failure]:
    """Return for each run the lowest top-1 of any file (of the torch student where there is none) on unseen domains.

    Without unseen domains the ID suite stands in. Corrupted and cue-conflict images have tables of their own.
    """
    rows = (_worst(raw.report, run) for run in raw.report.runs)
    return [_failure(raw, row) for row in rows if row is not None]


def _worst(report: Report, run: str) -> AccuracyRow | None:
    kinds = {row.subject: row.kind for row in report.summary if row.run == run}
    wanted = "artifact" if "artifact" in kinds.values() else "torch"
    own = [row for row in report.accuracy if row.run == run and kinds[row.subject] == wanted]
    outside = [row for row in own if row.suite.startswith("ood:")]
    inside = [row for row in own if row.suite == "id"]
    return min(outside or inside, key=lambda row: row.top1, default=None)


def _failure(raw: RawResults, row: AccuracyRow) -> Failure:
    logits, labels = raw.logits(row.run, row.subject, row.suite), raw.labels(row.run, row.suite)
    classes = raw.classes(row.run, row.suite)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    return Failure(
        row, tuple(classes), confusion, tuple(_errors(raw, row, logits, labels, classes))
    )


def _errors(
    raw: RawResults,
    row: AccuracyRow,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
) -> list[Error]:
    confidence = metrics.confidence(logits)  # [N]
    predicted, ids = logits.argmax(axis=1), raw.ids(row.run, row.suite)
    has_teacher = any((one.run, one.subject) == (row.run, "teacher") for one in raw.report.summary)
    teacher = raw.logits(row.run, "teacher", row.suite).argmax(axis=1) if has_teacher else None
    found: list[Error] = []
    kinds = Counter[tuple[int, int]]()
    wrong = np.flatnonzero(predicted != labels)
    for position in wrong[np.argsort(-confidence[wrong], kind="stable")].tolist():
        kind = (int(labels[position]), int(predicted[position]))
        kinds[kind] += 1
        if kinds[kind] <= 2 and len(found) < ERRORS:
            names = classes[kind[0]], classes[kind[1]]
            other = None if teacher is None else classes[int(teacher[position])]
            found.append(Error(position, ids[position], *names, float(confidence[position]), other))
    return found


def thumbnails(
    found: Sequence[Failure], suites: Sequence[Suite]
) -> dict[tuple[str, str, str], str]:
    """Return (run, suite, image) → small JPEGs without metadata as `data:` addresses, until the budget is spent.

    An image that can no longer be read has no thumbnail: the measurement is complete without it.
    """
    pictures: dict[tuple[str, str, str], str] = {}
    share = BUDGET_BYTES // max(len(found), 1)
    for failure in found:
        row, left = failure.row, share
        suite = next((s for s in suites if s.name == row.suite and s.run in (None, row.run)), None)
        for error in failure.errors if suite else ():
            assert suite is not None
            try:
                image = suite.images.read(int(suite.indices[error.position]), draft=THUMBNAIL_PX)
            except (UnreadableImage, EdgekdError):
                continue
            picture = small_jpeg(image)
            left -= len(picture)
            if left < 0:
                break
            pictures[row.run, row.suite, error.image] = f"data:image/jpeg;base64,{picture}"
    return pictures


def small_jpeg(image: Image.Image) -> str:
    """Return a small JPEG in base64, from the pixels alone, so that no EXIF of the original is kept."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=80, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def failure_items(found: Failure, pictures: dict[tuple[str, str, str], str]) -> Iterator[Item]:
    """Yield the confusion matrix, the most frequent confusions, and the most confident errors."""
    row = found.row
    yield _matrix(found)
    matrix = found.confusion.copy()
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:8]
    pairs = [
        (a, b) for a, b in zip(*np.unravel_index(order, matrix.shape), strict=True) if matrix[a, b]
    ]
    cells: list[Cells] = [
        {
            "label": found.classes[a],
            "predicted": found.classes[b],
            "images": str(matrix[a, b]),
            "of the label %": percent(matrix[a, b] / found.confusion[a].sum()),
        }
        for a, b in pairs
    ]
    if cells:
        yield table("Most frequent confusions", cells, heads=2)
        note = "At most two of each kind; the percentage is the confidence in the wrong class."
        shown = (
            _picture(error, pictures.get((row.run, row.suite, error.image), ""))
            for error in found.errors
        )
        yield Gallery("Most confident errors", tuple(shown), note)


def _picture(error: Error, address: str) -> Picture:
    lines = [f"{error.label} → {error.predicted}", f"{100 * error.confidence:.0f} %"]
    return Picture(
        address, error.image, (*lines, *([f"teacher: {error.teacher}"] if error.teacher else []))
    )


def _matrix(found: Failure) -> Table:
    """Return the confusion matrix, shaded by the share of the label's images."""
    row, matrix = found.row, found.confusion
    errors = matrix.sum(axis=1) - matrix.diagonal()
    shown = np.sort(np.argsort(-errors, kind="stable")[:MATRIX_CLASSES])
    cut = len(matrix) - len(shown)

    def cells(c: int) -> Iterator[str]:
        total = int(matrix[c].sum())
        yield found.classes[c]
        for d in shown:
            shade = round(10 * matrix[c, d] / max(total, 1))
            yield Cell(str(matrix[c, d] or "·"), f"{'r' if c == d else 'w'}{shade}")
        if cut:
            yield str(total - int(matrix[c, shown].sum()))
        yield str(total)

    note = "Rows are labels, columns are predictions, cells are images."
    if cut:
        note += f" The {len(shown)} classes with the most errors; predictions among {cut} others in their own column."
    title = f"{row.run}/{row.subject} on {row.suite}: {percent(row.top1)} % of {row.n:,} images"
    header = ("label", *(found.classes[d] for d in shown), *(("others",) if cut else ()), "images")
    return Table(title, header, tuple(tuple(cells(int(c))) for c in shown), note=note, matrix=True)
