"""How a target writes INT8: what the search for layers in float needs of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.core.manifest import Precision
from edgekd.core.predictor import Predictor
from edgekd.export.quantize.calibration import Calibrator

C = TypeVar("C")
"""All that is known about a model before a file is written."""


@dataclass(frozen=True)
class Group:
    """Nodes that are quantized together or not at all: a layer or an addition, with what follows it.

    Together the groups hold every operation that INT8 changes, so a file whose groups all stay in float is the FP32
    file.
    """

    name: str
    """For people: the module whose weights it holds, the addition after such a module, or the node's own name."""
    nodes: tuple[str, ...]
    """Names of its nodes, the leading one first."""
    weighted: bool
    """Whether it is a convolution or a matrix product, and so has multiplications to save."""


class Scheme(ABC, Generic[C]):
    """A quantization scheme."""

    rest: ClassVar[Precision]
    """What the nodes in float compute in."""
    timed: ClassVar[bool]
    """Whether the runtime here is also the device's, so that its time means something."""

    @abstractmethod
    def calibrate(self, fp32: Path, images: NDArray[np.uint8], calibrator: Calibrator) -> C:
        """Measure what the file of an FP32 ONNX file needs, on RGB uint8 `[N, H, W, 3]` as the model takes them.

        No or all-alike images, another shape, and activations that are not finite are an `EdgekdError`.
        """

    @abstractmethod
    def write(self, calibrated: C, out: Path, *, in_float: Collection[str] = ()) -> dict[str, Any]:
        """Write the INT8 file, with the nodes named `in_float` in float.

        Returns:
            For `artifact.json`: method, number of images, what stayed in float.
        """

    def quantize(
        self, fp32: Path, out: Path, images: NDArray[np.uint8], calibrator: Calibrator = "minmax"
    ) -> dict[str, Any]:
        """Write the INT8 file `out` of an FP32 file; arguments, result and errors as `calibrate` and `write`."""
        return self.write(self.calibrate(fp32, images, calibrator), out)

    @abstractmethod
    def groups(self, calibrated: C) -> list[Group]:
        """Return everything that `write` quantizes, in graph order; no node is in two groups."""

    @abstractmethod
    def open(self, path: Path) -> Predictor:
        """Return the output of a file, logits or embeddings, on one thread."""
