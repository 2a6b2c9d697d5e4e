"""Who is measured and on what: runs and artifacts as the benchmark room's subjects and suites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from edgekd.benchmark.accuracy import Subject, Suite
from edgekd.benchmark.counting import count_folder
from edgekd.console import say, warn
from edgekd.data import load_images
from edgekd.distill.load import LoadedRun, load_run
from edgekd.distill.predict import student_predict, teacher_predict
from edgekd.distill.prompts import TextBank
from edgekd.distill.teacher import ClipTeacher, load_teacher
from edgekd.errors import EdgekdError, NotHere, did_you_mean
from edgekd.files import read_json, short_hash
from edgekd.flops import count_torch
from edgekd.manifest import read_artifact, read_run
from edgekd.split import read_split
from edgekd.suites import (
    CORRUPTION_IMAGES,
    clean_suite,
    corruption_suites,
    cue_conflict_suite,
    folder_suites,
    lone_suites,
    named_folders,
    split_suites,
)
from edgekd.targets.session import open_session
from edgekd.vocabulary import spoken_as
from edgekd.wilds import wilds_named, wilds_suites
from edgekd.wording import in_other_words


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


def lone_artifact(path: Path, given: bool) -> Subject:
    """An artifact folder that was copied away from its run: it is measured alone, on the images given."""
    if not given:
        raise EdgekdError(
            f"{path} lies outside its run, so its images cannot be found.",
            "Say what to measure on: --data DIR or --ood NAME=DIR.",
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
                    counted=count_torch(answer, cast(Any, teacher.model).visual, teacher.preprocess.size),
                )
            )
        else:
            say(
                f"the teacher of {run.name} is a file of embeddings: it has no row, it cannot be asked about new images"
            )
    answer = student_predict(loaded.student, loaded.vectors)
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
            counted=count_torch(answer, loaded.student, run.preprocess.size),
        )
    )
    for name in artifacts:
        folder = loaded.folder / "artifacts" / name
        if read_artifact(folder, check_hashes=False).source.get("student_sha256") != run.student_sha256:
            raise EdgekdError(
                f"{folder} was exported from another student.",
                f"Export again: edgekd export {loaded.folder} --overwrite.",
            )
        try:
            subjects.append(_artifact_subject(folder))
        except NotHere as reason:
            warn(f"{name} is left out: {reason.message}")
    return subjects


def _described(bank: TextBank) -> str:
    """Tells apart two banks that differ in their descriptions alone; empty without any."""
    return short_hash(bank.vectors.numpy().tobytes().hex()) if bank.described else ""


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
        placement=session.placement,
        counted=count_folder(folder),
    )


def suites_of(loaded: LoadedRun, data: str | None, run: str | None) -> list[Suite]:
    """The run's own ID and OOD test images; with other `data`, every domain of it as an OOD suite."""
    images = loaded.images(data)
    try:
        split = read_split(loaded.folder / "split.json", images)
    except EdgekdError:
        if data is None:
            raise
        say(f"{images.name} is not the data of this run: all of its images are tests, each domain is an OOD suite")
        return _foreign(data, loaded, run)
    return split_suites(images, split, run)


def _foreign(data: str, loaded: LoadedRun, run: str | None) -> list[Suite]:
    """Every domain of images that the run was not split on; what it trained on all the same is left out."""
    images = load_images(data)
    suites = folder_suites(images.name, data, loaded.run.classes, trained_on=trained_on([loaded]), run=run)
    # Domains are called by their own names here, as there is only one set of images.
    return [replace(suite, name=suite.name.replace(f"ood:{images.name}/", "ood:", 1)) for suite in suites]


def trained_on(runs: Sequence[LoadedRun]) -> set[str]:
    """Content keys of the training and validation images of the runs."""
    keys: set[str] = set()
    for loaded in runs:
        roles = read_json(loaded.folder / "split.json", "split")["roles"]
        keys |= {*roles["train"].values(), *roles["val"].values()}
    return keys


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


COMPUTED = ("corruptions",)
"""Suites that are made from in-domain test images."""


@dataclass(frozen=True)
class Gathered:
    """Everything to measure. `home` is the folder that the report lies in unless told otherwise."""

    subjects: list[Subject]
    suites: list[Suite]
    contexts: list[dict[str, Any]]
    home: Path


def gather(
    places: Sequence[Path],
    *,
    data: str | None = None,
    ood: Sequence[str] = (),
    suites: Sequence[str] = (),
    texture_shape: str | None = None,
    corruption_images: int | None = None,
    vocabulary: Sequence[str] = (),
) -> Gathered:
    """Runs and artifacts at `places` with the suites that they are to be measured on; see `edgekd.api.benchmark`.

    Raises:
        EdgekdError: a path that is neither, images that do not fit, an unknown suite, artifacts of different splits.
    """
    for name in suites:
        if name not in COMPUTED:
            raise EdgekdError(f'There is no suite "{name}" to compute.', did_you_mean(name, COMPUTED))
    benches, plain = wilds_named(ood)
    folders = named_folders(plain, "--ood")
    runs: dict[Path, list[str]] = {}
    alone: list[Path] = []
    for place in places:
        if (place / "artifact.json").is_file() and not (place.parent.parent / "run.json").is_file():
            alone.append(place)
        else:
            folder, artifacts = run_of(place)
            runs.setdefault(folder, []).extend(artifacts)
    loaded = [load_run(folder) for folder in runs]
    subjects = [subject for one in loaded for subject in subjects_of(one, runs[one.folder])]
    for place in alone:
        subjects.append(
            _distinct(lone_artifact(place, bool(data or folders or benches or texture_shape)), subjects, loaded)
        )
    same_split = len({one.run.split_hash for one in loaded}) <= 1
    measured: list[Suite] = []
    if loaded:
        _check_splits(alone, loaded)
        for one in loaded[:1] if same_split else loaded:
            measured += suites_of(one, data, None if same_split else one.run.name)
    elif data:
        measured += lone_suites_of(alone[0], data)
    measured += _further(subjects, folders, benches, texture_shape, trained_on(loaded))
    for inside in [suite for suite in measured if suite.kind == "id"]:
        subsets = [suite for suite in measured if suite.kind == "subset" and suite.run in (None, inside.run)]
        measured += [clean for subset in subsets if (clean := clean_suite(subset, inside)) is not None]
        if "corruptions" in suites:
            measured += corruption_suites(inside, corruption_images or CORRUPTION_IMAGES)
    if "corruptions" in suites and not any(suite.kind == "corruption" for suite in measured):
        raise EdgekdError(
            "There are no in-domain test images to corrupt.",
            "Give the run, or with a lone artifact the images of its run: --data DIR.",
        )
    if vocabulary:
        subjects, measured = in_other_words(loaded, subjects, measured, vocabulary)
    return Gathered(subjects, measured, [context_of(one) for one in loaded], loaded[0].folder if loaded else alone[0])


def _further(
    subjects: Sequence[Subject],
    folders: Sequence[tuple[str, str]],
    benches: Sequence[tuple[str, str]],
    texture_shape: str | None,
    seen: set[str],
) -> list[Suite]:
    """Suites of folders, for all subjects together where they know the same classes, else for each run."""
    by_run = {subject.run: subject.classes for subject in subjects}
    shared = len(set(by_run.values())) == 1
    found: list[Suite] = []
    for run, classes in list(by_run.items())[:1] if shared else by_run.items():
        owner = None if shared else run
        for name, folder in folders:
            found += folder_suites(name, folder, classes, trained_on=seen, run=owner)
        for name, root in benches:
            found += wilds_suites(name, root, classes, run=owner)
        if texture_shape is not None:
            found.append(cue_conflict_suite("texture-shape", texture_shape, classes, run=owner))
    return found


def _distinct(subject: Subject, others: Sequence[Subject], runs: Sequence[LoadedRun]) -> Subject:
    """A lone artifact under a name of its own: no other's row, and no other student's references."""
    assert subject.folder is not None
    folder = subject.folder.resolve()
    source = read_artifact(folder, check_hashes=False).source
    for one in runs:
        if one.run.name == subject.run and one.run.student_sha256 != source.get("student_sha256"):
            subject = replace(subject, run=f"{subject.run} (copied)")
    if any((other.run, other.name) == (subject.run, subject.name) for other in others):
        subject = replace(subject, name=f"{subject.name}@{folder.parent.name}")
    return subject


def _check_splits(alone: Sequence[Path], runs: Sequence[LoadedRun]) -> None:
    """An artifact far from its run may be measured on another run's images only if these were split alike."""
    for place in alone:
        if read_artifact(place, check_hashes=False).source.get("split_hash") != runs[0].run.split_hash:
            raise EdgekdError(
                f"{place} was trained on another split than {runs[0].run.name}, so it may have seen its test images.",
                "Measure it alone: with --data, or with --ood on images that it has not seen.",
            )


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
        return next((i for i, place in enumerate(places) if folder.is_relative_to(place.resolve())), len(places))

    first, second = sorted(artifacts, key=place_of)
    return first, second


def lone_suites_of(path: Path, data: str) -> list[Suite]:
    """What a lone artifact is measured on: the suites of its run where `data` are its images, else by domain."""
    artifact = read_artifact(path, check_hashes=False)
    images = spoken_as(load_images(data), artifact.classes, data)
    return lone_suites(images, artifact.source)
