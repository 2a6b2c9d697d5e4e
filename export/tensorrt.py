"""The writer for TensorRT: the ONNX file, what builds an engine from it on a device, and an engine where possible."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import TensorSpec
from edgekd.export.onnx.evaluate import ONNX_FILE, onnx_evaluator
from edgekd.export.quantize.tensorrt import TensorRtInt8
from edgekd.export.quantize.tensorrt_rules import findings
from edgekd.export.writer import Build, Written, write_onnx
from edgekd.targets.trt.build import BuildError, build, parse
from edgekd.targets.trt.builders import Choice, choose, module

ENGINE_FILE = "model.engine"
MAX_BATCH = 32
"""Largest batch an engine is built for; 1 is what it is tuned for."""
EVALUATED_BY = "ONNX of the engine, run by ONNX Runtime; the engine itself was not run here"


def write(order: Build) -> Written:
    """Write `model.onnx`, `build.sh`, `build_engine.py`, and `model.engine` where a builder is on this machine.

    Raises:
        EdgekdError: an unknown compute capability, a graph that TensorRT would refuse or misread, or a failed build.
    """
    capabilities = _capabilities(order.options.get("compute_capability"))
    choice = choose(capabilities, precision=order.precision)
    if choice.builder is None:
        say(f"tensorrt: a bundle to build on the device, because {choice.why}")
    else:
        say(f"tensorrt: engine by {choice.builder} {choice.version}, because {choice.why}")
    path = order.folder / ONNX_FILE
    quantization = write_onnx(order, path, TensorRtInt8())
    checked = check_legal(path)
    engine = _build_engine(choice, order.folder)
    _write_bundle(order.folder, order.image)
    runs_here = choice.builder == "tensorrt"
    return Written(
        format="tensorrt",
        files=(*engine, ONNX_FILE, "build.sh", "build_engine.py"),
        inputs=(order.image,),
        outputs=(order.output,),
        quantization=quantization,
        details={
            "builder": choice.builder,
            "builder_version": choice.version,
            "why": choice.why,
            "compute_capabilities": list(choice.capabilities),
            "max_batch": MAX_BATCH,
            "checked": checked,
            "not_verified": _not_verified(choice),
        },
        evaluate=None if runs_here else onnx_evaluator(path, order.feed),
        evaluated_by=None if runs_here else EVALUATED_BY,
    )


def check_legal(path: Path) -> list[str]:
    """Return what accepts the file as it is meant: edgekd's rules, and every TensorRT parser on this machine.

    Raises:
        EdgekdError: one of them refuses it; the first reason.
    """
    broken = findings(onnx.load(path))
    if broken:
        raise EdgekdError(
            f"TensorRT would not take this model as it is meant ({len(broken)} findings): {broken[0]}",
            "If an older edgekd exported the fp32 artifact beside it, export that again with --overwrite.",
        )
    accepted = ["edgekd's rules"]
    for name in ("tensorrt", "tensorrt-rtx"):
        trt = module(name)
        if trt is None:
            continue
        try:
            reasons = parse(trt, path.read_bytes())[2]
        except BuildError:
            continue  # tensorrt without a GPU has no builder
        if reasons:
            raise EdgekdError(
                f"The parser of {name} {trt.__version__} refuses the model: {reasons[0]}.",
                "Use --fp16, or another student.",
            )
        accepted.append(f"the parser of {name} {trt.__version__}")
    return accepted


def _capabilities(given: Any) -> tuple[str, ...]:
    """`8.6,8.9` → `("8.6", "8.9")`."""
    parts = [] if given is None else [part.strip() for part in str(given).split(",")]
    wrong = [part for part in parts if not re.fullmatch(r"\d{1,2}\.\d", part)]
    if wrong:
        raise EdgekdError(
            f'"{wrong[0]}" is no compute capability.',
            "Give numbers like 8.6,8.9, separated by commas.",
        )
    return tuple(parts)


def _build_engine(choice: Choice, folder: Path) -> list[str]:
    """Write the engine where a builder is on this machine; return the files written."""
    if choice.builder is None:
        return []
    ahead = choice.capabilities if choice.builder == "tensorrt-rtx" else ()
    model = (folder / ONNX_FILE).read_bytes()
    try:
        plan = build(module(choice.builder), model, max_batch=MAX_BATCH, capabilities=ahead)
    except BuildError as error:
        raise EdgekdError(
            f"{choice.builder} {choice.version} cannot build the engine for {', '.join(choice.capabilities)}: {error}.",
            "Try --fp16, or another --compute-capability.",
        ) from error
    (folder / ENGINE_FILE).write_bytes(plan)
    return [ENGINE_FILE]


def _write_bundle(folder: Path, image: TensorSpec) -> None:
    source = files("edgekd.targets.trt")
    script = source.joinpath("build.sh").read_text(encoding="utf-8")
    item = "x".join(str(side) for side in image.shape[1:])
    script = script.replace("@ITEM@", item).replace("@BATCH@", str(MAX_BATCH))
    (folder / "build.sh").write_text(script, encoding="utf-8")
    (folder / "build.sh").chmod(0o755)
    builder = source.joinpath("build.py").read_text(encoding="utf-8")
    (folder / "build_engine.py").write_text(builder, encoding="utf-8")


def _not_verified(choice: Choice) -> list[str]:
    if choice.builder == "tensorrt":
        return []
    built = "that the engine loads on such a GPU"
    if choice.builder is None:
        built = "that an engine can be built from model.onnx"
    return [built, "the engine's numbers", "its latency"]
