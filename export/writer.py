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
    """What is exported: a model, and the images that calibrate, limit and check its files."""

    model: Deployable
    classes: tuple[str, ...]
    preprocess: Preprocess
    parity_images: NDArray[np.uint8]
    """uint8 `[M, H, W, 3]`, real images, none of them used for calibration."""
    facts: dict[str, Any]
    """Where the model comes from; JSON values."""
    parity_keys: tuple[str, ...] = ()
    """Their content keys; with them the student's logits are kept in the artifact for `edgekd verify`."""
    calibration: NDArray[np.uint8] | None = None
    """uint8 `[N, H, W, 3]`, images of the training domains, for the target's `calibrated` precisions."""
    calibration_ids: tuple[str, ...] = ()
    """Names of these images, for the artifact's record."""
    pictures: Callable[[], Iterable[NDArray[np.uint8]]] = tuple
    """Gives images in their own sizes, uint8 `[h, w, 3]` each, that a file which resizes is checked on."""
    budget: AccuracyBudget | None = None
    """How much accuracy int8 may cost; layers are kept in float until it costs no more."""
    bank: ClassBank | None = None
    """For a `model` that ends in an embedding: the vectors of `classes`, which then are beside the file. Parity, drops
    and thresholds are those of the logits computed with them."""

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
    """Where to write; it becomes the artifact's folder when everything has succeeded."""
    calibrator: Calibrator
    """How int8 ranges are chosen, where the target leaves the choice."""
    fp32_onnx: Path | None = None
    """The same model as an fp32 ONNX file, where one has been exported already."""

    @property
    def image(self) -> TensorSpec:
        """The one input every target but Core ML shares; its batch is free."""
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
        """uint8 `[B, H, W, 3]` → what the finished file takes."""
        return feed_of(self.image.model_dump(), self.source.preprocess.model_dump())

    @property
    def output(self) -> TensorSpec:
        """The one output every target but Core ML shares."""
        bank = self.source.bank
        if bank is None:
            shape = ("batch", len(self.source.classes))
            return TensorSpec(name="logits", dtype="float32", shape=shape, layout="NC")
        shape = ("batch", bank.vectors.shape[1])
        layout = "ND, rows of length 1"
        return TensorSpec(name="embedding", dtype="float32", shape=shape, layout=layout)

    def logits(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits `[B, C]` of what the file gives `[B, …]`."""
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
    """Further facts about this format for artifact.json: JSON values."""


def fp32_onnx(build: Build, path: Path) -> None:
    """Write the model as an fp32 ONNX file at `path`, from an earlier export where there is one."""
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
    """Write the agent beside a model that ends in an embedding, so that a device can add classes; return the files."""
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
