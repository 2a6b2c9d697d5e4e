"""A report's folder, read with every value checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from edgekd.benchmark.results.schema import (
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    Context,
    Report,
    SuiteRow,
)
from edgekd.core.console import shell_word
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import first_problem
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import printable, printable_values, read_object
from edgekd.core.readers import read_arrays as read_npz
from edgekd.targets.devices.result import Machine
from edgekd.targets.timing.stopwatch import Protocol

Arrays = Mapping[str, NDArray[Any]]


class _OnDevice(BaseModel):
    agreement_here: float | None
    same_pixels: float | None


class _Device(Machine):
    """What a report holds of a device (benchmark/device.py)."""

    device: str
    emulated: bool
    artifacts: dict[str, _OnDevice]


@dataclass(frozen=True, eq=False)
class RawResults:
    """A report with every logit and latency sample: the arrays of its predictions.npz and latency.npz."""

    report: Report
    predictions: Arrays
    latency: Arrays

    def logits(self, run: str, subject: str, suite: str) -> NDArray[np.float32]:
        """Return float32 `[n, C]`."""
        return self.array(f"logits/{run}/{subject}/{suite}")

    def labels(self, run: str, suite: str) -> NDArray[np.int64]:
        """Return int64 `[n]`."""
        return self._of_suite("labels", run, suite)

    def ids(self, run: str, suite: str) -> list[str]:
        """Return the names of the n images."""
        return [str(name) for name in self._of_suite("ids", run, suite)]

    def classes(self, run: str, suite: str) -> list[str]:
        """Return the names of the C classes."""
        return [str(name) for name in self._of_suite("classes", run, suite)]

    def samples(self, run: str, subject: str) -> list[NDArray[np.float64]]:
        """Return latencies in ms in the order measured, `[n]` for each process."""
        found: list[NDArray[np.float64]] = []
        while (part := self.latency.get(f"samples_ms/{run}/{subject}/{len(found)}")) is not None:
            found.append(part)
        if not found:
            raise self._lacks("latency.npz", f"samples of {run}/{subject}")
        return found

    def array(self, name: str) -> NDArray[Any]:
        """Return an array of predictions.npz; an `EdgekdError` where it is missing."""
        if name not in self.predictions:
            raise self._lacks("predictions.npz", name)
        return self.predictions[name]

    def _of_suite(self, what: str, run: str, suite: str) -> NDArray[Any]:
        own = self.predictions.get(f"{what}/{run}/{suite}")
        return own if own is not None else self.array(f"{what}/{suite}")

    def _lacks(self, file: str, name: str) -> EdgekdError:
        path = self.report.folder / file
        return EdgekdError(f"{path} lacks {name}.", "Run edgekd benchmark again.")


def report_folder(path: Path) -> Path:
    """Return `path` if it is a report's folder, else the newest report in it; none is an `EdgekdError`."""
    if (path / "report.json").is_file():
        return path
    found = [one for one in path.glob("benchmark*") if (one / "report.json").is_file()]
    if not found:
        hint = f"Make one: edgekd benchmark {shell_word(path)}."
        raise EdgekdError(f"There is no report in {path}.", hint)
    return max(found, key=lambda one: (read_report(one).created, len(one.name), one.name))


def read_report(folder: Path) -> Report:
    """Load `report.json`; one that is missing, damaged or of an unknown schema version is an `EdgekdError`."""
    data = printable_values(read_object(folder / "report.json", "report"))
    if data.get("schema_version") not in READABLE_VERSIONS:
        raise EdgekdError(
            f"The report at {folder} has schema version {str(data.get('schema_version'))[:20]}; this edgekd reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}.",
            "Run edgekd benchmark again, or install the edgekd that wrote it.",
        )
    try:
        report = Report.model_validate(data | {"folder": folder, "schema_version": SCHEMA_VERSION})
        Machine.model_validate(report.environment)
        for device in report.environment.get("devices", ()):
            _Device.model_validate(device)
        Context.model_validate(report.context)
        for settings in report.protocol["preprocess"].values():
            Preprocess.model_validate(settings)
        for rule in ("latency", "latency_context"):
            Protocol(**report.protocol[rule])
        _check_rows(report)
    except (ValidationError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else "its protocol is incomplete"
        if isinstance(error, ValidationError):
            reason = first_problem(error)
        raise EdgekdError(
            f"The report at {folder} is damaged: {reason}.", "Run edgekd benchmark again."
        ) from error
    return report


def _check_rows(report: Report) -> None:
    """Raise ValueError for a row that is not about a subject and a suite of the report."""
    known, suites = {row.who for row in report.summary}, {row.suite for row in report.suites}
    measured = ({row.who for row in rows} for rows in (report.latency, report.accuracy))
    if (
        not report.summary
        or any(known - rows for rows in measured)
        or any(row.who not in known or row.suite not in suites for row in report.accuracy)
        or any(row.preprocess not in report.protocol["preprocess"] for row in report.summary)
    ):
        raise ValueError("its rows do not fit together")


def read_results(folder: Path, *, clock: bool = True) -> RawResults:
    """Load a report with its predictions, and with `clock` its latency samples too.

    Raises:
        EdgekdError: as `read_report`, or arrays that are missing, damaged or of another report.
    """
    latency = read_arrays(folder / "latency.npz") if clock else {}
    raw = RawResults(read_report(folder), read_arrays(folder / "predictions.npz"), latency)
    check_arrays(raw)
    return raw


def check_arrays(raw: RawResults) -> None:
    """Refuse arrays that are missing, of another shape or dtype than the report tells, or not finite."""
    needed = {(one.run, one.subject, one.suite) for one in raw.report.accuracy}
    for row in raw.report.suites:
        shape = _check_suite(raw, row)
        for subject in raw.report.summary:
            name = f"logits/{subject.run}/{subject.subject}/{row.suite}"
            present = name in raw.predictions or (*subject.who, row.suite) in needed
            if row.run in (None, subject.run) and present:
                logits = raw.logits(*subject.who, row.suite)
                has_form = logits.dtype == np.float32 and logits.shape == shape
                if not has_form or not np.isfinite(logits).all():
                    raise _foreign(raw, name)
    for name, part in raw.latency.items():
        has_form = part.ndim == 1 and len(part) > 0 and part.dtype.kind in "fiu"
        least = 0 if name.startswith("blocks/") else 1e-9
        if not has_form or not np.isfinite(part).all() or part.min() < least:
            raise _foreign(raw, name)


def _check_suite(raw: RawResults, row: SuiteRow) -> tuple[int, int]:
    """Check a suite's labels, ids, classes and domains; return its numbers of images and classes."""
    name = row.suite if row.run is None else f"{row.run}/{row.suite}"
    labels, ids, classes, domains = (
        raw.array(f"{what}/{name}") for what in ("labels", "ids", "classes", "domains")
    )
    texture = raw.predictions.get(f"texture/{name}", labels)
    n, count = ids.size, classes.size
    has_form = (
        n > 0 and ids.ndim == classes.ndim == 1 and ids.dtype.kind == classes.dtype.kind == "U"
    )
    for values, least, end in ((labels, -1, count), (domains, 0, max(1, len(row.domains)))):
        has_form = has_form and values.shape == (n,) and values.dtype.kind in "iu"
        has_form = has_form and bool(least <= values.min() and values.max() < end)
    if not has_form or texture.shape != (n,) or texture.dtype.kind not in "iu":
        raise _foreign(raw, name)
    return n, count


def _foreign(raw: RawResults, name: str) -> EdgekdError:
    return EdgekdError(
        f"The arrays of {printable(name)} in {raw.report.folder} do not belong to its report.",
        "Restore them, or run edgekd benchmark again.",
    )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Load every array of an npz file; one that is missing or damaged is an `EdgekdError`."""
    hint = "Copy the whole report folder, or run edgekd benchmark again."
    return read_npz(path, path.name, hint)
