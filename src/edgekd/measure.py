"""Who is measured and on what: runs and artifacts as the benchmark room's subjects and suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.benchmark.accuracy import Subject, Suite
from edgekd.console import say, warn
from edgekd.data import ImageSet, load_images
from edgekd.distill.load import LoadedRun
from edgekd.distill.predict import student_predict, teacher_predict
from edgekd.distill.teacher import ClipTeacher, load_teacher
from edgekd.errors import EdgekdError
from edgekd.files import read_json
from edgekd.manifest import read_artifact, read_run
from edgekd.split import Split, read_split
from edgekd.targets.session import open_session


def run_of(path: Path) -> tuple[Path, list[str]]:
    """A path given to benchmark → the run's folder and the artifacts to measure (a run: all of them)."""
    if (path / "artifact.json").is_file():
        return path.parent.parent, [path.name]
    read_run(path)
    # A folder called NAME.failed holds an artifact that did not pass its parity check.
    found = (p.parent.name for p in path.glob("artifacts/*/artifact.json"))
    artifacts = sorted(name for name in found if not name.endswith(".failed"))
    if not artifacts:
        warn(f"{path} has no artifact; only its teacher and torch student are measured. Next: edgekd export {path}")
    return path, artifacts


def lone_artifact(path: Path, data: str | None) -> Subject:
    """An artifact folder that was copied away from its run: it is measured alone, on the images given."""
    if data is None:
        raise EdgekdError(
            f"{path} lies outside its run, so its images cannot be found.", "Say what to measure on: --data DIR."
        )
    return _artifact_subject(path)


def subjects_of(loaded: LoadedRun, artifacts: Sequence[str]) -> list[Subject]:
    """The run's teacher (where it can be asked), its torch student, and the named artifacts."""
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
            subjects.append(
                Subject(
                    name="teacher",
                    run=run.name,
                    kind="teacher",
                    precision="fp32",
                    preprocess=teacher.preprocess,
                    predict=teacher_predict(teacher, loaded.bank),
                    classes=run.classes,
                    identity=f"{teacher.id}:{'|'.join(loaded.bank.templates)}",
                    threads=torch.get_num_threads(),
                )
            )
        else:
            say(
                f"the teacher of {run.name} is a file of embeddings: it has no row, it cannot be asked about new images"
            )
    subjects.append(
        Subject(
            name="torch",
            run=run.name,
            kind="torch",
            precision="fp32",
            preprocess=run.preprocess,
            predict=student_predict(loaded.student, loaded.vectors),
            classes=run.classes,
            threads=torch.get_num_threads(),
        )
    )
    for name in artifacts:
        folder = loaded.folder / "artifacts" / name
        if read_artifact(folder, check_hashes=False).source.get("student_sha256") != run.student_sha256:
            raise EdgekdError(
                f"{folder} was exported from another student.",
                f"Export again: edgekd export {loaded.folder} --overwrite.",
            )
        subjects.append(_artifact_subject(folder))
    return subjects


def _artifact_subject(folder: Path) -> Subject:
    # Threads that poll would take the cores from the decoding that goes on beside the accuracy run.
    session = open_session(folder, spinning=False)
    artifact = session.artifact
    return Subject(
        name=artifact.name,
        run=str(artifact.source.get("run", "")),
        kind="artifact",
        precision=artifact.precision,
        preprocess=artifact.preprocess,
        predict=session.run,
        classes=artifact.classes,
        folder=folder,
    )


def suites_of(loaded: LoadedRun, data: str | None, run: str | None) -> list[Suite]:
    """The run's own ID and OOD test images; with other `data`, every domain of it as an OOD suite."""
    images = load_images(data or loaded.run.data)
    try:
        split = read_split(loaded.folder / "split.json", images)
    except EdgekdError:
        if data is None:
            raise
        return foreign_suites(images, run)
    return _own_suites(images, split, run) or [Suite("id", images, split.val, run)]


def _own_suites(images: ImageSet, split: Split, run: str | None) -> list[Suite]:
    suites = []
    if len(split.id_test):
        suites.append(Suite("id", images, split.id_test, run))
        suites.append(Suite("val", images, split.val, run))
    if split.test_domain is not None:
        suites.append(Suite(f"ood:{split.test_domain}", images, split.ood_test, run))
    return suites


def foreign_suites(images: ImageSet, run: str | None) -> list[Suite]:
    """Every domain of images that no run was split on, whole, as an OOD suite."""
    say(f"{images.name} is not the data of this run: all of its images are tests, each domain is an OOD suite")
    names = [images.name] if images.domains == ("all",) else list(images.domains)
    return [Suite(f"ood:{name}", images, np.flatnonzero(images.domain_of == d), run) for d, name in enumerate(names)]


def artifact_facts(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """What the report says about each exported file besides its numbers: parity, quantization, hashes, origin."""
    facts = []
    for subject in subjects:
        if subject.folder is None:
            continue
        artifact = read_artifact(subject.folder, check_hashes=False)
        known = artifact.model_dump(mode="json", include={"target", "format", "files", "parity", "versions", "created"})
        quantization = {key: value for key, value in (artifact.quantization or {}).items() if key != "ids"} or None
        named = {"run": subject.run, "name": subject.name, "source": artifact.source}
        facts.append(named | known | {"quantization": quantization})
    return facts


def context_of(loaded: LoadedRun) -> dict[str, Any]:
    """What the report says about a run besides its numbers."""
    split = read_json(loaded.folder / "split.json", "split")
    run = loaded.run
    return {
        "name": run.name,
        "student": run.student,
        "recipe": run.recipe,
        "teacher": run.teacher,
        "data": run.data,
        "seed": run.seed,
        "steps": run.steps,
        "train_seconds": run.train_seconds,
        "selection": run.selection,
        "split_rule": split["rule"],
        "split_hash": run.split_hash,
        "test_domain": run.test_domain,
        "templates": list(loaded.bank.templates) if loaded.bank else [],
    }
