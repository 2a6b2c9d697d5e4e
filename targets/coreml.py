"""Artifacts of the format `coreml`, run by Core ML, which only macOS has."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.errors import EdgekdError, NotHere, optional
from edgekd.core.predictor import Predictor
from edgekd.targets.session import RuntimeOptions, Session, model_path

EMBEDDING = "embedding"
"""Name of the output of a package that ends in an embedding."""
_TINY = np.finfo(np.float32).tiny


def open_file(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Load the package with Core ML, which chooses among CPU, GPU and Neural Engine and its own threads.

    See `edgekd.targets.session.Opener`. A classifier's logits are the logarithms of its probabilities: less one number
    per image, which moves neither the argmax nor the softmax.
    """
    check(artifact)
    if options.threads is not None:
        raise EdgekdError(
            "Core ML chooses its threads itself.", "Leave --threads out for this artifact."
        )
    started = time.perf_counter()
    # The package is the first part of the model file's path: model.mlpackage/Data/….
    package = Path(folder) / model_path(artifact, Path()).parts[0]
    if artifact.get("bank") is None:
        run = load_package(package, tuple(artifact["classes"]))
    else:
        run = load_embedder(package)
    return Session(run, "Core ML, all compute units", 0, (time.perf_counter() - started) * 1e3)


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a system without Core ML; see `edgekd.targets.session.Opener`."""
    if platform.system() != "Darwin":
        raise NotHere(
            f"{artifact.get('name', 'A package')} needs Core ML, which only macOS has.",
            "Copy the folder to a Mac; its parity record lists what was checked here.",
        )


def load_package(package: Path, classes: tuple[str, ...]) -> Predictor:
    """Return `uint8 [B, H, W, 3] → log-probabilities float32 [B, C]` of a saved package, columns as `classes`."""
    model = _model(package)

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = []
        for image in images:
            odds = model.predict({"image": Image.fromarray(image)})["classLabel_probs"]
            rows.append([odds[name] for name in classes])
        logs: NDArray[np.float32] = np.log(np.maximum(np.array(rows, dtype=np.float32), _TINY))
        return logs

    return predict


def load_embedder(package: Path) -> Predictor:
    """Return `uint8 [B, H, W, 3] → unit embeddings float32 [B, D]` of a saved package, by Core ML."""
    model = _model(package)

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = [model.predict({"image": Image.fromarray(image)})[EMBEDDING] for image in images]
        return np.concatenate(found).astype(np.float32)

    return predict


def _model(package: Path) -> Any:
    coremltools = optional("coremltools", "coreml", "A Core ML artifact")
    try:
        return coremltools.models.MLModel(str(package), compute_units=coremltools.ComputeUnit.ALL)
    except Exception as error:  # Core ML's errors arrive as RuntimeError with Apple's text
        raise EdgekdError(
            f"Core ML cannot load {package} ({error}).", "Export again with --overwrite."
        ) from error
