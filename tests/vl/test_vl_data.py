from __future__ import annotations

import itertools
import math
from collections import Counter
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
from edgekd.distill.models.teachers import load_teacher
from edgekd.distill.vl import easy_vqa, tokens
from edgekd.distill.vl.data import low_shot, split_examples, subset
from edgekd.distill.vl.run import build_student
from edgekd.distill.vl.student import Joint, VlStudent
from edgekd.distill.vl.tasks import LABELS, article, load_vl_data, make_choice, make_entailment
from edgekd.distill.vl.teacher import patch_map, read_tokens
from edgekd.distill.vl.token_td import (
    TeacherTokens,
    TokenMaps,
    VlBatch,
    confidences,
    most_relevant,
    token_distance,
    token_td,
)
from edgekd.export.vl import export_vl_onnx, open_vl


def test_entailment_says_what_the_folders_say(colours: Path) -> None:
    images = load_images(colours)
    data = make_entailment(images, styles=True)
    assert data.synthetic
    assert "synthetic" in data.name
    assert len(data) == 3 * len(images)
    assert Counter(data.labels.tolist()) == {0: len(images), 1: len(images), 2: len(images)}
    for index in range(len(data)):
        text, picture = data.texts[data.text_of[index]], data.image_of[index]
        name, domain = (
            images.classes[images.labels[picture]],
            images.domains[images.domain_of[picture]],
        )
        named_domain = next((d for d in images.domains if d in text), domain)
        is_true = name in text and named_domain == domain
        label = LABELS[data.labels[index]]
        assert is_true == (label != "contradiction"), (text, name, domain, label)
        assert ("old" in text or "child" in text or "spring" in text) == (label == "neutral")
    assert any(d in text for text in data.texts for d in images.domains)
    assert not any(
        d in text for text in make_entailment(images, styles=False).texts for d in images.domains
    )


def test_choice_has_one_right_candidate(colours: Path) -> None:
    images = load_images(colours)
    data = make_choice(images, styles=False)
    assert data.text_of.shape == (len(images), 3)  # three classes, so not four candidates
    for index in range(len(data)):
        shown = [data.texts[number] for number in data.text_of[index]]
        assert len(set(shown)) == 3
        assert (
            shown[data.labels[index]]
            == f"a picture of {article(images.classes[images.labels[index]])}"
        )
    assert set(data.labels.tolist()) == {0, 1, 2}


def test_no_picture_lies_on_both_sides(colours: Path) -> None:
    data = make_entailment(load_images(colours), styles=False)
    split = split_examples(data, test_domain="dark")
    sides = [
        set(data.image_of[part].tolist())
        for part in (split.train, split.val, split.id_test, split.ood_test)
    ]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides)) == len(data.images)
    assert {data.images.domains[data.images.domain_of[i]] for i in sides[3]} == {"dark"}


def test_low_shot_is_stratified_and_nested(colours: Path) -> None:
    images = load_images(colours)
    pool = np.arange(len(images))
    one, half = low_shot(images, pool, 0.01, 0), low_shot(images, pool, 0.5, 0)
    assert len(one) == 6  # one of each of 3 classes in 2 domains
    assert len(half) == 36
    assert set(one) < set(half) < set(pool)
    assert set(low_shot(images, pool, 0.5, 1)) != set(half)
    assert (low_shot(images, pool, 1.0, 0) == pool).all()
    for fraction in (0.0, 1.5):
        with pytest.raises(EdgekdError, match="fraction"):
            VlTrainConfig.load(fraction=fraction)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("what is the blue shape?", "rectangle")], "blue rectangle"),
        ([("what color is the triangle?", "red")], "red triangle"),
        ([("is there not a teal shape?", "no"), ("is there a circle?", "yes")], "teal circle"),
        ([("is no circle present?", "yes"), ("what color is the shape?", "gray")], "unknown"),
        ([("is a red shape present?", "no"), ("is a triangle present?", "yes")], "unknown"),
    ],
)
def test_combination_of(pairs: list[tuple[str, str]], expected: str) -> None:
    assert easy_vqa.combination_of(pairs) == expected


def test_easy_vqa() -> None:
    pytest.importorskip("easy_vqa")
    data = load_vl_data("vqa", "easy-vqa", shifted=True)
    assert len(data.answers) == 13
    assert len(data.texts) == 107
    assert len(data.images) == 3542 + 880  # counted with an independent script
    for group, truth, label in list(zip(data.statements_of, data.truth, data.labels, strict=True))[
        :50
    ]:
        assert data.statements[group][truth].endswith(" " + data.answers[label])
    split = split_examples(data, test_domain="held-out", fraction=0.01)
    pairs: dict[int, list[tuple[str, str]]] = {}
    for picture, text, label in zip(data.image_of, data.text_of, data.labels, strict=True):
        pairs.setdefault(picture, []).append((data.texts[text], data.answers[label]))
    unseen = {easy_vqa.combination_of(pairs[i]) for i in data.image_of[split.ood_test]}
    assert unseen == set(easy_vqa.HELD_OUT)
    assert not unseen & {easy_vqa.combination_of(pairs[i]) for i in data.image_of[split.train]}
    assert all(
        data.images.ids[i].startswith("test/") for i in np.unique(data.image_of[split.id_test])
    )


def test_mistakes(monkeypatch: pytest.MonkeyPatch, colours: Path) -> None:
    with pytest.raises(EdgekdError, match="needs questions"):
        load_vl_data("vqa", str(colours))
    with pytest.raises(EdgekdError, match="questions"):
        load_vl_data("ve", "easy-vqa")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        EdgekdError, match=r"easy-vqa is not installed. Install it: pip install \"edgekd\[vqa\]\""
    ):
        load_vl_data("vqa", "easy-vqa")


def test_content_tokens() -> None:
    ids = tokens.tokenize(["is there a red dog ! ?", "the"], 10)
    kept = [tokens.word(i) for i in ids[0][tokens.content_tokens(ids)[0]].tolist()]
    assert kept == ["red", "dog"]
    assert not tokens.content_tokens(ids)[1].any()


def test_token_rows() -> None:
    ids = tokens.tokenize(["red dog"], 6)
    rows = tokens.token_rows(ids)
    assert rows.shape == (49408,)
    assert sorted(rows[torch.unique(ids).numpy()]) == [
        1,
        2,
        3,
        4,
        5,
    ]  # padding, red, dog, begin, end
    assert rows[tokens.tokenize(["cat"], 6)[0, 1]] == 0


def test_long_texts_warn_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert tokens.length_of(["a", "one two three four five six seven"], 6) == 6
    assert tokens.length_of(["a", "one two"], 6) == 4
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "1 of 2 texts" in said
    assert "one two three" in said


def test_a_subset_has_every_kind_of_sentence(colours: Path) -> None:
    data = load_vl_data("ve", str(colours))
    everything = np.arange(len(data))
    shown = subset(everything, len(data) // 3)
    assert len(shown) == len(set(shown.tolist())) == len(data) // 3
    assert (np.diff(shown) > 0).all()
    assert set(data.labels[shown].tolist()) == {0, 1, 2}  # every third one would be of one label
    assert (shown == subset(everything, len(data) // 3)).all()
    assert (subset(everything, 10**6) == everything).all()


LENGTH = 7

TEXTS = ["red dog", "is there a red dog", "blue"]


def small_student(**changes: Any) -> VlStudent:
    torch.manual_seed(0)
    config = VlTrainConfig.load(
        **{
            "student": "test_resnet",
            "size": 64,
            "width": 16,
            "heads": 2,
            "control": "none",
            "task": "ve",
            **changes,
        }
    )
    rows = tokens.token_rows(tokens.tokenize(TEXTS, LENGTH))
    student, _, grid = build_student(config, rows, LENGTH, 3)
    assert config.blind or grid[0] * grid[1] == student.patches
    return student.eval()


def pictures(count: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize(("name", "patches"), [("test_resnet", 4), ("vit_tiny", 16)])
def test_patches_and_shapes(name: str, patches: int) -> None:
    student = small_student(student=name)
    joint = student.fuse(student.encode(pictures(3)), tokens.tokenize(TEXTS, LENGTH))
    assert joint.logits.shape == (3, 3)
    assert joint.cls.shape == (3, 16)
    assert joint.patches.shape == (3, patches, 16)
    assert joint.text.shape == (3, LENGTH, 16)


def test_padding_does_not_count() -> None:
    student = small_student()
    ids = tokens.tokenize(["red dog"], LENGTH)
    other = ids.clone()
    other[0, 5:] = tokens.tokenize(["blue"], LENGTH)[0, 1]
    with torch.inference_mode():
        assert torch.allclose(student(pictures(1), ids), student(pictures(1), other), atol=1e-6)
        other[0, 1] = other[0, 5]
        assert not torch.allclose(student(pictures(1), ids), student(pictures(1), other), atol=1e-4)


def test_the_picture_counts_but_not_for_a_blind_student() -> None:
    ids = tokens.tokenize(TEXTS[:1] * 2, LENGTH)
    with torch.inference_mode():
        seeing, blind = (
            small_student()(pictures(2), ids),
            small_student(control="question-only")(pictures(2), ids),
        )
    assert not torch.allclose(seeing[0], seeing[1], atol=1e-4)
    assert torch.equal(blind[0], blind[1])


def test_choice_scores_each_candidate_alone() -> None:
    student = small_student(task="choice")
    ids = tokens.tokenize(TEXTS, LENGTH)
    with torch.inference_mode():
        scores = student(pictures(1), ids[None])
        assert scores.shape == (1, 3)
        assert torch.allclose(
            student(pictures(1), ids[None, [2, 0, 1]]), scores[:, [2, 0, 1]], atol=1e-5
        )


@pytest.mark.parametrize("task", [pytest.param("ve", marks=pytest.mark.slow), "choice"])
def test_onnx_parity(task: str, tmp_path: Path) -> None:
    student = small_student(task=task)
    ids = tokens.tokenize(TEXTS, LENGTH)
    asked = (
        torch.stack([ids[list(p)] for p in itertools.permutations(range(3))])
        if task == "choice"
        else ids
    )
    export_vl_onnx(student, tmp_path / "m.onnx", size=64, text_shape=asked.shape[1:], metadata={})
    predict = open_vl(tmp_path / "m.onnx")
    for count in (1, 3):  # the batch is dynamic
        with torch.inference_mode():
            expected = student(pictures(count), asked[:count]).numpy()
        np.testing.assert_allclose(
            predict(pictures(count).numpy(), asked[:count].numpy()), expected, atol=2e-4
        )


@pytest.mark.slow
def test_distillation_leaves_the_graph_alone(tmp_path: Path) -> None:
    """The file is the same graph with and without a teacher, so its latency is too."""
    import onnx

    graphs = []
    for control in ("none", "clip-td"):
        path = tmp_path / f"{control}.onnx"
        export_vl_onnx(
            small_student(control=control), path, size=64, text_shape=(LENGTH,), metadata={}
        )
        graph = onnx.load(path).graph
        graphs.append(
            (
                [(n.op_type, list(n.input), list(n.output)) for n in graph.node],
                [(t.name, list(t.dims), t.data_type) for t in graph.initializer],
            )
        )
    assert graphs[0] == graphs[1]
    names = {i.name: i.type.tensor_type.elem_type for i in onnx.load(path).graph.input}
    assert names == {"image": onnx.TensorProto.UINT8, "tokens": onnx.TensorProto.INT64}


B, L, P, D, W = 3, 5, 4, 6, 8


def distilled_batch() -> VlBatch:
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
    batch = distilled_batch()
    expected = by_hand(batch, ratio, pooled)
    assert token_td(batch, ratio=ratio, pooled=pooled).tolist() == pytest.approx(expected, abs=1e-6)


def test_all_is_the_ratio_one_and_none_is_pooled_only() -> None:
    batch = distilled_batch()
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
    batch = distilled_batch()
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


def test_gradients_reach_the_chosen_states_of_the_student() -> None:
    batch = distilled_batch()
    text, cls = batch.joint.text.requires_grad_(), batch.joint.cls.requires_grad_()
    token_td(batch, ratio=0.3).sum().backward()  # type: ignore[no-untyped-call]
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
    batch = distilled_batch()
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


@pytest.mark.parametrize("spec", ["toy", "vit"])
def test_token_vectors_live_where_the_pooled_ones_do(spec: str, tiny_teacher: Path) -> None:
    teacher = load_teacher(f"local-dir:{tiny_teacher}" if spec == "vit" else spec)
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
    with pytest.raises(EdgekdError, match="tokenizer"):
        read_tokens(replace(plain, tokenizer=object()))
