"""Create the benchmark's subjects: teacher, torch student and artifacts of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekd.benchmark.measure.counting import count_folder
from edgekd.benchmark.results.rows import Kind
from edgekd.benchmark.subjects import Subject
from edgekd.core.console import say, shell_word, warn
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.files import short_hash
from edgekd.core.manifest import Run, read_artifact, read_run
from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.distill.classification.load_run import LoadedRun
from edgekd.distill.classification.predict import student_predict, teacher_predict
from edgekd.distill.models.teachers import ClipTeacher, Teacher, load_teacher
from edgekd.evaluation.flops import count_torch
from edgekd.export.graph import fuse
from edgekd.targets.bank import ClassBank
from edgekd.targets.session import Session, open_session

COPIED = " (copied)"
"""Suffix of the run's name for a copied artifact whose student differs from the local run's."""


def run_of(path: Path) -> tuple[Path, list[str]]:
    """Return the run's folder and the artifacts to measure for a path given to benchmark (all artifacts of a run)."""
    if (path / "artifact.json").is_file():
        return path.parent.parent, [path.name]
    read_run(path)
    artifacts = [folder.name for folder in artifact_folders(path)]
    if not artifacts:
        say(f"{path} has no exported file (edgekd export); only its torch student is measured")
    return path, artifacts


def artifact_folders(run: Path) -> list[Path]:
    """Return the artifacts of a run, sorted, without those that failed their parity check (`NAME.failed`)."""
    folders = (path.parent for path in run.glob("artifacts/*/artifact.json"))
    return sorted(folder for folder in folders if not folder.name.endswith(".failed"))


def subjects_of(
    loaded: LoadedRun, artifacts: Sequence[str], *, elsewhere: bool = False
) -> list[Subject]:
    """Return the run's teacher (if it can embed images), its torch student, and the given artifacts.

    Args:
        elsewhere: whether a device measures the artifacts. If not, those whose runtime is missing here are left out.
    """
    subjects = [] if loaded.bank is None else _teacher(loaded)
    subjects.append(_student(loaded))
    for name in artifacts:
        folder = loaded.folder / "artifacts" / name
        source = read_artifact(folder, check_hashes=False).source
        if source.get("student_sha256") != loaded.run.student_sha256:
            raise EdgekdError(
                f"{folder} was exported from another student.",
                f"Export again: edgekd export {shell_word(loaded.folder)} --overwrite.",
            )
        try:
            subjects.append(_artifact(folder, elsewhere))
        except NotHere as reason:
            warn(f"{name} is left out: {reason.message}")
    return subjects


def lone_artifact(
    path: Path, others: Sequence[Subject], runs: Sequence[LoadedRun], *, elsewhere: bool = False
) -> Subject:
    """Return an artifact without its run, under a name that none of `others` has.

    If one of `runs` has the same name but another student, that student is not its reference.
    """
    subject, folder = _artifact(path, elsewhere), path.resolve()
    source = read_artifact(path, check_hashes=False).source
    for one in runs:
        if one.run.name == subject.run and one.run.student_sha256 != source.get("student_sha256"):
            subject = replace(subject, run=f"{subject.run}{COPIED}")
    if any((other.run, other.name) == (subject.run, subject.name) for other in others):
        subject = replace(subject, name=f"{subject.name}@{folder.parent.name}")
    return subject


def own_teacher(loaded: LoadedRun) -> Teacher:
    """Load the teacher of the run; raise `EdgekdError` if it is missing or its weights have changed."""
    model, run = load_teacher(loaded.run.teacher), loaded.run
    if model.id != run.teacher_id:
        raise EdgekdError(
            f"{run.teacher} is not the teacher that {run.name} was trained with.",
            "Restore its weights.",
        )
    return model


def _teacher(loaded: LoadedRun) -> list[Subject]:
    run, bank = loaded.run, loaded.bank
    assert bank is not None
    if run.teacher.startswith("embeddings:"):
        say(f"the teacher of {run.name} is a file of embeddings, so it has no row")
        return []
    teacher = own_teacher(loaded)
    assert isinstance(teacher, ClipTeacher)
    # Two banks may differ only in their descriptions.
    texts = short_hash(bank.vectors.numpy().tobytes().hex()) if bank.described else ""
    identity = f"{teacher.id}:{'|'.join(bank.templates)}:{texts}"
    predict, encoder = teacher_predict(teacher, bank), cast(Any, teacher.model).visual
    return [_in_torch(run, "teacher", predict, encoder, teacher.preprocess, identity)]


def _student(loaded: LoadedRun) -> Subject:
    height, width = loaded.run.preprocess.shape
    student = fuse(loaded.student, torch.rand(2, 3, height, width))[0]  # as it is exported
    predict = student_predict(student, loaded.vectors)
    return _in_torch(loaded.run, "torch", predict, student, loaded.run.preprocess)


def _in_torch(
    run: Run,
    kind: Kind,
    predict: Predictor,
    module: nn.Module,
    preprocess: Preprocess,
    identity: str = "",
) -> Subject:
    return Subject(
        name=kind,
        run=run.name,
        kind=kind,
        precision="fp32",
        preprocess=preprocess,
        predict=predict,
        classes=run.classes,
        identity=identity,
        threads=torch.get_num_threads(),
        counted=count_torch(predict, module, preprocess.shape),
    )


def _artifact(folder: Path, elsewhere: bool) -> Subject:
    """Return an exported file; with `elsewhere`, its runtime may be missing on this machine."""
    try:
        # Spinning threads would take the cores from the decoding during the accuracy run.
        session = open_session(folder, spinning=False)
    except NotHere as error:
        if not elsewhere:
            raise
        artifact = read_artifact(folder)
        own: dict[str, Any] = {"predict": _raising(error), "here": False}
    else:
        artifact = session.artifact
        own = {"predict": session.run, "placement": session.placement}
        if session.bank is not None:
            own["with_classes"] = _with_classes(session, session.bank)
    return Subject(
        name=artifact.name,
        run=str(artifact.source.get("run", "")),
        kind="artifact",
        precision=artifact.precision,
        preprocess=artifact.preprocess,
        classes=artifact.classes,
        folder=folder,
        counted=count_folder(folder),
        **own,
    )


def _raising(error: NotHere) -> Predictor:
    def refuse(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise error

    return refuse


def _with_classes(session: Session, bank: ClassBank) -> Any:
    def with_classes(classes: tuple[str, ...], vectors: NDArray[np.float32]) -> Predictor:
        changed = replace(bank, classes=classes, vectors=vectors)
        return lambda images: changed.logits(session.embed(images))

    return with_classes


def compared_of(subjects: Sequence[Subject], places: Sequence[Path]) -> tuple[Subject, Subject]:
    """Return the two artifacts to compare, in the given order; another number is an `EdgekdError`."""
    artifacts = [subject for subject in subjects if subject.folder is not None]
    if len(artifacts) != 2:
        raise EdgekdError(
            f"--compare needs two artifacts, and {len(artifacts)} were given.",
            "Name two: edgekd benchmark ARTIFACT_A ARTIFACT_B --compare",
        )

    def place_of(subject: Subject) -> int:
        folder = Path(subject.folder or "").resolve()
        inside = [folder.is_relative_to(place.resolve()) for place in places]
        return inside.index(True) if True in inside else len(places)

    first, second = sorted(artifacts, key=place_of)
    return first, second


def artifact_facts(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Return the report's facts about each exported file: parity, quantization, hashes, origin."""
    facts = []
    fields = {"target", "format", "files", "inputs", "parity", "versions", "created", "source"}
    for subject in subjects:
        if subject.folder is not None:
            artifact = read_artifact(subject.folder, check_hashes=False)
            quantization = {k: v for k, v in (artifact.quantization or {}).items() if k != "ids"}
            own = {"run": subject.run, "name": subject.name, "quantization": quantization or None}
            facts.append(artifact.model_dump(mode="json", include=fields) | own)
    return facts
