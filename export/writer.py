"""Interface of a target's writer: its input `Build` and its result `Written`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.manifest import TensorSpec
from edgekd.core.preprocess import Preprocess
from edgekd.core.version import __version__
from edgekd.export.graph import Deployable
from edgekd.export.onnx.graphs import rewrite, to_half, with_float_input, with_resize
from edgekd.export.onnx.write import export_onnx
from edgekd.export.quantize.calibration import Calibrator
from edgekd.export.quantize.search import AccuracyBudget, Scheme, quantize_within
from edgekd.targets.bank import ClassBank
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.feed import Feed, feed_of

AGENT_FILE = "edgekd-agent.pyz"
"""The device agent next to a model that ends in an embedding, which classifies images and adds classes."""


@dataclass(frozen=True)
class Source:
    """A model to export, and the images for calibration, accuracy limits and the parity check."""

    model: Deployable
    classes: tuple[str, ...]
    preprocess: Preprocess
    parity_images: NDArray[np.uint8]
    """uint8 `[M, H, W, 3]`, real images that are not used for calibration."""
    facts: dict[str, Any]
    """Provenance of the model, as JSON values."""
    parity_keys: tuple[str, ...] = ()
    """Content keys of these images. If given, the student's logits are stored in the artifact for `edgekd verify`."""
    calibration: NDArray[np.uint8] | None = None
    """uint8 `[N, H, W, 3]`, images of the training domains, for the target's `calibrated` precisions."""
    calibration_ids: tuple[str, ...] = ()
    """Names of the calibration images, for the artifact's record."""
    pictures: Callable[[], Iterable[NDArray[np.uint8]]] = tuple
    """Returns images in their original sizes, uint8 `[h, w, 3]`, to check a file that resizes."""
    budget: AccuracyBudget | None = None
    """Maximum accuracy loss of int8; layers stay in float to meet it."""
    bank: ClassBank | None = None
    """Class vectors for a `model` that ends in an embedding, stored next to the file. Parity and limits then apply to
    the logits computed with them."""

    @property
    def metadata(self) -> dict[str, str]:
        """For the file itself: classes, preprocess and provenance, each as JSON."""
        values: dict[str, Any] = {"provenance": {"edgekd": __version__, **self.facts}}
        if self.bank is None:  # else they are beside the file, and may change
            values["classes"] = list(self.classes)
        found = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
        return {"preprocess": self.preprocess.model_dump_json(), **found}


@dataclass(frozen=True)
class Build:
    """One file to write; `source.model` is the deployed form."""

    source: Source
    config: ExportConfig
    """Target, precision, input and the target's own switches."""
    folder: Path
    """Folder to write to, which becomes the artifact's folder on success."""
    calibrator: Calibrator
    """Calibrator of int8 ranges, if the target has a choice."""
    fp32_onnx: Path | None = None
    """The same model as an fp32 ONNX file, if it was exported before."""

    @property
    def image(self) -> TensorSpec:
        """Return the input of all targets but Core ML, with a free batch."""
        size, kind = self.source.preprocess.size, self.config.input
        shape: tuple[str | int, ...] = ("batch", size, size, 3)
        dtype, layout = "uint8", "NHWC RGB"
        if kind == "picture":
            shape = ("batch", "height", "width", 3)
            layout = "NHWC RGB, resized inside as preprocess says"
        if kind == "float":
            dtype, shape = "float32", ("batch", 3, size, size)
            layout = "NCHW RGB, normalised: (value / 255 - mean) / std of preprocess"
        return TensorSpec(name="image", dtype=dtype, shape=shape, layout=layout)

    @property
    def feed(self) -> Feed:
        """Return the function from uint8 `[B, H, W, 3]` to the input of the finished file."""
        return feed_of(self.image.model_dump(), self.source.preprocess.model_dump())

    @property
    def output(self) -> TensorSpec:
        """Return the output of all targets but Core ML."""
        bank = self.source.bank
        if bank is None:
            shape = ("batch", len(self.source.classes))
            return TensorSpec(name="logits", dtype="float32", shape=shape, layout="NC")
        shape = ("batch", bank.vectors.shape[1])
        layout = "ND, rows of length 1"
        return TensorSpec(name="embedding", dtype="float32", shape=shape, layout=layout)

    def logits(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits `[B, C]` for the outputs of the file `[B, …]`."""
        return outputs if self.source.bank is None else self.source.bank.logits(outputs)

    @contextlib.contextmanager
    def fp32_file(self) -> Iterator[Path]:
        """Yield a temporary fp32 ONNX file of the model with uint8 input."""
        path = self.folder / "fp32.onnx"
        fp32_onnx(self, path)
        yield path
        path.unlink()

    def quantize(self, scheme: Scheme[Any], fp32: Path, out: Path) -> dict[str, Any]:
        """Write the INT8 file of an fp32 ONNX file, within the accuracy budget if there is one.

        Returns:
            For `artifact.json`, as `Scheme.write` and `quantize_within`.
        """
        images, budget = self.source.calibration, self.source.budget
        assert images is not None
        how = self.calibrator
        if budget is None:
            return scheme.quantize(fp32, out, images, how)
        return quantize_within(
            fp32, out, images, budget, scheme=scheme, calibrator=how, to_logits=self.logits
        )


@dataclass(frozen=True)
class Written:
    """The files written by a writer."""

    files: tuple[str, ...]
    """Paths relative to the folder, the model first."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts for artifact.json, as JSON values."""


def fp32_onnx(build: Build, path: Path) -> None:
    """Write the model as an fp32 ONNX file at `path`, or copy it from an earlier export."""
    if build.fp32_onnx is not None:
        shutil.copyfile(build.fp32_onnx, path)
    else:
        model, size = build.source.model, build.source.preprocess.size
        metadata, output = build.source.metadata, build.output.name
        export_onnx(model, path, size=size, metadata=metadata, output=output)


def write_onnx(build: Build, path: Path, scheme: Scheme[Any]) -> dict[str, Any] | None:
    """Write the model as an ONNX file at `path` in the build's precision and input; int8 uses `scheme`.

    Returns:
        As `Build.quantize`; None for the other precisions.
    """
    config, quantization = build.config, None
    if config.precision == "fp32":
        fp32_onnx(build, path)
    else:
        with build.fp32_file() as base:
            if config.precision == "int8":
                quantization = build.quantize(scheme, base, path)
            else:
                rewrite(base, path, to_half)
    if config.input == "float":
        rewrite(path, path, with_float_input)
    if config.input == "picture":
        rewrite(path, path, lambda model: with_resize(model, build.source.preprocess))
    return quantization


def agent_beside(build: Build) -> tuple[str, ...]:
    """Write the agent next to a model that ends in an embedding; return its file names."""
    if build.source.bank is None:
        return ()
    write_agent(build.folder / AGENT_FILE)
    return (AGENT_FILE,)


@contextlib.contextmanager
def converting(what: str) -> Iterator[None]:
    """Hide the output of a converter, and turn its errors into an `EdgekdError`.

    Args:
        what: the step, as the subject of the message.
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
