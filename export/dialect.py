"""One way to write INT8: what training and the search for layers in float need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd.export.calibrators import Calibrator
from edgekd.export.quantize import Calibrated
from edgekd.export.replay import Grid
from edgekd.export.units import Unit
from edgekd.manifest import Precision


class Write(Protocol):
    """Writes the INT8 file of what was calibrated; returns what was done, for `artifact.json`."""

    def __call__(self, calibrated: Calibrated, out: Path, *, keep: Collection[str] = ()) -> dict[str, Any]:
        """Nodes named in `keep` stay in float."""


@dataclass(frozen=True)
class Dialect:
    """One way to write INT8."""

    calibrate: Callable[[Path, NDArray[np.uint8], Calibrator], Calibrated]
    write: Write
    grid: Grid
    """The scales that `write` gives weights."""
    units: Callable[[Calibrated], list[Unit]]
    """Everything that `write` quantizes; with all of it in `keep` no value is rounded to 8 bits."""
    answers: Callable[[Path, NDArray[np.uint8]], NDArray[np.float32]]
    """Logits of a file, or embeddings."""
    rest: Precision
    """What the nodes in float compute in."""
    timed: bool
    """Whether who answers here is also who runs the file on a device, so that its time means something."""
