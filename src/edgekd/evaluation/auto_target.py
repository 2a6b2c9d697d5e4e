"""Candidates of `--target auto`: files for each available runtime in each precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from edgekd.configs.export import ExportConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.formats import Precision
from edgekd.core.manifest import newest_run, read_artifact
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.export.artifact import export_model
from edgekd.export.quantize.integer_form import can_be_padded
from edgekd.export.run import source_of
from edgekd.export.writer import Source
from edgekd.targets.agent.model import FORMATS, check_runtime
from edgekd.targets.devices.drive import unable
from edgekd.targets.devices.transports import find_device
from edgekd.targets.registry import (
    DEFAULT_TARGET,
    TARGETS,
    Target,
    artifact_name,
    get_target,
    opener_of,
)

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
"""Precisions of the candidates."""


def make_candidates(config: ExportConfig) -> tuple[list[Path], list[tuple[str, str]]]:
    """Export a run's student for every runtime on the device, ignoring the target and precision of `config`.

    Existing files of the same student are reused, unless `config.overwrite`.

    Returns:
        Folders of the files, and names and reasons of the candidates that were left out.

    Raises:
        EdgekdError: the device cannot be reached, or no file could be exported for it.
    """
    loaded = load_run(config.run or newest_run())
    targets, left_out = available(config.device)
    calibrated = config.model_copy(update={"target": DEFAULT_TARGET, "precision": "int8"})
    source = source_of(loaded, calibrated)
    found: list[Path] = []
    for one in _variants(loaded, config, targets):
        name = artifact_name(one.target, one.precision, padding=one.padding)
        say(f"candidate {name}")
        try:
            found.append(_exported(loaded, source, one, loaded.folder / "artifacts" / name))
        except EdgekdError as error:
            left_out.append((name, error.message))
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise EdgekdError(f"No file was exported ({reasons}).", "Install a runtime: edgekd doctor.")
    return found, left_out


def available(device: str | None) -> tuple[list[Target], list[tuple[str, str]]]:
    """Return the targets available on the device (None is this Python), and the others with reasons."""
    targets = list(TARGETS.values())
    needs: list[dict[str, Any]] = [{"format": one.format, "details": {}} for one in targets]
    if device is None:
        reasons = [_missing_here(one) for one in needs]
    else:
        with contextlib.closing(find_device(device)) as place:
            reasons = unable(place, needs)
    pairs = list(zip(targets, reasons, strict=True))
    missing = [(target.name, reason.message) for target, reason in pairs if reason is not None]
    return [target for target, reason in pairs if reason is None], missing


def _missing_here(needed: dict[str, Any]) -> EdgekdError | None:
    """Return the reason if this Python cannot run a format."""
    try:
        if needed["format"] in FORMATS:
            check_runtime(needed)
        else:
            opener_of(needed["format"]).check(needed)
    except EdgekdError as error:
        return error
    return None


def _variants(
    loaded: LoadedRun, config: ExportConfig, targets: Sequence[Target]
) -> Iterator[ExportConfig]:
    """Yield the exports, including INT8 without padding if the FP32 file, exported before, can be padded."""
    fields = ("calibration_images", "data", "overwrite")
    shared = {name: getattr(config, name) for name in fields}
    for target in targets:
        for precision in (one for one in PRECISIONS if one in target.precisions):
            one = ExportConfig(run=loaded.folder, target=target.name, precision=precision, **shared)
            yield one
            may = precision == "int8" and "padding" in target.options
            base = _fp32(loaded) if may else None
            if base is not None and can_be_padded(onnx.load(base)):
                yield one.model_copy(update={"padding": False})


def _exported(loaded: LoadedRun, source: Source, one: ExportConfig, folder: Path) -> Path:
    """Return the folder of the run's file, exporting it if necessary."""
    if one.overwrite or not _is_of(loaded, folder):
        limited = one.precision == "int8" and get_target(one.target).mixed
        made, base = source if limited else replace(source, budget=None), _fp32(loaded)
        own = base is not None and base.parent == folder
        export_model(made, folder, one, fp32_path=None if own else base)
    return folder


def _fp32(loaded: LoadedRun) -> Path | None:
    """Return the run's FP32 file; None if it is missing, damaged, or of another student."""
    folder = loaded.folder / "artifacts" / artifact_name(DEFAULT_TARGET, "fp32")
    with contextlib.suppress(EdgekdError):
        return folder / "model.onnx" if _is_of(loaded, folder) else None
    return None


def _is_of(loaded: LoadedRun, folder: Path) -> bool:
    """Return whether `folder` has an artifact of the run's student; raise `EdgekdError` if it is damaged."""
    digest = loaded.run.student_sha256
    return folder.exists() and read_artifact(folder).source.get("student_sha256") == digest
