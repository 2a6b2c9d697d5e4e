"""What to predict: images, folders of images, frames of a video or of a camera, one after the other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import NOT_REGULAR
from edgekd.data.images import decode
from edgekd.data.sources import scan

VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))
"""File endings, lower case, that are opened as video."""
CAMERA = "camera:"


@dataclass(frozen=True)
class Frame:
    """One image to predict."""

    name: str
    """For people: the path, or `clip.mp4#12`."""
    stem: str
    """Of a file that is made of it."""
    read: Callable[[], Image.Image]
    """Decodes it, RGB; raises `UnreadableImage`."""


def is_camera(source: str) -> bool:
    """Return whether a source is a camera, `camera:0`."""
    return source.startswith(CAMERA)


def check_sources(sources: Sequence[str]) -> None:
    """Refuse a source that does not exist, before a model is loaded."""
    for source in sources:
        if is_camera(source):
            number = source.removeprefix(CAMERA)
            if not (number.isascii() and number.isdigit()):
                raise EdgekdError(f'"{source}" is no camera.', "Number it: camera:0.")
        elif not os.path.lexists(source):
            raise EdgekdError(f"There is no file or folder {source}.", "Check the path.")
        elif not (os.path.isfile(source) or os.path.isdir(source)) and _is_video(source):
            raise EdgekdError(f"{source} is {NOT_REGULAR}.", "Name a video file.")


def frames(sources: Sequence[str], every: int = 1, without: Path | None = None) -> Iterator[Frame]:
    """Yield the images of files, folders (searched however deep), videos and cameras in order.

    Args:
        every: of a video or a camera, the first of so many frames.
        without: a folder that is left out inside the others, since results are written there.

    Raises:
        EdgekdError: a folder without an image, a video that cannot be opened, a camera that is not there.
    """
    for source in sources:
        path = Path(source)
        if is_camera(source):
            yield from _video(source, int(source.removeprefix(CAMERA)), every)
        elif path.is_dir():
            yield from _folder(path, without)
        elif _is_video(source):
            yield from _video(source, source, every)
        else:
            yield _file(path)


def _is_video(source: str) -> bool:
    return os.path.splitext(source)[1].lower() in VIDEOS


def _file(path: Path) -> Frame:
    return Frame(scan.shown(str(path)), path.stem, functools.partial(decode, path))


def _folder(root: Path, without: Path | None) -> Iterator[Frame]:
    entries = scan.list_all(root).entries
    kept = [root / entry.path for entry in entries]
    if without is not None:
        kept = [path for path in kept if not path.resolve().is_relative_to(without)]
    if not kept:
        raise EdgekdError(f"{root} holds no image but the results.", "Name another folder.")
    yield from map(_file, kept)


def _video(source: str, where: str | int, every: int) -> Iterator[Frame]:
    cv2 = _opencv()
    video = cv2.VideoCapture(where)
    stem = "camera" if isinstance(where, int) else Path(source).stem
    try:
        number = 0
        while True:
            # `grab` alone decodes no colours, so skipped frames cost little.
            if not video.grab():
                break
            if number % every == 0:
                good, image = video.retrieve()
                if not good:
                    break
                frame = Image.fromarray(image[..., ::-1].copy())  # BGR
                name = f"{scan.shown(source)}#{number}"
                yield Frame(name, f"{stem}-{number:06d}", lambda frame=frame: frame)  # type: ignore[misc]
            number += 1
        if number == 0 and isinstance(where, int):
            raise EdgekdError(
                f"There is no camera {where}, or another program uses it.",
                "Check that it is connected, and try another number.",
            )
        if number == 0:
            raise EdgekdError(
                f"{scan.shown(source)} is no video, or OpenCV here has no codec for it.",
                "Convert it, for example to MP4 with H.264.",
            )
    finally:
        video.release()


def _opencv() -> Any:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise EdgekdError(
            "Video and cameras need OpenCV, which is not installed here.",
            'Install it: pip install "edgekd[video]", or pip install opencv-python-headless.',
        ) from error
    return cv2
