"""Resolve the settings of a run before training: fill in defaults and check the recipe."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import is_model_in_modules

from edgekd.configs.train import TrainConfig, read_config
from edgekd.core.console import say, shell_word
from edgekd.core.errors import EdgekdError
from edgekd.core.folders import free_name
from edgekd.core.manifest import read_run
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.sources import absolute, is_packed
from edgekd.data.split import Split, read_split, read_stored_split
from edgekd.data.subsets import check_unseen, run_images, run_split
from edgekd.data.unlabelled import NO_DATA, label_free, with_unlabelled
from edgekd.distill.classification.checks import check_recipe, check_teacher, is_toy
from edgekd.distill.launch import precision_of
from edgekd.distill.loggers import check_loggers, own_loggers
from edgekd.distill.models.fetch import from_weights_dir
from edgekd.distill.models.students import TEACHER_ENCODER, timm_name, toy_weights
from edgekd.distill.recipes import get_recipe
from edgekd.distill.text_bank import readable
from edgekd.distill.text_files import read_vocabulary

TOY_SIZE = 48
TOY_STEPS = 500
TOY_BATCH = 32
SMOKE_STEPS = 4
DEFAULT_EPOCHS = 40.0


def settle(config: TrainConfig) -> TrainConfig:
    """Fill in every `None` that does not depend on the images, or read the settings of the run to resume.

    Unknown names, a recipe whose needs are not met, and nothing to resume are an `EdgekdError`, before any work.
    """
    if config.resume:
        return _resumed(config)
    check_loggers(config.logger)
    if config.patience:
        config = config.model_copy(update={"select": "best"})
    if config.start is not None:
        config = _started_from(config, config.start.expanduser().absolute())
    if "data" not in config.model_fields_set and config.vocabulary and config.unlabelled:
        config = config.model_copy(update={"data": NO_DATA})
    config = _with_recipe(config)
    recipe = get_recipe(config.recipe, config.stages)
    check_recipe(recipe, config)
    config = config.model_copy(update=from_weights_dir(config, toy=is_toy(config)))
    check_teacher(recipe, config)
    toy, encoder = is_toy(config), config.student == TEACHER_ENCODER
    pretrained = config.pretrained
    if pretrained is None and not encoder:
        pretrained = "hub" if not toy else "toy" if toy_weights(config.student) else "scratch"
    random = config.student_weights is None and config.start is None and pretrained == "scratch"
    if random:
        shipped = "no pretrained weights are shipped for the toy data"
        reason = shipped if config.pretrained is None else "as requested"
        say(f"student: {timm_name(config.student)} from random weights ({reason})")
    unlabelled = bool(config.unlabelled or config.adapt)
    chosen: dict[str, Any] = {
        "data": _absolute(config.data),
        "teacher": _absolute(config.teacher),
        "unlabelled": tuple(map(_absolute, config.unlabelled)),
        "pretrained": pretrained,
        "augment": config.augment or ("plain" if unlabelled else recipe.augment),
        "balance": config.balance or ("domains" if unlabelled else recipe.balance),
        "bn": config.bn or ("train" if random else "frozen"),
        "lr": config.lr or (_scratch_lr(config.student) if random or toy else 3e-4),
        "precision": precision_of(config),
        "out": config.out
        or free_name(Path("runs") / f"{config.student}-{config.recipe}-{_short(config.data)}"),
    }
    if config.size is None and toy and not encoder:
        chosen["size"] = TOY_SIZE
    if toy and "batch_size" not in config.model_fields_set:
        chosen["batch_size"] = TOY_BATCH
    if toy and config.prompts is None and recipe.prompts == "photo":
        chosen["prompts"] = "domain"  # the toy teacher was trained with the names of its styles
    if config.smoke:
        batch = min(config.batch_size, 16)
        chosen |= {"steps": SMOKE_STEPS, "epochs": None, "batch_size": batch, "views": 1}
    elif config.steps is None and config.epochs is None:
        chosen |= {"steps": TOY_STEPS} if toy else {"epochs": DEFAULT_EPOCHS}
    return config.model_copy(update=chosen)


def _scratch_lr(student: str) -> float:
    """Return the learning rate for random weights: plain vision transformers need a lower one.

    docs/measurements.md has the comparison.
    """
    if student == TEACHER_ENCODER:
        return 2e-3
    vit = is_model_in_modules(timm_name(student), {"vision_transformer", "deit"})
    return 5e-4 if vit else 2e-3


def _resumed(config: TrainConfig) -> TrainConfig:
    out = config.out or _newest_unfinished()
    if (out / "run.json").exists():
        raise EdgekdError(
            f"The run at {out} is finished.", "Export it: edgekd export " + shell_word(out)
        )
    if not (out / "config.json").is_file():
        raise EdgekdError(f"There is no run to resume at {out}.", "Check --out.")
    stored = read_config(out / "config.json")
    say(f"resuming {out} with its original settings")
    # The global batches do not depend on the number of processes.
    here = {
        name: getattr(config, name) for name in {"devices", "accelerator"} & config.model_fields_set
    }
    own = {"out": out, "resume": True, "logger": own_loggers(stored.logger, out)}
    return stored.model_copy(update=own | here)


def _started_from(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the settings of a run that starts from the finished run in `folder`, with its student."""
    read_run(folder)
    before = read_config(folder / "config.json")
    for field in ("student_weights", "pretrained"):
        if getattr(config, field) is not None:
            raise EdgekdError(
                f"The run starts from {folder}, so {field} has no effect.",
                "Leave one of them out.",
            )
    shared: dict[str, Any] = {}
    for field in ("student", "student_options", "size"):
        own, shared[field] = getattr(config, field), getattr(before, field)
        if field in config.model_fields_set and own not in (shared[field], None):
            raise EdgekdError(
                f"The run at {folder} has a different {field} ({shared[field]}), so --start cannot use it.",
                f"Leave out {field}, or start from another run.",
            )
    if "teacher" not in config.model_fields_set:
        shared["teacher"] = before.teacher
    pretrained = None if before.student == TEACHER_ENCODER else "scratch"
    return config.model_copy(update=shared | {"start": folder, "pretrained": pretrained})


def _with_recipe(config: TrainConfig) -> TrainConfig:
    """Return the settings with those of the recipe: student, projector, a term for captions, absolute paths."""
    recipe = get_recipe(config.recipe, config.stages)
    chosen: dict[str, Any] = {}
    student = config.student
    if recipe.student == "teacher":
        if "student" in config.model_fields_set and student != TEACHER_ENCODER:
            raise EdgekdError(
                f"The recipe {recipe.name} trains the teacher's own image encoder, not {student}.",
                "Leave out --student, or use --recipe vl2v-adip.",
            )
        student = chosen["student"] = TEACHER_ENCODER
    elif student != TEACHER_ENCODER:
        timm_name(student)
    projects = student != TEACHER_ENCODER and recipe.head != "linear"
    if config.projector is None and projects and recipe.projector != "none":
        chosen["projector"] = recipe.projector
    for name in ("captions", "vocabulary", "student_weights"):
        if (path := getattr(config, name)) is not None:
            chosen[name] = Path(path).expanduser().absolute()
    if config.descriptions and not config.descriptions.startswith("command:"):
        chosen["descriptions"] = str(Path(config.descriptions).expanduser().absolute())
    if config.captions is not None and "captions" not in recipe.needs:
        stages = copy.deepcopy(config.stages)
        last = stages.setdefault(recipe.stages[-1].name, {})
        last.setdefault("terms", {})["caption_nce"] = 1.0
        chosen["stages"] = stages
    return config.model_copy(update=chosen)


def _short(spec: str) -> str:
    """Return the name of a source for use in a folder name."""
    return re.sub(r"[^\w.-]+", "-", Path(spec).name.removesuffix(".tar")).strip("-") or "data"


def _absolute(spec: str) -> str:
    """Return a spec with an absolute path, so that the run can be used from another directory."""
    if is_packed(spec):
        return absolute(spec)
    kind, colon, path = spec.rpartition(":")
    if kind in ("local-dir", "embeddings"):
        return f"{kind}:{Path(path).expanduser().absolute()}"
    if not colon and spec != "toy" and Path(spec).exists():
        return str(Path(spec).expanduser().absolute())
    return spec


def load_data(config: TrainConfig) -> tuple[ImageSet, Split]:
    """Load the images of a run.

    Returns:
        The labelled images followed by the unlabelled ones, and the split (the stored one when resuming).
    """
    path = config.folder / "split.json"
    resumed = config.resume and path.exists()
    limit = config.unlabelled_images
    if config.data == NO_DATA:
        assert config.vocabulary is not None
        names = read_vocabulary(config.vocabulary)
        before = path if resumed else None
        return label_free(config.unlabelled, names, limit, config.split_seed, before)
    images = load_images(config.data)
    check_unseen(config, images)
    images = run_images(images, config)
    split = read_split(path, images) if resumed else run_split(config, images)
    if config.unlabelled or config.adapt:
        images, split = with_unlabelled(images, split, config.unlabelled, limit, config.adapt)
    if config.start is not None and not resumed:
        split = split_after(config.start, split)
    return images, split


def split_after(folder: Path, split: Split) -> Split:
    """Return the split of a run that starts from the run in `folder`, including the domains seen there.

    It is an `EdgekdError` if that run trained on the domain that is left out, or on test images.
    """
    before = read_stored_split(folder / "split.json")
    trained, domain = before.train_domains or (), split.test_domain
    names = [readable(name).casefold() for name in trained]
    if domain is not None and readable(domain).casefold() in names:
        raise EdgekdError(
            f"The run at {folder} trained on the domain {domain}, so it is not unseen.",
            f"Use the domain that it left out, or none: --test-domain {before.test_domain or 'none'}.",
        )
    roles = [before.roles.get(role, {}) for role in ("before", "unlabelled", "train")]
    seen = {key for role in roles for key in role.values()}
    tested = [key for role in ("id_test", "ood_test") for key in split.entries[role].values()]
    if count := sum(key in seen for key in tested):
        raise EdgekdError(
            f"The run at {folder} trained on {count:,} of the {len(tested):,} test images.",
            f"Use the same split: --split-seed {before.seed}, and the same --test-domain and --adapt.",
        )
    domains = dict.fromkeys((*split.unlabelled_domains, *before.unlabelled_domains))
    return replace(
        split,
        train_domains=tuple(sorted({*split.train_domains, *trained})),
        unlabelled_domains=tuple(domains),
        before={key: key for key in sorted(seen)},  # ids may repeat between runs
    )


def _newest_unfinished() -> Path:
    folders = [path.parent for path in Path("runs").glob("*/config.json")]
    started = [folder for folder in folders if not (folder / "run.json").exists()]
    if not started:
        raise EdgekdError(
            "There is no unfinished run under runs/.", "Give its folder: --resume --out FOLDER."
        )
    return max(started, key=os.path.getmtime)
