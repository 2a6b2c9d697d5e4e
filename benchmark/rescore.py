"""Every accuracy and calibration number again, from the predictions a report kept: no model, no device, no images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.compare import gain_rows
from edgekd.benchmark.evaluate.scores import Logits, score
from edgekd.benchmark.report.rows import SuiteRow
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.report.storage import read_results
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import printable
from edgekd.data.image_set import ImageSet

_NOT_PREDICTED = ("size_mb", "parameters", "macs", "same_as")


def rescore(folder: Path) -> Report:
    """The report of `folder` with all that follows from its logits computed anew from predictions.npz.

    Latency, gates, comparisons, a data set's own metrics and everything else are as stored.

    Raises:
        EdgekdError: no report there, or predictions that do not belong to it.
    """
    kept_arrays = read_results(folder, clock=False)
    report = kept_arrays.report
    suites = [_suite(row, kept_arrays.predictions, report) for row in report.suites]
    subjects = [_subject(row.run, row.subject, report, suites) for row in report.summary]
    logits: Logits = {
        (subject.key, number): kept_arrays.logits(subject.run, subject.name, suite.name)
        for number, suite in enumerate(suites)
        for subject in subjects
        if suite.holds(subject)
    }
    scores = score(subjects, suites, logits)
    kept = {(row.run, row.subject): row for row in report.summary}
    summary = [
        row.model_copy(
            update={name: getattr(kept[row.run, row.subject], name) for name in _NOT_PREDICTED}
        )
        for row in scores.summary
    ]
    found = {
        "accuracy": scores.accuracy,
        "summary": tuple(summary),
        "gains": tuple(gain_rows(subjects, suites, logits, report.context.get("runs", ()))),
        "corruptions": scores.corruptions,
        "cue_conflicts": scores.cue_conflicts,
        "vocabularies": scores.vocabularies,
        "unknowns": scores.unknowns,
    }
    return report.model_copy(update=found)


def stored_suites(folder: Path) -> list[Suite]:
    """The suites of a report with labels, class names, domains and image ids; their images cannot be read."""
    kept = read_results(folder, clock=False)
    return [_suite(row, kept.predictions, kept.report) for row in kept.report.suites]


def _suite(row: SuiteRow, arrays: Any, report: Report) -> Suite:
    name = row.suite if row.run is None else f"{row.run}/{row.suite}"
    labels: NDArray[np.int64] = arrays[f"labels/{name}"].astype(np.int64)
    ids = tuple(printable(str(one)) for one in arrays[f"ids/{name}"])
    classes = tuple(printable(str(one)) for one in arrays[f"classes/{name}"])
    domain_of = arrays[f"domains/{name}"].astype(np.int64)
    images = ImageSet(
        row.data, classes, row.domains, labels, domain_of, ids, ids, None, _unreadable
    )
    texture = arrays.get(f"texture/{name}")
    found = Suite(
        row.suite, images, np.arange(len(labels)), row.run, row.family, row.remarks, texture
    )
    inside = next((one.inside for one in report.unknowns if one.suite == row.suite), None)
    if inside is not None:
        return replace(found, base=inside)
    base = next((one.base for one in report.vocabularies if one.suite == row.suite), None)
    return found if base is None else replace(found, wording=row.suite, base=base)


def _subject(run: str, name: str, report: Report, suites: list[Suite]) -> Subject:
    row = next(row for row in report.summary if (row.run, row.subject) == (run, name))
    preprocess = Preprocess.model_validate(report.protocol["preprocess"][row.preprocess])
    spoken = {
        one.suite
        for one in report.vocabularies
        if (one.run, one.subject, one.reason) == (run, name, None)
    }
    wordings = {
        suite.name: (_unusable, suite.images.classes)
        for suite in suites
        if suite.wording and suite.name in spoken
    }
    classes = next(suite.images.classes for suite in suites if suite.wording is None)
    return Subject(
        name, run, row.kind, row.precision, preprocess, _unusable, classes, wordings=wordings
    )


def _unreadable(index: int) -> Image.Image:
    raise EdgekdError("A stored report keeps no images.", "Load the data to see them.")


def _unusable(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    raise EdgekdError("A stored report keeps no models.", "Run edgekd benchmark to ask them again.")
