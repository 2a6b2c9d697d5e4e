from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from edgekd.benchmark.evaluate.accuracy import ALEXNET_ERRORS, mean_corruption_error
from edgekd.data import corruptions as c


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A smooth picture with one sharp edge, away from black and white."""
    down, across = np.mgrid[0 : c.SIZE, 0 : c.SIZE] / c.SIZE
    planes = [0.3 + 0.3 * down, 0.4 + 0.2 * np.sin(9 * across), np.where(across > 0.5, 0.7, 0.4)]
    return (np.stack(planes, axis=-1) * 255).astype(np.uint8)


def changed(picture: np.ndarray, name: str, severity: int, key: str = "k") -> np.ndarray:
    return c.corrupt(picture, name, severity, key).astype(float)


@pytest.mark.parametrize("name", c.NAMES)
def test_corruption_follows_the_key(name: str, picture: np.ndarray) -> None:
    once = c.corrupt(picture, name, 3, "k")
    assert (once.dtype, once.shape) == (np.uint8, picture.shape)
    assert (once == c.corrupt(picture, name, 3, "k")).all()
    same = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (once != c.corrupt(picture, name, 3, "other")).any() == (name not in same)


def test_noise_has_the_published_spread() -> None:
    grey = np.full((c.SIZE, c.SIZE, 3), 64, dtype=np.uint8)
    assert changed(grey, "gaussian_noise", 1).std() == pytest.approx(255 * 0.08, rel=0.02)
    middle = np.full_like(grey, 128)
    for severity, spread in ((2, 0.12), (3, 0.18)):
        found = changed(middle, "gaussian_noise", severity).std()
        assert found == pytest.approx(255 * spread, rel=0.02)
    # Variance of a Poisson count over its square scale: x / photons.
    assert changed(grey, "shot_noise", 1).var() == pytest.approx(255 * 64 / 60, rel=0.03)
    hit = changed(middle, "impulse_noise", 5)
    assert (hit != 128).mean() == pytest.approx(0.27, abs=0.01)
    assert (hit == 255).sum() / (hit != 128).sum() == pytest.approx(0.5, abs=0.02)


def test_contrast_and_brightness_by_hand() -> None:
    halves = np.zeros((c.SIZE, c.SIZE, 3), dtype=np.uint8)
    halves[:, : c.SIZE // 2] = (200, 100, 0)
    low = changed(halves, "contrast", 2)
    assert sorted(np.unique(low[..., 0])) == pytest.approx([100 - 30, 100 + 30], abs=1)
    bright = changed(halves, "brightness", 2)
    # V rises by 0.2 · 255 = 51; red, the largest, leads and green keeps its half of it; black turns grey.
    assert bright[0, 0] == pytest.approx([251, 125.5, 0], abs=1)
    assert bright[0, -1] == pytest.approx([51, 51, 51], abs=1)


def test_blur_kernels() -> None:
    kernel = c.disk(3, 0.1)
    assert kernel.shape == (17, 17)
    assert kernel.sum() == pytest.approx(1)
    # Lattice points within radius 3 (the Gauss circle problem): 29.
    assert (kernel > 1e-9).sum() == 29
    assert c.disk(10, 0.5).shape == (21, 21)
    point = np.zeros((41, 41))
    point[20, 20] = 1
    line = c.smear(point, 10, 3, 0.0)
    expected = np.exp(-(np.arange(21) ** 2) / 18)
    assert line[20, 20::-1] == pytest.approx(expected / expected.sum())
    assert line.sum() == pytest.approx(1)


def test_zoom_is_scipys_zoom_of_the_middle(picture: np.ndarray) -> None:
    x = picture[..., 0] / 255.0
    for factor in (1.06, 2.5):
        kept = int(np.ceil(224 / factor))
        top = (224 - kept) // 2
        large = ndimage.zoom(x[top : top + kept, top : top + kept], factor, order=1)
        trim = (large.shape[0] - 224) // 2
        middle = large[trim : trim + 224, trim : trim + 224]
        assert c.zoomed(x, factor) == pytest.approx(middle, abs=1e-9)


def test_plasma_is_the_published_diamond_square() -> None:
    # The smallest field, by hand: the middle of a square, then the two middles of its diamonds.
    draws = np.random.Generator(np.random.Philox(5))
    a, b, d = (100 * draws.uniform(-100, 100, (1, 1)).item() for _ in range(3))
    middle = a
    expected = np.array([[0.0, 2 * middle / 4 + b], [2 * middle / 4 + d, middle]])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert c.plasma(2.0, np.random.Generator(np.random.Philox(5)), side=2) == pytest.approx(
        expected
    )


def test_pixelate_and_jpeg_are_pillows(picture: np.ndarray) -> None:
    image, box = Image.fromarray(picture), Image.Resampling.BOX
    small = np.asarray(image.resize((112, 112), box).resize((224, 224), box))
    assert np.abs(changed(picture, "pixelate", 2) - small).max() <= 1
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=7)
    assert (
        np.abs(changed(picture, "jpeg_compression", 5) - np.asarray(Image.open(stored))).max() <= 1
    )


def test_mce_of_alexnet_is_one_and_of_perfection_zero() -> None:
    own = {name: (1 - error,) * 5 for name, error in ALEXNET_ERRORS.items()}
    assert set(own) == set(c.NAMES)
    assert sum(ALEXNET_ERRORS.values()) == pytest.approx(11.834896)  # the published ones
    assert mean_corruption_error(own, ALEXNET_ERRORS) == pytest.approx(1.0)
    assert mean_corruption_error(dict.fromkeys(own, (1.0,) * 5), ALEXNET_ERRORS) == 0
    by_hand = (0.15 / 0.3 + 0.4 / 0.8) / 2
    two = {"fog": (0.9, 0.8), "snow": (0.7, 0.5)}
    assert mean_corruption_error(two, {"fog": 0.3, "snow": 0.8}) == pytest.approx(by_hand)
