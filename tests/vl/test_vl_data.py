from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import normalize
from vl_fakes import SMALL
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


def test_sentences_say_what_the_folders_say(colours: Path) -> None:
    images = load_images(colours)
    data = make_entailment(images, styles=True)
    assert data.synthetic
    assert "synthetic" in data.name
    assert np.bincount(data.labels).tolist() == [len(images)] * 3
    for index in range(len(data)):
        text, picture = data.texts[data.text_of[index]], data.image_of[index]
        name = images.classes[images.labels[picture]]
        domain = images.domains[images.domain_of[picture]]
        named_domain = next((d for d in images.domains if d in text), domain)
        is_true = name in text and named_domain == domain
        label = LABELS[data.labels[index]]
        assert is_true == (label != "contradiction"), (text, name, domain, label)
        assert ("old" in text or "child" in text or "spring" in text) == (label == "neutral")
    for styles in (True, False):
        texts = " ".join(make_entailment(images, styles=styles).texts)
        assert any(domain in texts for domain in images.domains) == styles
    data = make_choice(images, styles=False)
    assert data.text_of.shape == (len(images), 3)  # three classes, so not four candidates
    for row, label, right in zip(data.text_of, data.labels, images.labels, strict=True):
        shown = [data.texts[number] for number in row]
        assert len(set(shown)) == 3
        assert shown[label] == f"a picture of {article(images.classes[right])}"
    assert set(data.labels.tolist()) == {0, 1, 2}


def test_no_picture_lies_on_both_sides(colours: Path) -> None:
    data = make_entailment(load_images(colours), styles=False)
    split = split_examples(data, test_domain="dark")
    parts = (split.train, split.val, split.id_test, split.ood_test)
    sides = [set(data.image_of[part].tolist()) for part in parts]
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
    counts = (len(data.answers), len(data.texts), len(data.images))
    assert counts == (13, 107, 3542 + 880)  # counted with an independent script
    first = list(zip(data.statements_of, data.truth, data.labels, strict=True))[:50]
    for group, truth, label in first:
        assert data.statements[group][truth].endswith(" " + data.answers[label])
    split = split_examples(data, test_domain="held-out", fraction=0.01)
    pairs: dict[int, list[tuple[str, str]]] = {}
    for picture, text, label in zip(data.image_of, data.text_of, data.labels, strict=True):
        pairs.setdefault(picture, []).append((data.texts[text], data.answers[label]))
    unseen = {easy_vqa.combination_of(pairs[i]) for i in data.image_of[split.ood_test]}
    assert unseen == set(easy_vqa.HELD_OUT)
    assert not unseen & {easy_vqa.combination_of(pairs[i]) for i in data.image_of[split.train]}
    tested = np.unique(data.image_of[split.id_test])
    assert all(data.images.ids[i].startswith("test/") for i in tested)


def test_mistakes(monkeypatch: pytest.MonkeyPatch, colours: Path, tmp_path: Path) -> None:
    for task, data in (("vqa", str(colours)), ("ve", "easy-vqa")):
        with pytest.raises(EdgekdError):
            load_vl_data(task, data)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EdgekdError, match=r"edgekd\[vqa\]"):
        load_vl_data("vqa", "easy-vqa")
    file, texts = tmp_path / "e.npz", np.eye(2, 4)
    vectors = {"image_ids": ["a"], "image_vectors": np.ones((1, 4))}
    np.savez(file, **vectors, class_names=["x", "y"], text_vectors=texts)  # type: ignore[arg-type]
    plain = load_teacher("toy")
    for teacher in (load_teacher(f"embeddings:{file}"), replace(plain, tokenizer=object())):
        with pytest.raises(EdgekdError, match="token"):
            read_tokens(teacher)


def test_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokens.tokenize(["is there a red dog ! ?", "the"], 10)
    kept = [tokens.word(i) for i in ids[0][tokens.content_tokens(ids)[0]].tolist()]
    assert kept == ["red", "dog"]
    assert not tokens.content_tokens(ids)[1].any()
    ids = tokens.tokenize(["red dog"], 6)
    rows = tokens.token_rows(ids)
    assert rows.shape == (49408,)
    # Padding, red, dog, begin and end; 0 is for every other word.
    assert sorted(rows[torch.unique(ids).numpy()]) == [1, 2, 3, 4, 5]
    assert rows[tokens.tokenize(["cat"], 6)[0, 1]] == 0
    assert tokens.length_of(["a", "one two"], 6) == 4
    assert not capsys.readouterr().err
    assert tokens.length_of(["a", "one two three four five six seven"], 6) == 6
    assert "1 of 2 texts" in capsys.readouterr().err


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
    settings = SMALL | {"size": 64, "task": "ve", "control": "none"} | changes
    config = VlTrainConfig.load(**settings)
    rows = tokens.token_rows(tokens.tokenize(TEXTS, LENGTH))
    student, _, grid = build_student(config, rows, LENGTH, 3)
    assert config.blind or grid[0] * grid[1] == student.patches
    return student.eval()


def pictures(count: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


@torch.inference_mode()
def test_a_student_reads_text_and_picture() -> None:
    for name, patches in (("test_resnet", 4), ("vit_tiny", 16)):
        student = small_student(student=name)
        joint = student.fuse(student.encode(pictures(3)), tokens.tokenize(TEXTS, LENGTH))
        assert (joint.logits.shape, joint.cls.shape) == ((3, 3), (3, 16))
        assert (joint.patches.shape, joint.text.shape) == ((3, patches, 16), (3, LENGTH, 16))
    student, ids = small_student(), tokens.tokenize(["red dog"], LENGTH)
    padded = ids.clone()
    padded[0, 5:] = tokens.tokenize(["blue"], LENGTH)[0, 1]  # padding does not count
    assert torch.allclose(student(pictures(1), ids), student(pictures(1), padded), atol=1e-6)
    padded[0, 1] = padded[0, 5]
    assert not torch.allclose(student(pictures(1), ids), student(pictures(1), padded), atol=1e-4)
    ids = tokens.tokenize(TEXTS[:1] * 2, LENGTH)
    seeing = student(pictures(2), ids)
    assert not torch.allclose(seeing[0], seeing[1], atol=1e-4)
    blind = small_student(control="question-only")(pictures(2), ids)
    assert torch.equal(blind[0], blind[1])
    # Each candidate is scored alone.
    student, ids = small_student(task="choice"), tokens.tokenize(TEXTS, LENGTH)
    scores = student(pictures(1), ids[None])
    turned = student(pictures(1), ids[None, [2, 0, 1]])
    assert torch.allclose(turned, scores[:, [2, 0, 1]], atol=1e-5)


@pytest.mark.parametrize("task", [pytest.param("ve", marks=pytest.mark.slow), "choice"])
def test_onnx_parity(task: str, tmp_path: Path) -> None:
    student = small_student(task=task)
    ids = tokens.tokenize(TEXTS, LENGTH)
    turns = torch.stack([ids[[0, 1, 2]], ids[[2, 0, 1]], ids[[1, 0, 2]]])
    texts = turns if task == "choice" else ids
    export_vl_onnx(student, tmp_path / "m.onnx", size=64, text_shape=texts.shape[1:], metadata={})
    predict = open_vl(tmp_path / "m.onnx")
    for count in (1, 3):  # the batch is dynamic
        with torch.inference_mode():
            expected = student(pictures(count), texts[:count]).numpy()
        found = predict(pictures(count).numpy(), texts[:count].numpy())
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
def test_distillation_leaves_the_graph_alone(tmp_path: Path) -> None:
    """The file is the same graph with and without a teacher, so its latency is too."""
    graphs, path = [], tmp_path / "m.onnx"
    for control in ("none", "clip-td"):
        student = small_student(control=control)
        export_vl_onnx(student, path, size=64, text_shape=(LENGTH,), metadata={})
        graph = onnx.load(path).graph
        nodes = [(node.op_type, list(node.input), list(node.output)) for node in graph.node]
        graphs.append((nodes, [(t.name, list(t.dims), t.data_type) for t in graph.initializer]))
    assert graphs[0] == graphs[1]
    types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    assert types == {"image": onnx.TensorProto.UINT8, "tokens": onnx.TensorProto.INT64}


B, L, P, D, W = 3, 5, 4, 6, 8


def distilled_batch() -> VlBatch:
    torch.manual_seed(0)

    def directions(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape), dim=-1)

    content = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    teacher = TeacherTokens(
        text=directions(B, L, D), content=content, relevance=torch.randn(B, L), patches=directions(B, P, D),
        pooled_text=directions(B, D), pooled_image=directions(B, D), logits=torch.randn(B, 4),
        truth=torch.tensor([0, 3, 1]),
    )  # fmt: skip
    joint = Joint(torch.randn(B, 2), torch.randn(B, W), torch.randn(B, P, W), torch.randn(B, L, W))
    labels, maps = torch.tensor([0, 1, 1]), TokenMaps(W, D)
    return VlBatch(labels=labels, logits=joint.logits, joint=joint, tokens=teacher, maps=maps)


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
    text, cls = batch.joint.text.requires_grad_(), batch.joint.cls.requires_grad_()
    found = token_td(batch, ratio=ratio, pooled=pooled)
    assert found.tolist() == pytest.approx(by_hand(batch, ratio, pooled), abs=1e-6)
    # Gradients reach the chosen states of the student.
    found.sum().backward()  # type: ignore[no-untyped-call]
    chosen = most_relevant(batch.tokens.relevance, batch.tokens.content, ratio)
    assert ((text.grad.abs().sum(dim=-1) > 0) == chosen).all()
    assert not pooled or (cls.grad.abs().sum(dim=-1) > 0).all()


def test_what_is_selected_without_relevance() -> None:
    batch = distilled_batch()
    assert torch.equal(token_td(batch, select="all"), token_td(batch, ratio=1.0))
    own, maps, teacher = batch.joint.cls, batch.maps, batch.tokens
    halves = token_distance(maps.pooled_text(own), teacher.pooled_text, "cosine")
    halves = halves + token_distance(maps.pooled_image(own), teacher.pooled_image, "cosine")
    assert torch.allclose(token_td(batch, select="none", distance="cosine"), halves / 2)
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
def test_token_vectors_share_the_pooled_space(spec: str, tiny_teacher: Path, colours: Path) -> None:
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
    patches, pooled = reader.images(load_images(colours), np.array([0, 5, 7]), (3, 3))
    assert patches.shape == (3, 9, teacher.dim)
    assert torch.allclose(patches.float().norm(dim=-1), torch.ones(3, 9), atol=2e-3)
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(3), atol=1e-5)
