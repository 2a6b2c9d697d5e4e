"""A finished classifier, ready to use: images in, class names with probabilities out. An artifact needs no torch."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.evaluate.metrics import log_softmax
from edgekd.core.ahead import batched, map_ahead
from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor, in_batches
from edgekd.core.preprocess import Preprocess
from edgekd.data.images import UnreadableImage, decode, to_rgb
from edgekd.data.sources.scan import shown

ImageLike: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8]"
"""A file, a Pillow image, or RGB uint8 `[H, W, 3]`."""
BATCH = 16


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, the most probable first."""

    name: str
    """Path of the image, or its number among those given."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Of `classes`, 0–1; they add up to 1."""

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0]

    @property
    def probability(self) -> float:
        """Probability of `label`, 0–1."""
        return self.probabilities[0]

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return at most `count` classes with their probabilities, the most probable first."""
        return list(zip(self.classes, self.probabilities, strict=True))[:count]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{100 * value:.1f} %</td></tr>"
            for name, value in self.top(5)
        )
        return f"<table><caption>{html.escape(self.name)}</caption>{rows}</table>"


@dataclass(frozen=True, eq=False)
class Model:
    """A classifier in memory. `edgekd.load` makes one."""

    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    logits: Predictor
    """RGB uint8 `[B, H, W, 3]`, prepared by `preprocess` → float32 `[B, C]`."""

    def predict(
        self, images: ImageLike | Iterable[ImageLike], *, batch: int = BATCH
    ) -> list[Prediction]:
        """Classify images; return one prediction for each, in order.

        Args:
            images: one image, or any number of them: paths, Pillow images, or RGB uint8 arrays `[H, W, 3]`; an array
                `[B, H, W, 3]` is a batch.
            batch: images in one call of the model.

        Raises:
            EdgekdError: an image that cannot be read, or an array of another shape or dtype.
        """

        def pixels(item: tuple[int, ImageLike]) -> tuple[str, NDArray[np.uint8]]:
            number, image = item
            name = shown(str(image)) if isinstance(image, str | Path) else str(number)
            try:
                return name, self.preprocess.pixels(rgb(image))
            except UnreadableImage as error:
                raise EdgekdError(
                    f"The image {name} cannot be read: {error.reason}.", "Leave it out."
                ) from error

        prepared = map_ahead(pixels, enumerate(_each(images)), 2 * batch)
        return [one for some in batched(prepared, batch) for one in self.classify(some)]

    def classify(self, prepared: Sequence[tuple[str, NDArray[np.uint8]]]) -> list[Prediction]:
        """Return the predictions for named images that `preprocess` has prepared, uint8 `[H, W, 3]`.

        Raises:
            EdgekdError: the model does not give one finite number for each class.
        """
        logits = in_batches(self.logits, np.stack([pixels for _, pixels in prepared]), BATCH)
        if logits.shape != (len(prepared), len(self.classes)) or not np.isfinite(logits).all():
            raise EdgekdError(
                f"{self.name} does not give one finite number for each of its {len(self.classes)} classes.",
                "Its weights are damaged, or its classes are those of another model: export it again.",
            )
        rows = np.exp(log_softmax(logits))  # float64 [B, C]
        found = []
        for (name, _), row in zip(prepared, rows, strict=True):
            order = np.argsort(-row, kind="stable")
            classes = tuple(self.classes[index] for index in order)
            found.append(Prediction(name, classes, tuple(row[order].tolist())))
        return found


def load(path: str | Path, *, threads: int | None = None) -> Model:
    """Load a run's student, or an exported file, whose folder is enough; see `edgekd.load`."""
    folder = Path(path)
    if (folder / "artifact.json").is_file():
        from edgekd.targets.session import open_session

        session = open_session(folder, threads=threads, spinning=False)
        artifact = session.artifact
        return Model(artifact.name, artifact.classes, artifact.preprocess, session.run)
    if not (folder / "run.json").is_file():
        raise EdgekdError(
            f"There is neither a run nor an exported file at {folder}.",
            "Name a folder that edgekd train or edgekd export has written.",
        )
    from edgekd.core.manifest import read_run

    run = read_run(folder)
    from edgekd.distill.classification.load_run import load_run
    from edgekd.distill.classification.predict import student_predict

    loaded = load_run(folder)
    logits = student_predict(loaded.student, loaded.vectors)
    return Model(run.name, tuple(run.classes), run.preprocess, logits)


def rgb(image: ImageLike) -> Image.Image:
    """Return an image as upright RGB with 8 bits per channel.

    Raises:
        UnreadableImage: a file that yields no picture.
        EdgekdError: an array of another shape or dtype than uint8 `[H, W, 3]`.
    """
    if isinstance(image, str | Path):
        return decode(Path(image))
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow reads the file only now
            raise UnreadableImage("damaged") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return Image.fromarray(image)
    given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image)
    raise EdgekdError(
        f"An image is a path, a Pillow image or a uint8 array [H, W, 3], not {given}.",
        "Convert it to RGB with 8 bits per channel.",
    )


def _each(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    if isinstance(images, str | Path | Image.Image):
        return [images]
    return [images] if isinstance(images, np.ndarray) and images.ndim != 4 else images
