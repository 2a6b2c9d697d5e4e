"""Recipes as data: stages with loss terms, weights, trained parts and learning rates.

A recipe does not depend on student, data or hardware. Every number can be changed on the command line, for example
`--set stages.distill.terms.cos_img.weight=0.7` or `--set stages.align.share=0.1`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from edgekd.core.errors import EdgekdError, check_known
from edgekd.distill.losses import CONFIDENCES, MASKS, TERMS, TermSpec, needs, uses_labels

Part = Literal["backbone", "projector", "head"]


@dataclass(frozen=True)
class Stage:
    """One phase of training.

    `share` is the stage's fraction of the run's steps, so that every recipe takes the same number of steps. `lr` is a
    factor on the run's learning rate. Parts that are not in `trains` are frozen.
    """

    name: str
    share: float
    terms: Mapping[str, TermSpec]
    trains: tuple[Part, ...]
    lr: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A named list of stages with a head.

    A `text` head scores with the teacher's text vectors. A `linear` head is a classifier on the features. A `learned`
    head has trained class vectors in the teacher's space, initialised with the text vectors.
    """

    name: str
    summary: str
    source: str
    head: Literal["text", "linear", "learned"]
    stages: tuple[Stage, ...]
    prompts: str = "photo"
    """Prompt templates unless `--prompts` is given."""
    projector: Literal["linear", "mlp", "mlp-gelu", "none"] = "linear"
    """Layers from the student's features into the teacher's space."""
    student: Literal["any", "teacher"] = "any"
    """`teacher`: the student is the teacher's own image encoder."""
    momentum: float = 0.999
    """Momentum of the visual bank, if a term uses one."""
    augment: Literal["plain", "restyle"] = "plain"
    """Augmentation unless `--augment` is given; plain with unlabelled images."""
    balance: Literal["domains", "classes"] = "domains"
    """Balance of the batches unless `--balance` is given; domains with unlabelled images."""
    centre: bool = False
    """Whether anisotropic teacher embeddings are mean-centred (`TextBank.head`)."""

    @property
    def takes_unlabelled(self) -> bool:
        """Return whether a term counts images without a label."""
        terms = [item for stage in self.stages for item in stage.terms.items()]
        return not all(uses_labels(name, spec) for name, spec in terms)

    @property
    def needs(self) -> frozenset[str]:
        """Return the batch fields that the stages need."""
        return frozenset().union(*(needs(stage.terms) for stage in self.stages))

    @property
    def uses_texts(self) -> bool:
        """Return whether a term or the head needs a teacher and its text bank."""
        return bool(self.needs & {"teacher", "bank"}) or self.head == "text"

    def spans(self, steps: int) -> list[tuple[Stage, range]]:
        """Return each stage with its range of steps in a run of `steps`."""
        shares = [0.0, *(stage.share for stage in self.stages)]
        edges = [int(edge) for edge in np.rint(np.cumsum(shares) * steps)]
        return [(stage, range(*edges[i : i + 2])) for i, stage in enumerate(self.stages)]


_BODY: tuple[Part, ...] = ("backbone", "projector")
_LINEAR: tuple[Part, ...] = ("backbone", "head")
_ALL: tuple[Part, ...] = ("backbone", "projector", "head")
_CE = {"ce": TermSpec(1.0)}
_MSE = {"feat_mse": TermSpec(1.0)}
_VL2V = {"cos_img": TermSpec(0.5), "cos_text": TermSpec(0.5)}
_TEXT_CE = {"text_ce": TermSpec(1.0, {"tau": 0.07})}
_LGD = TermSpec(0.5, {"tau_student": 0.2, "tau_teacher": 0.01})
_RISE = {
    "logit_kd": TermSpec(0.8, {"temperature": 3.0}),
    "ce": TermSpec(0.2),
    "cos_text": TermSpec(1.0),
}


def _whole(trains: tuple[Part, ...], **terms: TermSpec) -> tuple[Stage, ...]:
    """Return the single stage of a recipe."""
    return (Stage("train", 1.0, terms, trains),)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "erm",
            "labels only: fine-tune with cross-entropy, the baseline",
            "Vapnik 1998; DomainBed (Gulrajani and Lopez-Paz 2021)",
            "linear",
            _whole(_LINEAR, **_CE),
        ),
        Recipe(
            "kd",
            "labels plus the teacher's zero-shot probabilities",
            "Hinton et al. 2015, KL on log-probabilities times T²",
            "linear",
            _whole(_LINEAR, ce=TermSpec(0.5), logit_kd=TermSpec(0.5, {"temperature": 4.0})),
        ),
        Recipe(
            "clip-mse",
            "no labels: regress the teacher's raw image embedding",
            "NVIDIA-AI-IOT/clip-distillation 2023",
            "text",
            (
                Stage("align", 0.3, _MSE, ("projector",), lr=10.0),
                Stage("train", 0.7, _MSE, _BODY),
            ),
        ),
        Recipe(
            "vl2v-adip",
            "align a projector, distil image and text embeddings, predict with the text head",
            "Addepalli et al., CVPR 2024 (λ = 0.5)",
            "text",
            (
                Stage("align", 0.3, _VL2V, ("projector",), lr=10.0),
                Stage("distill", 0.7, _VL2V, ("backbone",)),
            ),
            centre=True,
        ),
        Recipe(
            "vl2v-sd",
            "self-distillation: fine-tune the teacher's image encoder towards its text and original image embeddings",
            "Addepalli et al., CVPR 2024 (λ = 0.5, one stage)",
            "text",
            (Stage("distill", 1.0, _VL2V, ("backbone",), lr=0.2),),
            projector="none",
            student="teacher",
        ),
        Recipe(
            "text-ce",
            "labels through the text bank only: vlm-ood without its two distillation terms",
            "Li et al., ICCV 2023 (L_cls, the first row of their tables; τ = 0.07)",
            "text",
            _whole(_BODY, **_TEXT_CE),
        ),
        Recipe(
            "vlm-ood",
            "classify with the text bank, match the teacher's image embeddings and its distribution over near texts",
            "Li et al., ICCV 2023 (all weights 1, τ = 0.07, k = 256)",
            "text",
            _whole(
                _BODY,
                **_TEXT_CE,
                im_nce=TermSpec(1.0, {"tau": 0.07}),
                vlprox=TermSpec(1.0, {"k": 256, "tau": 0.07}, mask="teacher_correct"),
            ),
            centre=True,
        ),
        Recipe(
            "lgd",
            "no labels: the teacher's distributions over a vocabulary's texts and over their visual prototypes",
            "Li et al., T-MM 2024 (½ + ½, τ_S = 0.2, τ_T = 0.01, μ = 0.999)",
            "text",
            _whole(_BODY, text_soft_ce=_LGD, visual_soft_ce=_LGD),
            prompts="imagenet80",
            projector="mlp",
        ),
        Recipe(
            "lp-ft",
            "labels only: first a linear probe, then fine-tuning of all weights",
            "Kumar et al., ICLR 2022",
            "linear",
            (
                Stage("probe", 0.3, _CE, ("head",), lr=10.0),
                Stage("finetune", 0.7, _CE, _LINEAR),
            ),
        ),
        Recipe(
            "pseudo-label",
            "labels, and the student's own confident predictions on all images: self-training without a teacher",
            "Lee 2013; threshold 0.95 as in FixMatch (Sohn et al. 2020)",
            "linear",
            _whole(_LINEAR, **_CE, pseudo_ce=TermSpec(1.0, {"threshold": 0.95})),
        ),
        Recipe(
            "rise",
            "labels and the teacher's probabilities on class vectors initialised from texts, tied to text and domains",
            "Huang et al., ICCV 2023 (w1 = 0.8, w2 = 0.2, w3 = 1, T = 3)",
            "learned",
            _whole(_ALL, **_RISE, domain_rel=TermSpec(1.0)),
            prompts="imagenet7",
        ),
        Recipe(
            "edgekd",
            "labels, and the teacher's probabilities, texts and image embeddings, on restyled or unlabelled images",
            "ours: terms of RISE (Huang et al., ICCV 2023) and cos_img of VL2V (Addepalli et al., CVPR 2024)",
            "learned",
            _whole(_ALL, **_RISE, cos_img=TermSpec(1.0)),
            prompts="imagenet7",
            augment="restyle",
            balance="classes",
        ),
    )
}
DEFAULT_RECIPE = "edgekd"
_FIELDS = {"text": {"embedding"}, "linear": {"logits"}, "learned": {"embedding", "logits"}}
"""Batch fields that depend on the head; the others are available to every recipe."""
_OTHERS = {"labels", "teacher", "bank", "visual_bank", "domain_bank", "captions"}


def get_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by name, with its numbers replaced by `overrides[stage][field]`.

    An unknown recipe, stage, field, term, mask or confidence, and shares that do not add up to 1, are an `EdgekdError`.
    """
    _check_known("There is no recipe", [name], RECIPES, " See: edgekd list recipes.")
    recipe = RECIPES[name]
    stages = {stage.name: stage for stage in recipe.stages}
    for stage_name, changes in (overrides or {}).items():
        _check_known(f"The recipe {name} has no stage", [stage_name], stages)
        stages[stage_name] = _changed(stages[stage_name], changes)
    recipe = dataclasses.replace(recipe, stages=tuple(stages.values()))
    total = sum(stage.share for stage in recipe.stages)
    if abs(total - 1) > 1e-6 or any(stage.share < 0 for stage in recipe.stages):
        raise EdgekdError(
            f"The shares of the stages of {name} add up to {total:g}, not 1.",
            "Set the shares so that they add up to 1.",
        )
    provided = _OTHERS | _FIELDS[recipe.head]
    for stage in recipe.stages:
        for term, spec in stage.terms.items():
            if lacking := needs({term: spec}) - provided:
                raise EdgekdError(
                    f"The stage {stage.name} of {name} cannot have the term {term}: a {recipe.head} head has no "
                    f"{min(lacking)}.",
                    "Leave the term out, or take a recipe with another head.",
                )
        if not stage.terms:
            raise EdgekdError(
                f"The stage {stage.name} of {name} has no term left.",
                "Give a term a weight other than 0.",
            )
    return recipe


def _changed(stage: Stage, changes: Any) -> Stage:
    what = f"stage {stage.name}"
    changes = _table(changes, what, ("share", "lr", "terms", "trains"))
    terms = dict(stage.terms)
    for term, fields in _table(changes.get("terms", {}), f"{what}'s terms").items():
        _check_known("There is no loss term", [term], TERMS)
        terms[term] = _changed_term(term, terms.get(term, TermSpec(0.0)), fields)
    trains = changes.get("trains", stage.trains)
    parts = get_args(Part)
    if not isinstance(trains, (list, tuple)) or not trains or not set(trains) <= set(parts):
        raise EdgekdError(
            f"{stage.name}.trains is {trains!r}.",
            f'Write a list of {", ".join(parts)}: ["backbone"].',
        )
    return dataclasses.replace(
        stage,
        terms={term: spec for term, spec in terms.items() if spec.weight},
        share=_number(changes.get("share", stage.share), f"{stage.name}.share"),
        lr=_number(changes.get("lr", stage.lr), f"{stage.name}.lr"),
        trains=tuple(trains),
    )


def _changed_term(term: str, before: TermSpec, fields: Any) -> TermSpec:
    fields = fields if isinstance(fields, Mapping) else {"weight": fields}
    fields = _table(fields, f"term {term}", ("weight", "params", "mask", "confidence"))
    for field, known in (("mask", MASKS), ("confidence", CONFIDENCES)):
        if fields.get(field):
            _check_known(f"There is no {field}", [fields[field]], known)
    names = tuple(inspect.signature(TERMS[term].function).parameters)[1:]
    params = _table(fields.get("params", {}), f"term {term}", names)
    weight = _number(fields.get("weight", before.weight), f"{term}.weight")
    changed = {**fields, "weight": weight, "params": {**before.params, **params}}
    return dataclasses.replace(before, **changed)


def _table(value: Any, what: str, fields: Collection[str] | None = None) -> Mapping[str, Any]:
    """Check that `value` is a table with these fields."""
    if not isinstance(value, Mapping):
        raise EdgekdError(
            f"A {what} is a table, not {value!r}.", "Write --set stages.STAGE.FIELD=VALUE."
        )
    if fields is not None:
        _check_known(f"A {what} has no", value, fields)
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EdgekdError(
            f"{what} is a number, not {value!r}.", "Write --set stages.STAGE.FIELD=NUMBER."
        )
    return float(value)


def _check_known(what: str, names: Iterable[Any], known: Collection[str], more: str = "") -> None:
    for name in names:
        check_known(str(name), known, f'{what} "{name}".', more)
