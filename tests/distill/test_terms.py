from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from term_reference import CASES, B, D, by_hand, draw, softmax, unit
from torch import Tensor

from edgekd.distill.losses import (
    TERMS,
    Batch,
    TermSpec,
    needs,
    objective,
    teacher_confidence,
    teacher_correct,
)

NAMES = sorted({name for name, _ in CASES})


def test_every_term_is_checked() -> None:
    assert {name for name, _ in CASES} == set(TERMS) - {"token_td"}  # tests/vl has its own


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_a_term_and_its_gradient_are_what_the_formula_says(
    name: str, params: dict[str, Any]
) -> None:
    batch = draw()
    values = TERMS[name].function(batch, **params)
    assert values.shape == (B,)
    s, z = batch.embedding.tolist(), batch.logits.tolist()
    np.testing.assert_allclose(
        values.tolist(), by_hand(name, s, z, batch, **params), rtol=1e-9, atol=1e-12
    )
    values.sum().backward()
    learns = "embedding" if "embedding" in TERMS[name].needs else "logits"
    gradient = getattr(batch, learns).grad
    rows = {"embedding": s, "logits": z}[learns]
    for i, j in ((0, 0), (2, 1), (5, 3)):
        ends = []
        for nudge in (1e-6, -1e-6):
            moved = [list(row) for row in rows]
            moved[i][j] += nudge
            ends.append(
                sum(
                    by_hand(
                        name,
                        *((moved, z) if learns == "embedding" else (s, moved)),
                        batch,
                        **params,
                    )
                )
            )
        assert gradient[i, j].item() == pytest.approx(
            (ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7
        )


def test_a_term_looks_at_nothing_it_does_not_declare() -> None:
    for info in map(TERMS.__getitem__, NAMES):
        batch = draw()
        fields = (
            "embedding",
            "logits",
            "teacher",
            "bank",
            "visual_bank",
            "domain_bank",
            "captions",
        )
        hidden: dict[str, Any] = {field: None for field in fields if field not in info.needs}
        if "labels" not in info.needs:
            hidden["labels"] = torch.full((B,), -1)  # how many there are is all it may know
        info.function(replace(batch, **hidden))


def test_distillation_is_still_where_student_and_teacher_agree() -> None:
    batch = draw()
    same = batch.teacher_logits().detach().requires_grad_()
    values = TERMS["logit_kd"].function(replace(batch, logits=same))
    values.sum().backward()
    assert values.abs().max() < 1e-12
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-12


def test_distillation_is_torchs_own_divergence() -> None:
    batch = draw(3)
    teacher = torch.distributions.Categorical(logits=batch.teacher_logits() / 2.0)
    student = torch.distributions.Categorical(logits=batch.logits / 2.0)
    expected = 4.0 * torch.distributions.kl_divergence(teacher, student)
    assert torch.allclose(TERMS["logit_kd"].function(batch, temperature=2.0), expected)


def test_normed_distance_is_twice_the_cosine_loss() -> None:
    batch = draw(1)
    normed = TERMS["feat_mse"].function(batch, normed=True)
    assert torch.allclose(normed, 2 * TERMS["cos_img"].function(batch))
    units = replace(batch, embedding=unit(batch.embedding), teacher=unit(batch.teacher))
    # NVIDIA's element mean of unit vectors is Li et al.'s sum over D.
    assert torch.allclose(D * TERMS["feat_mse"].function(units), normed)


def test_text_cross_entropy_on_the_teachers_own_embedding_is_its_zero_shot_loss() -> None:
    batch = draw(2)
    own = TERMS["text_ce"].function(
        replace(batch, embedding=batch.teacher), tau=1 / batch.logit_scale
    )
    assert torch.allclose(
        own,
        torch.nn.functional.cross_entropy(batch.teacher_logits(), batch.labels, reduction="none"),
    )


def test_the_filter_keeps_what_the_teacher_gets_right() -> None:
    bank = torch.eye(3)
    batch = Batch(
        labels=torch.tensor([0, 1, 2]),
        teacher=torch.tensor([[2.0, 1, 0], [3, 1, 0], [0, 0, 5]]),
        bank=bank,
    )
    assert teacher_correct(batch).tolist() == [True, False, True]
    cosines = [
        [2 / math.sqrt(5), 1 / math.sqrt(5), 0],
        [3 / math.sqrt(10), 1 / math.sqrt(10), 0],
        [0, 0, 1],
    ]
    expected = [softmax([3 * value for value in row])[y] for y, row in enumerate(cosines)]
    assert teacher_confidence(replace(batch, logit_scale=3.0)).tolist() == pytest.approx(expected)


def masked_case(teacher_rows: list[list[float]], labels: list[int]) -> Batch:
    return Batch(
        labels=torch.tensor(labels),
        embedding=torch.tensor([[1.0, 2, 0], [0, 1, 1], [2, 0, 1]], requires_grad=True),
        teacher=torch.tensor(teacher_rows, dtype=torch.float32),
        bank=torch.eye(3),
    )


def test_the_objective_is_the_weighted_mean_over_kept_images() -> None:
    batch = masked_case(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 1, 0]
    )  # the teacher misses the third
    terms = {"cos_img": TermSpec(0.5, mask="teacher_correct"), "cos_text": TermSpec(2.0)}
    loss, values = objective(batch, terms)
    image = [1 - 1 / math.sqrt(5), 1 - 1 / math.sqrt(2)]
    text = [1 - 1 / math.sqrt(5), 1 - 1 / math.sqrt(2), 1 - 2 / math.sqrt(5)]
    assert values["cos_img"].item() == pytest.approx(sum(image) / 2)
    assert values["cos_text"].item() == pytest.approx(sum(text) / 3)
    assert loss.item() == pytest.approx(0.5 * sum(image) / 2 + 2 * sum(text) / 3)
    assert not values["cos_img"].requires_grad


def test_confidence_weighs_an_image_and_the_mask_counts_it() -> None:
    batch = replace(masked_case([[1, 0, 0], [1, 1, 0], [0, 0, 1]], [0, 1, 0]), logit_scale=2.0)
    spec = TermSpec(1.0, mask="teacher_correct", confidence="teacher_confidence")
    kept = teacher_correct(batch).tolist()
    shares = teacher_confidence(batch).tolist()
    losses = TERMS["cos_img"].function(batch).tolist()
    expected = sum(k * c * v for k, c, v in zip(kept, shares, losses, strict=True)) / sum(kept)
    assert objective(batch, {"cos_img": spec})[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("term", ["cos_img", "cos_text", "text_ce", "feat_mse"])
def test_an_empty_mask_gives_nought_and_no_gradient(term: str) -> None:
    batch = masked_case([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [1, 2, 0])
    loss, values = objective(batch, {term: TermSpec(1.0, mask="teacher_correct")})
    loss.backward()
    assert loss.item() == 0
    assert values[term].item() == 0
    assert batch.embedding.grad is not None
    assert (batch.embedding.grad == 0).all()


@pytest.mark.parametrize("confidence", [None, "teacher_confidence"])
def test_an_image_that_does_not_count_cannot_spoil_the_sum(confidence: str | None) -> None:
    clean = masked_case([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 1, 0])
    # Not a number in the third, whose label (1) is not what argmax makes of it (0).
    spoilt = masked_case([[1, 0, 0], [0, 1, 0], [math.nan] * 3], [0, 1, 1])
    terms = {"cos_img": TermSpec(1.0, mask="teacher_correct", confidence=confidence)}
    losses = [objective(batch, terms)[0] for batch in (clean, spoilt)]
    assert losses[1].item() == pytest.approx(losses[0].item())
    for loss in losses:
        loss.backward()
    assert clean.embedding.grad is not None
    assert spoilt.embedding.grad is not None
    assert torch.allclose(spoilt.embedding.grad[:2], clean.embedding.grad[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_taken_and_answered_in_single(name: str, dtype: torch.dtype) -> None:
    batch = draw()
    fields = ("embedding", "logits", "teacher", "bank", "visual_bank", "domain_bank", "captions")
    banks = (
        "bank",
        "visual_bank",
        "domain_bank",
    )  # these and the teacher's answers are stored, not computed by autocast
    half = replace(
        batch,
        **{
            f: getattr(batch, f).detach().to(torch.float32 if f in (*banks, "teacher") else dtype)
            for f in fields
        },
    )
    exact, _ = objective(batch, {name: TermSpec(1.0)})
    loss, _ = objective(half, {name: TermSpec(1.0)})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_a_large_batch_in_half_precision_is_summed_in_single() -> None:
    """4,096 images with a loss of 100 each: their sum is six times what half precision can hold."""
    embedding = torch.full((4096, D), 10.0, dtype=torch.float16)
    batch = Batch(
        labels=torch.zeros(4096, dtype=torch.int64),
        embedding=embedding,
        teacher=torch.zeros_like(embedding),
    )
    assert TERMS["feat_mse"].function(batch).dtype == torch.float16
    assert objective(batch, {"feat_mse": TermSpec(1.0)})[0].item() == 100


def test_where_targets_are_centred_the_teachers_own_logits_decide() -> None:
    batch = draw()
    own = batch.teacher_logits()
    moved = replace(batch, teacher=-batch.teacher, zero_shot=own)
    assert torch.equal(moved.teacher_logits(), own)
    assert torch.equal(teacher_correct(moved), teacher_correct(batch))
    assert not torch.equal(teacher_correct(moved), teacher_correct(replace(moved, zero_shot=None)))
    assert torch.equal(teacher_confidence(moved), teacher_confidence(batch))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_nought(name: str) -> None:
    batch = draw(batch=0)
    assert TERMS[name].function(batch).shape == (0,)
    loss, values = objective(batch, {name: TermSpec(1.0)})
    loss.backward()
    assert (loss.item(), values[name].item()) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_class_and_a_bank_of_one_text_are_no_exception(name: str) -> None:
    batch = draw(1)
    lone = replace(
        batch,
        labels=torch.zeros(B, dtype=torch.int64),
        bank=batch.bank[:1],
        logits=batch.logits[:, :1],
        visual_bank=batch.visual_bank[:1],
        domain_bank=batch.domain_bank[:, :1],
    )
    values = TERMS[name].function(lone)
    assert torch.isfinite(values).all()
    if name in ("ce", "text_ce", "logit_kd", "vlprox", "text_soft_ce", "caption_nce"):
        assert values.abs().max() < 1e-9  # nothing to choose between


ALL: dict[str, TermSpec] = {
    "cos_img": TermSpec(0.5, mask="teacher_correct"),
    "cos_text": TermSpec(0.5, confidence="teacher_confidence"),
    "logit_kd": TermSpec(0.3, {"temperature": 2.0}),
}


def share(batch: Batch, rank: int, world: int) -> Batch:
    def part(value: Tensor | None) -> Tensor | None:
        return (
            None
            if value is None
            else value.detach()[rank::world].clone().requires_grad_(value.is_floating_point())
        )

    labels = batch.labels[rank::world]
    return replace(
        batch,
        labels=labels,
        embedding=part(batch.embedding),
        logits=part(batch.logits),
        teacher=part(batch.teacher),
    )


def test_two_processes_give_the_objective_of_the_whole_batch() -> None:
    whole = draw(4, batch=8)
    loss, values = objective(whole, ALL)
    loss.backward()
    kept = int(teacher_correct(whole).sum())
    assert 0 < kept < 8
    shares = [share(whole, rank, 2) for rank in range(2)]
    counts = [int(teacher_correct(part).sum()) for part in shares]
    assert counts[0] != counts[1]  # else the plain mean of the two would do

    def summed(local: int) -> Callable[[Tensor], Tensor]:
        # Stands for all_reduce: a full share counts 8 together, a masked one as many as both keep.
        return lambda count: torch.tensor(8 if int(count) == 4 and local != 4 else kept)

    results = [
        objective(part, ALL, summed(count), 2) for part, count in zip(shares, counts, strict=True)
    ]
    for part_loss, _ in results:
        part_loss.backward()
    mean = sum(part_loss.item() for part_loss, _ in results) / 2
    assert mean == pytest.approx(loss.item(), rel=1e-5)
    for name in ALL:
        assert sum(part[name].item() for _, part in results) / 2 == pytest.approx(
            values[name].item(), rel=1e-5
        )
    for field in ("embedding", "logits"):
        full = getattr(whole, field).grad
        for rank, part in enumerate(shares):
            # The gradient of the averaged loss, as DDP forms it.
            assert torch.allclose(
                getattr(part, field).grad / 2, full[rank::2], rtol=1e-5, atol=1e-8
            )


def test_needs_are_those_of_terms_masks_and_confidences() -> None:
    assert needs({"ce": TermSpec(1.0)}) == {"logits", "labels"}
    assert needs({"ce": TermSpec(1.0, mask="teacher_correct")}) == {
        "logits",
        "labels",
        "teacher",
        "bank",
    }
    assert needs({"ce": TermSpec(1.0), "feat_mse": TermSpec(1.0)}) == {
        "logits",
        "labels",
        "embedding",
        "teacher",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_term_counts_the_images_that_it_has_a_target_for(name: str) -> None:
    batch = draw()
    labels = batch.labels.clone()
    labels[[1, 4]] = -1
    captions = batch.captions.clone() if batch.captions is not None else None
    if captions is not None:
        captions[[1, 4]] = 0
    partly = replace(batch, labels=labels, captions=captions)
    value = objective(partly, {name: TermSpec(1.0)})[1][name]
    kept = [i for i in range(B) if i not in (1, 4)]
    if "labels" not in TERMS[name].needs:
        assert value == pytest.approx(TERMS[name].function(batch).mean().item(), rel=1e-6)
        return
    fields = {
        field: getattr(batch, field)[kept]
        for field in ("labels", "embedding", "logits", "teacher", "captions")
    }
    alone = objective(replace(batch, **fields), {name: TermSpec(1.0)})[1][name]
    assert value == pytest.approx(float(alone), rel=1e-6)


def test_gradients_of_unlabelled_images_come_from_terms_without_labels_alone() -> None:
    batch = draw()
    batch = replace(batch, labels=torch.full_like(batch.labels, -1))
    loss, values = objective(batch, {"cos_text": TermSpec(1.0), "cos_img": TermSpec(1.0)})
    loss.backward()
    alone = draw()
    objective(alone, {"cos_img": TermSpec(1.0)})[0].backward()
    assert values["cos_text"] == 0
    assert batch.embedding.grad is not None
    assert alone.embedding.grad is not None
    assert torch.allclose(batch.embedding.grad, alone.embedding.grad)
