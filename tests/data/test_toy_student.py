"""The shipped first weights: they load, they are small, and they know photos of the toy kinds better than chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import toy_images
from edgekd.distill.students import make_student, toy_weights


def test_weights_are_shipped_for_mobilenetv3_only() -> None:
    path = toy_weights("mobilenetv3")
    assert path is not None
    assert path.stat().st_size < 9_000_000
    assert path == toy_weights("mobilenetv3_large_100")
    assert toy_weights("mobilenetv3_small") is None


def test_a_student_without_shipped_weights_is_refused() -> None:
    with pytest.raises(EdgekdError, match="No toy weights are shipped for resnet18"):
        make_student("resnet18", pretrained="toy", classes=10)


@torch.inference_mode()
def test_their_features_tell_kinds_apart_where_random_ones_do_not() -> None:
    """Nearest class mean on photos of fresh seeds, no training: chance is 10 %."""
    known, asked = (toy_images(seed=seed, per_class=8) for seed in (901, 902))

    def accuracy(pretrained: str) -> float:
        torch.manual_seed(0)
        student = make_student("mobilenetv3", pretrained=pretrained, size=48, classes=10).eval()  # type: ignore[arg-type]
        means, right = [], 0
        for images in (known, asked):
            photos = np.flatnonzero(images.domain_of == images.domains.index("photo"))
            pixels = np.stack([student.preprocess.pixels(images.read(int(i))) for i in photos])
            views = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
            features = torch.nn.functional.normalize(
                student.backbone((views - student.mean) / student.std), dim=-1
            )
            labels = torch.from_numpy(images.labels[photos])
            if images is known:
                means = torch.stack([features[labels == kind].mean(0) for kind in range(10)])
            else:
                right = int(((features @ means.T).argmax(1) == labels).sum())
        return right / 80

    assert accuracy("toy") > accuracy("scratch") + 0.2
