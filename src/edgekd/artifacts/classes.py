"""Add classes to an artifact that ends in an embedding, or remove them, on the workstation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.configs.export import AddClassConfig
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.readers import printable, read_array
from edgekd.targets.bank import ClassBank, read_bank
from edgekd.targets.bank_change import add_by_images, change_bank, provenance
from edgekd.targets.session import open_session


def add(config: AddClassConfig) -> Artifact:
    """Add a class to an artifact; see `edgekd.add_class`."""
    folder, name = config.artifact, printable(config.name)
    artifact = read_artifact(folder)
    if artifact.bank is None:
        raise EdgekdError(
            f"{artifact.name} ends in the logits of fixed classes, so none can be added.",
            "Export with --head embedding.",
        )
    with disk_errors(folder):
        if config.images:
            session = open_session(folder, spinning=False)
            add_by_images(folder, name, config.images, session)
        else:
            bank = read_bank(folder / artifact.bank)
            if config.text_vector is not None:
                vector, how = (
                    bank.of_text(_read_vector(config.text_vector)),
                    provenance("text vector", file=config.text_vector.name),
                )
            else:
                vector, how = _from_teacher(bank, name, config.teacher, config.descriptions)
            change_bank(folder, lambda current: current.with_class(name, vector, how))
    return read_artifact(folder)


def remove(folder: Path, name: str) -> Artifact:
    """Remove a class that was added; see `edgekd.remove_class`."""
    read_artifact(folder)
    with disk_errors(folder):
        change_bank(folder, lambda bank: bank.without_class(name))
    return read_artifact(folder)


def _from_teacher(
    bank: ClassBank, name: str, spec: str | None, descriptions: str | None
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the class vector for the run's prompts, and its provenance."""
    from edgekd.distill.models.teachers import load_teacher
    from edgekd.distill.text_files import descriptions_for

    model = load_teacher(spec or bank.facts["teacher"])
    if model.id != bank.facts["teacher_id"]:
        raise EdgekdError(
            f"{spec or bank.facts['teacher']} is not the teacher of this artifact.",
            f"It was distilled from {bank.facts['teacher']}; give its current place: --teacher SPEC.",
        )
    described = descriptions_for(descriptions, [name]) if descriptions else None
    if bank.facts["described"] and not described:
        warn(
            f"the other classes' prompts end in descriptions, that of {name} does not: --descriptions gives it one."
        )
    made = model.text_bank([name], bank.facts["templates"], described)
    more = {"descriptions": list(described[name])} if described else {}
    return bank.of_text(made.vectors[0].numpy()), provenance(
        "text", templates=bank.facts["templates"], **more
    )


def _read_vector(path: Path) -> NDArray[np.float32]:
    """Read the teacher's text vectors of one class, `[D]` or `[prompts, D]`, from a .npy file."""
    found = read_array(path, "text vector", "Write it with numpy.save.")
    if found.dtype.kind != "f" or found.ndim not in (1, 2):
        raise EdgekdError(
            f"{path} holds no vector of floats.",
            "Write [D], or [prompts, D], with numpy.save into a .npy file.",
        )
    return found.astype(np.float32)
