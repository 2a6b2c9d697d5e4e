from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.batches import pixel_batches
from edgekd.distill.classification.predict import predict_all, student_predict
from edgekd.distill.students import Student, make_student

Make = Callable[..., Path]


@pytest.fixture
def images(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> ImageSet:
    return load_images(str(make_domain_folder(tmp_path / "data", count=3)))


@pytest.mark.parametrize("batch", [4, 7, 100])
def test_batches_hold_the_asked_images_in_order(images: ImageSet, batch: int) -> None:
    indices = np.array([5, 0, 17, 3, 3, 9, 1])
    preprocess = Preprocess(size=20, resize="crop", crop_pct=0.8)
    parts = list(pixel_batches(images, indices, preprocess, batch))
    assert [len(part) for part in parts] == [min(batch, 7 - start) for start in range(0, 7, batch)]
    together = np.concatenate(parts)
    assert together.dtype == np.uint8
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(row, preprocess.pixels(images.read(int(index))))


def test_no_images_no_batches(images: ImageSet) -> None:
    assert list(pixel_batches(images, np.array([], dtype=np.int64), Preprocess(size=20))) == []


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return make_student("test_efficientnet", pretrained="scratch", size=32, dim=6)


def test_a_students_scores_do_not_depend_on_the_batch(images: ImageSet, student: Student) -> None:
    student.train()
    bank = torch.nn.functional.normalize(
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    predict = student_predict(student, bank)
    scores = predict_all(predict, images, np.arange(18), student.preprocess)
    assert scores.shape == (18, 4)
    assert scores.dtype == np.float32
    pixels = student.preprocess.pixels(images.read(7)).copy()
    alone = predict(pixels[None])
    np.testing.assert_allclose(scores[7:8], alone, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        view = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        expected = student.eval()(view) @ bank.T
    np.testing.assert_allclose(alone, expected.numpy(), rtol=1e-4, atol=1e-6)
