from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.plan import check_recipe, settle
from edgekd.distill.recipes import get_recipe

CASES: list[tuple[dict[str, Any], str]] = [
    ({"recipe": "vl2v-sd", "student": "resnet18"}, "own image encoder, not resnet18"),
    ({"recipe": "rise", "student": "teacher"}, "cannot train the teacher's own image encoder"),
    ({"recipe": "vl2v-adip", "student": "teacher"}, "stage align .* trains the projector"),
    ({"recipe": "vl2v-sd", "pretrained": "hub"}, "takes no others"),
    ({"recipe": "erm", "projector": "mlp"}, "no projector to choose"),
    ({"recipe": "vl2v-sd", "projector": "mlp"}, "no projector to choose"),
    ({"recipe": "erm", "descriptions": "d.json"}, "reads no text"),
    ({"recipe": "vlm-ood", "vocabulary": "v.txt"}, r"uses labels \(text_ce\)"),
    ({"recipe": "clip-mse", "vocabulary": "v.txt"}, "No term .* reads a vocabulary"),
    ({"recipe": "erm", "captions": "c.json"}, "cannot have the term caption_nce"),
    ({"recipe": "rise", "teacher": "embeddings:x.npz"}, "texts about the domains"),
    (
        {"recipe": "vlm-ood", "teacher": "embeddings:x.npz", "captions": "c.json"},
        "hold no captions",
    ),
    ({"recipe": "rise", "centre": True}, "learned head"),
    ({"recipe": "lgd", "centre": True}, "prototypes of lgd"),
    ({"recipe": "vl2v-sd", "centre": True}, "student of vl2v-sd"),
    ({"average": "wise-ft"}, "does not start from them"),
    ({"recipe": "erm", "student": "teacher", "average": "wise-ft"}, "does not start from them"),
    ({"average": "swad", "select": "best"}, "chooses the weights itself"),
    ({"recipe": "vl2v-sd", "average": "wise-ft", "select": "best"}, "chooses the weights itself"),
]


@pytest.mark.parametrize(("settings", "said"), CASES, ids=lambda value: str(value)[:50])
def test_what_cannot_go_together_is_refused_before_any_work(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(EdgekdError, match=said) as caught:
        settle(TrainConfig.model_validate(settings))
    assert caught.value.hint


def test_a_term_for_captions_needs_a_file_of_captions() -> None:
    stages = {"train": {"terms": {"caption_nce": 1.0}}}
    with pytest.raises(EdgekdError, match="no captions"):
        check_recipe(get_recipe("vlm-ood", stages), TrainConfig(recipe="vlm-ood"))


def test_a_file_of_captions_brings_its_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = {"train": {"lr": 2.0}}
    chosen = settle(TrainConfig(recipe="vlm-ood", captions=Path("c.json"), stages=stages))
    terms = get_recipe("vlm-ood", chosen.stages).stages[0].terms
    assert terms["caption_nce"].weight == 1
    assert chosen.captions == tmp_path / "c.json"
    assert stages == {"train": {"lr": 2.0}}
    weighed = {"train": {"terms": {"caption_nce": 0.3}}}
    own = settle(TrainConfig(recipe="vlm-ood", captions=Path("c.json"), stages=weighed))
    assert own.stages == weighed


def test_a_recipe_brings_its_student_and_projector() -> None:
    assert settle(TrainConfig(recipe="vl2v-sd")).student == "teacher"
    assert settle(TrainConfig(recipe="lgd")).projector == "mlp"
    assert settle(TrainConfig(recipe="erm")).projector is None
    encoder = TrainConfig(recipe="vlm-ood", student="teacher", average="wise-ft")
    assert settle(encoder).projector is None
