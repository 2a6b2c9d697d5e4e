"""The errors of a run's weakest file: the confusion matrix of its worst suite, and the most confident errors."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.report.elements import Cell, Cells, Gallery, Item, Picture, Table, table
from edgekd.benchmark.results.metric import percent
from edgekd.benchmark.results.rows import AccuracyRow
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import RawResults
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.images import UnreadableImage

_ERRORS = 12
_THUMBNAIL_PX = 112
BUDGET_BYTES = 120_000
"""Maximum total size of the thumbnails of a report."""
_MATRIX_CLASSES = 16
"""Maximum number of classes in the matrix, those with the most errors; the others share a column."""


def failure_items(raw: RawResults, suites: Sequence[Suite] = ()) -> Iterator[Item]:
    """Yield confusion matrix, confusions and most confident errors for each run's lowest top-1 on unseen domains.

    The subject is a file, or the torch student if there is no file. Without unseen domains, the ID suite is used.
    Corrupted and cue-conflict images have separate tables. Images of `suites` may be shown.
    """
    rows = [row for run in raw.report.runs if (row := _worst(raw.report, run)) is not None]
    for row in rows:
        labels = raw.labels(row.run, row.suite)
        logits = raw.logits(row.run, row.subject, row.suite)
        classes, predicted = raw.classes(row.run, row.suite), logits.argmax(axis=1)
        confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)  # label by prediction
        np.add.at(confusion, (labels, predicted), 1)
        yield _matrix(row, classes, confusion)
        yield _confusions(classes, confusion)
        errors = _pictures(raw, row, suites, BUDGET_BYTES // len(rows))
        if pictures := tuple(islice(errors, _ERRORS)):
            note = "At most two of each kind, with the confidence in the wrong class."
            yield Gallery("Most confident errors", pictures, note)


def _worst(report: Report, run: str) -> AccuracyRow | None:
    kinds = {row.subject: row.kind for row in report.summary if row.run == run}
    wanted = "artifact" if "artifact" in kinds.values() else "torch"
    own = [row for row in report.accuracy if row.run == run and kinds[row.subject] == wanted]
    outside = [row for row in own if row.suite.startswith("ood:")]
    inside = [row for row in own if row.suite == "id"]
    return min(outside or inside, key=lambda row: row.top1, default=None)


def _pictures(
    raw: RawResults, row: AccuracyRow, suites: Sequence[Suite], budget: int
) -> Iterator[Picture]:
    """Yield the misclassified images, the most confident first, at most two of a kind."""
    logits, labels = raw.logits(row.run, row.subject, row.suite), raw.labels(row.run, row.suite)
    classes, ids = raw.classes(row.run, row.suite), raw.ids(row.run, row.suite)
    confidence, predicted = metrics.confidence(logits), logits.argmax(axis=1)
    order = np.argsort(-confidence, kind="stable")
    has_teacher = any(one.who == (row.run, "teacher") for one in raw.report.summary)
    teacher = raw.logits(row.run, "teacher", row.suite).argmax(axis=1) if has_teacher else None
    suite = next((s for s in suites if s.name == row.suite and s.run in (None, row.run)), None)
    kinds = Counter[tuple[int, int]]()
    for place in order[predicted[order] != labels[order]].tolist():
        kind = (int(labels[place]), int(predicted[place]))
        kinds[kind] += 1
        if kinds[kind] > 2:
            continue
        lines = [f"{classes[kind[0]]} → {classes[kind[1]]}", f"{100 * confidence[place]:.0f} %"]
        if teacher is not None:
            lines.append(f"teacher: {classes[int(teacher[place])]}")
        address = _thumbnail(suite, place) if suite else ""
        budget -= len(address)
        yield Picture(address if budget >= 0 else "", ids[place], tuple(lines))


def _thumbnail(suite: Suite, place: int) -> str:
    """Return a thumbnail, or "" for an image that can no longer be read, since the report can do without it."""
    try:
        return jpeg_address(suite.images.read(int(suite.indices[place]), draft=_THUMBNAIL_PX))
    except (UnreadableImage, EdgekdError):
        return ""


def jpeg_address(image: Image.Image) -> str:
    """Return a small JPEG as a `data:` URL, made only from the pixels, so that it has no EXIF data."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _confusions(classes: Sequence[str], confusion: NDArray[np.int64]) -> Table:
    """Return the most frequent confusions."""
    errors = confusion * (1 - np.eye(len(classes), dtype=np.int64))
    order = np.argsort(-errors, axis=None, kind="stable")[:8]
    cells: list[Cells] = [
        {
            "label": classes[a],
            "predicted": classes[b],
            "images": str(errors[a, b]),
            "of the label %": percent(errors[a, b] / confusion[a].sum()),
        }
        for a, b in zip(*np.unravel_index(order, errors.shape), strict=True)
        if errors[a, b]
    ]
    return table("Most frequent confusions", cells, heads=2)


def _matrix(row: AccuracyRow, classes: Sequence[str], matrix: NDArray[np.int64]) -> Table:
    """Return the confusion matrix, shaded by the share of the label's images."""
    errors = matrix.sum(axis=1) - matrix.diagonal()
    shown = np.sort(np.argsort(-errors, kind="stable")[:_MATRIX_CLASSES])
    cut = len(matrix) - len(shown)

    def cells(c: int) -> Iterator[str]:
        total = int(matrix[c].sum())
        yield classes[c]
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
    header = ("label", *(classes[d] for d in shown), *(("others",) if cut else ()), "images")
    return Table(title, header, tuple(tuple(cells(int(c))) for c in shown), note=note, matrix=True)
