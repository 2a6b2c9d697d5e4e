"""What a target's writer is given and what it leaves: the seam between export and the formats."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.manifest import Input, Precision, TensorSpec
from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx.graphs import rewrite, to_half, with_float_input, with_resize
from edgekd.export.onnx.write import export_onnx
from edgekd.export.quantize.calibration import Calibrator
from edgekd.export.quantize.scheme import Scheme
from edgekd.export.quantize.search import AccuracyBudget, quantize_within
from edgekd.targets.bank import ClassBank
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.feed import Feed, feed_of

AGENT_FILE = "edgekd-agent.pyz"
"""Beside a model that ends in an embedding: classifies and adds classes with Python, numpy, Pillow and the runtime."""


@dataclass(frozen=True)
class Build:
    """A model in torch and everything that a writer needs."""

    model: Deployable
    folder: Path
    """Where to write; it becomes the artifact's folder when everything has succeeded."""
    precision: Precision
    preprocess: Preprocess
    classes: tuple[str, ...]
    metadata: Mapping[str, str]
    """For the file itself: classes, preprocess, provenance, each as JSON."""
    calibration: NDArray[np.uint8] | None
    """`[N, H, W, 3]`, images of the training domains; there for the target's `calibrated` precisions."""
    fp32_onnx: Path | None
    """The same model as an fp32 ONNX file, where one has been exported already."""
    options: Mapping[str, Any]
    """The target's own switches, checked against `Target.options`."""
    budget: AccuracyBudget | None = None
    """What int8 may cost, where there is a limit."""
    calibrator: Calibrator = "minmax"
    """How int8 ranges are chosen, where the target leaves the choice."""
    bank: ClassBank | None = None
    """The class vectors, where the model ends in an embedding."""
    input: Input = "uint8"
    """What the file takes."""

    @property
    def image(self) -> TensorSpec:
        """The one input every target but Core ML shares; its batch is free."""
        size = self.preprocess.size
        shape: tuple[str | int, ...] = ("batch", size, size, 3)
        dtype, layout = "uint8", "NHWC RGB"
        if self.input == "picture":
            shape = ("batch", "height", "width", 3)
            layout = "NHWC RGB, resized inside as preprocess says"
        if self.input == "float":
            dtype, shape = "float32", ("batch", 3, size, size)
            layout = "NCHW RGB, normalised: (value / 255 - mean) / std of preprocess"
        return TensorSpec(name="image", dtype=dtype, shape=shape, layout=layout)

    @property
    def feed(self) -> Feed:
        """uint8 `[B, H, W, 3]` → what the finished file takes."""
        return feed_of(self.image.model_dump(), self.preprocess.model_dump())

    @property
    def output(self) -> TensorSpec:
        """The one output every target but Core ML shares."""
        if self.bank is None:
            shape = ("batch", len(self.classes))
            return TensorSpec(name="logits", dtype="float32", shape=shape, layout="NC")
        shape = ("batch", self.bank.vectors.shape[1])
        layout = "ND, rows of length 1"
        return TensorSpec(name="embedding", dtype="float32", shape=shape, layout=layout)

    def logits(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits `[B, C]` of what the file gives `[B, …]`."""
        return outputs if self.bank is None else self.bank.logits(outputs)

    @contextlib.contextmanager
    def fp32_file(self) -> Iterator[Path]:
        """Yield a temporary fp32 ONNX file of the model, which takes pixels."""
        path = self.folder / "fp32.onnx"
        fp32_onnx(self, path)
        yield path
        path.unlink()

    def quantize(self, scheme: Scheme[Any], fp32: Path, out: Path) -> dict[str, Any]:
        """Write the INT8 file of an fp32 ONNX file, within the accuracy budget if there is one.

        Returns:
            For `artifact.json`, as `Scheme.write` and `quantize_within`.
        """
        assert self.calibration is not None
        if self.budget is None:
            return scheme.quantize(fp32, out, self.calibration, self.calibrator)
        return quantize_within(
            fp32,
            out,
            self.calibration,
            self.budget,
            scheme=scheme,
            calibrator=self.calibrator,
            to_logits=self.logits,
        )


@dataclass(frozen=True)
class Written:
    """What the folder holds now."""

    format: str
    files: tuple[str, ...]
    """Relative to the folder, the model first."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts about this format for artifact.json: JSON values."""
    evaluate: Predictor | None = None
    """The file's output, for the parity check where the format's runtime is not here; None runs a session."""
    evaluated_by: str | None = None
    """What `evaluate` is, for the parity record."""


def fp32_onnx(build: Build, path: Path) -> None:
    """Write the model as an fp32 ONNX file at `path`, from an earlier export where there is one."""
    if build.fp32_onnx is None:
        size, metadata = build.preprocess.size, dict(build.metadata)
        export_onnx(build.model, path, size=size, metadata=metadata, output=build.output.name)
    else:
        shutil.copyfile(build.fp32_onnx, path)


def write_onnx(build: Build, path: Path, scheme: Scheme[Any]) -> dict[str, Any] | None:
    """Write the model as an ONNX file of the build's precision and input, fp32, fp16 or int8 by `scheme`, at `path`.

    Returns:
        As `Build.quantize`; None for the other precisions.
    """
    quantization = None
    if build.precision == "fp32":
        fp32_onnx(build, path)
    else:
        with build.fp32_file() as base:
            if build.precision == "int8":
                quantization = build.quantize(scheme, base, path)
            else:
                rewrite(base, path, to_half)
    if build.input == "float":
        rewrite(path, path, with_float_input)
    if build.input == "picture":
        rewrite(path, path, lambda model: with_resize(model, build.preprocess))
    return quantization


def agent_beside(build: Build) -> tuple[str, ...]:
    """Write the agent beside a model that ends in an embedding, so that a device can add classes; return the files."""
    if build.bank is None:
        return ()
    write_agent(build.folder / AGENT_FILE)
    return (AGENT_FILE,)


@contextlib.contextmanager
def converting(what: str) -> Iterator[None]:
    """Keep a converter's progress messages off the terminal, and make any failure of it an `EdgekdError`.

    Args:
        what: the step, as the subject of the sentence.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    except Exception as error:  # converters raise anything
        raise EdgekdError(
            f"{what} failed: {first_line(error)}.",
            "Export for another target, or choose another student.",
        ) from error
