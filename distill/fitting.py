"""Does the method fit the student, the teacher and the files it is given? Settled and checked before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.unlabelled import NO_DATA
from edgekd.distill.recipes import Part, Recipe, get_recipe
from edgekd.distill.students import TEACHERS_TOWER, timm_name
from edgekd.distill.terms import uses_labels
from edgekd.distill.vocabulary import read_vocabulary


def settle_method(config: TrainConfig) -> dict[str, Any]:
    """The settings that follow from the recipe: the student, its projector, terms for captions, full paths.

    Raises:
        EdgekdError: unknown recipe or student, or a recipe whose needs these settings cannot meet.
    """
    recipe = get_recipe(config.recipe, config.stages)
    chosen: dict[str, Any] = {}
    if recipe.student == "teacher":
        if "student" in config.model_fields_set and config.student != TEACHERS_TOWER:
            raise EdgekdError(
                f"The recipe {recipe.name} trains the teacher's own image tower, not {config.student}.",
                "Leave --student out, or take --recipe vl2v-adip.",
            )
        chosen["student"] = TEACHERS_TOWER
    elif config.student != TEACHERS_TOWER:
        timm_name(config.student)
    tower = (chosen.get("student") or config.student) == TEACHERS_TOWER
    if (
        config.projector is None
        and not tower
        and recipe.head != "linear"
        and recipe.projector != "none"
    ):
        chosen["projector"] = recipe.projector
    for name in ("captions", "vocabulary"):
        if (path := getattr(config, name)) is not None:
            chosen[name] = Path(path).expanduser().absolute()
    if config.descriptions and not config.descriptions.startswith("command:"):
        chosen["descriptions"] = str(Path(config.descriptions).expanduser().absolute())
    if config.captions is not None and "captions" not in recipe.needs:
        chosen["stages"] = _with_term(config.stages, recipe.stages[-1].name, "caption_nce")
        recipe = get_recipe(config.recipe, chosen["stages"])
    check_needs(recipe, config.model_copy(update=chosen))
    return chosen


def check_needs(recipe: Recipe, config: TrainConfig) -> None:
    """Refuse a recipe whose needs the configuration cannot meet."""
    _check_inputs(recipe, config)
    _check_unlabelled(recipe, config)
    _check_student(recipe, config)
    _check_centre(recipe, config)
    _check_average(recipe, config)


def _check_inputs(recipe: Recipe, config: TrainConfig) -> None:
    if "captions" in recipe.needs and config.captions is None:
        raise EdgekdError(
            f"The recipe {recipe.name} has the term caption_nce and no captions.",
            "Give a file: --captions FILE.",
        )
    reads = recipe.needs & {"bank", "visual_bank", "domain_bank"} or recipe.head == "text"
    if config.descriptions and not reads:
        raise EdgekdError(
            f"The recipe {recipe.name} reads no text, so descriptions are of no use.",
            "Leave them out; in a study give them to one recipe: --recipe-set vlm-ood:descriptions=FILE.",
        )
    if config.vocabulary is not None and config.data != NO_DATA:
        labelled = [
            name
            for stage in recipe.stages
            for name, spec in stage.terms.items()
            if uses_labels(name, spec)
        ]
        if labelled:
            raise EdgekdError(
                f"The recipe {recipe.name} uses labels ({labelled[0]}), and a vocabulary other than the classes has "
                "none.",
                "Distil for a vocabulary with --recipe lgd.",
            )
        if not recipe.needs & {"bank", "visual_bank"}:
            raise EdgekdError(
                f"No term of the recipe {recipe.name} looks at a vocabulary.",
                "Leave it out, or take --recipe lgd.",
            )
        read_vocabulary(config.vocabulary)
    if config.teacher.startswith("embeddings:"):
        if config.online_teacher and "teacher" in recipe.needs:
            raise EdgekdError(
                "Precomputed embeddings cannot be asked for new views.",
                "Leave --online-teacher out, or name a real teacher.",
            )
        for field, what in (("captions", "captions"), ("domain_bank", "texts about the domains")):
            if field in recipe.needs:
                raise EdgekdError(
                    f"Precomputed embeddings cannot be asked about {what}, which {recipe.name} needs.",
                    "Name a real teacher, or drop the term with --set.",
                )


def _check_unlabelled(recipe: Recipe, config: TrainConfig) -> None:
    if config.data == NO_DATA:
        _check_label_free(config)
    if not (config.unlabelled or config.adapt):
        return
    if config.unlabelled_filter and not recipe.needs & {"teacher", "bank"}:
        raise EdgekdError(
            f"The recipe {recipe.name} has no teacher to filter unlabelled images with.",
            "Leave unlabelled_filter out.",
        )
    if not recipe.takes_unlabelled:
        raise EdgekdError(
            f"Every term of the recipe {recipe.name} needs labels, so unlabelled images are of no use.",
            "Leave --unlabelled out, or take a recipe that reads the teacher: edgekd list recipes.",
        )


def _check_label_free(config: TrainConfig) -> None:
    if config.vocabulary is None or not config.unlabelled:
        raise EdgekdError(
            "A run without labelled images needs names and unlabelled images.",
            "Give --vocabulary FILE and --unlabelled DIR.",
        )
    read_vocabulary(config.vocabulary)
    for name, is_set in {
        "--select best": config.select == "best",
        "--average swad": config.average == "swad",
        "--eval-every": config.eval_every is not None,
        "--unlabelled-filter": config.unlabelled_filter,
    }.items():
        if is_set:
            raise EdgekdError(
                f"{name} needs labelled validation images, and there are none.",
                "Leave it out, or give labelled images with --data.",
            )


def _check_student(recipe: Recipe, config: TrainConfig) -> None:
    tower = config.student == TEACHERS_TOWER
    if tower and (config.pretrained or config.student_weights or config.student_options):
        raise EdgekdError(
            "The teacher's own image tower starts from the teacher's weights and takes no others.",
            "Leave --pretrained, --student-weights and student_options out.",
        )
    if tower and recipe.head == "learned":
        raise EdgekdError(
            f"The recipe {recipe.name} cannot train the teacher's own image tower.",
            "Use --recipe vl2v-sd or erm.",
        )
    if config.projector and (recipe.head == "linear" or tower):
        raise EdgekdError(
            f"There is no projector to choose: {config.student} with {recipe.name} has none.",
            "Leave projector out.",
        )
    has: set[Part] = {"backbone"}
    if recipe.head != "text":
        has.add("head")
    if recipe.head != "linear" and not tower:
        has.add("projector")
    for stage in recipe.stages:
        if stage.share and not has & set(stage.trains):
            raise EdgekdError(
                f"The stage {stage.name} of {recipe.name} trains the {stage.trains[0]}, and this student has none.",
                f"Give it no share and the next one all: --set stages.{stage.name}.share=0, or take --recipe vl2v-sd.",
            )


def _check_centre(recipe: Recipe, config: TrainConfig) -> None:
    if config.centre and recipe.head != "text":
        raise EdgekdError(
            f"{recipe.name} has a {recipe.head} head, so there is no embedding to centre.",
            "Leave centre out.",
        )
    if config.centre and ("visual_bank" in recipe.needs or config.student == TEACHERS_TOWER):
        what = "prototypes" if "visual_bank" in recipe.needs else "student"
        raise EdgekdError(
            f"The {what} of {recipe.name} live in the teacher's own space.", "Leave centre out."
        )


def _check_average(recipe: Recipe, config: TrainConfig) -> None:
    if config.average == "wise-ft" and (config.student != TEACHERS_TOWER or recipe.head != "text"):
        raise EdgekdError(
            "WiSE-FT mixes fine-tuned weights with CLIP's own, and this student does not start from them.",
            "Use --student teacher with a recipe that predicts with the text head, or --average swad.",
        )


def _with_term(stages: dict[str, Any], stage: str, term: str) -> dict[str, Any]:
    copy = json.loads(json.dumps(stages))
    copy.setdefault(stage, {}).setdefault("terms", {})[term] = 1.0
    return dict(copy)
