"""What a run will do, settled before anything is computed: every open choice made, every need checked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgekd.configs.train import TrainConfig, read_config
from edgekd.core.console import is_main_process, say, shell_word
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_json
from edgekd.core.folders import RUN, clear, free_name, growing
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import Split, read_split
from edgekd.data.subsets import check_unseen, run_images, run_split
from edgekd.data.unlabelled import NO_DATA, label_free, with_unlabelled
from edgekd.distill.descriptions import DESCRIPTIONS_FILE, Descriptions
from edgekd.distill.fetch import from_weights_dir
from edgekd.distill.fitting import settle_method
from edgekd.distill.launch import precision_of
from edgekd.distill.recipes import get_recipe
from edgekd.distill.start import settle_start, split_after
from edgekd.distill.students import TEACHERS_TOWER, timm_name, toy_weights
from edgekd.distill.vocabulary import read_vocabulary

TOY_SIZE = 48
TOY_STEPS = 150
SMOKE_STEPS = 4
DEFAULT_EPOCHS = 20.0


def settle(config: TrainConfig) -> TrainConfig:
    """Fill every `None` that does not depend on the images, or take the settings of the run to resume.

    Raises:
        EdgekdError: unknown names, nothing to resume; before any work is done.
    """
    if config.resume:
        out = config.out or _newest_unfinished()
        if (out / "run.json").exists():
            raise EdgekdError(
                f"The run at {out} is finished.", "Export it: edgekd export " + shell_word(out)
            )
        if not (out / "config.json").is_file():
            raise EdgekdError(f"There is no run to resume at {out}.", "Check --out.")
        stored = read_config(out / "config.json")
        say(f"resuming {out} with the settings it was started with")
        return stored.model_copy(update={"out": out, "resume": True})
    chosen: dict[str, object] = settle_start(config)
    if "data" not in config.model_fields_set and config.vocabulary and config.unlabelled:
        chosen["data"] = NO_DATA
    config = config.model_copy(update=chosen)
    chosen |= settle_method(config)
    config = config.model_copy(update=chosen)
    chosen |= from_weights_dir(config, toy=is_toy(config))
    config = config.model_copy(update=chosen)
    toy, tower = is_toy(config), config.student == TEACHERS_TOWER
    _check_teacher(config)
    chosen |= {"data": _absolute(config.data), "teacher": _absolute(config.teacher)}
    chosen["unlabelled"] = tuple(_absolute(source) for source in config.unlabelled)
    if config.student_weights is not None:
        chosen["student_weights"] = config.student_weights.expanduser().absolute()
    start = config.pretrained
    if start is None and not tower:
        start = "hub" if not toy else "toy" if toy_weights(config.student) else "scratch"
    chosen["pretrained"] = start
    if config.augment is None:
        unlabelled = bool(config.unlabelled or config.adapt)
        chosen["augment"] = "plain" if unlabelled else get_recipe(config.recipe).augment
    if config.size is None and toy and not tower:
        chosen["size"] = TOY_SIZE
    if toy and config.prompts is None and get_recipe(config.recipe).prompts == "photo":
        chosen["prompts"] = "domain"  # the toy teacher knows its styles by name
    from_scratch = config.student_weights is None and config.start is None and start == "scratch"
    if config.bn is None:
        chosen["bn"] = "train" if from_scratch else "frozen"
    if config.lr is None:
        chosen["lr"] = 2e-3 if from_scratch else 1e-3 if toy else 3e-4
    chosen["precision"] = precision_of(config)
    if config.smoke:
        chosen |= {
            "steps": SMOKE_STEPS,
            "epochs": None,
            "batch_size": min(config.batch_size, 16),
            "views": 1,
        }
    elif config.steps is None and config.epochs is None:
        chosen |= {"steps": TOY_STEPS} if toy else {"epochs": DEFAULT_EPOCHS}
    if config.out is None:
        chosen["out"] = free_name(
            Path("runs") / f"{config.student}-{config.recipe}-{Path(config.data).name}"
        )
    if from_scratch:
        reason = (
            "no pretrained one is shipped for the toy data"
            if config.pretrained is None
            else "as you asked"
        )
        say(f"student: {timm_name(config.student)} from random weights ({reason})")
    return config.model_copy(update=chosen)


def uses_teacher(config: TrainConfig) -> bool:
    """Whether the run needs a teacher at all."""
    recipe = get_recipe(config.recipe, config.stages)
    texts = bool(recipe.needs & {"teacher", "bank"}) or recipe.head == "text"
    return texts or config.student == TEACHERS_TOWER


def _check_teacher(config: TrainConfig) -> None:
    """Refuse the toy teacher, which knows the toy shapes alone, for other images unless it was named."""
    own = not is_toy(config) and config.data is not None and Path(config.data).expanduser().exists()
    if own and "teacher" not in config.model_fields_set and uses_teacher(config):
        raise EdgekdError(
            f"No teacher was named for {config.data}, and the built-in one knows the toy images alone.",
            "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy insists on the built-in one.",
        )


def is_toy(config: TrainConfig) -> bool:
    """Whether a run has built-in images alone."""
    if config.data == NO_DATA:
        return all(source.startswith("toy:") for source in config.unlabelled)
    return config.data == "toy"


def _absolute(spec: str) -> str:
    """A spec that names a file or folder, with its full path, so that the run can be used from another directory."""
    kind, colon, path = spec.rpartition(":")
    if kind in ("local-dir", "embeddings") or (not colon and spec != "toy"):
        return (
            f"{kind}{colon}{Path(path).expanduser().absolute()}"
            if colon or Path(spec).exists()
            else spec
        )
    return spec


def load_data(config: TrainConfig) -> tuple[ImageSet, Split]:
    """Load the images of a run.

    Returns:
        The labelled images with the unlabelled ones behind them, and the split, read back when a run is resumed.
    """
    assert config.out is not None
    path = config.out / "split.json"
    if config.data == NO_DATA:
        assert config.vocabulary is not None
        names = read_vocabulary(config.vocabulary)
        before = path if config.resume and path.exists() else None
        return label_free(
            config.unlabelled, names, config.unlabelled_images, config.split_seed, before
        )
    images = load_images(config.data)
    check_unseen(config, images)
    images = run_images(images, config)
    resumed = config.resume and path.exists()
    split = read_split(path, images) if resumed else run_split(config, images)
    if config.unlabelled or config.adapt:
        images, split = with_unlabelled(
            images, split, config.unlabelled, config.unlabelled_images, config.adapt
        )
    if config.start is not None and not resumed:
        split = split_after(config.start, split)
    return images, split


@contextlib.contextmanager
def claimed(config: TrainConfig) -> Iterator[None]:
    """Hold the run's folder from before the work until its end; the other processes of a launch claim nothing.

    Raises:
        EdgekdError: another training writes there, or an existing folder without `overwrite`.
    """
    assert config.out is not None
    if not is_main_process():
        yield
        return
    with growing(config.out, RUN, overwrite=config.overwrite, resume=config.resume):
        yield


def begin_folder(
    config: TrainConfig, split: Split, descriptions: Descriptions | None = None
) -> None:
    """Write the run's configuration, split and class descriptions into its folder; process 0 only.

    Called when data, teacher and student are in hand, so that `overwrite` removes nothing for a run that cannot start.
    """
    assert config.out is not None
    if not config.resume:
        clear(config.out, RUN, marker=False)
        settings = config.model_dump(mode="json", exclude={"resume", "overwrite", "out", "plan"})
        write_json(config.out / "config.json", settings)
    if not (config.out / "split.json").exists():
        split.write(config.out / "split.json")
    if descriptions is not None and not (config.out / DESCRIPTIONS_FILE).exists():
        write_json(
            config.out / DESCRIPTIONS_FILE,
            {name: list(told) for name, told in descriptions.items()},
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
        raise EdgekdError(
            f"There is no finished run under {root}/.", "Train one first: edgekd train."
        )
    return finished[-1].parent


def _newest_unfinished(root: Path = Path("runs")) -> Path:
    started = [
        path.parent
        for path in root.glob("*/config.json")
        if not (path.parent / "run.json").exists()
    ]
    if not started:
        raise EdgekdError(
            f"There is no unfinished run under {root}/.", "Name it: --resume --out FOLDER."
        )
    return max(started, key=os.path.getmtime)
