"""Relations between terms that the published systems imply, beside the reference values of test_terms.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from term_reference import C, draw, unit
from torch import Tensor
from torch.nn.functional import cross_entropy

from edgekd.distill.classification.text_targets import VisualBank
from edgekd.distill.losses import (
    TERMS,
    Batch,
    TermSpec,
    caption_nce,
    domain_rel,
    im_nce,
    objective,
    text_soft_ce,
    visual_soft_ce,
    vlprox,
)


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_soft_text_targets_are_vlprox_over_all_classes_plus_the_teachers_entropy(
    tau: float,
) -> None:
    batch = draw(1)
    entropy = torch.distributions.Categorical(
        logits=unit(batch.teacher) @ batch.bank.T / tau
    ).entropy()
    soft = text_soft_ce(batch, tau_student=tau, tau_teacher=tau)
    near = vlprox(batch, k=C, tau=tau)
    assert torch.allclose(soft, near + entropy)
    # The entropy is the teacher's alone, so what the student learns is the same.
    slopes = [torch.autograd.grad(values.sum(), batch.embedding)[0] for values in (soft, near)]
    assert torch.allclose(*slopes)


def test_soft_text_targets_of_a_cold_teacher_are_cross_entropy_with_its_pseudo_labels() -> None:
    batch = draw(2)
    guessed = replace(batch, labels=batch.teacher_logits().argmax(dim=-1))
    soft = text_soft_ce(batch, tau_student=0.1, tau_teacher=1e-4)
    assert torch.allclose(soft, TERMS["text_ce"].function(guessed, tau=0.1))


def test_vlprox_compares_the_teachers_favourites_and_nothing_else() -> None:
    batch = replace(draw(3), bank=torch.eye(5, dtype=torch.float64))
    teacher = torch.tensor([[3.0, 2, 1, 0, -1]], dtype=torch.float64).expand(6, 5)
    one = replace(batch, teacher=teacher)
    # The three others change places, which changes no cosine with the first two.
    other = batch.embedding.detach()[:, [0, 1, 4, 2, 3]]
    assert torch.allclose(vlprox(one, k=2), vlprox(replace(one, embedding=other), k=2))
    assert not torch.allclose(vlprox(one, k=3), vlprox(replace(one, embedding=other), k=3))


def test_vlprox_of_a_batch_the_teacher_gets_all_wrong_is_nought() -> None:
    batch = draw(4)
    wrong = replace(batch, labels=(batch.teacher_logits().argmax(dim=-1) + 1) % C)
    loss, _ = objective(wrong, {"vlprox": TermSpec(1.0, mask="teacher_correct")})
    loss.backward()
    assert loss.item() == 0
    assert wrong.embedding.grad is not None
    assert not wrong.embedding.grad.any()


def test_with_prototypes_far_away_the_visual_target_is_the_own_teacher_embedding() -> None:
    batch = draw(5)
    far = replace(batch, visual_bank=0.3 * batch.visual_bank)
    scores = torch.cat(
        [
            torch.cosine_similarity(batch.embedding, batch.teacher)[:, None],
            unit(batch.embedding) @ (0.3 * batch.visual_bank).T,
        ],
        dim=1,
    )
    expected = cross_entropy(scores / 0.2, torch.zeros(6, dtype=torch.int64), reduction="none")
    assert torch.allclose(visual_soft_ce(far), expected)


def test_a_student_on_its_text_stands_to_the_domains_as_the_text_does() -> None:
    batch = draw(6)
    assert domain_rel(replace(batch, embedding=7 * batch.bank[batch.labels])).abs().max() < 1e-15


def test_a_perfect_student_is_told_apart_by_the_angles_alone() -> None:
    batch = Batch(labels=torch.arange(3), embedding=2 * torch.eye(3), teacher=5 * torch.eye(3))
    # Own score 1/τ, two others 0: −log(e^{1/τ} / (e^{1/τ} + 2)).
    assert im_nce(batch, tau=0.5).tolist() == pytest.approx([math.log(1 + 2 * math.exp(-2))] * 3)


def test_distance_is_cosine_at_half_the_temperature() -> None:
    batch = draw(2)
    assert torch.allclose(im_nce(batch, tau=0.2, metric="distance"), im_nce(batch, tau=0.1))


def test_a_caption_of_the_own_class_is_no_wrong_answer() -> None:
    batch = replace(draw(3), labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    moved = batch.captions.clone()
    moved[1] = 100 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = caption_nce(batch) != caption_nce(replace(batch, captions=moved))
    assert changed.tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("term", ["im_nce", "caption_nce"])
def test_three_processes_give_the_values_and_gradients_of_one(term: str) -> None:
    whole = draw(5, batch=12)
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


def test_prototypes_move_as_the_formula_says() -> None:
    texts = torch.eye(3)
    bank = VisualBank(texts, momentum=0.9, seed=1)
    start = bank.vectors.clone()
    assert torch.allclose(start.norm(dim=-1), torch.ones(3))
    # Two images nearest to text 0, one to text 1; lengths do not count.
    bank.update(torch.tensor([[4.0, 0, 3], [10.0, 0, 0], [0, 2.0, 0]]))
    assert bank.seen.tolist() == [True, True, False]
    assert torch.allclose(bank.vectors[:2], torch.tensor([[0.9, 0, 0.3], [0.0, 1, 0]]))
    assert torch.equal(bank.vectors[2], start[2])
    bank.update(torch.tensor([[0.8, 0, 0.6]]))
    # 0.9 · old + 0.1 · new, and not normalised again.
    assert torch.allclose(
        bank.vectors[0], torch.tensor([0.9 * 0.9 + 0.1 * 0.8, 0, 0.9 * 0.3 + 0.1 * 0.6])
    )
    assert torch.allclose(bank.vectors[1], torch.tensor([0.0, 1, 0]))


def test_nothing_seen_moves_nothing() -> None:
    bank = VisualBank(torch.eye(3))
    before = bank.vectors.clone()
    bank.update(torch.zeros(0, 3))
    assert torch.equal(bank.vectors, before)
    assert not bank.seen.any()
    assert set(bank.state_dict()) == {"vectors", "seen"}
