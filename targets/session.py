"""An exported artifact, opened and ready to run, whatever its runtime; never torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.predictor import Predictor, in_batches
from edgekd.targets.bank import ClassBank, read_bank
from edgekd.targets.opened import Ask, Opened
from edgekd.targets.registry import opener_of, target_of


@dataclass(frozen=True)
class Session:
    """A loaded artifact. Make one with `open_session`."""

    artifact: Artifact
    provider: str
    """What executes the graph, in the runtime's own words."""
    threads: int
    """Threads within one operator; operators run one after the other."""
    load_ms: float
    """Reading and preparing the model, without the check of its hash."""
    predict: Predictor
    """The runtime's call, unchecked: the file's own output, for at most `largest_batch` images."""
    placement: Ask = lambda: None
    """Asks the runtime which nodes run where; None from runtimes that do not tell. May open the model once more."""
    largest_batch: int | None = None
    """Images in one call of the runtime at most, as the file was made; None: as many as there are. More are run in
    pieces, so whoever takes the time of a batch has to ask for no more."""
    bank: ClassBank | None = None
    """The class vectors of a file that gives embeddings."""

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 `[B, H, W, 3]` → float32 logits `[B, C]`; of a file that gives embeddings, by its class bank.

        Raises:
            EdgekdError: another dtype or another shape than the artifact's input.
        """
        answer = in_batches(self.predict, self._checked(images), self.largest_batch)
        return answer if self.bank is None else self.bank.logits(answer)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 `[B, H, W, 3]` → float32 `[B, D]`, rows of length 1, in the space of the class bank.

        Raises:
            EdgekdError: as `run`, or a file that ends in logits.
        """
        if self.bank is None:
            raise EdgekdError(
                f"{self.artifact.name} ends in the logits of its classes and gives no embedding.",
                "Export with --head embedding.",
            )
        return in_batches(self.predict, self._checked(images), self.largest_batch)

    def _checked(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.artifact.preprocess.size
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[1:] != (size, size, 3)
            or len(images) == 0
        ):
            raise EdgekdError(
                f"{self.artifact.name} takes uint8 [B, {size}, {size}, 3], not {images.dtype} {list(images.shape)}.",
                "Prepare the images with the artifact's preprocess.",
            )
        return images


def session_of(artifact: Artifact, opened: Opened) -> Session:
    """The session of a model file that is open."""
    return Session(
        artifact,
        opened.provider,
        opened.threads,
        opened.load_ms,
        opened.run,
        opened.placement,
        largest_batch=opened.largest_batch,
    )


def open_session(
    folder: Path,
    *,
    threads: int | None = None,
    check_hashes: bool = True,
    spinning: bool = True,
    provider: str | None = None,
) -> Session:
    """Load the artifact in `folder` with the runtime of its format.

    Args:
        threads: threads within one operator; None is the runtime's choice.
        check_hashes: False skips the comparison of each file with its SHA-256, for repeated loads of a checked folder.
        spinning: waiting threads poll, ONNX Runtime's default: the lowest latency on a quiet machine. False lets them
            sleep, for work beside other work. Runtimes without such a choice ignore it.
        provider: who executes a file of a target that has several, as ONNX Runtime has `cpu` and `cuda`; None is the
            target's own. Nothing else is ever used in its place.

    Raises:
        EdgekdError: not an artifact, a format that cannot run here, an altered or corrupt file, a file that the
            runtime refuses, or a runtime that would fall back to another device.
    """
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise EdgekdError(f"{threads} threads are not possible.", "Give 1 or more.")
    artifact = read_artifact(folder, check_hashes=check_hashes)
    if provider is not None and not target_of(artifact.format).providers:
        raise EdgekdError(
            f"The format {artifact.format} has one runtime and no providers.",
            "Leave the provider out.",
        )
    opened: Opened = opener_of(artifact.format).open_file(
        artifact.model_dump(mode="json"),
        folder,
        threads=threads,
        spinning=spinning,
        provider=provider,
    )
    session = session_of(artifact, opened)
    if artifact.bank is None:
        return session
    bank = read_bank(folder / artifact.bank)
    if bank.classes != artifact.classes:
        raise EdgekdError(
            f"{folder / artifact.bank} holds other classes than artifact.json names.",
            "Copy the artifact again.",
        )
    return replace(session, bank=bank)
