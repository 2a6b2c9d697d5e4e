"""Mixed images, label smoothing, class weights and early stopping: the options of a run that change its loss or end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_data import tiny_settings
from term_reference import B, draw

import edgekd
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.distill.classification.setup import class_weights
from edgekd.distill.inputs.batches import BalancedSampler, BatchSource, Sampler, open_store
from edgekd.distill.inputs.mixing import Mixing
from edgekd.distill.inputs.views import Augmentation
from edgekd.distill.losses import Batch, TermSpec, objective

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_every_image_has_one_partner_and_a_part_of_its_own(mixup: float, cutmix: float) -> None:
    mixing = Mixing(mixup, cutmix, 16, seed=5)
    partners, own = mixing.draw(7, 64)
    assert sorted(partners) == list(range(64))
    assert own.shape == (64, 1, 16, 16)
    assert own.min() >= 0
    assert own.max() <= 1
    parts = own[:, 0].numpy()
    boxes = np.array([set(np.unique(row)) <= {0.0, 1.0} for row in parts])
    constant = np.ptp(parts, axis=(1, 2)) == 0
    assert (boxes | constant).all()
    if mixup and cutmix:
        assert 0.25 < boxes.mean() < 0.75
    else:
        assert boxes.all() == (not mixup)
    for row in parts[boxes & ~constant]:  # a box is one rectangle
        rows, columns = np.where(row == 0)
        assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == len(rows)
    if (
        not mixup
    ):  # 1 - λ of Beta(1, 1) is even over 0–1; a box at the edge loses a part of its area
        large = Mixing(0.0, 1.0, 64, seed=0).draw(0, 256)[1]
        assert 0.25 < (large == 0).float().mean() < 0.5
    again, same = mixing.draw(7, 64)
    assert np.array_equal(again, partners)
    assert torch.equal(same, own)
    assert not np.array_equal(mixing.draw(8, 64)[0], partners)


TERMS = {
    "ce": TermSpec(0.7),
    "logit_kd": TermSpec(1.0, {"temperature": 3.0}),
    "cos_img": TermSpec(1.0),
    "cos_text": TermSpec(0.5, mask="teacher_correct"),
    "im_nce": TermSpec(0.3),
}


def permuted(batch: Batch, order: torch.Tensor) -> Batch:
    """The student's output of `batch` with the targets of others."""
    return replace(batch, labels=batch.labels[order], teacher=batch.teacher[order])


def test_a_mixed_image_has_both_losses_in_proportion() -> None:
    batch, order = draw(), torch.arange(B).roll(1)
    labels = batch.labels.clone()
    labels[0] = -1  # one image has no label
    batch = replace(batch, labels=labels)
    partner = permuted(batch, order)
    first, second = (objective(one, TERMS)[0].item() for one in (batch, partner))
    for part in (1.0, 0.0, 0.25):
        mixed = replace(batch, partner=partner, own=torch.full((B,), part, dtype=torch.float64))
        found = objective(mixed, TERMS)[0].item()
        assert found == pytest.approx(part * first + (1 - part) * second, rel=1e-5)


def test_smoothing_and_class_weights() -> None:
    batch = draw()
    classes = batch.logits.shape[1]
    weights = torch.linspace(0.5, 2, classes, dtype=torch.float64)
    changed = replace(batch, smoothing=0.1, class_weights=weights)
    found = objective(changed, {"ce": TermSpec(1.0)})[0].item()
    log = batch.logits.detach().log_softmax(dim=-1)
    target = 0.9 * torch.nn.functional.one_hot(batch.labels, classes) + 0.1 / classes
    assert found == pytest.approx(-(weights * target * log).sum(dim=-1).mean().item(), rel=1e-5)
    # Class weights make every class count alike.
    labels = np.array([0] * 6 + [1] * 2 + [3] * 4)
    own = class_weights(labels, 5).numpy()
    np.testing.assert_allclose(np.bincount(labels, own[labels], minlength=5), [4, 4, 0, 4, 0])
    assert own[2] == own[4] == 0


@pytest.fixture
def folder(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> Path:
    return make_domain_folder(tmp_path / "data", domains=("art", "photo"), count=6)


def test_processes_share_the_mixed_batch_of_one(folder: Path) -> None:
    images = load_images(folder)
    groups = tuple(np.flatnonzero(images.domain_of == domain) for domain in range(2))
    sampler = Sampler((BalancedSampler(groups, 6, 0),))
    store, views = open_store(images, 20), np.full(len(images), 2)

    def source(rank: int, world: int) -> BatchSource:
        place, mixing = {"rank": rank, "world": world}, Mixing(0.5, 1.0, 16, seed=3)
        return BatchSource(store, sampler, Augmentation(), views, **place, mixing=mixing)

    whole = source(0, 1)(4)
    for rank in range(3):
        part = source(rank, 3)(4)
        assert torch.equal(part.own, whole.own[rank::3])
        assert np.array_equal(part.partner.indices, whole.partner.indices[rank::3])
        assert torch.equal(part.partner.pixels, whole.partner.pixels[rank::3])
        assert torch.equal(part.partner.params.theta, whole.partner.params.theta[rank::3])


@pytest.fixture
def options(folder: Path, tiny_teacher: Path) -> dict[str, Any]:
    return tiny_settings(folder, tiny_teacher) | {"batch_size": 4, "test_domain": "none"}


def test_a_run_with_all_options(options: dict[str, Any], tmp_path: Path) -> None:
    more = {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "balance": "weights"}
    first, again, plain = (
        edgekd.train(**options | changes, out=tmp_path / str(number)).student_sha256
        for number, changes in enumerate((more, more, {}))
    )
    assert first == again != plain


def test_patience_ends_a_run_that_no_longer_gains(options: dict[str, Any], tmp_path: Path) -> None:
    """With a learning rate of next to nothing, no evaluation is better than the first."""
    given = options | {"steps": 40, "lr": 1e-9, "eval_every": 2, "recipe": "erm", "patience": 3}
    run = edgekd.train(**given, average="none", out=tmp_path / "run")
    assert run.steps == 8
    assert "step 2" in run.selection
    assert edgekd.load(tmp_path / "run").classes
    with pytest.raises(EdgekdError):
        edgekd.train(**given, average="swad", out=tmp_path / "swad")
