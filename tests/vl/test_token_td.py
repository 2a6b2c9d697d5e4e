"""The distillation term against values by hand, its ingredients one by one, and the teacher's tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from vl_fakes import colours as colours

from edgekd.configs.vl import CONTROLS, VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.distill.losses import TermSpec, objective
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.vl import tokens
from edgekd.distill.vl.student import Joint
from edgekd.distill.vl.teacher import patch_map, read_tokens
from edgekd.distill.vl.token_td import (
    TeacherTokens,
    TokenMaps,
    VlBatch,
    confidences,
    masked_mean,
    most_relevant,
    token_distance,
    token_td,
)

B, L, P, D, W = 3, 5, 4, 6, 8


def sample() -> VlBatch:
    torch.manual_seed(0)
    content = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    teacher = TeacherTokens(
        text=normalize(torch.randn(B, L, D), dim=-1),
        content=content,
        relevance=torch.randn(B, L),
        patches=normalize(torch.randn(B, P, D), dim=-1),
        pooled_text=normalize(torch.randn(B, D), dim=-1),
        pooled_image=normalize(torch.randn(B, D), dim=-1),
        logits=torch.randn(B, 4),
        truth=torch.tensor([0, 3, 1]),
    )
    joint = Joint(torch.randn(B, 2), torch.randn(B, W), torch.randn(B, P, W), torch.randn(B, L, W))
    return VlBatch(
        labels=torch.tensor([0, 1, 1]),
        logits=joint.logits,
        joint=joint,
        tokens=teacher,
        maps=TokenMaps(W, D),
    )


def by_hand(batch: VlBatch, ratio: float, pooled: bool) -> list[float]:
    """The docstring's formula, in loops and float64."""
    joint, teacher, maps = batch.joint, batch.tokens, batch.maps

    def d(a: torch.Tensor, b: torch.Tensor) -> float:
        own = a.detach().double().numpy()
        return float(np.abs(own / np.linalg.norm(own) - b.double().numpy()).sum() / D)

    found = []
    for i in range(B):
        value = 0.0
        allowed = [j for j in range(L) if teacher.content[i, j]]
        best = sorted(allowed, key=lambda j: -float(teacher.relevance[i, j]))
        best = best[: max(1, math.ceil(ratio * len(allowed)))]
        if best:
            words = [d(maps.text(joint.text[i, j]), teacher.text[i, j]) for j in best]
            value += sum(words) / len(best)
        fit = [float(teacher.patches[i, q] @ teacher.pooled_text[i]) for q in range(P)]
        cells = sorted(range(P), key=lambda q: -fit[q])[: max(1, math.ceil(ratio * P))]
        patches = [d(maps.patches(joint.patches[i, q]), teacher.patches[i, q]) for q in cells]
        value += sum(patches) / len(cells)
        if pooled:
            value += d(maps.pooled_text(joint.cls[i]), teacher.pooled_text[i]) / 2
            value += d(maps.pooled_image(joint.cls[i]), teacher.pooled_image[i]) / 2
        found.append(value)
    return found


@pytest.mark.parametrize(("ratio", "pooled"), [(0.3, True), (0.5, False), (1.0, True)])
def test_term_is_the_formula(ratio: float, pooled: bool) -> None:
    batch = sample()
    expected = by_hand(batch, ratio, pooled)
    assert token_td(batch, ratio=ratio, pooled=pooled).tolist() == pytest.approx(expected, abs=1e-6)


def test_all_is_the_ratio_one_and_none_is_pooled_only() -> None:
    batch = sample()
    assert torch.equal(token_td(batch, select="all"), token_td(batch, ratio=1.0))
    halves = [
        token_distance(own(batch.joint.cls), target, "cosine")
        for own, target in (
            (batch.maps.pooled_text, batch.tokens.pooled_text),
            (batch.maps.pooled_image, batch.tokens.pooled_image),
        )
    ]
    found = token_td(batch, select="none", distance="cosine")
    assert torch.allclose(found, (halves[0] + halves[1]) / 2)


def test_random_draws_follow_the_generator() -> None:
    batch = sample()
    content = torch.ones(B, L, dtype=torch.bool)
    batch = replace(batch, tokens=replace(batch.tokens, content=content))

    def drawn(seed: int) -> torch.Tensor:
        seeded = replace(batch, generator=torch.Generator().manual_seed(seed))
        return token_td(seeded, select="random", pooled=False)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_most_relevant() -> None:
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0]])
    allowed = torch.tensor([[False, True, True, True], [False, False, False, False]])
    found = most_relevant(scores, allowed, 0.3).tolist()
    assert found == [[False, False, True, False], [False] * 4]
    assert most_relevant(scores, allowed, 0.5)[0].tolist() == [False, False, True, True]


def test_masked_mean_of_nothing_is_zero_even_with_nan() -> None:
    values = torch.tensor([[math.nan, 2.0, 4.0], [math.nan] * 3])
    mask = torch.tensor([[False, True, True], [False] * 3])
    assert masked_mean(values, mask).tolist() == [3.0, 0.0]


def test_gradients_reach_the_chosen_states_of_the_student() -> None:
    batch = sample()
    text, cls = batch.joint.text.requires_grad_(), batch.joint.cls.requires_grad_()
    token_td(batch, ratio=0.3).sum().backward()  # type: ignore[no-untyped-call]
    assert text.grad is not None
    assert cls.grad is not None
    touched = text.grad.abs().sum(dim=-1) > 0  # [B, L]
    chosen = most_relevant(batch.tokens.relevance, batch.tokens.content, 0.3)
    assert (touched == chosen).all()
    assert (cls.grad.abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("kind", "teacher", "expected"),
    [
        ("label", [[0.8, 0.2], [0.4, 0.6]], [0.8 / 0.6, 0.4 / 0.6]),
        ("max", [[0.8, 0.2], [0.4, 0.6]], [0.8 / 0.7, 0.6 / 0.7]),
        ("relative", [[0.8, 0.2], [0.4, 0.6]], [0.8 / 0.65, 0.5 / 0.65]),
        ("label", [[1.0, 0.0], [0.0, 1.0]], [1 / 0.525, 0.05 / 0.525]),
    ],
)
def test_confidences(kind: Any, teacher: list[list[float]], expected: list[float]) -> None:
    logits = torch.log(torch.tensor(teacher).clamp(min=1e-30))
    truth, student = torch.tensor([0, 0]), torch.tensor([0.2, 0.4])
    assert confidences(kind, logits, truth, student).tolist() == pytest.approx(expected)


def test_the_loss_is_the_task_and_the_weighted_confident_term() -> None:
    batch = sample()
    terms = {"ce": TermSpec(1.0), "token_td": TermSpec(10.0, {"confidence": "relative"})}
    loss, values = objective(batch, terms)
    ce = torch.nn.functional.cross_entropy(batch.logits, batch.labels, reduction="none")
    tokens_ = batch.tokens
    weight = confidences("relative", tokens_.logits, tokens_.truth, (-ce).exp())
    distilled = (weight * token_td(batch)).mean()
    assert values["token_td"].item() == pytest.approx(distilled.item())
    assert loss.item() == pytest.approx((ce.mean() + 10 * distilled).item())


def test_controls_change_what_they_name() -> None:
    method = VlTrainConfig.load()
    own = (method.select, method.confidence, method.pooled, method.distil)
    assert own == ("relevance", "label", True, True)
    for name, changes in CONTROLS.items():
        config = VlTrainConfig.load(**{"control": name})
        fields = type(config).model_fields
        changed = {key for key in fields if getattr(config, key) != getattr(method, key)}
        assert changed == {*changes, *(() if name == "clip-td" else ("control",))}
    assert VlTrainConfig.load(**{"control": "uniform", "confidence": "max"}).confidence == "max"


@pytest.mark.parametrize(
    "wrong",
    [{"control": "pooltd"}, {"select": "best"}, {"select": "none", "pooled": False}, {"heads": 3}],
    ids=str,
)
def test_mistaken_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(EdgekdError):
        VlTrainConfig.load(**wrong)


@pytest.mark.parametrize("spec", ["toy", "vit"])
def test_token_vectors_live_where_the_pooled_ones_do(spec: str, tiny_teacher: Path) -> None:
    teacher = load_teacher(f"local-dir:{tiny_teacher}" if spec == "vit" else spec)
    assert isinstance(teacher, ClipTeacher)
    reader = read_tokens(teacher)
    texts = ["a red dog", "blue"]
    per_token, pooled = reader.texts(texts, 8)
    assert per_token.shape == (2, 8, teacher.dim)
    assert torch.allclose(pooled, normalize(teacher.embed_texts(texts), dim=-1), atol=1e-5)
    end = (tokens.tokenize(texts, 8) == tokens.END).int().argmax(dim=1)
    # CLIP pools at the end token.
    assert torch.allclose(per_token[torch.arange(2), end], pooled, atol=1e-5)

    size = teacher.preprocess.size
    views = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    cells, whole = patch_map(teacher, views)
    assert torch.allclose(whole, teacher.model.encode_image(views), atol=1e-4)  # type: ignore[operator]
    if spec == "toy":  # it ends in an average and a linear layer, which commute
        assert torch.allclose(cells.mean(dim=(2, 3)), whole, atol=1e-4)
    else:
        assert cells.shape == (2, teacher.dim, 2, 2)


def test_pictures_come_at_the_students_grid(colours: Path) -> None:
    teacher = read_tokens(load_teacher("toy"))
    patches, pooled = teacher.images(load_images(colours), np.array([0, 5, 7]), (3, 3))
    assert patches.shape == (3, 9, teacher.teacher.dim)
    assert torch.allclose(patches.float().norm(dim=-1), torch.ones(3, 9), atol=2e-3)
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_teachers_without_tokens_are_refused(tmp_path: Path) -> None:
    file, texts = tmp_path / "e.npz", np.eye(2, 4)
    vectors = {"image_ids": ["a"], "image_vectors": np.ones((1, 4))}
    np.savez(file, **vectors, class_names=["x", "y"], text_vectors=texts)  # type: ignore[arg-type]
    with pytest.raises(EdgekdError, match="vector per token"):
        read_tokens(load_teacher(f"embeddings:{file}"))
    plain = load_teacher("toy")
    assert isinstance(plain, ClipTeacher)
    with pytest.raises(EdgekdError, match="tokenizer"):
        read_tokens(replace(plain, tokenizer=object()))
