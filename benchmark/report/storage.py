"""A report's folder: what is written, and how it is read again."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from edgekd.benchmark.report.schema import READABLE_VERSIONS, SCHEMA_VERSION, Report
from edgekd.errors import EdgekdError
from edgekd.files import read_json
from edgekd.manifest import first_problem

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class RawResults:
    """A report with every logit and latency sample: the arrays of its predictions.npz and latency.npz."""

    report: Report
    predictions: Arrays
    latency: Arrays

    def logits(self, run: str, subject: str, suite: str) -> NDArray[np.float32]:
        """Return float32 `[n, C]`."""
        return self._array(f"logits/{run}/{subject}/{suite}")

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

    def _of_suite(self, what: str, run: str, suite: str) -> NDArray[Any]:
        own = self.predictions.get(f"{what}/{run}/{suite}")
        return own if own is not None else self._array(f"{what}/{suite}")

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self.predictions:
            raise self._lacks("predictions.npz", name)
        return self.predictions[name]

    def _lacks(self, file: str, name: str) -> EdgekdError:
        return EdgekdError(
            f"{self.report.folder / file} lacks {name}.", "Run edgekd benchmark again."
        )


def read_report(folder: Path) -> Report:
    """Load `report.json` of a report folder.

    Raises:
        EdgekdError: no report there, a damaged one, or one of an unknown schema version.
    """
    data = read_json(folder / "report.json", "report")
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in READABLE_VERSIONS:
        raise EdgekdError(
            f"The report at {folder} has schema version {str(version)[:20]}; this edgekd reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}.",
            "Run edgekd benchmark again, or install the edgekd that wrote it.",
        )
    try:
        return Report.model_validate(data | {"folder": folder, "schema_version": SCHEMA_VERSION})
    except ValidationError as error:
        raise EdgekdError(
            f"The report at {folder} is damaged: {first_problem(error)}.",
            "Run edgekd benchmark again.",
        ) from error


def read_results(folder: Path) -> RawResults:
    """Load a report with its arrays.

    Raises:
        EdgekdError: a file is missing or damaged.
    """
    report = read_report(folder)
    return RawResults(
        report, read_arrays(folder / "predictions.npz"), read_arrays(folder / "latency.npz")
    )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return every array of an npz file.

    Raises:
        EdgekdError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except FileNotFoundError as error:
        raise EdgekdError(
            f"There is no {path.name} in {path.parent}.", "Copy the whole report folder."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EdgekdError(
            f"{path} is damaged.", "Copy it again, or run edgekd benchmark again."
        ) from error
