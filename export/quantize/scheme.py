"""One way to write INT8: what the search for layers in float needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.core.manifest import Precision
from edgekd.core.predictor import Predictor, in_batches
from edgekd.export.quantize.calibrators import Calibrator
from edgekd.export.quantize.groups import Group
from edgekd.export.quantize.onnxruntime import Calibrated, weight_errors
from edgekd.export.quantize.qdq import WeightGrid

C = TypeVar("C")
"""All that is known about a model before a file is written."""
C_in = TypeVar("C_in", contravariant=True)


class Write(Protocol[C_in]):
    """Writes the INT8 file of what was calibrated; returns what was done, for `artifact.json`."""

    def __call__(
        self, calibrated: C_in, out: Path, *, keep: Collection[str] = ()
    ) -> dict[str, Any]:
        """Nodes named in `keep` stay in float."""


@dataclass(frozen=True)
class Scheme(Generic[C]):
    """One way to write INT8."""

    calibrate: Callable[[Path, NDArray[np.uint8], Calibrator], C]
    """FP32 file, images, how ranges are chosen."""
    write: Write[C]
    units: Callable[[C], list[Group]]
    """Everything that `write` quantizes; with all of it in `keep` no value is rounded to 8 bits."""
    rounding: Callable[[C], Mapping[str, float]]
    """Leading node of a unit → squared error that INT8 makes in its weights, relative to their squares."""
    open: Callable[[Path], Predictor]
    """Who runs a file, on one thread: its logits, or embeddings."""
    rest: Precision
    """What the nodes in float compute in."""
    timed: bool
    """Whether who answers here is also who runs the file on a device, so that its time means something."""

    def answers(self, file: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What a file says about any number of images."""
        return in_batches(self.open(file), images)


def onnx_scheme(
    calibrate: Callable[[Path, NDArray[np.uint8], Calibrator], Calibrated],
    write: Write[Calibrated],
    units: Callable[[Calibrated], list[Group]],
    *,
    grid: WeightGrid,
    open: Callable[[Path], Predictor],
    rest: Precision,
    timed: bool,
) -> Scheme[Calibrated]:
    """The scheme whose weights are rounded on `grid`; the other arguments as `Scheme`."""

    def rounding(calibrated: Calibrated) -> Mapping[str, float]:
        return weight_errors(calibrated.model, grid)

    return Scheme(calibrate, write, units, rounding, open, rest, timed)
