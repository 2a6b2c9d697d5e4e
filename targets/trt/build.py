"""Build `device.engine` from `model.onnx` with TensorRT, on the machine that will run it.

This file needs only Python and NVIDIA's `tensorrt` (or `tensorrt_rtx`). A copy of it is in every TensorRT artifact as
`build_engine.py`. Run it in the artifact's folder: `python3 build_engine.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Name → Python module. Both have the same interface."""
# After these warnings TensorRT builds an engine that computes something else.
_FATAL_WARNINGS = ("Defaulting to INT8 instead", "TensorRT will use INT8 instead")
_loggers: dict[str, Any] = {}


class BuildError(Exception):
    """TensorRT refused the model; the message is its reason in one line."""


def parse(trt: Any, model: bytes) -> tuple[Any, Any, list[str]]:
    """Read an ONNX file's bytes into a strongly typed network.

    Returns:
        The builder, the network, and the reasons for refusing the model; without any, the network can be built.
    """
    logger = _logger(trt)
    logger.lines.clear()
    builder = trt.Builder(logger)
    if builder is None:
        raise BuildError(_last(logger) or "the builder could not be created")
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model)
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        place = error.node_name() or error.node_operator()
        reasons.append(f"{place}: {_tidy(error.desc())}" if place else _tidy(error.desc()))
    reasons += [
        _tidy(line) for line in logger.lines if any(fatal in line for fatal in _FATAL_WARNINGS)
    ]
    if not parsed and not reasons:
        reasons = [_last(logger) or "the parser gave no reason"]
    return builder, network, reasons


def build(trt: Any, model: bytes, *, max_batch: int, capabilities: Sequence[str] = ()) -> bytes:
    """Return an engine for batches of 1 to `max_batch`, tuned for 1.

    Args:
        capabilities: compute capabilities such as `8.6` to build for ahead of time, TensorRT-RTX only; empty builds
            for this machine's GPU.

    Raises:
        BuildError: TensorRT refuses the model, or cannot compile it for that kind of GPU.
    """
    builder, network, reasons = parse(trt, model)
    if reasons:
        raise BuildError(reasons[0])
    config = builder.create_builder_config()
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(
                getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index
            )
    image = network.get_input(0)
    shape = tuple(image.shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, (1, *shape), (1, *shape), (max_batch, *shape))
    config.add_optimization_profile(profile)
    logger = _logger(trt)
    logger.lines.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(_last(logger) or "the builder gave no reason")
    return bytes(plan)


def _logger(trt: Any) -> Any:
    """Return the logger of the process, since TensorRT keeps the first one and ignores others."""
    if trt.__name__ not in _loggers:

        class Lines(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                    self.lines.append(message)

        _loggers[trt.__name__] = Lines()
    return _loggers[trt.__name__]


def _last(logger: Any) -> str:
    errors = [line for line in logger.lines if "Error Code" in line] or logger.lines
    return _tidy(errors[-1]) if errors else ""


def _tidy(text: str) -> str:
    """Return one line without TensorRT's own source positions."""
    line = " ".join(text.split())
    for mark in (" In checkType at ", " In compileGraph at ", " (In catch"):
        line = line.partition(mark)[0]
    return line.rstrip(". ")[:400]


def main() -> None:
    """Run the command line of the copy in an artifact's folder."""
    arguments = argparse.ArgumentParser(
        description="Build device.engine from model.onnx on this machine."
    )
    arguments.add_argument("--max-batch", type=int, help="largest batch [default: the artifact's]")
    arguments.add_argument("--builder", choices=sorted(MODULES), default="tensorrt")
    given = arguments.parse_args()
    folder = Path(__file__).resolve().parent
    details = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))["details"]
    try:
        trt = importlib.import_module(MODULES[given.builder])
        model = (folder / "model.onnx").read_bytes()
        plan = build(trt, model, max_batch=given.max_batch or details["max_batch"])
    except (ImportError, BuildError) as error:
        sys.exit(f"error: {error}.")
    scratch = folder / "device.engine.part"
    scratch.write_bytes(plan)
    os.replace(scratch, folder / "device.engine")
    print(f"device.engine: {len(plan) / 1e6:.1f} MB, {given.builder} {trt.__version__}")


if __name__ == "__main__":
    main()
