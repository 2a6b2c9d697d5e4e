from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from edgekd.distill.classification.predict import knn_scores, linear_probe, student_vectors


def test_neighbours_vote_by_their_nearness() -> None:
    train = torch.tensor([[1.0, 0], [0, 2.0], [1.0, 1.0]])
    scores = knn_scores(train, torch.tensor([0, 1, 2]), torch.tensor([[3.0, 0]]), 3, k=2)
    near, far = math.exp(1 / 0.07), math.exp(math.sqrt(0.5) / 0.07)
    assert scores[0].tolist() == pytest.approx(
        [near / (near + far), 0, far / (near + far)], rel=1e-4
    )
    assert knn_scores(train, torch.tensor([0, 0, 1]), train, 2, k=50).sum(
        dim=1
    ).tolist() == pytest.approx([1, 1, 1])


def test_the_linear_probe_is_at_the_optimum_of_its_loss() -> None:
    make = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=make)
    train = (
        5 + torch.randn(60, 4, generator=make) + 2 * torch.nn.functional.one_hot(labels, 4).float()
    )
    layer = linear_probe(train, labels, 3, decay=0.1)
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    weight = (layer.weight * std).detach().requires_grad_()
    bias = (layer.bias + layer.weight @ mean).detach().requires_grad_()
    loss = (
        cross_entropy((train - mean) / std @ weight.T + bias, labels) + 0.05 * weight.square().sum()
    )
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-3
    assert not layer.weight.requires_grad


def test_the_probe_agrees_with_an_independent_solver() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    make = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (80,), generator=make)
    train = torch.randn(80, 5, generator=make) + torch.nn.functional.one_hot(labels, 5).float()
    standard = ((train - train.mean(0)) / train.std(0, correction=0)).numpy()
    other = linear_model.LogisticRegression(C=1 / (0.01 * 80), tol=1e-8, max_iter=2000).fit(
        standard, labels.numpy()
    )
    mine = linear_probe(train, labels, 3, decay=0.01)(train).softmax(dim=1)
    assert torch.allclose(mine, torch.from_numpy(other.predict_proba(standard)).float(), atol=1e-3)


def test_constant_features_are_no_trouble() -> None:
    train = torch.tensor([[0.0, 7.0], [1.0, 7.0], [0.0, 7.0], [1.0, 7.0]])
    labels = torch.tensor([0, 1, 0, 1])
    assert linear_probe(train, labels, 2)(train).argmax(dim=1).tolist() == labels.tolist()


def test_vectors_are_the_backbones_and_the_students() -> None:
    from types import SimpleNamespace
    from typing import Any

    import numpy as np
    from PIL import Image

    from edgekd.distill.students import make_student

    torch.manual_seed(0)
    student = make_student(
        "test_efficientnet", pretrained="scratch", size=32, dim=6, projector="mlp"
    ).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images: Any = SimpleNamespace(read=lambda i, **_: Image.fromarray(pixels[i]))
    features, outputs = student_vectors(student, images, np.arange(3))
    views = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        assert torch.allclose(outputs, student(views), atol=1e-5)
        assert torch.allclose(
            features, student.backbone((views - student.mean) / student.std), atol=1e-5
        )
