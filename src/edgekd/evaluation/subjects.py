"""Who is measured: runs and artifacts as the benchmark room's subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.benchmark.measure.counting import count_folder
from edgekd.benchmark.subjects import Subject
from edgekd.core.console import say, shell_word, warn
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.files import short_hash
from edgekd.core.manifest import read_artifact, read_run
from edgekd.core.predictor import Predictor
from edgekd.distill.classification.load import LoadedRun
from edgekd.distill.classification.predict import student_predict, teacher_predict
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.text_bank import TextBank
from edgekd.evaluation.flops import count_torch
from edgekd.export.fuse import fuse
from edgekd.targets.session import open_session

COPIED = " (copied)"
"""Behind the run's name of a lone artifact that is of another student than the run of that name here."""


def run_of(path: Path) -> tuple[Path, list[str]]:
    """A path given to benchmark → the run's folder and the artifacts to measure (a run: all of them)."""
    if (path / "artifact.json").is_file():
        return path.parent.parent, [path.name]
    read_run(path)
    # A folder called NAME.failed holds an artifact that did not pass its parity check.
    found = (p.parent.name for p in path.glob("artifacts/*/artifact.json"))
    artifacts = sorted(name for name in found if not name.endswith(".failed"))
    if not artifacts:
        warn(
            f"{path} has no artifact; only its teacher and torch student are measured. "
            f"Next: edgekd export {shell_word(path)}"
        )
    return path, artifacts


def lone_artifact(path: Path, given: bool, *, elsewhere: bool = False) -> Subject:
    """An artifact folder that was copied away from its run: it is measured alone, on the images given.

    Args:
        elsewhere: a device measures it, so its runtime need not be here.
    """
    if not given:
        raise EdgekdError(
            f"{path} lies outside its run, so its images cannot be found.",
            "Say what to measure on: --data DIR or --ood NAME=DIR.",
        )
    return _artifact_subject(path, elsewhere)


def subjects_of(
    loaded: LoadedRun, artifacts: Sequence[str], *, elsewhere: bool = False
) -> list[Subject]:
    """The run's teacher (where it can be asked), its torch student, and the named artifacts.

    Args:
        elsewhere: a device measures the artifacts; those whose runtime is not here are left out otherwise.
    """
    run = loaded.run
    subjects = []
    if loaded.bank is not None:
        teacher = load_teacher(run.teacher)
        if isinstance(teacher, ClipTeacher):
            if teacher.id != run.teacher_id:
                raise EdgekdError(
                    f"The teacher {run.teacher} is not the one {run.name} was trained with.",
                    "Restore its weights, or train again.",
                )
            answer = teacher_predict(teacher, loaded.bank)
            subjects.append(
                Subject(
                    name="teacher",
                    run=run.name,
                    kind="teacher",
                    precision="fp32",
                    preprocess=teacher.preprocess,
                    predict=answer,
                    classes=run.classes,
                    identity=f"{teacher.id}:{'|'.join(loaded.bank.templates)}:{_described(loaded.bank)}",
                    threads=torch.get_num_threads(),
                    counted=count_torch(
                        answer, cast(Any, teacher.model).visual, teacher.preprocess.shape
                    ),
                )
            )
        else:
            say(
                f"the teacher of {run.name} is a file of embeddings: it has no row, it cannot be asked about new images"
            )
    height, width = run.preprocess.shape
    student = fuse(loaded.student, torch.rand(2, 3, height, width)).model  # as it is exported
    answer = student_predict(student, loaded.vectors)
    subjects.append(
        Subject(
            name="torch",
            run=run.name,
            kind="torch",
            precision="fp32",
            preprocess=run.preprocess,
            predict=answer,
            classes=run.classes,
            threads=torch.get_num_threads(),
            counted=count_torch(answer, student, run.preprocess.shape),
        )
    )
    for name in artifacts:
        folder = loaded.folder / "artifacts" / name
        if (
            read_artifact(folder, check_hashes=False).source.get("student_sha256")
            != run.student_sha256
        ):
            raise EdgekdError(
                f"{folder} was exported from another student.",
                f"Export again: edgekd export {shell_word(loaded.folder)} --overwrite.",
            )
        try:
            subjects.append(_artifact_subject(folder, elsewhere))
        except NotHere as reason:
            warn(f"{name} is left out: {reason.message}")
    return subjects


def _described(bank: TextBank) -> str:
    """Tells apart two banks that differ in their descriptions alone; empty without any."""
    return short_hash(bank.vectors.numpy().tobytes().hex()) if bank.described else ""


def _artifact_subject(folder: Path, elsewhere: bool) -> Subject:
    try:
        # Threads that poll would take the cores from the decoding that goes on beside the accuracy run.
        session = open_session(folder, spinning=False)
    except NotHere as reason:
        if not elsewhere:
            raise
        return _silent_subject(folder, reason)
    artifact, bank = session.artifact, session.bank

    def with_classes(classes: tuple[str, ...], vectors: NDArray[np.float32]) -> Predictor:
        assert bank is not None
        changed = replace(bank, classes=classes, vectors=vectors)
        return lambda images: changed.logits(session.embed(images))

    return Subject(
        name=artifact.name,
        run=str(artifact.source.get("run", "")),
        kind="artifact",
        precision=artifact.precision,
        preprocess=artifact.preprocess,
        predict=session.run,
        classes=artifact.classes,
        folder=folder,
        placement=session.placement,
        counted=count_folder(folder),
        with_classes=None if bank is None else with_classes,
    )


def _silent_subject(folder: Path, reason: NotHere) -> Subject:
    """An artifact that this machine cannot run."""
    artifact = read_artifact(folder)

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise reason

    return Subject(
        name=artifact.name,
        run=str(artifact.source.get("run", "")),
        kind="artifact",
        precision=artifact.precision,
        preprocess=artifact.preprocess,
        predict=predict,
        classes=artifact.classes,
        folder=folder,
        counted=count_folder(folder),
        here=False,
    )


def distinct(subject: Subject, others: Sequence[Subject], runs: Sequence[LoadedRun]) -> Subject:
    """A lone artifact under a name of its own: no other's row, and no other student's references."""
    assert subject.folder is not None
    folder = subject.folder.resolve()
    source = read_artifact(folder, check_hashes=False).source
    for one in runs:
        if one.run.name == subject.run and one.run.student_sha256 != source.get("student_sha256"):
            subject = replace(subject, run=f"{subject.run}{COPIED}")
    if any((other.run, other.name) == (subject.run, subject.name) for other in others):
        subject = replace(subject, name=f"{subject.name}@{folder.parent.name}")
    return subject


def compared_of(subjects: Sequence[Subject], places: Sequence[Path]) -> tuple[Subject, Subject]:
    """The two artifacts to compare, A and B in the order in which they were named.

    Raises:
        EdgekdError: not exactly two.
    """
    artifacts = [subject for subject in subjects if subject.folder is not None]
    if len(artifacts) != 2:
        raise EdgekdError(
            f"{len(artifacts)} artifacts cannot be compared; two can.",
            "edgekd benchmark ARTIFACT_A ARTIFACT_B --compare",
        )

    def place_of(subject: Subject) -> int:
        assert subject.folder is not None
        folder = subject.folder.resolve()
        return next(
            (i for i, place in enumerate(places) if folder.is_relative_to(place.resolve())),
            len(places),
        )

    first, second = sorted(artifacts, key=place_of)
    return first, second


def artifact_facts(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """What the report says about each exported file besides its numbers: parity, quantization, hashes, origin."""
    facts = []
    for subject in subjects:
        if subject.folder is None:
            continue
        artifact = read_artifact(subject.folder, check_hashes=False)
        known = artifact.model_dump(
            mode="json",
            include={"target", "format", "files", "inputs", "parity", "versions", "created"},
        )
        quantization = {
            key: value for key, value in (artifact.quantization or {}).items() if key != "ids"
        } or None
        named = {"run": subject.run, "name": subject.name, "source": artifact.source}
        facts.append(named | known | {"quantization": quantization})
    return facts
