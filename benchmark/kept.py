"""What a benchmark keeps besides its numbers: every logit and every latency sample, by subject and suite."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.rows import Report
from edgekd.errors import EdgekdError

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


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of an npz file.

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
