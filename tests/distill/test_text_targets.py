"""When the targets are mean-centred, the check of the teacher, and the views of unlabelled images."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.distill.batches import BalancedSampler, Sampler
from edgekd.distill.classification.setup import cached_view_counts
from edgekd.distill.classification.task import make_batch
from edgekd.distill.classification.text_targets import (
    TextTargets,
    mean_centred,
    near_chance,
    report_zero_shot,
)
from edgekd.distill.losses import TermSpec, objective
from edgekd.distill.text_bank import TextBank

BANK = TextBank(("a", "b"), ("{}",), torch.tensor([[0.6, 0.8], [0.8, -0.6]]), "0123", 10.0)
ANISOTROPIC = torch.tensor([[2.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
"""At 0°, 53° and 0°."""
SPREAD = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])


def test_anisotropic_embeddings_are_centred_on_their_mean() -> None:
    bank = mean_centred(BANK, ANISOTROPIC, always=False)
    assert bank.image_centre is not None
    assert bank.image_centre.tolist() == pytest.approx([2.6 / 3, 0.8 / 3])
    assert bank.text_centre is not None
    assert bank.text_centre.tolist() == pytest.approx([0.7, 0.1])
    # (0.6, 0.8) − (0.7, 0.1) = (−0.1, 0.7), of length √0.5.
    assert bank.head[0].tolist() == pytest.approx([-0.1 / 0.5**0.5, 0.7 / 0.5**0.5])


def test_other_embeddings_are_centred_on_request_alone() -> None:
    assert mean_centred(BANK, SPREAD, always=False) is BANK
    assert mean_centred(BANK, None, always=False) is BANK
    assert mean_centred(BANK, SPREAD, always=True).image_centre is not None
    texts = mean_centred(BANK, None, always=True)
    assert (texts.image_centre, texts.text_centre is None) == (None, False)


def test_all_targets_follow_the_centre_of_the_classes() -> None:
    bank = mean_centred(BANK, ANISOTROPIC, always=True)
    vocabulary = replace(BANK, classes=("x", "y"), vectors=torch.eye(2))
    made = TextTargets(vocabulary, None, torch.ones(1, 2, 2), 2 * torch.eye(2))
    moved = made.centred_like(bank)
    assert torch.allclose(moved.bank.head, torch.tensor([[0.5, -0.5], [-0.5, 0.5]]) * 2**0.5)
    assert moved.bank.image_centre is bank.image_centre
    assert moved.captions is not None
    assert torch.allclose(moved.captions, torch.eye(2) - torch.tensor([0.7, 0.1]))
    assert made.centred_like(BANK) is made


def test_the_filter_reads_the_teachers_own_logits_and_not_those_of_the_centred_targets() -> None:
    """The teacher names both images `a` as labelled; mean-centred, the second one is nearer to `b`."""
    bank = TextBank(("a", "b"), ("{}",), torch.eye(2), "0123", 10.0)
    teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    apart = replace(bank, image_centre=teacher.mean(dim=0), text_centre=bank.vectors.mean(dim=0))
    targets = apart.image_target(teacher)
    assert (targets @ apart.head.T).argmax(dim=1).tolist() == [0, 1]
    student: Any = SimpleNamespace(embeds=True, head=None)
    answers = torch.stack([targets[0], -targets[1]])  # as the first, opposite to the second
    batch = make_batch(student, answers, torch.zeros(2, dtype=torch.int64), teacher, apart)
    loss, _ = objective(batch, {"cos_img": TermSpec(1.0, mask="teacher_correct")})
    assert loss.item() == pytest.approx((0 + 2) / 2, abs=1e-6)


def test_the_teachers_zero_shot_accuracy_is_printed_and_near_chance_is_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels, eye = np.array([0] * 30 + list(range(1, 10))), torch.eye(10)
    report_zero_shot(eye[labels], labels, "images")
    log = capsys.readouterr().err
    assert "100.0 % on 39 training images" in log
    assert "chance is 10.0 %" in log
    assert "warning" not in log
    # Always the most frequent class: 77 % of the images, and chance as a mean over classes.
    assert report_zero_shot(eye[[0] * 39], labels, "images") == pytest.approx(0.1)
    log = capsys.readouterr().err
    assert "10.0 % on 39" in log
    assert "warning" in log


@pytest.mark.parametrize(
    ("accuracy", "chance", "near"),
    [
        (0.52, 0.5, True),
        (0.6, 0.5, False),
        (0.2, 1 / 7, True),
        (0.3, 1 / 7, False),
        (0.01, 0.001, False),
    ],
)
def test_near_chance(accuracy: float, chance: float, near: bool) -> None:
    assert near_chance(accuracy, chance) is near


@pytest.mark.parametrize(
    ("unlabelled", "steps", "expected"),
    [
        (10, 100, 12),  # 40 labelled × 3 views, spread over 10
        (20, 100, 6),
        (80, 100, 3),  # never fewer than a labelled image has
        (10, 9, 5),  # 9 steps of 5 places visit each 4.5 times
        (2, 1000, 32),
    ],
)
def test_few_unlabelled_images_have_more_cached_views(
    unlabelled: int, steps: int, expected: int
) -> None:
    train, others = np.arange(40), np.arange(40, 40 + unlabelled)
    places = min(5, unlabelled)
    labelled = BalancedSampler((train,), 10 - places, 0)
    task: Any = SimpleNamespace(
        config=SimpleNamespace(views=3),
        images=range(40 + unlabelled),
        split=SimpleNamespace(train=train),
        unlabelled=others,
        steps=steps,
        sampler=Sampler((labelled,), (BalancedSampler((others,), places, 0),)),
    )
    assert cached_view_counts(task).tolist() == [3] * 40 + [expected] * unlabelled
