from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekd.data.images import UnreadableImage, decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def raw_png(width: int, height: int, *, bits: int, colour: int, rows: bytes) -> bytes:
    """Assemble a PNG that Pillow does not write: 16-bit colour, headers that do not match the data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def deep_png(colour: int, values: tuple[int, ...]) -> bytes:
    rows = b"\0" + struct.pack(f">{len(values)}H", *values)
    return raw_png(2, 1, bits=16, colour=colour, rows=rows)


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def reason_of(source: Path | bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(source)
    return caught.value.reason


def test_cmyk_as_adobe_and_as_the_standard_store_it() -> None:
    # Cyan 0, magenta 255, yellow 255, black 0 is red.
    adobe = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    # The same ink values without Adobe's marker must be stored the other way round.
    inverted = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 255)), "JPEG", quality=95)
    start = inverted.index(b"\xff\xee")
    length = struct.unpack(">H", inverted[start + 2 : start + 4])[0]
    plain = inverted[:start] + inverted[start + 2 + length :]
    # YCCK (Adobe TN 5116) codes 255 minus the first three inks by JFIF's matrix as YCbCr (179, 171, 1). Written as if
    # they were CMYK values, with Adobe's transform flag set to 2 afterwards, they make that file.
    inks = tuple(255 - value for value in (179, 171, 1, 255))
    ycck = bytearray(encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100))
    ycck[ycck.index(b"\xff\xee") + 4 + 11] = 2
    for data in (adobe, plain, bytes(ycck)):
        assert np.abs(np.asarray(decode(data)).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), kind)))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def two_pixels(mode: str, first: Any, second: Any) -> Image.Image:
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    return image


def palette() -> Image.Image:
    image = two_pixels("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return image


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (
            encoded(two_pixels("RGBA", (255, 0, 0, 255), (0, 0, 0, 128)), "PNG"),
            [RED, (127, 127, 127)],
        ),
        (encoded(two_pixels("LA", (10, 255), (10, 0)), "PNG"), [(10, 10, 10), WHITE]),
        (encoded(two_pixels("1", 0, 1), "PNG"), [(0, 0, 0), WHITE]),
        (encoded(palette(), "PNG", transparency=1), [RED, WHITE]),
        (encoded(palette(), "PNG", transparency=bytes([255, 0])), [RED, WHITE]),
        (deep_png(2, (65535, 32768, 0, 256, 255, 4660)), [(255, 128, 0), (1, 0, 18)]),
        (deep_png(6, (65535, 0, 0, 65535, 0, 0, 0, 0)), [RED, WHITE]),
    ],
    ids=["RGBA", "LA", "1 bit", "palette", "palette with alpha", "16 bit", "16 bit with alpha"],
)
def test_every_mode_becomes_rgb_on_white(data: bytes, pixels: list[tuple[int, ...]]) -> None:
    assert np.asarray(decode(data))[0].tolist() == [list(pixel) for pixel in pixels]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    data = encoded(red, kind, save_all=True, append_images=[blue], lossless=True)
    assert np.asarray(decode(data))[4, 4].tolist() == list(RED)


@pytest.mark.parametrize(
    ("kind", "orientation"),
    [*(("JPEG", n) for n in range(1, 9)), ("PNG", 6), ("TIFF", 6), ("WEBP", 6)],
)
def test_exif_orientation(kind: str, orientation: int) -> None:
    # 48 x 32 with a red corner top left, a blue one top right. EXIF says which side stored row 0 and column 0 are.
    scene = np.full((32, 48, 3), 255, dtype=np.uint8)
    scene[:16, :16], scene[:16, 32:] = RED, BLUE
    turned = scene.transpose(1, 0, 2)
    upright = (scene, scene[:, ::-1], scene[::-1, ::-1], scene[::-1])
    rotated = (turned, turned[::-1], scene[::-1, ::-1].transpose(1, 0, 2), turned[:, ::-1])
    stored = Image.fromarray(np.ascontiguousarray((*upright, *rotated)[orientation - 1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    decoded = decode(encoded(stored, kind, exif=exif, **options.get(kind, {})))
    assert decoded.size == (48, 32)
    for place, colour in (((8, 8), RED), ((40, 8), BLUE), ((8, 24), WHITE)):
        assert np.abs(np.array(decoded.getpixel(place)) - colour).max() <= 4


def test_draft_never_goes_below_what_is_wanted() -> None:
    data = encoded(noise(640, 480), "JPEG")
    # Fractions JPEG offers: 1, 1/2, 1/4, 1/8 of 640 x 480.
    for wanted, width in ((241, 640), (240, 320), (100, 160), (1, 80)):
        assert decode(data, draft=wanted).size == (width, width * 3 // 4)
    assert decode(encoded(noise(640, 480), "PNG"), draft=10).size == (640, 480)


def test_unreadable_files_have_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "empty.jpg").touch()
    # EPS is an image to Pillow, which would hand it to Ghostscript.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    long, wide = (encoded(Image.new("RGB", size), "PNG") for size in ((1, 30_000), (30_000, 2)))
    for source, reason in (
        (tmp_path / "absent.png", "missing"),
        (tmp_path / "empty.jpg", "empty file"),
        (tmp_path, "not a regular file"),
        (b"<html>not an image</html>", "not an image"),
        (eps, "not an image"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "pixels of unknown range"),
        # Resized by their short side to 256 pixels they would have gigapixels.
        (long, "over 100 times as long as wide"),
        (wide, "over 100 times as long as wide"),
    ):
        assert reason_of(source) == reason
    monkeypatch.setattr("edgekd.data.images.open_regular", refuse)
    assert reason_of(tmp_path / "a.png") == "not permitted"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_raises_nothing_but_unreadable(kind: str) -> None:
    data = encoded(noise(200, 200), kind)
    for share in (0.02, 0.3, 0.9):
        assert reason_of(data[: int(len(data) * share)]) in ("truncated", "damaged")
    data, generator = encoded(noise(32, 32), kind), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data)
        for place in generator.integers(0, min(len(broken), 400), 4):
            broken[place] = int(generator.integers(0, 256))
        with contextlib.suppress(UnreadableImage):
            assert decode(bytes(broken)).mode == "RGB"


@pytest.mark.parametrize("side", [9_487, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore")
def test_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    # 9,487² is just over 90 and 12,000² over 100 megapixels; Pillow itself warns at 89 and raises at 179.
    data = raw_png(side, side, bits=1, colour=0, rows=b"")
    # Just below the limit the lying header is found out by the missing pixels.
    assert reason_of(data) == ("truncated" if side == 9_487 else "more than 100 megapixels")
