"""The files that a device could run: each available runtime in each precision, without those that cannot be chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from edgekd.benchmark.evaluate.accuracy import size_of
from edgekd.benchmark.gates import Gate
from edgekd.configs.export import ExportConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.formats import Precision
from edgekd.core.manifest import read_artifact
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.distill.classification.plan import newest_run
from edgekd.export.artifact import Source, export_model
from edgekd.export.quantize.integer_form import can_be_padded
from edgekd.export.run import source_of
from edgekd.targets.agent.model import FORMATS, check_runtime
from edgekd.targets.devices.drive import unable
from edgekd.targets.devices.transports import find_device
from edgekd.targets.registry import (
    DEFAULT_TARGET,
    TARGETS,
    UNPADDED,
    Target,
    artifact_name,
    get_target,
    opener_of,
)
from edgekd.targets.session import open_session
from edgekd.targets.timing.intervals import percentile
from edgekd.targets.timing.speed import timed_in_turns

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
"""Those that are tried, the most exact first."""
SLOWER = 1.3
"""A file that takes so many times as long as a smaller and more exact one is not measured."""
OVER = 1.5
"""A file whose quick p90 is so many times a limit is not measured."""


@dataclass(frozen=True)
class Candidate:
    """An exported file that may be the one to ship."""

    name: str
    folder: Path
    precision: Precision
    size_mb: float
    p50_ms: float | None = None
    """By a quick clock on this machine; None for a file that a device runs."""
    p90_ms: float | None = None


@dataclass(frozen=True)
class Candidates:
    """Files to measure, and what was left out, each with the reason."""

    run: Path
    folders: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...]


def make_candidates(config: ExportConfig, gates: Sequence[Gate]) -> Candidates:
    """Export a run's student for every runtime that the device has.

    Files of the same student that are there already are taken as they are, unless `config.overwrite`.

    Args:
        config: its target and precision are not looked at.
        gates: the budget; a file whose size or quick latency is beyond it is not measured further.

    Raises:
        EdgekdError: no way to the device, or no file that it could run.
    """
    loaded = load_run(config.run or newest_run())
    targets, left_out = available(config.device)
    calibrated = config.model_copy(update={"target": DEFAULT_TARGET, "precision": "int8"})
    source = source_of(loaded, calibrated)
    found: list[Candidate] = []
    for one in _variants(loaded, config, targets):
        name = artifact_name(one.target, one.precision, padding=one.padding)
        say(f"candidate {name}")
        try:
            found.append(_candidate(loaded, source, one, loaded.folder / "artifacts" / name))
        except EdgekdError as error:
            left_out.append((name, error.message))
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise EdgekdError(f"No file was exported ({reasons}).", "Install a runtime: edgekd doctor.")
    if not config.device:
        found = _timed(found, source)
    kept, dropped = prune(found, gates)
    return Candidates(loaded.folder, tuple(one.folder for one in kept), (*left_out, *dropped))


def available(device: str | None) -> tuple[list[Target], list[tuple[str, str]]]:
    """Return the targets whose runtime the device has, None being this Python, and why it has not the others."""
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
    """Return why this Python cannot run a format; it runs some that no agent on a device does."""
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
    """Yield what is exported; INT8 without padding too, where the FP32 file, exported before, could be padded."""
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


def _candidate(loaded: LoadedRun, source: Source, one: ExportConfig, folder: Path) -> Candidate:
    """Return the run's file in `folder`, exported now unless it is there."""
    if one.overwrite or not _is_of(loaded, folder):
        limited = one.precision == "int8" and get_target(one.target).mixed
        made, base = source if limited else replace(source, budget=None), _fp32(loaded)
        own = base is not None and base.parent == folder
        export_model(made, folder, one, fp32_path=None if own else base)
    return Candidate(folder.name, folder, one.precision, size_of(folder))


def _fp32(loaded: LoadedRun) -> Path | None:
    """Return the run's FP32 file; None where it is missing, damaged, or of another student."""
    folder = loaded.folder / "artifacts" / artifact_name(DEFAULT_TARGET, "fp32")
    with contextlib.suppress(EdgekdError):
        return folder / "model.onnx" if _is_of(loaded, folder) else None
    return None


def _is_of(loaded: LoadedRun, folder: Path) -> bool:
    """Return whether an artifact of the run's present student is in `folder`; a damaged one is an `EdgekdError`."""
    digest = loaded.run.student_sha256
    return folder.exists() and read_artifact(folder).source.get("student_sha256") == digest


def _timed(found: Sequence[Candidate], source: Source) -> list[Candidate]:
    """Return the candidates with quick latencies, measured in turns."""
    say(f"quick latency of {len(found)} files, in turns")
    models = {one.name: open_session(one.folder, spinning=False).run for one in found}
    samples = timed_in_turns(models, np.asarray(source.parity_images[:64]))
    times = (samples[one.name].samples_ms for one in found)
    return [
        replace(one, p50_ms=percentile(ms, 50), p90_ms=percentile(ms, 90))
        for one, ms in zip(found, times, strict=True)
    ]


def prune(
    found: Sequence[Candidate], gates: Sequence[Gate]
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Return the candidates worth a measurement, and why the others are not.

    A candidate goes where another is at least as exact and as small, and faster by `SLOWER`; where a faster one differs
    in padding alone; or where its size is above a limit, or its quick latency above one by `OVER`, unless all would go.
    """
    kept, dropped = [], []
    for one in found:
        better = next((other for other in found if _beats(other, one)), None)
        if better is None:
            kept.append(one)
        else:
            times = f"{one.p50_ms:.2f} ms against {better.p50_ms:.2f}"
            dropped.append(
                (one.name, f"slower than {better.name}, which is as exact and as small: {times}")
            )
    over = {one.name: reason for one in kept if (reason := _over(one, gates)) is not None}
    if len(over) == len(kept):
        return kept, dropped
    dropped += over.items()
    return [one for one in kept if one.name not in over], dropped


def _beats(one: Candidate, other: Candidate) -> bool:
    if one is other or one.p50_ms is None or other.p50_ms is None:
        return False
    if one.name.removesuffix(UNPADDED) == other.name.removesuffix(UNPADDED):
        return one.p50_ms < other.p50_ms
    order = get_args(Precision).index
    exact = order(one.precision) <= order(other.precision)
    return exact and one.size_mb <= other.size_mb and SLOWER * one.p50_ms < other.p50_ms


def _over(one: Candidate, gates: Sequence[Gate]) -> str | None:
    """Return which limit of size or latency the file is beyond."""
    for gate in gates:
        value, slack = getattr(one, gate.metric, None), 1.0 if gate.metric == "size_mb" else OVER
        if gate.operator in ("<=", "<") and isinstance(value, float) and value > slack * gate.limit:
            return f"{gate.metric} is {value:.2f}, above {gate.limit:g}"
    return None
