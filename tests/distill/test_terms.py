from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from term_reference import CASES, B, D, by_hand, draw, softmax, unit
from torch import Tensor

from edgekd.distill.classification.text_targets import VisualBank
from edgekd.distill.losses import (
    TERMS,
    Batch,
    TermSpec,
    objective,
    teacher_confidence,
    teacher_correct,
)

NAMES = sorted(set(TERMS) - {"token_td"})  # tests/vl has its own


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_terms_and_gradients_follow_the_formula(name: str, params: dict[str, Any]) -> None:
    assert sorted({name for name, _ in CASES}) == NAMES
    batch = draw()
    values = TERMS[name].function(batch, **params)
    assert values.shape == (B,)
    rows = {"embedding": batch.embedding.tolist(), "logits": batch.logits.tolist()}

    def reference() -> list[float]:
        return by_hand(name, rows["embedding"], rows["logits"], batch, **params)

    np.testing.assert_allclose(values.tolist(), reference(), rtol=1e-9, atol=1e-12)
    values.sum().backward()
    learns = "embedding" if "embedding" in TERMS[name].needs else "logits"
    gradient = getattr(batch, learns).grad
    for i, j in ((0, 0), (2, 1), (5, 3)):
        before, ends = rows[learns][i][j], []
        for nudge in (1e-6, -1e-6):
            rows[learns][i][j] = before + nudge
            ends.append(sum(reference()))
        rows[learns][i][j] = before
        slope = (ends[0] - ends[1]) / 2e-6
        assert gradient[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


FIELDS = ("embedding", "logits", "teacher", "bank", "visual_bank", "domain_bank", "captions")


@pytest.mark.parametrize("name", NAMES)
def test_a_term_reads_nothing_it_does_not_declare_and_takes_an_empty_batch(name: str) -> None:
    info = TERMS[name]
    hidden: dict[str, Any] = {field: None for field in FIELDS if field not in info.needs}
    if "labels" not in info.needs:
        hidden["labels"] = torch.full((B,), -1)  # how many there are is all it may know
    info.function(replace(draw(), **hidden))
    empty = draw(batch=0)
    assert info.function(empty).shape == (0,)
    loss, values = objective(empty, {name: TermSpec(1.0)})
    loss.backward()
    assert (loss.item(), values[name].item()) == (0, 0)


def test_the_filter_keeps_what_the_teacher_gets_right() -> None:
    rows = [[2.0, 1, 0], [3, 1, 0], [0, 0, 5]]
    batch = Batch(labels=torch.tensor([0, 1, 2]), teacher=torch.tensor(rows), bank=torch.eye(3))
    assert teacher_correct(batch).tolist() == [True, False, True]
    lengths = (math.sqrt(5), math.sqrt(10), 5)
    expected = [
        softmax([3 * value / length for value in row])[y]
        for y, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    assert teacher_confidence(replace(batch, logit_scale=3.0)).tolist() == pytest.approx(expected)


def masked_case(teacher_rows: list[list[float]], labels: list[int]) -> Batch:
    return Batch(
        labels=torch.tensor(labels),
        embedding=torch.tensor([[1.0, 2, 0], [0, 1, 1], [2, 0, 1]], requires_grad=True),
        teacher=torch.tensor(teacher_rows, dtype=torch.float32),
        bank=torch.eye(3),
    )


ONE_EACH = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_the_objective_is_the_weighted_mean_over_kept_images() -> None:
    batch = masked_case(ONE_EACH, [0, 1, 0])  # the teacher misses the third
    terms = {"cos_img": TermSpec(0.5, mask="teacher_correct"), "cos_text": TermSpec(2.0)}
    loss, values = objective(batch, terms)
    image = [1 - 1 / math.sqrt(5), 1 - 1 / math.sqrt(2)]
    text = [1 - 1 / math.sqrt(5), 1 - 1 / math.sqrt(2), 1 - 2 / math.sqrt(5)]
    assert values["cos_img"].item() == pytest.approx(sum(image) / 2)
    assert values["cos_text"].item() == pytest.approx(sum(text) / 3)
    assert loss.item() == pytest.approx(0.5 * sum(image) / 2 + 2 * sum(text) / 3)
    assert not values["cos_img"].requires_grad
    # Confidence weighs an image, and the mask counts it.
    unsure = replace(masked_case([[1, 0, 0], [1, 1, 0], [0, 0, 1]], [0, 1, 0]), logit_scale=2.0)
    spec = TermSpec(1.0, mask="teacher_correct", confidence="teacher_confidence")
    kept, shares = teacher_correct(unsure).float(), teacher_confidence(unsure)
    expected = (kept * shares * TERMS["cos_img"].function(unsure)).sum() / kept.sum()
    assert objective(unsure, {"cos_img": spec})[0].item() == pytest.approx(expected.item())
    masked = masked_case(ONE_EACH, [1, 2, 0])
    loss, values = objective(masked, {"cos_img": TermSpec(1.0, mask="teacher_correct")})
    loss.backward()
    assert (loss.item(), values["cos_img"].item()) == (0, 0)
    assert not masked.embedding.grad.any()


@pytest.mark.parametrize("confidence", [None, "teacher_confidence"])
def test_an_image_that_does_not_count_cannot_spoil_the_sum(confidence: str | None) -> None:
    clean = masked_case(ONE_EACH, [0, 1, 0])
    # Not a number in the third, whose label (1) is not what argmax makes of it (0).
    spoilt = masked_case([[1, 0, 0], [0, 1, 0], [math.nan] * 3], [0, 1, 1])
    terms = {"cos_img": TermSpec(1.0, mask="teacher_correct", confidence=confidence)}
    losses = [objective(batch, terms)[0] for batch in (clean, spoilt)]
    assert losses[1].item() == pytest.approx(losses[0].item())
    for loss in losses:
        loss.backward()
    assert torch.allclose(spoilt.embedding.grad[:2], clean.embedding.grad[:2])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_a_loss_in_single(name: str) -> None:
    batch = draw()
    computed = dict.fromkeys(("embedding", "logits", "captions"), torch.float16)
    stored = dict.fromkeys(("teacher", "bank", "visual_bank", "domain_bank"), torch.float32)
    cast = {f: getattr(batch, f).detach().to(kind) for f, kind in (computed | stored).items()}
    exact, loss = (
        objective(each, {name: TermSpec(1.0)})[0] for each in (batch, replace(batch, **cast))
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    # 4,096 images with a loss of 100 each: their sum is six times what half precision can hold.
    embedding = torch.full((4096, D), 10.0, dtype=torch.float16)
    labels = torch.zeros(4096, dtype=torch.int64)
    large = Batch(labels=labels, embedding=embedding, teacher=torch.zeros_like(embedding))
    assert objective(large, {"feat_mse": TermSpec(1.0)})[0].item() == 100


def share(batch: Batch, rank: int, world: int) -> Batch:
    def part(name: str) -> Any:
        value = getattr(batch, name).detach()[rank::world].clone()
        return value.requires_grad_(value.is_floating_point())

    fields = ("labels", "embedding", "logits", "teacher")
    return replace(batch, **{name: part(name) for name in fields})


def test_two_processes_give_the_objective_of_the_whole_batch() -> None:
    terms = {
        "cos_img": TermSpec(0.5, mask="teacher_correct"),
        "logit_kd": TermSpec(0.3, {"temperature": 2.0}, confidence="teacher_confidence"),
    }
    whole = draw(4, batch=8)
    loss, values = objective(whole, terms)
    loss.backward()
    shares = [share(whole, rank, 2) for rank in range(2)]
    kept = [int(teacher_correct(part).sum()) for part in shares]
    assert kept[0] != kept[1]  # else the plain mean of the two would do

    def summed(count: Tensor) -> Tensor:  # stands for all_reduce
        return torch.tensor(8 if int(count) == 4 else sum(kept))

    results = [objective(part, terms, summed, 2) for part in shares]
    for part_loss, _ in results:
        part_loss.backward()
    assert sum(part.item() for part, _ in results) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name in terms:
        mean = sum(part[name].item() for _, part in results) / 2
        assert mean == pytest.approx(values[name].item(), rel=1e-5)
    for field in ("embedding", "logits"):
        full = getattr(whole, field).grad
        for rank, part in enumerate(shares):  # the gradient of the averaged loss, as DDP forms it
            own = getattr(part, field).grad / 2
            assert torch.allclose(own, full[rank::2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_term_counts_the_images_that_it_has_a_target_for(name: str) -> None:
    batch = draw()
    labels, captions = batch.labels.clone(), batch.captions.clone()
    labels[[1, 4]], captions[[1, 4]] = -1, 0
    partly = replace(batch, labels=labels, captions=captions)
    value = objective(partly, {name: TermSpec(1.0)})[1][name]
    if "labels" not in TERMS[name].needs:
        assert value == pytest.approx(TERMS[name].function(batch).mean().item(), rel=1e-6)
        return
    fields = ("labels", "embedding", "logits", "teacher", "captions")
    labelled = replace(batch, **{field: getattr(batch, field)[[0, 2, 3, 5]] for field in fields})
    alone = objective(labelled, {name: TermSpec(1.0)})[1][name]
    assert value == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize("term", ["im_nce", "caption_nce"])
def test_three_processes_give_the_values_and_gradients_of_one(term: str) -> None:
    whole, terms = draw(5, batch=12), {term: TermSpec(1.0)}
    loss, _ = objective(whole, terms)
    loss.backward()
    rows = [torch.arange(rank, 12, 3) for rank in range(3)]
    embedding = whole.embedding.detach().clone().requires_grad_()
    fields = {name: getattr(whole, name) for name in ("labels", "teacher", "captions")}
    fields["embedding"] = embedding
    everything = [unit(each) if each.is_floating_point() else each for each in fields.values()]

    def gather(own: Tensor) -> Tensor:
        """Return the rows of all processes, as the collective does for unit vectors and labels."""
        for value, mine in itertools.product(everything, rows):
            part = value[mine]
            if own.shape == part.shape and own.dtype == part.dtype and torch.allclose(own, part):
                return value[torch.cat(rows)]
        raise AssertionError("gathers something else")

    parts = []
    for rank, mine in enumerate(rows):
        own: Any = {name: value[mine] for name, value in fields.items()}
        part = replace(whole, **own, gather=gather, first=4 * rank)
        parts.append(objective(part, terms, lambda count: 3 * count, 3)[0])
    mean = torch.stack(parts).mean()
    mean.backward()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(embedding.grad, whole.embedding.grad, rtol=1e-5, atol=1e-8)


def test_prototypes_move_as_the_formula_says() -> None:
    bank = VisualBank(torch.eye(3), momentum=0.9, seed=1)
    start = bank.vectors.clone()
    assert torch.allclose(start.norm(dim=-1), torch.ones(3))
    # Two images nearest to text 0, one to text 1; lengths do not count.
    bank.update(torch.tensor([[4.0, 0, 3], [10.0, 0, 0], [0, 2.0, 0]]))
    assert bank.seen.tolist() == [True, True, False]
    assert torch.allclose(bank.vectors[:2], torch.tensor([[0.9, 0, 0.3], [0.0, 1, 0]]))
    assert torch.equal(bank.vectors[2], start[2])
    bank.update(torch.tensor([[0.8, 0, 0.6]]))  # 0.9 · old + 0.1 · new, and not normalised again
    moved = torch.tensor([[0.9 * 0.9 + 0.1 * 0.8, 0, 0.9 * 0.3 + 0.1 * 0.6], [0.0, 1, 0]])
    assert torch.allclose(bank.vectors[:2], moved)
