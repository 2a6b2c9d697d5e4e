"""Tasks from metadata and from easy-VQA, their splits, their tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from vl_fakes import colours as colours

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.distill.vl import easy_vqa, tokens
from edgekd.distill.vl.data import low_shot, split_examples, subset
from edgekd.distill.vl.tasks import LABELS, article, load_vl_data, make_choice, make_entailment


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


def test_entailment_depends_on_contents_only(colours: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(colours)
    first, second = (make_entailment(load_images(path), styles=True) for path in (colours, moved))
    assert first.texts == second.texts
    assert (first.text_of == second.text_of).all()


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


def test_article() -> None:
    assert (article("elephant"), article("dog")) == ("an elephant", "a dog")


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
    with pytest.raises(EdgekdError, match="fraction 0"):
        split_examples(make_choice(images, styles=False), test_domain="none", fraction=0)


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


def test_held_out_combinations() -> None:
    assert len(easy_vqa.HELD_OUT) == 6
    assert Counter(name.split()[1] for name in easy_vqa.HELD_OUT) == dict.fromkeys(
        easy_vqa.SHAPES, 2
    )
    assert max(Counter(name.split()[0] for name in easy_vqa.HELD_OUT).values()) == 1


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
    with pytest.raises(EdgekdError, match='no vision-language task "vgq"'):
        load_vl_data("vgq", "easy-vqa")
    with pytest.raises(EdgekdError, match="needs questions"):
        load_vl_data("vqa", str(colours))
    with pytest.raises(EdgekdError, match="holds questions"):
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
