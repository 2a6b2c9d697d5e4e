"""When the student's space is centred, and what a centre is a mean of."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from edgekd.distill.prompts import TextBank
from edgekd.distill.recipes import Stage, get_recipe
from edgekd.distill.sampling import BalancedSampler, MixedSampler
from edgekd.distill.teaching import cached_view_counts, centred, near_chance, say_zero_shot
from edgekd.distill.terms import TermSpec
from edgekd.distill.train import stage_loss

TRAIN = np.array([0, 2, 3])


def bank_of(
    embeddings: list[list[float]],
    *,
    recipe: str = "vl2v-adip",
    student: str = "resnet18",
    centre: bool | None = None,
) -> TextBank:
    """What `centred` makes of a teacher with these embeddings, one for each of four images."""
    table = np.asarray(embeddings, dtype=np.float32)
    bank = TextBank(("a", "b"), ("{}",), torch.tensor([[0.6, 0.8], [0.8, -0.6]]), "0123", 10.0)
    job: Any = SimpleNamespace(
        images=None,
        split=SimpleNamespace(train=TRAIN),
        trained=TRAIN,
        teacher=None,
        bank=bank,
        config=SimpleNamespace(centre=centre, student=student),
        recipe=get_recipe(recipe),
    )
    source: Any = SimpleNamespace(embeddings=lambda indices, views: table[indices])
    return centred(job, source)


CONE_LIKE = [[2.0, 0.0], [-9.0, 0.0], [3.0, 4.0], [1.0, 0.0]]
"""Training images at 0°, 53° and 0°; the second image is in another part of the split."""
SPREAD = [[1.0, 0.0], [0.0, 9.0], [-1.0, 0.0], [0.0, 1.0]]


def test_a_cone_is_centred_on_the_mean_of_the_training_images() -> None:
    bank = bank_of(CONE_LIKE)
    assert bank.image_centre is not None
    assert bank.image_centre.tolist() == pytest.approx([2.6 / 3, 0.8 / 3])
    assert bank.text_centre is not None
    assert bank.text_centre.tolist() == pytest.approx([0.7, 0.1])
    # (0.6, 0.8) − (0.7, 0.1) = (−0.1, 0.7), of length √0.5.
    assert bank.head[0].tolist() == pytest.approx([-0.1 / 0.5**0.5, 0.7 / 0.5**0.5])


def test_embeddings_that_spread_out_are_left_as_they_are_unless_told_otherwise() -> None:
    assert bank_of(SPREAD).image_centre is None
    assert bank_of(SPREAD, centre=True).image_centre is not None


def test_the_user_and_the_recipe_can_say_no() -> None:
    assert bank_of(CONE_LIKE, centre=False).text_centre is None
    assert bank_of(CONE_LIKE, recipe="clip-mse").text_centre is None


def zero_shot_said(answers: list[int], labels: list[int]) -> None:
    """Print the check of a teacher of ten classes that names `answers` for training images with `labels`."""
    eye = np.eye(10, dtype=np.float32)
    bank = TextBank(tuple("abcdefghij"), ("{}",), torch.eye(10), "0123", 10.0)
    table = eye[answers]
    job: Any = SimpleNamespace(
        fabric=SimpleNamespace(is_global_zero=True, device="cpu"),
        images=SimpleNamespace(labels=np.asarray(labels)),
        split=SimpleNamespace(train=np.arange(len(labels))),
        teacher="some",
        bank=bank,
    )
    source: Any = SimpleNamespace(embeddings=lambda indices, views: table[indices])
    say_zero_shot(job, source)


def test_the_teachers_zero_shot_accuracy_is_said_and_near_chance_is_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = [0] * 30 + list(range(1, 10)) + [-1] * 7  # unlabelled images are no part of it
    zero_shot_said([0] * 30 + list(range(1, 10)) + [3] * 7, labels)
    said = capsys.readouterr().err
    assert "100.0 % on 39 training images" in said
    assert "chance is 10.0 %" in said
    assert "warning" not in said
    # Always the most frequent class: 77 % of the images, and chance as a mean over classes.
    zero_shot_said([0] * 46, labels)
    said = capsys.readouterr().err
    assert "10.0 % on 39" in said
    assert "warning" in said


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


def test_vlm_ood_is_centred_but_not_in_the_teachers_own_tower() -> None:
    assert bank_of(CONE_LIKE, recipe="vlm-ood").image_centre is not None
    assert bank_of(CONE_LIKE, recipe="vlm-ood", student="teacher").image_centre is None


def test_the_filter_asks_the_teacher_itself_and_not_what_is_left_without_the_centre() -> None:
    """The teacher names both images `a` as labelled; less the centres the second one is nearer to `b`."""
    bank = TextBank(("a", "b"), ("{}",), torch.eye(2), "0123", 10.0)
    teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    apart = replace(bank, image_centre=teacher.mean(dim=0), text_centre=bank.vectors.mean(dim=0))
    assert (apart.image_target(teacher) @ apart.head.T).argmax(dim=1).tolist() == [0, 1]
    student: Any = SimpleNamespace(embeds=True, head=None)
    stage = Stage("train", 1.0, {"cos_img": TermSpec(1.0, mask="teacher_correct")}, ("backbone",))
    told = apart.image_target(teacher)
    answers = torch.stack([told[0], -told[1]])  # as the first, opposite to the second
    labels = torch.zeros(2, dtype=torch.int64)
    fabric = Fabric(accelerator="cpu", devices=1)
    loss, _ = stage_loss(fabric, nn.Identity(), student, stage, answers, labels, teacher, apart)
    assert loss.item() == pytest.approx((0 + 2) / 2, abs=1e-6)


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
    job: Any = SimpleNamespace(
        config=SimpleNamespace(views=3, steps=steps),
        images=range(40 + unlabelled),
        split=SimpleNamespace(train=train),
        unlabelled=others,
    )
    places = min(5, unlabelled)
    dealt = BalancedSampler((others,), places, 0)
    sampler = MixedSampler(BalancedSampler((train,), 10 - places, 0), dealt)
    assert cached_view_counts(job, sampler).tolist() == [3] * 40 + [expected] * unlabelled
