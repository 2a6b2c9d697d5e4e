"""What a target's writer is given and what it leaves: the seam between export and the formats."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.core.manifest import Input, Precision, TensorSpec
from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.export.calibrators import Calibrator
from edgekd.export.dialect import Dialect
from edgekd.export.float_input import take_floats
from edgekd.export.graph import Deployable
from edgekd.export.mixed import Yardstick, quantize_within
from edgekd.export.onnx import export_onnx
from edgekd.export.quantize import to_fp16
from edgekd.targets.bank import ClassBank
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.feed import Feed, feed_of

AGENT_FILE = "edgekd-agent.pyz"
"""Beside a model that ends in an embedding: classifies and adds classes with Python, numpy, Pillow and the runtime."""
Said = TypeVar("Said")


@dataclass(frozen=True)
class Build:
    """The order: a model in torch and everything a format needs to know about it."""

    model: Deployable
    folder: Path
    """Where to write; it becomes the artifact's folder when everything has succeeded."""
    precision: Precision
    preprocess: Preprocess
    classes: tuple[str, ...]
    metadata: Mapping[str, str]
    """For the file itself: classes, preprocess, provenance, each as JSON."""
    calibration: NDArray[np.uint8] | None
    """`[N, H, W, 3]`, images of the training domains; there for int8."""
    fp32_onnx: Path | None
    """The same model as an fp32 ONNX file, where one has been exported already."""
    options: Mapping[str, Any]
    """The target's own switches, checked against `Target.options`."""
    yardstick: Yardstick | None = None
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
        if self.input == "uint8":
            return TensorSpec(
                name="image", dtype="uint8", shape=("batch", size, size, 3), layout="NHWC RGB"
            )
        layout = "NCHW RGB, normalised: (value / 255 - mean) / std of preprocess"
        return TensorSpec(
            name="image", dtype="float32", shape=("batch", 3, size, size), layout=layout
        )

    @property
    def feed(self) -> Feed:
        """uint8 `[B, H, W, 3]` → what the finished file takes."""
        return feed_of(self.image.dtype, self.preprocess.model_dump())

    @property
    def output(self) -> TensorSpec:
        """The one output every target but Core ML shares."""
        if self.bank is None:
            return TensorSpec(
                name="logits", dtype="float32", shape=("batch", len(self.classes)), layout="NC"
            )
        dim = self.bank.vectors.shape[1]
        return TensorSpec(
            name="embedding", dtype="float32", shape=("batch", dim), layout="ND, rows of length 1"
        )

    def logits(self, answers: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the file gives `[B, …]` → logits `[B, C]`."""
        return answers if self.bank is None else self.bank.logits(answers)


@dataclass(frozen=True)
class Written:
    """The delivery: what lies in the folder now."""

    format: str
    files: tuple[str, ...]
    """Relative to the folder, the model first."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """What else a reader of artifact.json should know about this format: JSON values."""
    evaluate: Predictor | None = None
    """The file's output, for the parity check where the format's runtime is not here; None runs a session."""
    evaluated_by: str | None = None
    """Who `evaluate` is, for the parity record."""


def fp32_onnx(build: Build, path: Path) -> None:
    """Put the model as an fp32 ONNX file at `path`, from an earlier export where there is one."""
    if build.fp32_onnx is None:
        size, metadata = build.preprocess.size, dict(build.metadata)
        export_onnx(build.model, path, size=size, metadata=metadata, output=build.output.name)
    else:
        shutil.copyfile(build.fp32_onnx, path)


def write_onnx(
    build: Build, path: Path, quantize: Callable[[Path, Path, NDArray[np.uint8]], Said]
) -> Said | None:
    """Put the model as an ONNX file of the build's precision and input, fp32, fp16 or int8, at `path`.

    Args:
        quantize: fp32 file, int8 file to write, calibration images → what was done; both files take pixels.

    Returns:
        What `quantize` said; None for the other precisions.
    """
    described = None
    if build.precision == "fp32":
        fp32_onnx(build, path)
    else:
        base = build.folder / "fp32.onnx"
        fp32_onnx(build, base)
        if build.precision == "int8":
            assert build.calibration is not None
            described = quantize(base, path, build.calibration)
        else:
            to_fp16(base, path)
        base.unlink()
    if build.input == "float":
        take_floats(path)
    return described


def agent_beside(build: Build) -> tuple[str, ...]:
    """Where the model ends in an embedding, the device itself can add classes, with what lies in the folder.

    Returns:
        The files written.
    """
    if build.bank is None:
        return ()
    write_agent(build.folder / AGENT_FILE)
    return (AGENT_FILE,)


def write_within(build: Build, path: Path, dialect: Dialect[Any]) -> dict[str, Any] | None:
    """Put the model at `path` as an INT8 file within the build's yardstick; returns as `quantize_within`."""
    return write_onnx(build, path, within(build, dialect))


def within(
    build: Build, dialect: Dialect[Any]
) -> Callable[[Path, Path, NDArray[np.uint8]], dict[str, Any]]:
    """`quantize_within` for the build: fp32 file, int8 file to write, calibration images → what was done."""
    assert build.yardstick is not None

    def logits(file: Path) -> Predictor:
        run = dialect.open(file)
        return lambda images: build.logits(run(images))

    judged = replace(dialect, open=logits)
    return partial(
        quantize_within, yardstick=build.yardstick, dialect=judged, calibrator=build.calibrator
    )
