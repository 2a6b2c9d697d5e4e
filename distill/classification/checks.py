"""Check that the settings of a run meet the needs of its recipe."""

from __future__ import annotations

from pathlib import Path

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.sources import is_packed
from edgekd.data.unlabelled import NO_DATA
from edgekd.distill.losses import uses_labels
from edgekd.distill.models.students import TEACHER_ENCODER
from edgekd.distill.recipes import Part, Recipe
from edgekd.distill.text_files import read_vocabulary


def is_toy(config: TrainConfig) -> bool:
    """Return whether a run uses only built-in images."""
    if config.data == NO_DATA:
        return all(source.startswith("toy:") for source in config.unlabelled)
    return config.data == "toy"


def check_teacher(recipe: Recipe, config: TrainConfig) -> None:
    """Refuse the default toy teacher for images other than the toy images."""
    own = not is_toy(config) and (is_packed(config.data) or Path(config.data).expanduser().exists())
    needed = recipe.uses_texts or config.student == TEACHER_ENCODER
    if own and needed and "teacher" not in config.model_fields_set:
        raise EdgekdError(
            f"No teacher is given for {config.data}, and the built-in one is for the toy images only.",
            "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy forces the built-in one.",
        )


def check_recipe(recipe: Recipe, config: TrainConfig) -> None:
    """Refuse a recipe whose needs the configuration does not meet."""
    _check_texts(recipe, config)
    if config.data == NO_DATA:
        _check_label_free(config)
    if config.unlabelled or config.adapt:
        _check_unlabelled(recipe, config)
    _check_student(recipe, config)


def _check_texts(recipe: Recipe, config: TrainConfig) -> None:
    needs = recipe.needs
    if "captions" in needs and config.captions is None:
        raise EdgekdError(
            f"The recipe {recipe.name} has the term caption_nce, but no captions are given.",
            "Give a file: --captions FILE.",
        )
    reads_text = needs & {"bank", "visual_bank", "domain_bank"} or recipe.head == "text"
    if config.descriptions and not reads_text:
        raise EdgekdError(
            f"The recipe {recipe.name} uses no texts, so descriptions have no effect.",
            "Leave them out; in a study give them to one recipe: --recipe-set vlm-ood:descriptions=FILE.",
        )
    if config.vocabulary is not None and config.data != NO_DATA:
        terms = [item for stage in recipe.stages for item in stage.terms.items()]
        labelled = [name for name, spec in terms if uses_labels(name, spec)]
        if labelled:
            raise EdgekdError(
                f"The recipe {recipe.name} uses labels ({labelled[0]}), and a vocabulary has none.",
                "Distil for a vocabulary with --recipe lgd.",
            )
        if not needs & {"bank", "visual_bank"}:
            raise EdgekdError(
                f"No term of the recipe {recipe.name} uses a vocabulary.",
                "Leave it out, or use --recipe lgd.",
            )
        read_vocabulary(config.vocabulary)
    if config.teacher.startswith("embeddings:"):
        if config.online_teacher and "teacher" in needs:
            raise EdgekdError(
                "Precomputed embeddings have no new views.",
                "Leave out --online-teacher, or use a teacher model.",
            )
        for field, what in (("captions", "captions"), ("domain_bank", "texts about the domains")):
            if field in needs:
                raise EdgekdError(
                    f"Precomputed embeddings have no {what}, which {recipe.name} needs.",
                    "Use a teacher model, or drop the term with --set.",
                )


def _check_unlabelled(recipe: Recipe, config: TrainConfig) -> None:
    if config.unlabelled_filter and not recipe.needs & {"teacher", "bank"}:
        raise EdgekdError(
            f"The recipe {recipe.name} has no teacher to filter unlabelled images with.",
            "Leave unlabelled_filter out.",
        )
    if not recipe.takes_unlabelled:
        raise EdgekdError(
            f"Every term of the recipe {recipe.name} needs labels, so unlabelled images have no effect.",
            "Leave out --unlabelled, or use a recipe with a teacher: edgekd list recipes.",
        )


def _check_label_free(config: TrainConfig) -> None:
    if config.vocabulary is None or not config.unlabelled:
        raise EdgekdError(
            "A run without labelled images needs a vocabulary and unlabelled images.",
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
    encoder = config.student == TEACHER_ENCODER
    if encoder and (config.pretrained or config.student_weights or config.student_options):
        raise EdgekdError(
            "The teacher's image encoder as a student always starts from the teacher's weights.",
            "Leave out --pretrained, --student-weights and student_options.",
        )
    if encoder and recipe.head == "learned":
        raise EdgekdError(
            f"The recipe {recipe.name} cannot train the teacher's own image encoder.",
            "Use --recipe vl2v-sd or erm.",
        )
    if config.projector and (recipe.head == "linear" or encoder):
        raise EdgekdError(
            f"{config.student} with {recipe.name} has no projector.",
            "Leave out --projector.",
        )
    has: set[Part] = {"backbone"}
    has |= {"head"} if recipe.head != "text" else set()
    has |= {"projector"} if recipe.head != "linear" and not encoder else set()
    for stage in recipe.stages:
        if stage.share and not has & set(stage.trains):
            raise EdgekdError(
                f"The stage {stage.name} of {recipe.name} trains the {stage.trains[0]}, but this student has none.",
                f"Set the share of the stage to 0 (--set stages.{stage.name}.share=0), or use --recipe vl2v-sd.",
            )
    if config.centre and recipe.head != "text":
        raise EdgekdError(
            f"{recipe.name} has a {recipe.head} head, so it has no embedding to centre.",
            "Leave out --centre.",
        )
    if config.centre and (encoder or "visual_bank" in recipe.needs):
        what = "prototypes" if "visual_bank" in recipe.needs else "student"
        raise EdgekdError(
            f"The {what} of {recipe.name} need the teacher's own space.", "Leave out --centre."
        )
    if config.average == "wise-ft" and not (encoder and recipe.head == "text"):
        raise EdgekdError(
            "WiSE-FT needs a student that starts from the teacher's weights.",
            "Use --student teacher with a recipe with a text head, or --average swad.",
        )
