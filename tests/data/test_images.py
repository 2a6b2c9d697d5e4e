from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
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
    """A PNG put together by hand, for what Pillow does not write (16-bit colour, headers that lie)."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def reason_of(source: Path | bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(source)
    return caught.value.reason


def test_plain_png_comes_back_pixel_for_pixel(tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(image))
    assert decode(tmp_path / "a.png").mode == "RGB"


def test_cmyk_as_adobe_and_as_the_standard_store_it() -> None:
    # Cyan 0, magenta 255, yellow 255, black 0 is red.
    adobe = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.asarray(decode(adobe)).astype(int) - RED).max() <= 3

    # The same ink values without Adobe's marker must be stored the other way round.
    inverted = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 255)), "JPEG", quality=95)
    start = inverted.index(b"\xff\xee")
    length = struct.unpack(">H", inverted[start + 2 : start + 4])[0]
    plain = inverted[:start] + inverted[start + 2 + length :]
    assert np.abs(np.asarray(decode(plain)).astype(int) - RED).max() <= 3


def test_ycck_jpeg() -> None:
    # Red is ink (0, 255, 255, 0), inverted (255, 0, 0, 255). YCCK (Adobe TN 5116) codes 255 minus the first three, that
    # is (0, 255, 255), by JFIF's matrix as YCbCr (179, 171, 1), and K as it is. Written as if they were CMYK values,
    # with Adobe's transform flag set to 2 afterwards, they make that file.
    y, cb, cr = 179, 171, 1
    data = encoded(
        Image.new("CMYK", (16, 16), tuple(255 - v for v in (y, cb, cr, 255))), "JPEG", quality=100
    )
    flag = data.index(b"\xff\xee") + 4 + 11
    assert data[flag] == 0
    assert (
        np.abs(np.asarray(decode(data[:flag] + b"\x02" + data[flag + 1 :])).astype(int) - RED).max()
        <= 4
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), kind)))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_16_bit_colour_is_scaled() -> None:
    data = raw_png(
        2, 1, bits=16, colour=2, rows=b"\0" + struct.pack(">6H", 65535, 32768, 0, 256, 255, 4660)
    )
    assert np.asarray(decode(data))[0].tolist() == [[255, 128, 0], [1, 0, 18]]


def test_16_bit_colour_with_alpha_lies_on_white() -> None:
    data = raw_png(
        2, 1, bits=16, colour=6, rows=b"\0" + struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0)
    )
    assert np.asarray(decode(data))[0].tolist() == [list(RED), list(WHITE)]


def test_pixels_whose_range_nobody_knows_are_refused() -> None:
    assert reason_of(encoded(Image.new("F", (4, 4), 0.5), "TIFF")) == "pixels of unknown range"


def test_alpha_lies_on_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert np.asarray(decode(encoded(image, "PNG")))[0].tolist() == [
        list(RED),
        list(WHITE),
        [127, 127, 127],
    ]

    grey = Image.new("LA", (2, 1), (10, 255))
    grey.putpixel((1, 0), (10, 0))
    assert np.asarray(decode(encoded(grey, "PNG")))[0].tolist() == [[10, 10, 10], list(WHITE)]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_alpha(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG", transparency=transparency)
    assert np.asarray(decode(data))[0].tolist() == [list(RED), list(WHITE)]


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(image, "PNG")))[0].tolist() == [[0, 0, 0], list(WHITE)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.n_frames == 3  # type: ignore[attr-defined]
    assert np.asarray(decode(data))[4, 4].tolist() == list(RED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    # 48 x 32 with a red corner top left, a blue one top right. EXIF says which side stored row 0 and column 0 are.
    scene = np.full((32, 48, 3), 255, dtype=np.uint8)
    scene[:16, :16], scene[:16, 32:] = RED, BLUE
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: scene.transpose(1, 0, 2)[::-1],  # row 0 is the right-hand side, column 0 the top
        7: scene[::-1, ::-1].transpose(1, 0, 2),
        8: scene.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left-hand side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        options["lossless"] = True
    decoded = decode(
        encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    )
    assert decoded.size == (48, 32)
    pixels = np.asarray(decoded).astype(int)
    assert np.abs(pixels[8, 8] - RED).max() <= 4
    assert np.abs(pixels[8, 40] - BLUE).max() <= 4
    assert np.abs(pixels[24, 8] - WHITE).max() <= 4


def test_draft_never_goes_below_what_is_wanted() -> None:
    data = encoded(noise(640, 480), "JPEG")
    # Fractions JPEG offers: 1, 1/2, 1/4, 1/8 of 640 x 480.
    assert decode(data, draft=241).size == (640, 480)
    assert decode(data, draft=240).size == (320, 240)
    assert decode(data, draft=100).size == (160, 120)
    assert decode(data, draft=1).size == (80, 60)
    assert decode(encoded(noise(640, 480), "PNG"), draft=10).size == (640, 480)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "absent.png") == "missing"
    (tmp_path / "empty.jpg").touch()
    assert reason_of(tmp_path / "empty.jpg") == "empty file"
    assert reason_of(tmp_path) == "not a regular file"
    assert reason_of(b"<html>not an image</html>") == "not an image"
    # EPS is an image to Pillow, which would hand it to Ghostscript.
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not an image"


def test_permission_error_has_its_own_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edgekd.data.images.open_regular", refuse)
    assert reason_of(tmp_path / "a.png") == "not permitted"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated(kind: str, share: float) -> None:
    data = encoded(noise(200, 200), kind)
    assert reason_of(data[: int(len(data) * share)]) in ("truncated", "damaged")


def test_truncated_jpeg_in_draft_too() -> None:
    data = encoded(noise(200, 200), "JPEG")
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(data[: len(data) // 2], draft=32)
    assert reason_of(data[: len(data) // 2]) == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bit_rot_raises_nothing_but_unreadable() -> None:
    generator = np.random.default_rng(0)
    for kind in ("PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG", "PPM"):
        data = encoded(noise(32, 32), kind)
        for _ in range(60):
            broken = bytearray(data)
            for place in generator.integers(0, min(len(broken), 400), 4):
                broken[place] = int(generator.integers(0, 256))
            with contextlib.suppress(UnreadableImage):
                assert decode(bytes(broken)).mode == "RGB"


@pytest.mark.parametrize("side", [9_487, 12_000, 14_500, 60_000])
@pytest.mark.filterwarnings("ignore")
def test_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    # 9,487² is just over 90 and 12,000² over 100 megapixels; Pillow itself warns at 89 and raises at 179.
    data = raw_png(side, side, bits=1, colour=0, rows=b"")
    # Just below the limit the lying header is found out by the missing pixels.
    assert reason_of(data) == ("truncated" if side == 9_487 else "more than 100 megapixels")


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 2)])
def test_images_without_a_shape_are_refused(size: tuple[int, int]) -> None:
    """Resized by their short side to 256 pixels they would have gigapixels."""
    assert reason_of(encoded(Image.new("RGB", size), "PNG")) == "over 100 times as long as wide"


def test_large_images_print_nothing(tmp_path: Path) -> None:
    # In a process of its own, since pytest sets the warning filters anew for every test.
    (tmp_path / "large.png").write_bytes(raw_png(9_487, 9_487, bits=1, colour=0, rows=b""))
    (tmp_path / "huge.png").write_bytes(raw_png(12_000, 12_000, bits=1, colour=0, rows=b""))
    code = (
        "import sys; from pathlib import Path; from edgekd.data.images import UnreadableImage, decode\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode(Path(name))\n"
        "    except UnreadableImage as error: print(error.reason)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.png"), str(tmp_path / "huge.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.split("\n")[1], done.stderr) == ("more than 100 megapixels", "")
