from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from term_reference import draw, unit
from torch import Tensor

from edgekd.distill.losses import Batch, TermSpec, caption_nce, im_nce, objective


def test_a_perfect_student_is_told_apart_by_the_angles_alone() -> None:
    batch = Batch(labels=torch.arange(3), embedding=2 * torch.eye(3), teacher=5 * torch.eye(3))
    # Own score 1/τ, two others 0: −log(e^{1/τ} / (e^{1/τ} + 2)).
    assert im_nce(batch, tau=0.5).tolist() == pytest.approx([math.log(1 + 2 * math.exp(-2))] * 3)


def test_distance_is_cosine_at_half_the_temperature() -> None:
    batch = draw(2)
    assert torch.allclose(im_nce(batch, tau=0.2, metric="distance"), im_nce(batch, tau=0.1))


def test_a_caption_of_the_own_class_is_no_wrong_answer() -> None:
    batch = replace(draw(3), labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert batch.captions is not None
    moved = batch.captions.clone()
    moved[1] = 100 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = caption_nce(batch) != caption_nce(replace(batch, captions=moved))
    assert changed.tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("term", ["im_nce", "caption_nce"])
def test_three_processes_give_the_values_and_gradients_of_one(term: str) -> None:
    whole = draw(5, batch=12)
    assert whole.embedding is not None
    terms = {term: TermSpec(1.0)}
    loss, _ = objective(whole, terms)
    loss.backward()

    rows = [torch.arange(rank, 12, 3) for rank in range(3)]
    order = torch.cat(rows)
    embedding = whole.embedding.detach().clone().requires_grad_()
    fields = {
        "labels": whole.labels,
        "embedding": embedding,
        "teacher": whole.teacher,
        "captions": whole.captions,
    }
    units = {
        name: unit(value) if value.is_floating_point() else value for name, value in fields.items()
    }  # type: ignore[union-attr]

    def gather(own: Tensor) -> Tensor:
        # Stands for the collective: gives everybody's rows, process after process, to whoever asks with its own.
        for value in units.values():
            for mine in rows:
                if (
                    own.shape == value[mine].shape
                    and own.dtype == value.dtype
                    and torch.allclose(own, value[mine])
                ):
                    return value[order]
        raise AssertionError("gathers something else than unit vectors or labels")

    parts = []
    for rank, mine in enumerate(rows):
        part = replace(
            whole, **{k: v[mine] for k, v in fields.items()}, gather=gather, first=4 * rank
        )  # type: ignore[index]
        parts.append(objective(part, terms, lambda count: 3 * count, 3)[0])
    mean = torch.stack(parts).mean()
    mean.backward()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6)
    assert whole.embedding.grad is not None
    assert embedding.grad is not None
    assert torch.allclose(embedding.grad, whole.embedding.grad, rtol=1e-5, atol=1e-8)
