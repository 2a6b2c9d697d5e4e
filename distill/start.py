"""Starting from a finished run: its student goes on learning, with more images or other classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgekd.configs.train import TrainConfig, read_config
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_run
from edgekd.core.readers import read_tensors
from edgekd.data.split import Split, read_stored_split
from edgekd.distill.prompts import readable
from edgekd.distill.students import TEACHERS_TOWER, Student

_SHARED = ("student", "student_options", "size")
"""Settings that both runs have in common; those left out are taken from the run to start from."""


def settle_start(config: TrainConfig) -> dict[str, Any]:
    """The settings that follow from `start`: an absolute path, and the student as the other run has it.

    Raises:
        EdgekdError: no finished run there, other weights to start from, or a student that is not the same.
    """
    if config.start is None:
        return {}
    folder = config.start.expanduser().absolute()
    read_run(folder)
    before = read_config(folder / "config.json")
    for field in ("student_weights", "pretrained"):
        if getattr(config, field) is not None:
            raise EdgekdError(
                f"The run starts from {folder}, so {field} has nothing to say.",
                "Leave one of them out.",
            )
    for field in _SHARED:
        own, other = getattr(config, field), getattr(before, field)
        if field in config.model_fields_set and own not in (other, None):
            raise EdgekdError(
                f"The run at {folder} has another {field} ({other}), so it cannot be started from.",
                f"Leave {field} out, or start from another run.",
            )
    shared = {field: getattr(before, field) for field in _SHARED}
    if "teacher" not in config.model_fields_set:
        shared["teacher"] = before.teacher
    return shared | {
        "start": folder,
        "pretrained": None if before.student == TEACHERS_TOWER else "scratch",
    }


def split_after(folder: Path, split: Split) -> Split:
    """Return the split of a run that starts from the one in `folder`, with the domains that were seen there.

    Raises:
        EdgekdError: the run in `folder` trained on the domain that is left out, or on test images.
    """
    before = read_stored_split(folder / "split.json")
    trained, domain = before.train_domains or (), split.test_domain
    if domain is not None and readable(domain).casefold() in [
        readable(name).casefold() for name in trained
    ]:
        raise EdgekdError(
            f"The run at {folder} trained on the domain {domain}, so it is not unseen.",
            f"Leave out a domain that it left out too, or none: --test-domain {before.test_domain or 'none'}.",
        )
    roles = [before.roles.get(role, {}) for role in ("before", "unlabelled", "train")]
    seen = {key for role in roles for key in role.values()}
    tested = [key for role in ("id_test", "ood_test") for key in split.entries[role].values()]
    if count := sum(key in seen for key in tested):
        raise EdgekdError(
            f"The run at {folder} trained on {count:,} of the {len(tested):,} test images.",
            f"Split the images as it did: --split-seed {before.seed}, and the same --test-domain and --adapt.",
        )
    return replace(
        split,
        train_domains=tuple(sorted({*split.train_domains, *trained})),
        unlabelled_domains=tuple(
            dict.fromkeys((*split.unlabelled_domains, *before.unlabelled_domains))
        ),
        before={key: key for key in sorted(seen)},  # ids may repeat from run to run
    )


@torch.no_grad()
def continue_from(folder: Path, student: Student, classes: Sequence[str]) -> None:
    """Copy the weights of the finished run in `folder` into a student for `classes`.

    Rows of a trained head are copied by the name of their class; rows of new classes stay as they are.

    Raises:
        EdgekdError: the two do not consist of the same parts.
    """
    run = read_run(folder)
    state, _ = read_tensors(folder / "student.safetensors", "student", "Train that run again.")
    own = student.state_dict()
    places = [(classes.index(name), row) for row, name in enumerate(run.classes) if name in classes]
    if any(len(state[name]) != len(run.classes) for name in state if name.startswith("head.")):
        raise EdgekdError(
            f"The head of {folder} does not fit its classes.", "Train that run again."
        )
    for name in [name for name in state if name.startswith("head.") and name in own]:
        rows = own[name].clone()
        rows[[new for new, _ in places]] = state[name][[old for _, old in places]]
        state[name] = rows
    # It makes the finished run's scores calibrated; this run fits its own.
    state["scale"] = own["scale"]
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise EdgekdError(
            f"The student of {folder} ({run.recipe}) has not the parts that this recipe needs.",
            f"Start from it with --recipe {run.recipe}.",
        ) from error
