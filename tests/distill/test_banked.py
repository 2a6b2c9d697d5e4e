"""The equivalences between terms that the published systems imply, beside the reference values of test_terms.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from term_reference import C, draw, unit
from torch.nn.functional import cross_entropy

from edgekd.distill.losses import (
    TERMS,
    TermSpec,
    domain_rel,
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
    assert batch.teacher is not None
    assert batch.bank is not None
    entropy = torch.distributions.Categorical(
        logits=unit(batch.teacher) @ batch.bank.T / tau
    ).entropy()
    soft = text_soft_ce(batch, tau_student=tau, tau_teacher=tau)
    near = vlprox(batch, k=C, tau=tau)
    assert torch.allclose(soft, near + entropy)
    assert batch.embedding is not None
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
    assert batch.teacher is not None
    assert batch.embedding is not None
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
    assert wrong.embedding is not None
    assert wrong.embedding.grad is not None
    assert not wrong.embedding.grad.any()


def test_with_prototypes_far_away_the_visual_target_is_the_own_teacher_embedding() -> None:
    batch = draw(5)
    assert batch.visual_bank is not None
    assert batch.embedding is not None
    assert batch.teacher is not None
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
    assert batch.bank is not None
    assert domain_rel(replace(batch, embedding=7 * batch.bank[batch.labels])).abs().max() < 1e-15
