"""What a run will do, settled before anything is computed: every open choice made, every need checked, all of it said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgekd.distill.recipes import Recipe, get_recipe
from edgekd.distill.students import timm_name

from edgekd.config import TrainConfig
from edgekd.console import is_main_process, say
from edgekd.data import ImageSet, load_images
from edgekd.errors import EdgekdError
from edgekd.files import read_json, write_json
from edgekd.split import Split, make_split, read_split

TOY_SIZE = 64
TOY_STEPS = 150
SMOKE_STEPS = 4
DEFAULT_EPOCHS = 20.0


def settle(config: TrainConfig) -> TrainConfig:
    """Fill every `None` that does not depend on the images. Raises for unknown names before any work is done."""
    get_recipe(config.recipe, config.stages)
    timm_name(config.student)
    toy = config.data == "toy"
    chosen: dict[str, object] = {}
    if config.pretrained is None:
        chosen["pretrained"] = "scratch" if toy and config.student_weights is None else "hub"
    if config.size is None and toy:
        chosen["size"] = TOY_SIZE
    from_scratch = config.student_weights is None and chosen.get("pretrained", config.pretrained) == "scratch"
    if config.bn is None:
        chosen["bn"] = "train" if from_scratch else "frozen"
    if config.lr is None:
        chosen["lr"] = 2e-3 if from_scratch else 3e-4
    if config.smoke:
        chosen |= {"steps": SMOKE_STEPS, "epochs": None, "batch_size": min(config.batch_size, 16), "views": 1}
    elif config.steps is None and config.epochs is None:
        chosen |= {"steps": TOY_STEPS} if toy else {"epochs": DEFAULT_EPOCHS}
    if config.out is None:
        chosen["out"] = _free_name(Path("runs"), f"{config.student}-{config.recipe}-{Path(config.data).name}")
    if from_scratch:
        reason = "the toy data comes with no pretrained student" if config.pretrained is None else "as you asked"
        say(f"student: {timm_name(config.student)} from random weights ({reason})")
    return config.model_copy(update=chosen)


def claim_folder(config: TrainConfig) -> TrainConfig:
    """Make the run's folder, or find the run to resume in it. Only process 0 touches the disk.

    Returns:
        The configuration to use: when resuming, the one the run was started with.

    Raises:
        EdgekdError: the folder exists and neither `overwrite` nor `resume` was given; nothing to resume.
    """
    assert config.out is not None
    out, stored = config.out, config.out / "config.json"
    if config.resume:
        settings = read_json(stored, "run to resume")
        say(f"resuming {out} with the settings it was started with")
        return TrainConfig.model_validate(settings | {"out": str(out), "resume": True})
    if is_main_process():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not config.overwrite:
                raise EdgekdError(f"{out} exists already.", "Choose another --out, or add --resume or --overwrite.")
            if out.is_dir() and not stored.exists():
                raise EdgekdError(f"{out} is not a run, so it is not overwritten.", "Choose another --out.")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        settings = config.model_dump(mode="json", exclude={"resume", "overwrite", "out"})
        write_json(stored, settings)
    return config


def load_data(config: TrainConfig) -> tuple[ImageSet, Split]:
    """The images and the run's split: read back when the run has one, else made and written down."""
    assert config.out is not None
    images = load_images(config.data)
    path = config.out / "split.json"
    if path.exists():
        return images, read_split(path, images)
    split = make_split(images, test_domain=config.test_domain, seed=config.split_seed)
    if is_main_process():
        split.write(path)
    return images, split


def check_needs(recipe: Recipe, config: TrainConfig) -> None:
    """Refuse a recipe whose needs the configuration cannot meet, before training."""
    if config.online_teacher and config.teacher.startswith("embeddings:") and "teacher" in recipe.needs:
        raise EdgekdError(
            "Precomputed embeddings cannot be asked for new views.",
            "Leave --online-teacher out, or name a real teacher.",
        )


def total_steps(config: TrainConfig, epoch_steps: int) -> int:
    """Optimizer steps of the whole run, all stages together."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * epoch_steps))


def newest_run(root: Path = Path("runs")) -> Path:
    """The most recently finished run under `runs/`."""
    finished = sorted(root.glob("*/run.json"), key=os.path.getmtime)
    if not finished:
        raise EdgekdError(f"There is no finished run under {root}/.", "Train one first: edgekd train.")
    return finished[-1].parent


def _free_name(root: Path, stem: str) -> Path:
    path, number = root / stem, 2
    while path.exists():
        path, number = root / f"{stem}-{number}", number + 1
    return path
