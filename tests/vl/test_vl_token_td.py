"""The distillation term against values by hand, its three ingredients one by one, and the teacher's tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from vl_fakes import colours as colours

from edgekd.configs.vl import CONTROLS, VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.distill.teacher import ClipTeacher, load_teacher
from edgekd.distill.terms import weighted_mean
from edgekd.distill.vl import tokens
from edgekd.distill.vl.student import Joint
from edgekd.distill.vl.teacher_tokens import patch_map, read_tokens
from edgekd.distill.vl.token_td import (
    TeacherTokens,
    TokenMaps,
    chosen,
    confidence,
    distance,
    masked_mean,
    token_td,
)

B, L, P, D, W = 3, 5, 4, 6, 8


def sample(seed: int = 0) -> tuple[Joint, TeacherTokens, TokenMaps]:
    torch.manual_seed(seed)
    content = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    teacher = TeacherTokens(
        text=normalize(torch.randn(B, L, D), dim=-1),
        content=content,
        relevance=torch.randn(B, L),
        patches=normalize(torch.randn(B, P, D), dim=-1),
        pooled_text=normalize(torch.randn(B, D), dim=-1),
        pooled_image=normalize(torch.randn(B, D), dim=-1),
    )
    joint = Joint(torch.randn(B, 2), torch.randn(B, W), torch.randn(B, P, W), torch.randn(B, L, W))
    return joint, teacher, TokenMaps(W, D)


def by_hand(
    joint: Joint, teacher: TeacherTokens, maps: TokenMaps, ratio: float, pooled: bool
) -> list[float]:
    """The docstring's formula, in loops and float64."""

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
            value += sum(d(maps.text(joint.text[i, j]), teacher.text[i, j]) for j in best) / len(
                best
            )
        fit = [float(teacher.patches[i, q] @ teacher.pooled_text[i]) for q in range(P)]
        cells = sorted(range(P), key=lambda q: -fit[q])[: max(1, math.ceil(ratio * P))]
        value += sum(
            d(maps.patches(joint.patches[i, q]), teacher.patches[i, q]) for q in cells
        ) / len(cells)
        if pooled:
            value += d(maps.pooled_text(joint.cls[i]), teacher.pooled_text[i]) / 2
            value += d(maps.pooled_image(joint.cls[i]), teacher.pooled_image[i]) / 2
        found.append(value)
    return found


@pytest.mark.parametrize(("ratio", "pooled"), [(0.3, True), (0.5, False), (1.0, True)])
def test_term_is_the_formula(ratio: float, pooled: bool) -> None:
    joint, teacher, maps = sample()
    values = token_td(joint, teacher, maps, ratio=ratio, pooled=pooled)
    assert values.tolist() == pytest.approx(by_hand(joint, teacher, maps, ratio, pooled), abs=1e-6)


def test_all_is_the_ratio_one_and_none_is_pooled_only() -> None:
    joint, teacher, maps = sample()
    assert torch.equal(
        token_td(joint, teacher, maps, select="all"), token_td(joint, teacher, maps, ratio=1.0)
    )
    expected = distance(maps.pooled_text(joint.cls), teacher.pooled_text, "cosine")
    expected = (
        expected + distance(maps.pooled_image(joint.cls), teacher.pooled_image, "cosine")
    ) / 2
    assert torch.allclose(token_td(joint, teacher, maps, select="none", kind="cosine"), expected)


def test_random_draws_as_many_and_follows_the_generator() -> None:
    joint, teacher, maps = sample()
    teacher = replace(teacher, content=torch.ones(B, L, dtype=torch.bool))

    def drawn(seed: int) -> torch.Tensor:
        return token_td(
            joint,
            teacher,
            maps,
            select="random",
            generator=torch.Generator().manual_seed(seed),
            pooled=False,
        )

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_chosen() -> None:
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0]])
    allowed = torch.tensor([[False, True, True, True], [False, False, False, False]])
    assert chosen(scores, allowed, 0.3).tolist() == [[False, False, True, False], [False] * 4]
    assert chosen(scores, allowed, 0.5)[0].tolist() == [False, False, True, True]


def test_masked_mean_of_nothing_is_zero_even_with_nan() -> None:
    values = torch.tensor([[math.nan, 2.0, 4.0], [math.nan] * 3])
    mask = torch.tensor([[False, True, True], [False] * 3])
    assert masked_mean(values, mask).tolist() == [3.0, 0.0]


def test_gradients_reach_the_student_and_not_the_teacher() -> None:
    joint, teacher, maps = sample()
    joint = replace(joint, text=joint.text.requires_grad_(), cls=joint.cls.requires_grad_())
    token_td(joint, teacher, maps, ratio=0.3).sum().backward()  # type: ignore[no-untyped-call]
    assert joint.text.grad is not None
    assert joint.cls.grad is not None
    touched = joint.text.grad.abs().sum(dim=-1) > 0  # [B, L]
    assert (touched == chosen(teacher.relevance, teacher.content, 0.3)).all()
    assert (joint.cls.grad.abs().sum(dim=-1) > 0).all()


def test_confidence() -> None:
    teacher = torch.log(torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
    truth, student = torch.tensor([0, 0]), torch.tensor([0.2, 0.4])
    assert confidence("none", teacher, truth, student).tolist() == [1, 1]
    assert confidence("label", teacher, truth, student).tolist() == pytest.approx(
        [0.8 / 0.6, 0.4 / 0.6]
    )
    assert confidence("max", teacher, truth, student).tolist() == pytest.approx(
        [0.8 / 0.7, 0.6 / 0.7]
    )
    assert confidence("relative", teacher, truth, student).tolist() == pytest.approx(
        [0.8 / 0.65, 0.5 / 0.65]
    )
    certain = torch.tensor([[0.0, -1000.0], [-1000.0, 0.0]])
    assert confidence("label", certain, truth, student).tolist() == pytest.approx(
        [1 / 0.525, 0.05 / 0.525]
    )


def test_weighted_mean() -> None:
    values = torch.tensor([1.0, math.nan, 3.0])
    mask, counts = torch.tensor([True, False, True]), torch.tensor([2.0, 1.0, 0.0])
    assert weighted_mean(values, mask=mask).item() == 2.0
    assert weighted_mean(values, mask=mask, confidence=counts).item() == 1.0
    assert weighted_mean(values, mask=~torch.ones(3, dtype=torch.bool)).item() == 0.0


def test_controls_differ_from_the_method_in_what_they_say() -> None:
    method = VlTrainConfig.load()
    assert (method.select, method.confidence, method.pooled, method.distil) == (
        "relevance",
        "label",
        True,
        True,
    )
    for name, changes in CONTROLS.items():
        config = VlTrainConfig.load(**{"control": name})
        changed = {
            key for key in type(config).model_fields if getattr(config, key) != getattr(method, key)
        }
        assert changed == {*changes, *(() if name == "clip-td" else ("control",))}
    assert VlTrainConfig.load(**{"control": "uniform", "confidence": "max"}).confidence == "max"


def test_mistaken_settings() -> None:
    with pytest.raises(EdgekdError, match='no control "poolt'):
        VlTrainConfig.load(**{"control": "pooltd"})
    with pytest.raises(EdgekdError, match='no select "best"'):
        VlTrainConfig.load(**{"select": "best"})
    with pytest.raises(EdgekdError, match="nothing is distilled"):
        VlTrainConfig.load(**{"select": "none", "pooled": False})
    with pytest.raises(EdgekdError, match="does not divide by 3 heads"):
        VlTrainConfig.load(**{"heads": 3})


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
    assert torch.allclose(
        per_token[torch.arange(2), end], pooled, atol=1e-5
    )  # CLIP pools at the end token

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
    images = load_images(colours)
    patches, pooled = teacher.images(images, np.array([0, 5, 7]), (3, 3))
    assert patches.shape == (3, 9, teacher.teacher.dim)
    assert torch.allclose(patches.float().norm(dim=-1), torch.ones(3, 9), atol=2e-3)
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_teachers_without_tokens_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "e.npz"
    np.savez(
        file,
        image_ids=["a"],
        image_vectors=np.ones((1, 4)),
        class_names=["x", "y"],
        text_vectors=np.eye(2, 4),
    )
    with pytest.raises(EdgekdError, match="needs a vector per token"):
        read_tokens(load_teacher(f"embeddings:{file}"))
    plain = load_teacher("toy")
    assert isinstance(plain, ClipTeacher)
    with pytest.raises(EdgekdError, match="does not use CLIP's tokenizer"):
        read_tokens(replace(plain, tokenizer=object()))
