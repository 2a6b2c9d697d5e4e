from __future__ import annotations

from typing import Any

import pytest

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.plan import settle
from edgekd.distill.recipes import RECIPES, get_recipe
from edgekd.distill.train import schedule


def refusal(name: str, overrides: dict[str, Any] | None) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        get_recipe(name, overrides)
    assert caught.value.hint
    return caught.value


def weights(name: str, stage: int = 0) -> dict[str, float]:
    return {term: spec.weight for term, spec in get_recipe(name).stages[stage].terms.items()}


def test_recipes_have_the_published_numbers() -> None:
    ood, lgd, rise, vl2v = (get_recipe(name) for name in ("vlm-ood", "lgd", "rise", "vl2v-adip"))
    assert weights("vlm-ood") == {"text_ce": 1.0, "im_nce": 1.0, "vlprox": 1.0}
    prox = ood.stages[0].terms["vlprox"]
    assert (prox.params, prox.mask) == ({"tau": 0.07, "k": 256}, "teacher_correct")
    assert (lgd.prompts, lgd.projector, lgd.momentum) == ("imagenet80", "mlp", 0.999)
    for spec in lgd.stages[0].terms.values():
        taus = (spec.params["tau_student"], spec.params["tau_teacher"])
        assert (spec.weight, *taus) == (0.5, 0.2, 0.01)
    assert (rise.head, rise.prompts) == ("learned", "imagenet7")
    assert weights("rise") == {"logit_kd": 0.8, "ce": 0.2, "cos_text": 1.0, "domain_rel": 1.0}
    assert rise.stages[0].terms["logit_kd"].params == {"temperature": 3.0}
    assert weights("edgekd") == {"logit_kd": 0.8, "ce": 0.2, "cos_text": 1.0, "cos_img": 1.0}
    assert [stage.trains for stage in vl2v.stages] == [("projector",), ("backbone",)]
    assert weights("vl2v-adip", 0) == weights("vl2v-adip", 1) == {"cos_img": 0.5, "cos_text": 0.5}
    probing = [stage.trains for stage in get_recipe("lp-ft").stages]
    assert probing == [("head",), ("backbone", "head")]


def test_needs_are_those_of_the_terms_and_masks() -> None:
    assert get_recipe("erm").needs == {"logits", "labels"}
    assert get_recipe("kd").needs == {"logits", "labels", "teacher", "bank"}
    assert get_recipe("clip-mse").needs == {"embedding", "teacher"}
    masked = get_recipe("clip-mse", {"train": {"terms": {"feat_mse": {"mask": "teacher_correct"}}}})
    assert masked.needs == {"embedding", "teacher", "bank", "labels"}
    assert not get_recipe("erm").takes_unlabelled
    assert get_recipe("edgekd").takes_unlabelled


def test_the_schedule_of_a_recipe() -> None:
    for name in RECIPES:
        for steps in (1, 2, 7, 5001):
            spans = [span for _, span in get_recipe(name).spans(steps)]
            assert [step for span in spans for step in span] == list(range(steps))
    # The learning rate rises, then falls as half a cosine.
    for at, expected in ((0.05, 0.5), (0.1, 1), (0.55, 0.5), (1.0, 0)):
        assert schedule(at, 0.1) == pytest.approx(expected, abs=0.02)
    assert schedule(0.0, 0.0) == 1
    assert {schedule(part, 0.1, constant=True) for part in (0.1, 0.5, 1.0)} == {0.5}
    assert settle(TrainConfig(recipe="vl2v-sd")).student == "teacher"
    assert [settle(TrainConfig(recipe=name)).projector for name in ("lgd", "erm")] == ["mlp", None]


def test_numbers_can_be_changed_and_terms_added_and_dropped() -> None:
    text_ce = {"weight": 1, "params": {"tau": 0.1}}
    terms = {"cos_img": {"weight": 0.7}, "cos_text": 0, "text_ce": text_ce}
    changes = {"align": {"share": 0.5}, "distill": {"share": 0.5, "lr": 2, "terms": terms}}
    changed = get_recipe("vl2v-adip", changes)
    align, distill = changed.stages
    assert {name: spec.weight for name, spec in align.terms.items()} == weights("vl2v-adip")
    changed_weights = {name: spec.weight for name, spec in distill.terms.items()}
    assert changed_weights == {"cos_img": 0.7, "text_ce": 1}
    assert (distill.terms["text_ce"].params, distill.lr) == ({"tau": 0.1}, 2)
    assert [span for _, span in changed.spans(10)] == [range(5), range(5, 10)]
    assert weights("vl2v-adip", 1)["cos_img"] == 0.5  # the recipe itself stays as it is

    one = {"train": {"terms": {"vlprox": {"params": {"k": 5}}}, "trains": ["projector"]}}
    stage = get_recipe("vlm-ood", one).stages[0]
    assert stage.terms["vlprox"].params == {"k": 5, "tau": 0.07}
    assert (stage.terms["vlprox"].mask, stage.trains) == ("teacher_correct", ("projector",))


@pytest.mark.parametrize(
    ("name", "overrides", "meant"),
    [
        ("vl2v-adib", None, "vl2v-adip"),
        ("vl2v-adip", {"destill": {}}, "distill"),
        ("vl2v-adip", {"distill": {"terms": {"cos_imgs": 1}}}, "cos_img"),
        ("vl2v-adip", {"distill": {"shares": 1}}, "share"),
        ("kd", {"train": {"terms": {"logit_kd": {"wight": 1}}}}, "weight"),
        ("kd", {"train": {"terms": {"logit_kd": {"mask": "teacher_corect"}}}}, "teacher_correct"),
        ("kd", {"train": {"terms": {"logit_kd": {"params": {"temprature": 2}}}}}, "temperature"),
    ],
)
def test_misspelt_words(name: str, overrides: dict[str, Any] | None, meant: str) -> None:
    assert f'"{meant}"' in refusal(name, overrides).hint


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("erm", {"train": 3}),
        ("erm", {"train": {"terms": 1}}),
        ("erm", {"train": {"share": "most"}}),
        ("erm", {"train": {"terms": {"ce": {"params": 4}}}}),
        ("erm", {"train": {"terms": {"ce": 0}}}),  # nothing left to minimise
        ("erm", {"train": {"trains": "backbone"}}),
        ("erm", {"train": {"terms": {"cos_img": 0.5}}}),  # a linear head has no embedding
        ("vl2v-adip", {"align": {"terms": {"ce": 0.5}}}),  # a text head has no logits
        ("vl2v-adip", {"align": {"share": 0.1}, "distill": {"share": 0.8}}),
        ("vl2v-adip", {"align": {"share": -0.2}, "distill": {"share": 1.2}}),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(name: str, overrides: dict[str, Any]) -> None:
    refusal(name, overrides)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"recipe": "vl2v-sd", "student": "resnet18"}, "own image encoder, not resnet18"),
    ({"recipe": "rise", "student": "teacher"}, "cannot train the teacher's own image encoder"),
    ({"recipe": "vl2v-adip", "student": "teacher"}, "stage align .* trains the projector"),
    ({"recipe": "vl2v-sd", "pretrained": "hub"}, "image encoder"),
    ({"recipe": "erm", "projector": "mlp"}, "no projector"),
    ({"recipe": "erm", "descriptions": "d.json"}, "descriptions"),
    ({"recipe": "vlm-ood", "vocabulary": "v.txt"}, r"uses labels \(text_ce\)"),
    ({"recipe": "erm", "captions": "c.json"}, "cannot have the term caption_nce"),
    ({"recipe": "rise", "teacher": "embeddings:x.npz"}, "texts about the domains"),
    ({"recipe": "rise", "centre": True}, "learned head"),
    ({"recipe": "lgd", "centre": True}, "prototypes of lgd"),
    ({"recipe": "vl2v-sd", "centre": True}, "student of vl2v-sd"),
    ({"average": "wise-ft"}, "WiSE-FT"),
    ({"average": "swad", "select": "best"}, "swad"),
]


@pytest.mark.parametrize(("settings", "said"), CASES, ids=lambda value: str(value)[:50])
def test_what_cannot_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgekdError, match=said) as caught:
        settle(TrainConfig.model_validate(settings))
    assert caught.value.hint
