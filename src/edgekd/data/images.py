"""One decoder for every picture a user may own: RGB, 8 bits, upright, opaque."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from edgekd.core.readers import NOT_REGULAR, open_regular

MAX_MEGAPIXELS = 100
"""Larger images are refused by their header, before a pixel is decoded."""

MAX_ASPECT = 100
"""Longer images are refused: resized by their short side they would have any number of pixels."""

MAX_BYTES = 10**9
"""Larger files are refused unread."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded; Pillow's other plug-ins stay shut (EPS, for one, would start Ghostscript)."""

EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
))  # fmt: skip
"""File endings, lower case, that are looked at when a folder is scanned."""

_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")

# EXIF 2.32, tag 0x0112: what undoes each way the camera was held.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Decoding runs in threads, where warnings.catch_warnings is unsafe. Everything Pillow would warn of (large images,
# odd metadata) is either refused below or harmless to the pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(Exception):
    """A file that yields no picture; `reason` is a short category, the same for all files with the same fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(source: Path | bytes, *, draft: int | None = None) -> Image.Image:
    """Decode a file, or a file's bytes, to an upright RGB image with 8 bits per channel. Thread-safe.

    The first frame of an animation counts; transparency lies on white; 16-bit channels keep their high byte; EXIF
    orientation is applied; embedded colour profiles are not.

    Args:
        draft: short side in pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, never below it.

    Raises:
        UnreadableImage: see its `reason`.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    if not data:
        raise UnreadableImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if min(image.size) < 1:
                raise UnreadableImage("zero-sized")
            if image.width * image.height > MAX_MEGAPIXELS * 1_000_000:
                raise UnreadableImage(f"more than {MAX_MEGAPIXELS} megapixels")
            if draft is not None:
                image.draft(None, (draft, draft))
            return to_rgb(image)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {MAX_MEGAPIXELS} megapixels") from None
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            "truncated" if data.startswith(_SIGNATURES) else "not an image"
        ) from error
    except MemoryError:
        raise
    # Pillow's parsers meet hostile bytes with OSError, SyntaxError, struct.error, ValueError, IndexError and more.
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise UnreadableImage("truncated" if cut else "damaged") from error


def check_content(source: Path | bytes) -> tuple[str, str]:
    """Return content key and "" of a readable image, "" and the reason of another.

    The key is the first 32 hex digits of the SHA-256 of the file.
    """
    try:
        content = source if isinstance(source, bytes) else read_bytes(source)
        # A JPEG decodes faster at a fraction of its size, and a cut or torn one still fails.
        decode(content, draft=32)
    except UnreadableImage as error:
        return "", error.reason
    return content_key(content), ""


def content_key(content: bytes) -> str:
    """Return the first 32 hex digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow image as upright RGB with 8 bits per channel, by the rules of `decode`.

    Raises:
        UnreadableImage: pixels whose range is not known, or an image that is far too long.
        Exception: a damaged file that is read only now, by Pillow's own error.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableImage(f"over {MAX_ASPECT} times as long as wide")
    image.load()
    turn, upright = _TURNS.get(_orientation(image)), _opaque_rgb(image)
    return upright if turn is None else upright.transpose(turn)


def read_bytes(path: Path) -> bytes:
    """Return a file's content; what the system refuses becomes `UnreadableImage`."""
    try:
        with open_regular(path) as handle:
            data = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableImage("missing") from None
    except PermissionError:
        raise UnreadableImage("not permitted") from None
    except OSError as error:
        raise UnreadableImage(
            NOT_REGULAR if error.strerror == NOT_REGULAR else "damaged"
        ) from error
    if len(data) > MAX_BYTES:
        raise UnreadableImage("more than 1 GB")
    return data


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken metadata does not affect the pixels, which have been decoded.
        return 1


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion clips at 255. The high byte is what it keeps of 16-bit colour, so grey does the same.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("I", "F"):
        raise UnreadableImage("pixels of unknown range")
    if image.mode == "CMYK":
        # Pillow takes every CMYK JPEG for Adobe's, which stores inverted values; without the marker they are plain.
        plain = image.format in ("JPEG", "MPO") and "adobe" not in image.info
        return (ImageChops.invert(image) if plain else image).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(ground, layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
