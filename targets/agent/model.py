"""An artifact folder and the runtimes of this Python: checked, made ready and opened without pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.readers import inside, read_object, sha256_file
from edgekd.targets.agent.job import number, whole
from edgekd.targets.registry import TARGETS, opener_of
from edgekd.targets.session import OR_ANOTHER, RuntimeOptions, Session, open_artifact

PACKAGES = {
    target.format: target.packages for target in TARGETS.values() if target.packages is not None
}
"""Format of artifacts that the agent runs → what a device's Python needs besides numpy and Pillow, for people."""
FORMATS = tuple(PACKAGES)
"""Formats of artifacts that the agent runs."""
_NEEDED = ("builder", "builder_version", "compute_capabilities")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what `artifact.json` in `folder` holds.

    A missing or damaged one, and a file name that leads out of the folder, are an `EdgekdError`.
    """
    artifact = read_object(folder / "artifact.json", "artifact", "Copy the artifact again.")
    try:
        _check(artifact)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise EdgekdError(
            f"The artifact at {folder} is damaged.", "Copy the artifact again."
        ) from error
    for name in artifact["files"]:
        inside(folder, name)
    return artifact


def _check(artifact: dict[str, Any]) -> None:
    """Refuse a manifest that lacks what the agent needs, with whatever error comes first."""
    files, preprocess, details = artifact["files"], artifact["preprocess"], artifact["details"]
    if not files or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("files")
    if artifact.get("bank") is not None and artifact["bank"] not in files:
        raise ValueError("bank")
    if not all(isinstance(value, str) for value in (artifact["name"], artifact["format"])):
        raise TypeError("name")
    if not artifact["classes"] or not all(isinstance(name, str) for name in artifact["classes"]):
        raise TypeError("classes")
    taken = artifact["inputs"][0]
    if not isinstance(details, dict) or not isinstance(taken["dtype"], str):
        raise TypeError("inputs")
    if len(taken["shape"]) != 4 and taken["dtype"] == "uint8":
        raise ValueError("inputs")
    if details.get("builder") is not None:
        texts = [details["builder"], details["builder_version"], *details["compute_capabilities"]]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("builder")
    whole(details.get("max_batch", 1), 1, 65_536)
    whole(preprocess["size"], 16, 4096)
    number(preprocess["crop_pct"], 0.25, 1)
    for value in (*preprocess["mean"], *preprocess["std"]):
        number(value, -1e6, 1e6)
    if preprocess["resize"] not in ("squash", "crop") or len(preprocess["mean"]) != 3:
        raise ValueError("preprocess")
    if len(preprocess["std"]) != 3 or min(preprocess["std"]) <= 0:
        raise ValueError("preprocess")
    if preprocess["interpolation"] not in ("nearest", "bilinear", "bicubic"):
        raise ValueError("preprocess")


def needs(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `artifact.json` that `check_runtime` reads."""
    details = artifact.get("details", {})
    return {
        "format": artifact["format"],
        "details": {key: details[key] for key in _NEEDED if key in details},
    }


def check_runtime(artifact: Mapping[str, Any]) -> Any:
    """Return the opener of an artifact, an `edgekd.targets.session.Opener`, whose runtime this device's Python has.

    What `needs` takes of `artifact.json` is enough. A runtime that is not here is an `EdgekdError` with its package.
    """
    if artifact["format"] not in FORMATS:
        raise EdgekdError(
            f"The agent cannot run artifacts of the format {artifact['format']}.",
            f"It runs {', '.join(FORMATS)}; measure others without --device.",
        )
    package = PACKAGES[artifact["format"]]
    try:
        opener = opener_of(artifact["format"])
        if hasattr(opener, "check"):
            opener.check(artifact)
    except (ImportError, OSError, NotHere) as error:
        raise EdgekdError(
            f"The device's Python cannot load {package} ({error.__cause__ or error}).",
            f"On the device: python3 -m pip install {package}, {OR_ANOTHER}",
        ) from error
    return opener


def open_model(folder: Path, *, threads: int | None) -> Session:
    """Open an artifact folder, whose files must be those that were exported, with the runtime of its format."""
    artifact = read_manifest(folder)
    for name, expected in artifact["files"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != expected:
            raise EdgekdError(
                f"{folder / name} is not the file that was exported.", "Copy the artifact again."
            )
    if artifact["format"] in FORMATS:
        check_runtime(artifact)
    return open_artifact(artifact, folder, RuntimeOptions(threads=threads))
