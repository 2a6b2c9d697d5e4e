"""Predictors for ONNX files, operator by operator or optimised by ONNX Runtime, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgekd.core.manifest import Artifact
from edgekd.core.predictor import Predictor
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.session import feed_for

ONNX_FILE = "model.onnx"
EVALUATED_BY = "ONNX of the engine, run by ONNX Runtime; the engine itself was not run here"


def onnx_evaluator(path: Path, feed: Feed = as_pixels) -> Predictor:
    """Return the ONNX file as it is written, run by ONNX Runtime on the CPU; `feed` makes its input of pixels.

    Without graph optimisation: that would drop roundings to half precision and quantize biases, which no engine does.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return _evaluator(path, options, feed)


def runtime_evaluator(path: Path) -> Predictor:
    """Return a predictor for an ONNX file with uint8 input in ONNX Runtime on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return _evaluator(path, options, as_pixels)


def _evaluator(path: Path, options: onnxruntime.SessionOptions, feed: Feed) -> Predictor:
    options.log_severity_level = 4
    # Loaded from bytes, since the file is renamed with its folder while the session is open.
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {"image": feed(images)})[0]
        return logits

    return run


def reference(artifact: Artifact, folder: Path) -> tuple[Predictor, str]:
    """Return the ONNX file in an artifact's folder as ONNX Runtime computes it, and what that is."""
    feed = feed_for(artifact.model_dump(mode="json"))
    return onnx_evaluator(folder / ONNX_FILE, feed), EVALUATED_BY
