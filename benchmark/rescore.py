"""Compute the accuracy and calibration numbers of a report again from its predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.benchmark.compare import gain_rows
from edgekd.benchmark.evaluate.accuracy import score
from edgekd.benchmark.results.rows import SummaryRow
from edgekd.benchmark.results.schema import Report, SuiteRow
from edgekd.benchmark.results.storage import RawResults, read_results
from edgekd.benchmark.subjects import Logits, Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import printable
from edgekd.data.image_set import ImageSet

_NOT_PREDICTED = ("size_mb", "parameters", "macs", "same_as")


def rescore(folder: Path) -> Report:
    """Return the report of `folder` with all numbers that follow from logits recomputed from predictions.npz.

    Everything else, latency and gates too, is as stored.

    Raises:
        EdgekdError: there is no report, or the predictions do not belong to it.
    """
    raw = read_results(folder, clock=False)
    report = raw.report
    suites = [_suite(row, raw) for row in report.suites]
    subjects = [_subject(row, report, suites) for row in report.summary]
    logits: Logits = {
        (subject.key, number): raw.logits(subject.run, subject.name, suite.name)
        for number, suite in enumerate(suites)
        for subject in subjects
        if suite.holds(subject)
    }
    scores = score(subjects, suites, logits)
    scores["summary"] = tuple(
        row.model_copy(update={name: getattr(stored, name) for name in _NOT_PREDICTED})
        for row, stored in zip(scores["summary"], report.summary, strict=True)
    )
    gains = tuple(gain_rows(subjects, suites, logits, report.context.get("runs", ())))
    kept = {"gains": gains, "own_metrics": report.own_metrics}
    return report.model_copy(update=scores | kept)


def _suite(row: SuiteRow, raw: RawResults) -> Suite:
    name, report = row.suite if row.run is None else f"{row.run}/{row.suite}", raw.report
    labels, domain_of = (raw.array(f"{w}/{name}").astype(np.int64) for w in ("labels", "domains"))
    ids, classes = (
        tuple(map(printable, map(str, raw.array(f"{w}/{name}")))) for w in ("ids", "classes")
    )
    images = ImageSet(row.data, classes, row.domains, labels, domain_of, ids, ids, None, _refuse)
    stored = Suite(
        row.suite,
        images,
        np.arange(len(labels)),
        row.run,
        row.family,
        row.remarks,
        raw.predictions.get(f"texture/{name}"),
    )
    inside = next((one.inside for one in report.unknowns if one.suite == row.suite), None)
    base = next((one.base for one in report.vocabularies if one.suite == row.suite), None)
    if inside is not None:
        return replace(stored, base=inside)
    return stored if base is None else replace(stored, variant=row.suite, base=base)


def _subject(row: SummaryRow, report: Report, suites: list[Suite]) -> Subject:
    changed = {one.suite for one in report.vocabularies if one.who == row.who and not one.reason}
    return Subject(
        name=row.subject,
        run=row.run,
        kind=row.kind,
        precision=row.precision,
        preprocess=Preprocess.model_validate(report.protocol["preprocess"][row.preprocess]),
        predict=_refuse,
        classes=next(suite.images.classes for suite in suites if suite.variant is None),
        variants={
            suite.name: (_refuse, suite.images.classes)
            for suite in suites
            if suite.variant and suite.name in changed
        },
    )


def _refuse(*_: Any) -> Any:
    raise EdgekdError(
        "A stored report keeps no images and no models.", "Run edgekd benchmark to run them again."
    )
