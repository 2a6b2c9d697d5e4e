"""`edgekd predict`: a stream of images in, predictions out, to the console, a CSV file and annotated copies."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edgekd.configs.models import PredictConfig
from edgekd.core.ahead import batched, map_ahead
from edgekd.core.console import Tally, result, say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import csv_text, disk_errors
from edgekd.data.images import UnreadableImage
from edgekd.inference.model import BATCH, Model, Prediction, load
from edgekd.inference.sources import Frame, check_sources, frames, is_camera


def run_predict(config: PredictConfig) -> Iterator[Prediction]:
    """Predict the images of `config` one after the other; see `edgekd.predict`."""
    check_sources(config.images)
    _check_outputs(config)
    model = load(config.model, threads=config.threads)
    return _recorded(config, model)


def print_predictions(predictions: Iterator[Prediction], config: PredictConfig) -> None:
    """Print each prediction on a line as it arrives: text, or a JSON object."""
    for one in predictions:
        best = one.top(config.top)
        if config.as_json:
            classes = [{"class": name, "probability": round(value, 6)} for name, value in best]
            result(json.dumps({"image": one.name, "classes": classes}, ensure_ascii=False))
        else:
            text = ", ".join(f"{name} {100 * value:.1f} %" for name, value in best)
            result(f"{one.name}: {text}")


def stream(
    model: Model, config: PredictConfig, skipped: Tally
) -> Iterator[tuple[Prediction, Frame, Image.Image | None]]:
    """Yield predictions while the next images are decoded; a camera's frames one by one, without delay.

    Args:
        skipped: counts the images that could not be read.
    """
    live = any(map(is_camera, config.images))
    batch = 1 if live else BATCH

    def prepare(
        frame: Frame,
    ) -> tuple[Frame, NDArray[np.uint8] | None, Image.Image | None, str]:
        try:
            image = frame.read()
        except UnreadableImage as error:
            return frame, None, None, error.reason
        return frame, model.preprocess.pixels(image), image if config.annotate else None, ""

    own = None if config.annotate is None else config.annotate.resolve()
    found = frames(config.images, config.every, own)

    def readable() -> Iterator[tuple[Frame, NDArray[np.uint8], Image.Image | None]]:
        for frame, pixels, image, reason in map_ahead(prepare, found, 1 if live else 2 * batch):
            if pixels is None:
                skipped.add(reason, frame.name)
            else:
                yield frame, pixels, image

    for some in batched(readable(), batch):
        predictions = model.classify([(frame.name, pixels) for frame, pixels, _ in some])
        for one, (frame, _, image) in zip(predictions, some, strict=True):
            yield one, frame, image


def _recorded(config: PredictConfig, model: Model) -> Iterator[Prediction]:
    """Yield predictions, and write the CSV file and the annotated images on the way."""
    skipped = Tally()
    count = 0
    with contextlib.ExitStack() as stack:
        table = None
        if config.csv is not None:
            stack.enter_context(disk_errors(config.csv))
            table = stack.enter_context(open(config.csv, "x", encoding="utf-8", newline=""))
            table.write(csv_text([_header(min(config.top, len(model.classes)))]))
        if config.annotate is not None:
            stack.enter_context(disk_errors(config.annotate))
            config.annotate.mkdir(parents=True, exist_ok=True)
        try:
            for one, frame, image in stream(model, config, skipped):
                count += 1
                _write_row(table, one, config.top)
                if config.annotate is not None and image is not None:
                    annotated(image, one).save(_free_jpeg(config.annotate, frame.stem))
                yield one
        except KeyboardInterrupt:
            if not any(map(is_camera, config.images)):
                raise  # a camera has no other end
    skipped.warn("images left out")
    if not count and skipped.reasons:
        raise EdgekdError("None of the images can be read.", "Check them with an image viewer.")
    if config.csv is not None:
        say(f"{count:,} predictions: {config.csv}")


def _header(top: int) -> list[str]:
    numbered = [(f"class_{rank}", f"probability_{rank}") for rank in range(2, top + 1)]
    return ["image", "class", "probability", *(name for pair in numbered for name in pair)]


def _write_row(table: IO[str] | None, one: Prediction, top: int) -> None:
    if table is None:
        return
    cells = [cell for name, value in one.top(top) for cell in (name, round(value, 6))]
    table.write(csv_text([[one.name, *cells]]))
    table.flush()


def annotated(image: Image.Image, one: Prediction) -> Image.Image:
    """Return a copy of an RGB image with the best class and its probability in a corner."""
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    font = ImageFont.load_default(max(10, min(copy.size) // 14))
    text = f"{one.label} {100 * one.probability:.0f} %"
    left, top, right, bottom = draw.textbbox((4, 4), text, font=font)
    draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill="black")
    draw.text((4, 4), text, fill="white", font=font)
    return copy


def _free_jpeg(folder: Path, stem: str) -> Path:
    """Return a path that does not exist: images of several folders may share a name."""
    path = folder / f"{stem}.jpg"
    for number in itertools.count(2):
        if not path.exists():
            break
        path = folder / f"{stem}-{number}.jpg"
    return path


def _check_outputs(config: PredictConfig) -> None:
    """Refuse to write over anything."""
    if config.csv is not None and config.csv.exists():
        raise EdgekdError(f"{config.csv} exists already.", "Choose another --csv.")
    folder: Path | None = config.annotate
    if (
        folder is not None
        and folder.exists()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise EdgekdError(
            f"{folder} exists already and is not empty.", "Choose another --annotate."
        )
