from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill import batches
from edgekd.distill.batches import open_store, squashed, store_side

Make = Callable[..., Path]


@pytest.fixture
def images(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> ImageSet:
    return load_images(str(make_domain_folder(tmp_path / "data", count=3)))


def expected(images: ImageSet, index: int, side: int) -> np.ndarray:
    return np.asarray(images.read(index).resize((side, side), Image.Resampling.BICUBIC))


def test_a_store_holds_every_image_squashed(images: ImageSet) -> None:
    store = open_store(images, 24)
    rows = np.array([17, 0, 5, 5])
    batch = store.batch(rows)
    assert batch.shape == (4, 24, 24, 3)
    assert batch.dtype == np.uint8
    for row, index in zip(batch, rows, strict=True):
        assert np.array_equal(row, expected(images, int(index), 24))


def test_a_batch_is_the_callers_own(images: ImageSet) -> None:
    store = open_store(images, 24)
    store.batch(np.array([1]))[:] = 0
    assert np.array_equal(store.batch(np.array([1]))[0], expected(images, 1, 24))


def test_decoding_happens_once_for_all_runs(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_store(images, 24).batch(np.arange(18))
    monkeypatch.setattr(batches, "squashed", lambda *a: pytest.fail("decoded again"))
    assert np.array_equal(open_store(images, 24).batch(np.arange(18)), first)


def test_another_side_or_content_is_another_store(
    images: ImageSet, make_image: Make, tmp_path: Path
) -> None:
    assert open_store(images, 24).batch(np.array([0])).shape[1] == 24
    assert open_store(images, 20).batch(np.array([0])).shape[1] == 20
    make_image(tmp_path / "data" / "art" / "cat" / "0000.png", seed=999)
    changed = load_images(str(tmp_path / "data"))
    index = changed.ids.index("art/cat/0000.png")
    assert np.array_equal(
        open_store(changed, 24).batch(np.array([index]))[0], expected(changed, index, 24)
    )


def test_too_many_images_are_decoded_on_the_fly(images: ImageSet, own_cache: Path) -> None:
    store = open_store(images, 24, max_bytes=1000)
    assert store.array is None
    assert np.array_equal(
        store.batch(np.array([4, 2])), open_store(images, 24).batch(np.array([4, 2]))
    )


def test_large_jpegs_read_at_reduced_size_look_the_same(tmp_path: Path, own_cache: Path) -> None:
    x, y = np.meshgrid(np.linspace(0, 9, 800), np.linspace(0, 7, 600))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    for number in range(3):
        path = tmp_path / "data" / ("cat" if number else "dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((127.5 + 100 * np.roll(waves, 50 * number, axis=1)).astype(np.uint8)).save(
            path, quality=95
        )
    images = load_images(str(tmp_path / "data"))
    difference = squashed(images, 0, 60).astype(int) - expected(images, 0, 60)
    assert np.abs(difference).mean() < 2


def test_a_killed_decoder_leaves_nothing_that_counts(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batches.squashed

    def fails(images: ImageSet, index: int, side: int) -> np.ndarray:
        if index == 9:
            raise KeyboardInterrupt
        return real(images, index, side)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "squashed", fails)
        with pytest.raises(KeyboardInterrupt):
            open_store(images, 24)
    assert np.array_equal(open_store(images, 24).batch(np.array([9]))[0], expected(images, 9, 24))


def test_a_full_disk_is_said(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batches, "squashed", full)
    with pytest.raises(EdgekdError, match="full"):
        open_store(images, 24)


def test_the_stored_side_leaves_room_for_the_smallest_crop() -> None:
    assert store_side(100) == 120
    assert store_side(64) ** 2 * 0.7 >= 64**2
