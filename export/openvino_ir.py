"""Read, write and evaluate OpenVINO's files."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.openvino import load_openvino, reason_of, shared_core, version_of

_AUTOMATIC = re.compile(r"([A-Z][A-Za-z0-9]*)_\d+(?=/|$)")


def read(path: Path) -> Any:
    """Return the model of an ONNX file; raise `EdgekdError` if OpenVINO does not support it."""
    openvino = load_openvino()
    try:
        return _renumbered(shared_core().read_model(path))
    except RuntimeError as error:
        raise EdgekdError(
            f"OpenVINO {version_of(openvino)} cannot read the student's ONNX graph: {reason_of(error)}.",
            "Choose another student, or --target onnxruntime.",
        ) from error


def save(model: Any, path: Path, metadata: Mapping[str, str], *, halved: bool) -> None:
    """Write a model as IR, with `halved` its float weights in 16 bits."""
    openvino = load_openvino()
    model = _renumbered(model.clone())
    for key, value in metadata.items():
        model.set_rt_info(value, ["edgekd", key])
    try:
        openvino.save_model(model, path, compress_to_fp16=halved)
    except RuntimeError as error:  # an OSError in all but name and number
        # Temporary folders mean nothing to the user.
        own = (".tmp-", "search-")
        place = next(parent for parent in path.parents if not parent.name.startswith(own))
        raise EdgekdError(
            f"OpenVINO {version_of(openvino)} could not write its files in {place} ({reason_of(error)}).",
            "Is the disk full? Free some space and run again; nothing half-written was kept.",
        ) from error


def evaluator(path: Path, feed: Feed = as_pixels) -> Predictor:
    """Return a predictor for an IR or ONNX file in OpenVINO on one CPU thread, compiled for each batch size."""
    core = shared_core()
    model = core.read_model(path)
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }

    @functools.cache
    def prepared(shape: tuple[int, ...]) -> Any:
        fixed = model.clone()
        fixed.reshape(list(shape))
        return core.compile_model(fixed, "CPU", settings).create_infer_request()

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        given = feed(images)
        request = prepared(given.shape)
        request.get_input_tensor(0).data[...] = given
        request.start_async()
        request.wait()
        found: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        return found

    return run


def _renumbered(model: Any) -> Any:
    """Renumber the operations named by OpenVINO, in place, since it counts them over the whole process."""
    names: dict[str, str] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if found := _AUTOMATIC.match(name):
            number = names.setdefault(found[0], f"{found[1]}_{len(names)}")
            node.set_friendly_name(number + name[found.end() :])
    return model
