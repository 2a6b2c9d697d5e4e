"""A model file, open in its runtime, whichever it is (the device agent carries this file)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor
from edgekd.targets.feed import Feed, feed_of
from edgekd.targets.placement import Placement

OR_ANOTHER = "or name a Python that has it."
"""End of a hint about a package that a device lacks."""
Ask = Callable[[], Optional[Placement]]  # noqa: UP045  `Placement | None` is no expression in Python 3.9
"""Asks the runtime which nodes run where; None from runtimes that do not tell."""


@dataclass(frozen=True)
class Opened:
    """A model file in its runtime."""

    run: Predictor
    """The file's own output."""
    provider: str
    """What executes the graph, in the runtime's own words."""
    threads: int
    """Threads within one operator; operators run one after the other."""
    load_ms: float
    """Reading and preparing the model."""
    placement: Ask = lambda: None
    """May open the model once more."""
    largest_batch: int | None = None
    """Images that one call of `run` takes at most; None takes any number."""


class Opener(Protocol):
    """What a module of targets/ offers for the files of one format."""

    def open_file(
        self,
        artifact: Mapping[str, Any],
        folder: Path,
        *,
        threads: int | None,
        spinning: bool,
        provider: str | None,
    ) -> Opened:
        """Open an artifact's model file.

        Args:
            artifact: what `artifact.json` holds.
            threads: threads within one operator; None is the runtime's choice.
            spinning: waiting threads poll; runtimes without such a choice ignore it.
            provider: who executes the file; None where the target has one runtime.

        Raises:
            NotHere: the runtime is not on this machine.
            EdgekdError: a file that the runtime refuses.
        """

    def check(self, artifact: Mapping[str, Any]) -> None:
        """Refuse, with an `EdgekdError`, an artifact whose runtime this device's Python lacks."""

    def make_ready(
        self, artifact: Mapping[str, Any], folder: Path, say: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Do once on a device what must be done before the file can be opened; return what was built."""


def feed_for(artifact: Mapping[str, Any]) -> Feed:
    """Return what brings uint8 `[B, H, W, 3]` to the artifact's input; an unknown input is an `EdgekdError`."""
    return feed_of(artifact["inputs"][0]["dtype"], artifact["preprocess"])


def model_path(artifact: Mapping[str, Any], folder: Path) -> Path:
    """Return the path of the artifact's model file."""
    return Path(folder) / str(next(iter(artifact["files"])))


def refuse_batch(batch: int, largest: int | None) -> None:
    """Refuse to take the time of a batch that would be run in pieces."""
    if largest is not None and batch > largest:
        images = "one image" if largest == 1 else f"{largest} images"
        raise EdgekdError(
            f"The file is made for {images} at a time, not for {batch}.", "Ask for smaller batches."
        )
