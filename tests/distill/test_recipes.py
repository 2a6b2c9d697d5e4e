from __future__ import annotations

from typing import Any

import pytest

from edgekd.core.errors import EdgekdError
from edgekd.distill.losses import TermSpec
from edgekd.distill.recipes import RECIPES, get_recipe
from edgekd.distill.train import schedule


def refusal(name: str, overrides: dict[str, Any] | None = None) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        get_recipe(name, overrides)
    assert caught.value.hint
    return caught.value


def test_the_recipes_say_what_the_literature_says() -> None:
    ood = get_recipe("vlm-ood").stages[0].terms
    assert {name: (spec.weight, spec.params["tau"], spec.mask) for name, spec in ood.items()} == {
        "text_ce": (1.0, 0.07, None),
        "im_nce": (1.0, 0.07, None),
        "vlprox": (1.0, 0.07, "teacher_correct"),
    }
    assert ood["vlprox"].params["k"] == 256
    lgd = get_recipe("lgd")
    assert "labels" not in lgd.needs
    assert (lgd.prompts, lgd.projector, lgd.momentum) == ("imagenet80", "mlp", 0.999)
    assert {
        (s.weight, s.params["tau_student"], s.params["tau_teacher"])
        for s in lgd.stages[0].terms.values()
    } == {(0.5, 0.2, 0.01)}
    self_taught = get_recipe("vl2v-sd")
    assert (self_taught.student, self_taught.projector, len(self_taught.stages)) == (
        "teacher",
        "none",
        1,
    )
    assert [stage.trains for stage in get_recipe("lp-ft").stages] == [
        ("head",),
        ("backbone", "head"),
    ]
    rise = get_recipe("rise")
    assert (rise.head, rise.prompts, rise.stages[0].terms["logit_kd"].params) == (
        "learned",
        "imagenet7",
        {"temperature": 3.0},
    )
    assert {n: s.weight for n, s in rise.stages[0].terms.items()} == {
        "logit_kd": 0.8,
        "ce": 0.2,
        "cos_text": 1.0,
        "domain_rel": 1.0,
    }
    own = get_recipe("edgekd")
    assert (own.head, own.prompts, own.centre) == (rise.head, rise.prompts, rise.centre)
    rest = {name: spec for name, spec in rise.stages[0].terms.items() if name != "domain_rel"}
    assert own.stages[0].terms == {**rest, "cos_img": TermSpec(1.0)}
    assert [name for name, recipe in RECIPES.items() if recipe.augment == "restyle"] == ["edgekd"]
    assert not get_recipe("erm").takes_unlabelled
    assert own.takes_unlabelled
    vl2v = get_recipe("vl2v-adip")
    assert [stage.name for stage in vl2v.stages] == ["align", "distill"]
    assert [stage.trains for stage in vl2v.stages] == [("projector",), ("backbone",)]
    assert all(
        {n: s.weight for n, s in stage.terms.items()} == {"cos_img": 0.5, "cos_text": 0.5}
        for stage in vl2v.stages
    )
    assert vl2v.head == "text"
    assert vl2v.needs == {"embedding", "teacher", "bank", "labels"}
    assert get_recipe("erm").needs == {"logits", "labels"}
    assert get_recipe("kd").needs == {"logits", "labels", "teacher", "bank"}
    assert get_recipe("clip-mse").needs == {"embedding", "teacher"}  # no labels


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [1, 2, 7, 150, 5001])
def test_the_shares_of_a_recipe_add_up(name: str, steps: int) -> None:
    spans = [span for _, span in get_recipe(name).spans(steps)]
    assert [step for span in spans for step in span] == list(range(steps))


def test_stages_get_their_share_of_the_steps() -> None:
    fifth = get_recipe("vl2v-adip", {"align": {"share": 0.2}, "distill": {"share": 0.8}})
    assert [span for _, span in fifth.spans(150)] == [range(30), range(30, 150)]
    moved = get_recipe("vl2v-adip", {"align": {"share": 0.5}, "distill": {"share": 0.5, "lr": 2}})
    assert [len(span) for _, span in moved.spans(10)] == [5, 5]
    assert [stage.lr for stage in moved.stages] == [get_recipe("vl2v-adip").stages[0].lr, 2.0]


def test_numbers_can_be_changed_and_terms_added_and_dropped() -> None:
    changes = {
        "distill": {
            "terms": {
                "cos_img": {"weight": 0.7},
                "cos_text": 0,
                "text_ce": {"weight": 1, "params": {"tau": 0.1}},
            }
        }
    }
    align, distill = get_recipe("vl2v-adip", changes).stages
    assert {name: spec.weight for name, spec in align.terms.items()} == {
        "cos_img": 0.5,
        "cos_text": 0.5,
    }
    assert {name: spec.weight for name, spec in distill.terms.items()} == {
        "cos_img": 0.7,
        "text_ce": 1,
    }
    assert distill.terms["text_ce"].params == {"tau": 0.1}
    assert (
        get_recipe("vl2v-adip").stages[1].terms["cos_img"].weight == 0.5
    )  # the recipe itself stays as it is


def test_a_mask_brings_its_needs() -> None:
    masked = get_recipe("clip-mse", {"train": {"terms": {"feat_mse": {"mask": "teacher_correct"}}}})
    assert masked.needs == {"embedding", "teacher", "bank", "labels"}


@pytest.mark.parametrize(
    ("name", "overrides", "meant"),
    [
        ("vl2v-adib", None, "vl2v-adip"),
        ("vl2v-adip", {"destill": {}}, "distill"),
        ("vl2v-adip", {"distill": {"terms": {"cos_imgs": 1}}}, "cos_img"),
        ("vl2v-adip", {"distill": {"shares": 1}}, "share"),
        ("vl2v-adip", {"distill": {"terms": {"cos_img": {"wight": 1}}}}, "weight"),
        (
            "vl2v-adip",
            {"distill": {"terms": {"cos_img": {"mask": "teacher_corect"}}}},
            "teacher_correct",
        ),
        (
            "vl2v-adip",
            {"distill": {"terms": {"cos_img": {"confidence": "teacher_confidense"}}}},
            "teacher_confidence",
        ),
        ("kd", {"train": {"terms": {"logit_kd": {"params": {"temprature": 2}}}}}, "temperature"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_closest(
    name: str, overrides: dict[str, Any] | None, meant: str
) -> None:
    assert f'"{meant}"' in refusal(name, overrides).hint


def test_shares_must_add_up_to_one() -> None:
    assert (
        "0.9" in refusal("vl2v-adip", {"align": {"share": 0.1}, "distill": {"share": 0.8}}).message
    )
    refusal("vl2v-adip", {"align": {"share": -0.2}, "distill": {"share": 1.2}})


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("erm", {"train": {"terms": {"cos_img": 0.5}}}),  # a linear head has no embedding
        ("vl2v-adip", {"align": {"terms": {"ce": 0.5}}}),  # a text head has no logits
    ],
)
def test_a_term_whose_needs_the_head_cannot_meet_is_refused(
    name: str, overrides: dict[str, Any]
) -> None:
    refusal(name, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"train": 3},
        {"train": {"terms": 1}},
        {"train": {"share": "most"}},
        {"train": {"terms": {"ce": "much"}}},
        {"train": {"terms": {"ce": {"params": 4}}}},
        {"train": {"terms": {"ce": 0}}},  # nothing left to minimise
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(overrides: dict[str, Any]) -> None:
    refusal("erm", overrides)


def test_the_learning_rate_rises_then_falls_as_half_a_cosine() -> None:
    assert schedule(0.05, 0.1) == pytest.approx(0.5, abs=0.02)
    assert schedule(0.1, 0.1) == pytest.approx(1)
    assert schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == pytest.approx(0)
    assert schedule(0.0, 0.0) == 1
    assert 0 < schedule(0.0, 0.1) < 0.02


def test_for_swad_the_learning_rate_stays_at_the_cosines_mean() -> None:
    parts = [(n + 0.5) / 1000 for n in range(1000)]
    assert schedule(0.05, 0.1, constant=True) == pytest.approx(0.25, abs=0.01)
    assert {schedule(part, 0.1, constant=True) for part in (0.1, 0.5, 1.0)} == {0.5}
    assert schedule(0.0, 0.0, constant=True) == 0.5
    mean = sum(schedule(part, 0.0) for part in parts) / 1000
    assert mean == pytest.approx(0.5, abs=1e-3)


def test_one_number_of_a_term_leaves_its_others_and_what_trains_can_change() -> None:
    changes = {"train": {"terms": {"vlprox": {"params": {"k": 5}}}, "trains": ["projector"]}}
    stage = get_recipe("vlm-ood", changes).stages[0]
    assert stage.terms["vlprox"].params == {"k": 5, "tau": 0.07}
    assert stage.terms["vlprox"].mask == "teacher_correct"
    assert stage.trains == ("projector",)
    for wrong in ([], ["backbones"], "backbone", 3):
        assert "trains" in refusal("vlm-ood", {"train": {"trains": wrong}}).message
