from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.distill.classification.predict import source_loss
from edgekd.distill.students import make_student
from edgekd.distill.text_bank import TextBank

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
IMAGES: Any = SimpleNamespace(
    read=lambda i, **_: Image.fromarray(PIXELS[i]),
    labels=np.array([0, 1, 1, 2]),
    domain_of=np.array([0, 0, 0, 1]),
)


def expected(rows: torch.Tensor) -> float:
    each = [
        -float(row[label] - math.log(sum(row.exp())))
        for row, label in zip(rows, (0, 1, 1, 2), strict=True)
    ]
    return (sum(each[:3]) / 3 + each[3]) / 2


@pytest.mark.parametrize("head", ["text", "linear", "learned"])
def test_the_loss_counts_every_domain_alike_and_a_text_head_as_its_teachers(head: str) -> None:
    torch.manual_seed(0)
    student = make_student(
        "test_efficientnet",
        pretrained="scratch",
        size=32,
        dim=None if head == "linear" else 6,
        classes=None if head == "text" else 3,
    )
    vectors = torch.nn.functional.normalize(torch.randn(3, 6), dim=-1)
    bank = TextBank(("a", "b", "c"), ("{}",), vectors, "t", 20.0)
    student.train()
    found = source_loss(student, None if head == "linear" else bank, IMAGES, np.arange(4))
    assert student.training
    with torch.inference_mode():
        out = student.eval()(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255)
        if head == "text":
            rows = 20 * (out / out.norm(dim=-1, keepdim=True)) @ vectors.T
        else:
            rows = out if head == "linear" else out @ student.head.weight.T  # type: ignore[union-attr]
    assert found == pytest.approx(expected(rows), rel=1e-4)
