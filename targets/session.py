"""An artifact open in its runtime: pixels in, logits out (the device agent carries this module; never torch)."""

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
"""End of a hint about a package that a device lacks."""
Nodes = dict[str, dict[str, int]]
"""Execution provider or device → kind of operator → how many of them it ran."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one loaded artifact ran, by the runtime's own account."""

    provider: str
    """The provider or device that was to run all of them."""
    nodes: Nodes
    source: str
    """The record of the runtime that this is read from."""


def refuse_fallback(name: str, placement: Placement) -> None:
    """Raise an `EdgekdError` unless every node ran on the requested provider, and at least one did."""
    counts = {who: sum(kinds.values()) for who, kinds in placement.nodes.items()}
    elsewhere = {who: n for who, n in sorted(counts.items()) if who != placement.provider}
    if elsewhere:
        kinds = sorted({kind for who in elsewhere for kind in placement.nodes[who]})
        total = sum(counts.values())
        found = ", ".join(f"{n} of {total} nodes on {who}" for who, n in elsewhere.items())
        raise EdgekdError(
            f"{name} was to run on {placement.provider}, but fell back: {found} ({', '.join(kinds[:5])}).",
            "No report is written of that. Export for a target whose runtime takes every operator.",
        )
    if not placement.nodes.get(placement.provider):
        raise EdgekdError(
            f"{placement.source} names no node of {name}, so nothing shows where it ran.",
            "Report this to edgekd.",
        )


@dataclass(frozen=True)
class Session:
    """A model file in its runtime. Openers make one of a file, `open_session` one of an artifact."""

    predict: Predictor
    """The runtime's call, unchecked: the file's own output, for at most `largest_batch` images."""
    provider: str
    """What executes the graph, in the runtime's own words."""
    threads: int
    """Threads within one operator; operators run one after the other."""
    load_ms: float
    """Reading and preparing the model, without the check of its hash."""
    placement: Callable[[], Optional[Placement]] = lambda: None  # noqa: UP045  Python 3.9
    """Which nodes run where; None from runtimes without such a record. May open the model once more."""
    largest_batch: int | None = None
    """Images in one call of the runtime at most, as the file was made; None: any number."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What `artifact.json` holds."""
    bank: ClassBank | None = None
    """The class vectors of a file that ends in an embedding."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names behind the logits, in their order."""
        return tuple(printable(name) for name in self.manifest["classes"])

    @functools.cached_property
    def artifact(self) -> Artifact:
        """The manifest as a model of pydantic, which a device need not have."""
        from edgekd.core.manifest import Artifact

        return Artifact.model_validate(self.manifest)

    def prepare(self, encoded: bytes) -> NDArray[np.uint8]:
        """Return an encoded image as the artifact takes it, RGB uint8 `[H, W, 3]`; bad bytes are an `EdgekdError`."""
        keys = ("size", "resize", "crop_pct", "interpolation")
        wanted = {key: self.manifest["preprocess"][key] for key in keys}
        try:
            return resize_rgb(decode(encoded), **wanted)
        except UnreadableImage as error:
            raise EdgekdError(
                f"An image cannot be read: {error.reason}.", "Leave it out, or update Pillow here."
            ) from error

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 `[B, H, W, 3]` → float32 logits `[B, C]`; of a file that gives embeddings, by its class bank.

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
                f"{self.manifest['name']} ends in the logits of its classes and gives no embedding.",
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
        except Exception as error:  # every runtime has errors of its own
            raise EdgekdError(
                f"{self.manifest['name']} fails on {list(images.shape)} pixels ({first_line(error)}).",
                "Its file does not do what artifact.json promises: export it again.",
            ) from error


@dataclass(frozen=True)
class RuntimeOptions:
    """How a runtime executes a file.

    Args:
        threads: within one operator; None is the runtime's choice.
        spinning: waiting threads poll, ONNX Runtime's default: the lowest latency on a quiet machine. False lets them
            sleep, for work beside other work. Runtimes without such a choice ignore it.
        provider: what executes a file of a target that has several, as ONNX Runtime has `cpu` and `cuda`; None is the
            target's own. Nothing else is ever used in its place.
    """

    threads: int | None = None
    spinning: bool = True
    provider: str | None = None


class Opener(Protocol):
    """What a module of targets/ offers for the files of one format.

    It may also offer `check(artifact)`, which refuses with an `EdgekdError` an artifact whose runtime this device's
    Python lacks, and `make_ready(artifact, folder, say)`, which does once on a device what must be done before the file
    can be opened and returns JSON values about what was built.
    """

    def open_file(
        self, artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions
    ) -> Session:
        """Open an artifact's model file; `artifact` is what `artifact.json` holds.

        A runtime that is not on this machine is `NotHere`, a file that it refuses an `EdgekdError`.
        """


def feed_for(artifact: Mapping[str, Any]) -> Feed:
    """Return what brings uint8 `[B, H, W, 3]` to the artifact's input; an unknown input is an `EdgekdError`."""
    return feed_of(artifact["inputs"][0], artifact["preprocess"])


def model_path(artifact: Mapping[str, Any], folder: Path) -> Path:
    """Return the path of the artifact's model file."""
    return Path(folder) / str(next(iter(artifact["files"])))


def refuse_batch(batch: int, largest: int | None) -> None:
    """Refuse to time a batch that would be run in pieces."""
    if largest is not None and batch > largest:
        images = "one image" if largest == 1 else f"{largest} images"
        raise EdgekdError(
            f"The file is made for {images} at a time, not for {batch}.", "Use smaller batches."
        )


def open_artifact(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open the artifact whose checked manifest is `artifact`; errors as of `open_session`."""
    threads = options.threads
    if threads is not None and threads < 1:
        raise EdgekdError(f"{threads} threads are not possible.", "Give 1 or more.")
    target = target_of(artifact["format"])
    if options.provider is not None and not target.providers:
        raise EdgekdError(
            f"The format {target.format} has one runtime and no providers.",
            "Leave the provider out.",
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
            f"{folder / artifact['bank']} holds other classes than artifact.json names.",
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
    """Load the artifact in `folder` with the runtime of its format; options as of `RuntimeOptions`.

    An altered or corrupt file, one that the runtime refuses, and a fallback to another device are an `EdgekdError`; a
    runtime that is not on this machine is `NotHere`.
    """
    from edgekd.core.manifest import read_artifact

    manifest = read_artifact(Path(folder)).model_dump(mode="json")
    options = RuntimeOptions(threads=threads, spinning=spinning, provider=provider)
    return open_artifact(manifest, Path(folder), options)
