"""Interface of a quantization scheme, for the search for layers in float."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.core.manifest import Precision
from edgekd.core.predictor import Predictor
from edgekd.export.quantize.calibration import Calibrator

C = TypeVar("C")
"""A calibrated model."""


@dataclass(frozen=True)
class Group:
    """Nodes that are quantized together: a layer or an addition, with the operations after it.

    The groups include every operation that INT8 changes, so a file with all groups in float is the FP32 file.
    """

    name: str
    """Readable name: the module of its weights, the addition after such a module, or the node's own name."""
    nodes: tuple[str, ...]
    """Names of its nodes, the leading one first."""
    weighted: bool
    """Whether it is a convolution or a matrix product."""


class Scheme(ABC, Generic[C]):
    """A quantization scheme."""

    rest: ClassVar[Precision]
    """Precision of the nodes in float."""
    timed: ClassVar[bool]
    """Whether files can be timed on this machine."""

    @abstractmethod
    def calibrate(self, fp32: Path, images: NDArray[np.uint8], calibrator: Calibrator) -> C:
        """Calibrate a model.

        Args:
            fp32: the FP32 ONNX file.
            images: RGB uint8 `[N, H, W, 3]`, preprocessed with the model's preprocess.
            calibrator: calibrator of the ranges of activations.

        Raises:
            EdgekdError: images are missing, all alike or of a wrong shape, or activations are not finite.
        """

    @abstractmethod
    def write(self, calibrated: C, out: Path, *, in_float: Collection[str] = ()) -> dict[str, Any]:
        """Write the INT8 file, with the nodes named `in_float` in float.

        Returns:
            For `artifact.json`: method, number of images, layers in float.
        """

    def quantize(
        self, fp32: Path, out: Path, images: NDArray[np.uint8], calibrator: Calibrator = "minmax"
    ) -> dict[str, Any]:
        """Write the INT8 file `out` of an FP32 file; arguments, result and errors as `calibrate` and `write`."""
        return self.write(self.calibrate(fp32, images, calibrator), out)

    @abstractmethod
    def groups(self, calibrated: C) -> list[Group]:
        """Return the disjoint groups that `write` quantizes, in graph order."""

    @abstractmethod
    def weight_errors(self, calibrated: C) -> Mapping[str, float]:
        """Return layer → relative squared error of its INT8 weights."""

    @abstractmethod
    def open(self, path: Path) -> Predictor:
        """Return a predictor for a file (logits or embeddings) on one thread."""


def relative_error(rows: NDArray[Any], scale: NDArray[Any]) -> float:
    """Return the squared error of rounding `rows [channels, K]` to `scale [channels]`, relative to their squares."""
    rounded = np.round(rows / scale[:, None]) * scale[:, None]
    lost = np.square(rows - rounded).sum()
    return float(lost / max(np.square(rows).sum(), np.finfo(np.float32).tiny))
