"""Sessions: artifacts opened in their runtime, without torch (part of the device agent)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, NotHere, first_line
from edgekd.core.predictor import Predictor, in_batches
from edgekd.core.readers import printable
from edgekd.data.images import UnreadableImage, decode
from edgekd.data.resize import resize_rgb
from edgekd.targets.bank import ClassBank, read_bank
from edgekd.targets.feed import Feed, feed_of, resizes
from edgekd.targets.registry import opener_of, target_of

if TYPE_CHECKING:
    from edgekd.core.manifest import Artifact

OR_ANOTHER = "or name a Python that has it."
"""End of a hint about a missing package on a device."""
Nodes = dict[str, dict[str, int]]
"""Execution provider or device → kind of operator → number of nodes."""


@dataclass(frozen=True)
class Placement:
    """Placement of the nodes of a loaded artifact, as reported by the runtime."""

    provider: str
    """The requested provider or device."""
    nodes: Nodes
    source: str
    """The source of the information."""


def refuse_fallback(name: str, placement: Placement) -> None:
    """Raise an `EdgekdError` unless every node ran on the requested provider, and at least one did."""
    counts = {who: sum(kinds.values()) for who, kinds in placement.nodes.items()}
    elsewhere = {who: n for who, n in sorted(counts.items()) if who != placement.provider}
    if elsewhere:
        kinds = sorted({kind for who in elsewhere for kind in placement.nodes[who]})
        total = sum(counts.values())
        found = ", ".join(f"{n} of {total} nodes on {who}" for who, n in elsewhere.items())
        raise EdgekdError(
            f"{name} did not run on {placement.provider} only: {found} ({', '.join(kinds[:5])}).",
            "No report is written. Export for a target whose runtime supports every operator.",
        )
    if not placement.nodes.get(placement.provider):
        raise EdgekdError(
            f"{placement.source} has no node of {name}, so its placement is unknown.",
            "Report this to edgekd.",
        )


@dataclass(frozen=True)
class Session:
    """A model file in its runtime, created by openers for files and by `open_session` for artifacts."""

    predict: Predictor
    """The unchecked call of the runtime, which returns the file's output for at most `largest_batch` images."""
    provider: str
    """Runtime and provider that execute the graph."""
    threads: int
    """Threads within an operator; operators run sequentially."""
    load_ms: float
    """Time for loading and preparing the model, without its hash check."""
    placement: Callable[[], Optional[Placement]] = lambda: None  # noqa: UP045  Python 3.9
    """Returns the placement of the nodes, or None if the runtime does not report it. May open the model again."""
    largest_batch: int | None = None
    """Maximum number of images per call of the runtime; None is any number."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Content of `artifact.json`."""
    bank: ClassBank | None = None
    """The class vectors of a file that ends in an embedding."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names in the order of the logits."""
        return tuple(printable(name) for name in self.manifest["classes"])

    @functools.cached_property
    def artifact(self) -> Artifact:
        """Return the manifest as a pydantic model (not on devices)."""
        from edgekd.core.manifest import Artifact

        return Artifact.model_validate(self.manifest)

    def prepare(self, encoded: bytes) -> NDArray[np.uint8]:
        """Decode and preprocess an image to RGB uint8 `[H, W, 3]`; raise `EdgekdError` for an invalid image."""
        keys = ("size", "resize", "crop_pct", "interpolation")
        wanted = {key: self.manifest["preprocess"][key] for key in keys}
        try:
            return resize_rgb(decode(encoded), **wanted)
        except UnreadableImage as error:
            raise EdgekdError(
                f"An image cannot be read: {error.reason}.", "Leave it out, or update Pillow here."
            ) from error

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 `[B, H, W, 3]` → float32 logits `[B, C]`, with the class bank for a file that gives embeddings.

        Batches above `largest_batch` are run in pieces. A file that resizes takes pictures of any height and width;
        those of exactly the student's size count as resized already, as for other files. Another dtype or shape is an
        `EdgekdError`.
        """
        return self._predict(images, None if self.bank is None else self.bank.logits)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 `[B, H, W, 3]` → float32 `[B, D]`, rows of length 1, in the space of the class bank.

        A file that ends in logits is an `EdgekdError`.
        """
        if self.bank is None:
            raise EdgekdError(
                f"{self.manifest['name']} gives logits and no embedding.",
                "Export with --head embedding.",
            )
        return self._predict(images)

    def _predict(
        self,
        images: NDArray[np.uint8],
        after: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        size = self.manifest["preprocess"]["size"]
        right = images.dtype == np.uint8 and images.shape[1:] == (size, size, 3)
        if resizes(self.manifest["inputs"][0]):
            right = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        if not right or len(images) == 0:
            raise EdgekdError(
                f"{self.manifest['name']} takes uint8 [B, {size}, {size}, 3], not {images.dtype} {list(images.shape)}.",
                "Prepare the images with the artifact's preprocess.",
            )
        try:
            found = in_batches(self.predict, images, self.largest_batch)
            if found.dtype.kind != "f":
                raise TypeError(f"an output of type {found.dtype}")
            return found if after is None else after(found)
        except EdgekdError:
            raise
        except Exception as error:  # runtimes raise their own errors
            raise EdgekdError(
                f"{self.manifest['name']} fails on {list(images.shape)} pixels ({first_line(error)}).",
                "The file does not match artifact.json; export it again.",
            ) from error


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of a runtime.

    Args:
        threads: threads within an operator; None is the runtime's choice.
        spinning: waiting threads poll (ONNX Runtime's default), for the lowest latency on a quiet machine. With False
            they sleep, for use next to other work. Runtimes without this option ignore it.
        provider: execution provider of a target that has several, such as `cpu` and `cuda` of ONNX Runtime; None is the
            default. There is no fallback to another provider.
    """

    threads: int | None = None
    spinning: bool = True
    provider: str | None = None


class Opener(Protocol):
    """Interface of a module of targets/ for the files of one format.

    It may also have `check(artifact)`, which raises `EdgekdError` if the runtime of the artifact is not installed, and
    `make_ready(artifact, folder, say)`, which prepares the artifact once on a device before it is opened, and returns
    JSON values about what was built.
    """

    def open_file(
        self, artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions
    ) -> Session:
        """Open an artifact's model file; `artifact` is the content of `artifact.json`.

        A runtime that is not on this machine is `NotHere`, a file that it refuses an `EdgekdError`.
        """


def feed_for(artifact: Mapping[str, Any]) -> Feed:
    """Return the feed of the artifact's input; raise `EdgekdError` for an unknown input."""
    return feed_of(artifact["inputs"][0], artifact["preprocess"])


def model_path(artifact: Mapping[str, Any], folder: Path) -> Path:
    """Return the path of the artifact's model file."""
    return Path(folder) / str(next(iter(artifact["files"])))


def refuse_batch(batch: int, largest: int | None) -> None:
    """Refuse to time a batch that would be split."""
    if largest is not None and batch > largest:
        images = "one image" if largest == 1 else f"{largest} images"
        raise EdgekdError(
            f"The file is made for {images} at a time, not for {batch}.", "Use smaller batches."
        )


def open_artifact(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open an artifact with a checked manifest; errors as `open_session`."""
    threads = options.threads
    if threads is not None and threads < 1:
        raise EdgekdError(f"{threads} threads are not possible.", "Give 1 or more.")
    target = target_of(artifact["format"])
    if options.provider is not None and not target.providers:
        raise EdgekdError(
            f"The format {target.format} has no providers.",
            "Leave out the provider.",
        )
    try:
        opener: Opener = opener_of(target.format)
    except (ImportError, OSError) as error:
        raise NotHere(
            f"{artifact['name']} needs {target.packages or target.runtime}, which cannot be loaded here ({error}).",
            "Install it, or use a machine that has it.",
        ) from error
    session = opener.open_file(artifact, folder, options)
    bank = read_bank(folder / artifact["bank"]) if artifact.get("bank") else None
    if bank is not None and bank.classes != tuple(map(printable, artifact["classes"])):
        raise EdgekdError(
            f"{folder / artifact['bank']} has other classes than artifact.json.",
            "Copy the artifact again.",
        )
    return replace(session, manifest=artifact, bank=bank)


def open_session(
    folder: Path,
    *,
    threads: int | None = None,
    spinning: bool = True,
    provider: str | None = None,
) -> Session:
    """Load the artifact in `folder` with the runtime of its format; options as in `RuntimeOptions`.

    An altered or corrupt file, one that the runtime refuses, and a fallback to another device are an `EdgekdError`; a
    runtime that is not on this machine is `NotHere`.
    """
    from edgekd.core.manifest import read_artifact

    manifest = read_artifact(Path(folder)).model_dump(mode="json")
    options = RuntimeOptions(threads=threads, spinning=spinning, provider=provider)
    return open_artifact(manifest, Path(folder), options)
