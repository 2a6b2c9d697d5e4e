"""Starting from a finished run: its student goes on learning, with more images or other classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgekd.configs.train import TrainConfig, read_config
from edgekd.distill.students import TEACHERS_TOWER, Student
from edgekd.errors import EdgekdError
from edgekd.manifest import read_run
from edgekd.readers import read_tensors

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
