from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from edgekd.core.preprocess import Preprocess


def picture(width: int, height: int) -> Image.Image:
    """Smooth waves in three channels."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    return Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8))


def test_squash_is_pillows_resize() -> None:
    image = picture(50, 31)
    made = Preprocess(size=24).pixels(image)
    assert made.shape == (24, 24, 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    "size", [(60, 40), (40, 60), (48, 48), (97, 40), (40, 97), (33, 50), (51, 67), (200, 31)]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], interpolation: str
) -> None:
    image = picture(*size)
    preprocess = Preprocess(size=28, resize="crop", crop_pct=0.875, interpolation=interpolation)
    short = Resize(32, InterpolationMode(interpolation))
    expected = np.asarray(CenterCrop(28)(short(image)))
    assert np.array_equal(preprocess.pixels(image), expected)


def test_the_hash_changes_with_every_field() -> None:
    base = Preprocess(size=32)
    others = [
        Preprocess(size=33),
        Preprocess(size=32, resize="crop"),
        Preprocess(size=32, crop_pct=0.9),
        Preprocess(size=32, interpolation="bilinear"),
        Preprocess(size=32, mean=(0.5, 0.5, 0.5)),
        Preprocess(size=32, std=(0.5, 0.5, 0.5)),
    ]
    assert len({made.hash for made in [base, *others]}) == 7
    assert Preprocess(size=32).hash == base.hash
    assert Preprocess.model_validate_json(base.model_dump_json()) == base


@pytest.mark.parametrize(
    "field",
    [
        {"size": 15},
        {"size": 5000},
        {"crop_pct": 0.0},
        {"crop_pct": 1e-3},  # would resize to 1,000 times the size first
        {"interpolation": "lanczos"},
        {"std": (0.5, 0.0, 0.5)},
        {"mean": (0.5, float("nan"), 0.5)},
    ],
)
def test_senseless_numbers_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate({"size": 32} | field)
