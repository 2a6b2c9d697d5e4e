"""What a benchmark keeps besides its numbers: every logit and every latency sample, by subject and suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.rows import Report
from edgekd.errors import EdgekdError
from edgekd.readers import printable
from edgekd.readers import read_arrays as read_npz

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Kept:
    """A report with the arrays of its predictions.npz and latency.npz (names in docs/report.md)."""

    report: Report
    predictions: Arrays
    latency: Arrays

    def logits(self, run: str, subject: str, suite: str) -> NDArray[np.float32]:
        """Float32 `[n, C]`."""
        return self._array(self.predictions, f"logits/{run}/{subject}/{suite}")

    def labels(self, run: str, suite: str) -> NDArray[np.int64]:
        """Int64 `[n]`."""
        return self._of_suite("labels", run, suite)

    def ids(self, run: str, suite: str) -> list[str]:
        """Names of the n images."""
        return [str(name) for name in self._of_suite("ids", run, suite)]

    def classes(self, run: str, suite: str) -> list[str]:
        """Names of the C classes."""
        return [str(name) for name in self._of_suite("classes", run, suite)]

    def samples(self, run: str, subject: str) -> list[NDArray[np.float64]]:
        """Latencies in ms in the order measured, `[n]` for each process."""
        found: list[NDArray[np.float64]] = []
        while (part := self.latency.get(f"samples_ms/{run}/{subject}/{len(found)}")) is not None:
            found.append(part)
        if not found:
            raise self._lacks("latency.npz", f"samples of {run}/{subject}")
        return found

    def _of_suite(self, what: str, run: str, suite: str) -> NDArray[Any]:
        own = self.predictions.get(f"{what}/{run}/{suite}")
        return own if own is not None else self._array(self.predictions, f"{what}/{suite}")

    def _array(self, arrays: Arrays, name: str) -> NDArray[Any]:
        found = arrays.get(name)
        if found is None:
            raise self._lacks("predictions.npz", name)
        return found

    def _lacks(self, file: str, name: str) -> EdgekdError:
        return EdgekdError(
            f"{self.report.folder / file} lacks {name}.", "Run edgekd benchmark again."
        )


def check_arrays(kept: Kept) -> None:
    """Refuse arrays that do not fit the report they lie beside.

    Raises:
        EdgekdError: an array is missing, of another shape or dtype, or not finite.
    """
    folder = kept.report.folder
    classes_of: dict[tuple[str | None, str], int] = {}
    for row in kept.report.suites:
        name = row.suite if row.run is None else f"{row.run}/{row.suite}"
        parts = {
            what: kept._array(kept.predictions, f"{what}/{name}")
            for what in ("labels", "ids", "classes", "domains")
        }
        n, classes = len(np.atleast_1d(parts["ids"])), len(np.atleast_1d(parts["classes"]))
        classes_of[row.run, row.suite] = classes
        labels, domains = parts["labels"], parts["domains"]
        if (
            any(part.shape != (n,) for what, part in parts.items() if what != "classes")
            or parts["classes"].shape != (classes,)
            or any(parts[what].dtype.kind != "U" for what in ("ids", "classes"))
            or any(part.dtype.kind not in "iu" for part in (labels, domains))
            or n == 0
            or not (labels.min() >= -1 and labels.max() < classes)
            or not (domains.min() >= 0 and domains.max() < max(1, len(row.domains)))
        ):
            raise _foreign(folder, name)
        texture = kept.predictions.get(f"texture/{name}")
        if texture is not None and (texture.shape != (n,) or texture.dtype.kind not in "iu"):
            raise _foreign(folder, name)
    for one in kept.report.accuracy:
        logits = kept.logits(one.run, one.subject, one.suite)
        count = classes_of.get((None, one.suite), classes_of.get((one.run, one.suite)))
        shape = (len(kept.ids(one.run, one.suite)), count)
        if logits.shape != shape or logits.dtype != np.float32 or not np.isfinite(logits).all():
            raise _foreign(folder, f"{one.run}/{one.subject}/{one.suite}")
    for name, part in kept.latency.items():
        known = part.ndim == 1 and len(part) and part.dtype.kind in "fiu"
        if not known or not np.isfinite(part).all() or part.min() < 0:
            raise _foreign(folder, name)


def _foreign(folder: Path, name: str) -> EdgekdError:
    return EdgekdError(
        f"The arrays of {printable(name)} in {folder} do not belong to its report.",
        "Restore them, or run edgekd benchmark again.",
    )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of an npz file.

    Raises:
        EdgekdError: the file is missing or damaged.
    """
    hint = "Copy the whole report folder, or run edgekd benchmark again."
    return read_npz(path, path.name, hint)
