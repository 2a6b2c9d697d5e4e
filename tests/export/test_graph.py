from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable, UnitHead, fold_head

PREPROCESS = Preprocess(size=16, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_normalisation_is_that_of_the_formula_per_channel() -> None:
    head = nn.Linear(3 * 16 * 16, 3 * 16 * 16, bias=False)
    nn.init.eye_(head.weight)
    model = Deployable(Identity(), head, PREPROCESS)
    images = torch.randint(
        0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    expected = (images.numpy() / 255.0 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)
    np.testing.assert_allclose(
        model(images).detach().numpy().reshape(2, 3, 16, 16),
        expected.transpose(0, 3, 1, 2),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 16, 20, 3, dtype=torch.uint8),
        torch.zeros(1, 20, 20, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(1, 16, 16, 3),
    ],
    ids=["not square", "other size", "NCHW", "float"],
)
def test_wrong_input_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(EdgekdError, match="takes uint8"):
        Deployable(Identity(), nn.Linear(768, 2), PREPROCESS)(images)


@pytest.mark.parametrize("with_projector", [True, False])
def test_folded_head_predicts_what_the_cosine_head_predicts(with_projector: bool) -> None:
    torch.manual_seed(1)
    features = torch.randn(500, 12)
    projector = nn.Linear(12, 8) if with_projector else None
    bank = nn.functional.normalize(torch.randn(6, 8 if with_projector else 12), dim=1)
    embedding = projector(features) if projector is not None else features
    cosine = nn.functional.normalize(embedding, dim=1) @ bank.T
    logits = fold_head(projector, bank, 7.0)(features)
    assert torch.equal(logits.argmax(1), cosine.argmax(1))
    torch.testing.assert_close(
        logits, 7.0 * cosine * embedding.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4
    )


def test_bank_of_another_width_is_refused() -> None:
    with pytest.raises(EdgekdError, match="gives 8 values but the text bank has 5"):
        fold_head(nn.Linear(12, 8), torch.randn(6, 5), 1.0)


@pytest.mark.parametrize("with_projector", [True, False])
@pytest.mark.parametrize("length", [0.01, 1.0, 300.0])
def test_unit_head_gives_directions_whatever_the_length(
    with_projector: bool, length: float
) -> None:
    torch.manual_seed(2)
    features = length * torch.randn(50, 16)
    projector = nn.Linear(16, 16, bias=False) if with_projector else None
    raw = projector(features) if projector is not None else features
    head = UnitHead(projector, 16, float(raw.detach().norm(dim=1).mean()))
    torch.testing.assert_close(
        head(features), nn.functional.normalize(raw, dim=1), rtol=1e-5, atol=1e-6
    )
    # 16^¼ = 2, far from both ends of half precision.
    inner = head.projector(features) if head.projector is not None else features * head.factor
    assert inner.norm(dim=1).mean().item() == pytest.approx(2.0, rel=1e-4)
    if projector is not None:
        assert not any(parameter.requires_grad for parameter in head.parameters())
