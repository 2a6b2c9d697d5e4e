"""What a recipe needs of the settings of a run, checked before any work."""

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
    """Return whether a run has built-in images alone."""
    if config.data == NO_DATA:
        return all(source.startswith("toy:") for source in config.unlabelled)
    return config.data == "toy"


def check_teacher(recipe: Recipe, config: TrainConfig) -> None:
    """Refuse the toy teacher, which is for the toy shapes alone, for other images unless it was named."""
    own = not is_toy(config) and (is_packed(config.data) or Path(config.data).expanduser().exists())
    needed = recipe.uses_texts or config.student == TEACHER_ENCODER
    if own and needed and "teacher" not in config.model_fields_set:
        raise EdgekdError(
            f"No teacher was named for {config.data}, and the built-in one is for the toy images alone.",
            "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy forces the built-in one.",
        )


def check_recipe(recipe: Recipe, config: TrainConfig) -> None:
    """Refuse a recipe whose needs the configuration cannot meet."""
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
            f"The recipe {recipe.name} has the term caption_nce and no captions.",
            "Give a file: --captions FILE.",
        )
    reads_text = needs & {"bank", "visual_bank", "domain_bank"} or recipe.head == "text"
    if config.descriptions and not reads_text:
        raise EdgekdError(
            f"The recipe {recipe.name} reads no text, so descriptions are of no use.",
            "Leave them out; in a study give them to one recipe: --recipe-set vlm-ood:descriptions=FILE.",
        )
    if config.vocabulary is not None and config.data != NO_DATA:
        terms = [item for stage in recipe.stages for item in stage.terms.items()]
        labelled = [name for name, spec in terms if uses_labels(name, spec)]
        if labelled:
            raise EdgekdError(
                f"The recipe {recipe.name} uses labels ({labelled[0]}), and a vocabulary other than the classes has "
                "none.",
                "Distil for a vocabulary with --recipe lgd.",
            )
        if not needs & {"bank", "visual_bank"}:
            raise EdgekdError(
                f"No term of the recipe {recipe.name} reads a vocabulary.",
                "Leave it out, or take --recipe lgd.",
            )
        read_vocabulary(config.vocabulary)
    if config.teacher.startswith("embeddings:"):
        if config.online_teacher and "teacher" in needs:
            raise EdgekdError(
                "Precomputed embeddings hold no new views.",
                "Leave --online-teacher out, or name a real teacher.",
            )
        for field, what in (("captions", "captions"), ("domain_bank", "texts about the domains")):
            if field in needs:
                raise EdgekdError(
                    f"Precomputed embeddings hold no {what}, which {recipe.name} needs.",
                    "Name a real teacher, or drop the term with --set.",
                )


def _check_unlabelled(recipe: Recipe, config: TrainConfig) -> None:
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
    encoder = config.student == TEACHER_ENCODER
    if encoder and (config.pretrained or config.student_weights or config.student_options):
        raise EdgekdError(
            "The teacher's own image encoder starts from the teacher's weights and takes no others.",
            "Leave --pretrained, --student-weights and student_options out.",
        )
    if encoder and recipe.head == "learned":
        raise EdgekdError(
            f"The recipe {recipe.name} cannot train the teacher's own image encoder.",
            "Use --recipe vl2v-sd or erm.",
        )
    if config.projector and (recipe.head == "linear" or encoder):
        raise EdgekdError(
            f"There is no projector to choose: {config.student} with {recipe.name} has none.",
            "Leave projector out.",
        )
    has: set[Part] = {"backbone"}
    has |= {"head"} if recipe.head != "text" else set()
    has |= {"projector"} if recipe.head != "linear" and not encoder else set()
    for stage in recipe.stages:
        if stage.share and not has & set(stage.trains):
            raise EdgekdError(
                f"The stage {stage.name} of {recipe.name} trains the {stage.trains[0]}, and this student has none.",
                f"Give it no share and the next one all: --set stages.{stage.name}.share=0, or take --recipe vl2v-sd.",
            )
    if config.centre and recipe.head != "text":
        raise EdgekdError(
            f"{recipe.name} has a {recipe.head} head, so there is no embedding to centre.",
            "Leave centre out.",
        )
    if config.centre and (encoder or "visual_bank" in recipe.needs):
        what = "prototypes" if "visual_bank" in recipe.needs else "student"
        raise EdgekdError(
            f"The {what} of {recipe.name} live in the teacher's own space.", "Leave centre out."
        )
    if config.average == "wise-ft" and not (encoder and recipe.head == "text"):
        raise EdgekdError(
            "WiSE-FT mixes fine-tuned weights with CLIP's own, and this student does not start from them.",
            "Use --student teacher with a recipe that predicts with the text head, or --average swad.",
        )
