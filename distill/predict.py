"""Scores of a teacher or a student on images, prepared exactly as an artifact's would be."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.distill.prompts import TextBank
from edgekd.distill.students import Student
from edgekd.distill.teacher import ClipTeacher
from edgekd.distill.views import plain


def pixel_batches(
    images: ImageSet, indices: NDArray[np.int64], preprocess: Preprocess, batch: int = 64
) -> Iterator[NDArray[np.uint8]]:
    """The images at `indices`, prepared, as uint8 `[≤batch, H, W, 3]`; the next batch decodes in the background."""

    def prepared(index: int) -> NDArray[np.uint8]:
        return preprocess.pixels(images.read(index))

    def submit(chunk: NDArray[np.int64]) -> list[Future[NDArray[np.uint8]]]:
        return [pool.submit(prepared, int(index)) for index in chunk]

    with ThreadPoolExecutor() as pool:
        chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
        upcoming = submit(chunks[0]) if chunks else []
        for following in [*chunks[1:], None] if chunks else []:
            current, upcoming = upcoming, submit(following) if following is not None else []
            yield np.stack([future.result() for future in current])


def student_predict(student: Student, bank: Tensor | None) -> Predictor:
    """The torch student as a callable on uint8 images."""
    student.eval()

    @torch.inference_mode()
    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        views = plain(torch.from_numpy(pixels).to(student.mean.device))
        return student.scores(views, bank).float().cpu().numpy()

    return predict


def teacher_predict(teacher: ClipTeacher, bank: TextBank) -> Predictor:
    """The teacher's zero-shot classifier, `logit_scale · cos`, as a callable on uint8 images."""

    @torch.inference_mode()
    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return bank.zero_shot(teacher.embed_images(plain(torch.from_numpy(pixels)))).cpu().numpy()

    return predict


def predict_all(
    predict: Predictor, images: ImageSet, indices: NDArray[np.int64], preprocess: Preprocess
) -> NDArray[np.float32]:
    """Scores of all images at `indices`, float32 `[len(indices), C]`."""
    return np.concatenate(
        [predict(pixels) for pixels in pixel_batches(images, indices, preprocess)]
    )
