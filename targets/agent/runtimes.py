"""The runtimes that the agent finds on a device: whether one is there, and a model file opened in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError
from edgekd.targets.registry import TARGETS, opener_of
from edgekd.targets.session import OR_ANOTHER

PACKAGES = {
    target.format: target.packages for target in TARGETS.values() if target.packages is not None
}
"""Format of artifacts that the agent runs → what a device's Python needs besides numpy and Pillow, for people."""
FORMATS = tuple(PACKAGES)
"""Formats of artifacts that the agent runs."""


def needs(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `artifact.json` that says which runtime it needs: what `check_runtime` looks at."""
    details = artifact.get("details", {})
    kept = ("builder", "builder_version", "compute_capabilities")
    return {
        "format": artifact["format"],
        "details": {key: details[key] for key in kept if key in details},
    }


def check_runtime(artifact: Mapping[str, Any]) -> Any:
    """Return the opener of an artifact, an `edgekd.targets.session.Opener`, whose runtime this device's Python has.

    Args:
        artifact: what `artifact.json` holds; what `needs` takes of it is enough.

    Raises:
        EdgekdError: an unknown format, or a runtime that is not here, by the name of its package.
    """
    if artifact["format"] not in FORMATS:
        raise EdgekdError(
            f"The agent cannot run artifacts of the format {artifact['format']}.",
            f"It runs {', '.join(FORMATS)}.",
        )
    package = PACKAGES[artifact["format"]]
    try:
        opener = opener_of(artifact["format"])
    except (ImportError, OSError) as error:
        raise EdgekdError(
            f"The device's Python cannot load {package} ({error}).",
            f"On the device: python3 -m pip install {package}, {OR_ANOTHER}",
        ) from error
    if hasattr(opener, "check"):
        opener.check(artifact)
    return opener


def make_ready(
    artifact: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Do what must be done once before an artifact can be opened: the engine of a TensorRT bundle is built.

    Returns:
        What was built here, as `engines.ready_engine` has it; None where nothing was.

    Raises:
        EdgekdError: as `check_runtime`, or a build that fails.
    """
    opener = check_runtime(artifact)
    if not hasattr(opener, "make_ready"):
        return None
    built: dict[str, Any] | None = opener.make_ready(artifact, folder, say)
    return built
