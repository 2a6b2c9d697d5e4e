"""The writer for TensorRT: an ONNX file, scripts that build an engine on a device, and an engine if possible."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import onnx

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import TensorSpec
from edgekd.export.onnx.evaluate import ONNX_FILE
from edgekd.export.quantize.tensorrt import TensorRtInt8
from edgekd.export.quantize.tensorrt_rules import findings
from edgekd.export.writer import Build, Written, write_onnx
from edgekd.targets.trt.build import BuildError, build, parse
from edgekd.targets.trt.machine import Choice, choose, module

ENGINE_FILE = "model.engine"
MAX_BATCH = 32
"""Largest batch an engine is built for; 1 is what it is tuned for."""


def write(order: Build) -> Written:
    """Write `model.onnx`, `build.sh`, `build_engine.py`, and `model.engine` if a builder is on this machine.

    An unknown compute capability, a graph that TensorRT would refuse or misread, and a failed build are an
    `EdgekdError`.
    """
    capabilities = _capabilities(order.config.compute_capability)
    choice = choose(capabilities, precision=order.config.precision)
    if choice.builder is None:
        say(f"tensorrt: a bundle to build on the device, because {choice.why}")
    else:
        say(f"tensorrt: engine by {choice.builder} {choice.version}, because {choice.why}")
    path = order.folder / ONNX_FILE
    quantization = write_onnx(order, path, TensorRtInt8())
    checked = check_legal(path)
    engine = _build_engine(choice, order.folder)
    _write_bundle(order.folder, order.image)
    return Written(
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
    )


def check_legal(path: Path) -> list[str]:
    """Check a file with edgekd's rules and every TensorRT parser on this machine; return the names of the checks.

    A refusal is an `EdgekdError` with its first reason.
    """
    broken = findings(onnx.load(path))
    if broken:
        raise EdgekdError(
            f"TensorRT would refuse or misread this model ({len(broken)} findings): {broken[0]}",
            "If an older edgekd exported the fp32 artifact, export that again with --overwrite.",
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


def _capabilities(given: str | None) -> tuple[str, ...]:
    """`8.6,8.9` → `("8.6", "8.9")`."""
    parts = [] if given is None else [part.strip() for part in given.split(",")]
    wrong = [part for part in parts if not re.fullmatch(r"\d{1,2}\.\d", part)]
    if wrong:
        raise EdgekdError(
            f'"{wrong[0]}" is not a compute capability.',
            "Give numbers like 8.6,8.9, separated by commas.",
        )
    return tuple(parts)


def _build_engine(choice: Choice, folder: Path) -> list[str]:
    """Write the engine if a builder is on this machine; return the written files."""
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
