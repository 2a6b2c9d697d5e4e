"""Decode image files to upright, opaque RGB with 8 bits per channel."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from edgekd.core.readers import NOT_REGULAR, open_regular

MAX_MEGAPIXELS = 100
"""Maximum size, checked in the header before decoding."""

MAX_ASPECT = 100
"""Maximum aspect ratio, since an image resized by its short side could otherwise have any number of pixels."""

MAX_BYTES = 10**9
"""Maximum file size, checked before reading."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Supported formats; Pillow's other plug-ins are not used (EPS, for example, would start Ghostscript)."""

EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
    )
)
"""File endings, lower case, of images in a scanned folder."""

_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")

# EXIF 2.32, tag 0x0112: orientation → the operation that reverses it.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Decoding runs in threads, where warnings.catch_warnings is unsafe. Pillow warns about large images, which are refused
# below, and about unusual metadata, which does not affect pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(Exception):
    """Raised for a file that cannot be decoded; `reason` is a short category of the fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(source: Path | bytes, *, draft: int | None = None) -> Image.Image:
    """Decode a file, or a file's bytes, to an upright RGB image with 8 bits per channel. Thread-safe.

    Uses the first frame of an animation, a white background for transparency, and the high byte of 16-bit channels.
    EXIF orientation is applied, and embedded colour profiles are ignored.

    Args:
        draft: minimum short side in pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if it stays above.

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
    # Pillow raises OSError, SyntaxError, struct.error, ValueError, IndexError and others for malformed files.
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise UnreadableImage("truncated" if cut else "damaged") from error


def check_content(source: Path | bytes) -> tuple[str, str]:
    """Return (content key, "") for a readable image, or ("", reason) for an unreadable one.

    The key is the first 32 hex digits of the SHA-256 of the file.
    """
    try:
        content = source if isinstance(source, bytes) else read_bytes(source)
        # JPEGs decode faster at reduced size, and truncated or damaged ones still fail.
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
        UnreadableImage: the range of the pixels is unknown, or the aspect ratio is too large.
        Exception: Pillow's own error for a damaged file that is read lazily.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableImage(f"over {MAX_ASPECT} times as long as wide")
    image.load()
    turn, upright = _TURNS.get(_orientation(image)), _opaque_rgb(image)
    return upright if turn is None else upright.transpose(turn)


def read_bytes(path: Path) -> bytes:
    """Return a file's content; raise `UnreadableImage` if it cannot be read."""
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
        # Broken metadata does not affect the decoded pixels.
        return 1


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow clips 16-bit grey at 255, but keeps the high byte of 16-bit colour. Keep the high byte of both.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("I", "F"):
        raise UnreadableImage("pixels of unknown range")
    if image.mode == "CMYK":
        # Pillow inverts every CMYK JPEG, but only those with Adobe's marker store inverted values.
        plain = image.format in ("JPEG", "MPO") and "adobe" not in image.info
        return (ImageChops.invert(image) if plain else image).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(ground, layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
