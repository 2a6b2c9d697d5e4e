"""Folders of weights for offline machines, written by `edgekd fetch` and read by `--weights-dir`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors, write_json
from edgekd.core.folders import MODEL, publishing
from edgekd.core.hub import NoNetwork
from edgekd.core.tensors import write_tensors
from edgekd.distill.inputs.views import plain
from edgekd.distill.models.students import TEACHER_ENCODER, make_student, timm_name
from edgekd.distill.models.teachers import ClipTeacher, load_teacher

if TYPE_CHECKING:
    from edgekd.configs.models import FetchConfig

_LOCAL = ("toy", "local-dir:", "embeddings:")


def fetch(config: FetchConfig) -> list[Path]:
    """Write teacher and student into `config.to`; see `edgekd.api.fetch`."""
    written = []
    with disk_errors(config.to):
        config.to.mkdir(parents=True, exist_ok=True)
        teacher = load_teacher(config.teacher)
        if not isinstance(teacher, ClipTeacher):
            raise EdgekdError(
                f"{config.teacher} is already a local file.", "Copy it, and use it with --teacher."
            )
        folder = teacher_folder(config.to, config.teacher)
        written.append(folder)
        if not _is_there(folder):
            with publishing(folder, MODEL, overwrite=False) as scratch:
                _write_teacher(teacher, scratch)
        for name in config.students:
            path = student_file(config.to, name)
            written.append(path)
            if not _is_there(path):
                weights = make_student(name, pretrained="hub").backbone.state_dict()
                write_tensors(path, weights, {"timm": timm_name(name)})
                again = make_student(name, pretrained="hub", weights=path).backbone.state_dict()
                if not all(torch.equal(again[key], tensor) for key, tensor in weights.items()):
                    path.unlink()
                    raise EdgekdError(
                        f"The copy of {name} does not have its weights.", "Try again."
                    )
    return written


def from_weights_dir(config: TrainConfig, *, toy: bool) -> dict[str, Any]:
    """Return the settings that take teacher and student from `config.weights_dir`; if it lacks them: `EdgekdError`.

    On `toy` data the student does not come from a hub unless `pretrained` is set.
    """
    if config.weights_dir is None:
        return {}
    folder = config.weights_dir.expanduser().absolute()
    chosen: dict[str, Any] = {"weights_dir": None}
    if not config.teacher.startswith(_LOCAL):
        place = teacher_folder(folder, config.teacher)
        _check_there(place, config.teacher, folder)
        chosen["teacher"] = f"local-dir:{place}"
    given = config.student_weights is not None or config.start is not None
    from_hub = config.pretrained == "hub" or (config.pretrained is None and not toy)
    if from_hub and not given and config.student != TEACHER_ENCODER:
        path = student_file(folder, config.student)
        _check_there(path, config.student, folder)
        chosen |= {"student_weights": path, "pretrained": None}
    return chosen


@contextlib.contextmanager
def hint_of(config: TrainConfig) -> Iterator[None]:
    """Add teacher and student of `config` to the hint of download errors."""
    try:
        yield
    except NoNetwork as error:
        teacher = "TEACHER" if config.teacher.startswith(_LOCAL) else config.teacher
        raise NoNetwork(error.what, teacher, config.student) from error


def teacher_folder(folder: Path, spec: str) -> Path:
    """Return the path of a teacher in a folder of weights."""
    return folder / re.sub(r"[^\w.-]+", "-", spec)


def student_file(folder: Path, name: str) -> Path:
    """Return the path of a student's initial weights in a folder of weights."""
    return folder / f"{timm_name(name)}.safetensors"


def _is_there(path: Path) -> bool:
    """Return whether `path` exists; existing files are kept, since they may be the user's."""
    if os.path.lexists(path):
        say(f"{path} exists already and is kept.")
        return True
    return False


def _check_there(path: Path, name: str, folder: Path) -> None:
    if not path.exists():
        raise EdgekdError(
            f"{folder} does not have the weights of {name}.",
            f"Write them on a machine with a network: edgekd fetch TEACHER STUDENT --to {folder.name}",
        )


def _write_teacher(teacher: ClipTeacher, folder: Path) -> None:
    """Write an open_clip model folder, and check its embeddings, since open_clip does not save all settings."""
    import open_clip

    name, _, tag = teacher.spec.partition(":")
    is_named = name in open_clip.list_models()
    settings = dict(open_clip.get_model_config(name if is_named else teacher.spec) or {})
    if is_named and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
        settings["quick_gelu"] = True
    preprocess = open_clip.get_model_preprocess_cfg(teacher.model)
    write_tensors(folder / "open_clip_model.safetensors", teacher.model.state_dict(), {})
    if hasattr(teacher.tokenizer, "save_pretrained"):
        teacher.tokenizer.save_pretrained(folder)
    write_json(
        folder / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": preprocess}
    )
    again = load_teacher(f"local-dir:{folder}")
    assert isinstance(again, ClipTeacher)
    height, width = teacher.preprocess.shape
    noise = torch.randint(
        0, 256, (1, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    same = again.preprocess == teacher.preprocess and all(
        torch.allclose(a, b, atol=1e-4, rtol=1e-3)
        for a, b in (
            (teacher.embed_images(plain(noise)), again.embed_images(plain(noise))),
            (teacher.embed_texts(["a photo"]), again.embed_texts(["a photo"])),
        )
    )
    if not same:
        raise EdgekdError(
            f"The copy of {teacher.spec} does not give the same embeddings.",
            "Copy the model's own folder instead, and use --teacher local-dir:FOLDER.",
        )
