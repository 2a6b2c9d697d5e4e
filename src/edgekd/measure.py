"""What is measured on what: runs and artifacts, each with the suites of test images that it is to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.benchmark.accuracy import Subject, Suite
from edgekd.console import say
from edgekd.data import load_images
from edgekd.distill.load import LoadedRun, load_run
from edgekd.errors import EdgekdError, did_you_mean
from edgekd.manifest import read_artifact
from edgekd.split import read_split, stored_keys
from edgekd.subjects import distinct, lone_artifact, run_of, subjects_of
from edgekd.suites import (
    CORRUPTION_IMAGES,
    clean_suite,
    corruption_suites,
    cue_conflict_suite,
    folder_suites,
    lone_suites,
    named_folders,
    split_suites,
    unknown_suites,
)
from edgekd.unlabelled import load_unlabelled
from edgekd.vocabulary import spoken_as
from edgekd.wilds import wilds_named, wilds_suites
from edgekd.wording import in_other_words

COMPUTED = ("corruptions",)
"""Suites that are made from in-domain test images."""


def suites_of(loaded: LoadedRun, data: str | None, run: str | None) -> list[Suite]:
    """The run's own ID and OOD test images; with other `data`, every domain of it as an OOD suite."""
    images = loaded.images(data)
    try:
        split = read_split(loaded.folder / "split.json", images)
    except EdgekdError:
        if data is None:
            raise
        say(
            f"{images.name} is not the data of this run: all of its images are tests, each domain is an OOD suite"
        )
        return _foreign(data, loaded, run)
    return split_suites(images, split, run)


def _foreign(data: str, loaded: LoadedRun, run: str | None) -> list[Suite]:
    """Every domain of images that the run was not split on; what it trained on all the same is left out."""
    images = load_images(data)
    suites = folder_suites(
        images.name, data, loaded.run.classes, trained_on=trained_on([loaded]), run=run
    )
    # Domains are called by their own names here, as there is only one set of images.
    return [
        replace(suite, name=suite.name.replace(f"ood:{images.name}/", "ood:", 1))
        for suite in suites
    ]


def trained_on(runs: Sequence[LoadedRun]) -> set[str]:
    """Content keys of the training and validation images of the runs."""
    keys: set[str] = set()
    for loaded in runs:
        roles, _ = stored_keys(loaded.folder / "split.json")
        keys |= {*roles["train"].values(), *roles["val"].values()}
    return keys


def context_of(loaded: LoadedRun) -> dict[str, Any]:
    """What the report says about a run besides its numbers."""
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
        "split_rule": stored_keys(loaded.folder / "split.json")[1],
        "split_hash": run.split_hash,
        "test_domain": run.test_domain,
        "templates": list(loaded.bank.templates) if loaded.bank else [],
    }


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
    unknown: Sequence[str] = (),
    suites: Sequence[str] = (),
    texture_shape: str | None = None,
    corruption_images: int | None = None,
    vocabulary: Sequence[str] = (),
    elsewhere: bool = False,
) -> Gathered:
    """Runs and artifacts at `places` with the suites that they are to be measured on; see `edgekd.api.benchmark`.

    Args:
        elsewhere: a device runs the artifacts, so their runtimes need not be here.

    Raises:
        EdgekdError: a path that is neither, images that do not fit, an unknown suite, artifacts of different splits.
    """
    for name in suites:
        if name not in COMPUTED:
            raise EdgekdError(
                f'There is no suite "{name}" to compute.', did_you_mean(name, COMPUTED)
            )
    benches, plain = wilds_named(ood)
    folders = named_folders(plain, "--ood")
    strangers = [
        (name, load_unlabelled(folder)) for name, folder in named_folders(unknown, "--unknown")
    ]
    runs: dict[Path, list[str]] = {}
    alone: list[Path] = []
    for place in places:
        if (place / "artifact.json").is_file() and not (place.parent.parent / "run.json").is_file():
            alone.append(place)
        else:
            folder, artifacts = run_of(place)
            runs.setdefault(folder, []).extend(artifacts)
    loaded = [load_run(folder) for folder in runs]
    subjects = [
        subject
        for one in loaded
        for subject in subjects_of(one, runs[one.folder], elsewhere=elsewhere)
    ]
    given = bool(data or folders or benches or texture_shape)
    for place in alone:
        subjects.append(
            distinct(lone_artifact(place, given, elsewhere=elsewhere), subjects, loaded)
        )
    same_split = len({one.run.split_hash for one in loaded}) <= 1
    measured: list[Suite] = []
    if loaded:
        _check_splits(alone, loaded)
        for one in loaded[:1] if same_split else loaded:
            measured += suites_of(one, data, None if same_split else one.run.name)
    elif data:
        measured += lone_suites_of(alone[0], data)
    seen = trained_on(loaded)
    measured += _further(subjects, folders, benches, texture_shape, seen)
    for inside in [suite for suite in measured if suite.kind == "id"]:
        subsets = [
            suite
            for suite in measured
            if suite.kind == "subset" and suite.run in (None, inside.run)
        ]
        measured += [
            clean for subset in subsets if (clean := clean_suite(subset, inside)) is not None
        ]
        classes = next(subject.classes for subject in subjects if inside.run in (None, subject.run))
        for name, images in strangers:
            measured += unknown_suites(name, images, inside, classes, trained_on=seen)
        if "corruptions" in suites:
            measured += corruption_suites(inside, corruption_images or CORRUPTION_IMAGES)
    if strangers and not any(suite.kind == "unknown" for suite in measured):
        raise EdgekdError(
            "There are no in-domain test images to tell unknown ones from.",
            "Give the run, or with a lone artifact the images of its run: --data DIR.",
        )
    if "corruptions" in suites and not any(suite.kind == "corruption" for suite in measured):
        raise EdgekdError(
            "There are no in-domain test images to corrupt.",
            "Give the run, or with a lone artifact the images of its run: --data DIR.",
        )
    if vocabulary:
        subjects, measured = in_other_words(loaded, subjects, measured, vocabulary)
    return Gathered(
        subjects,
        measured,
        [context_of(one) for one in loaded],
        loaded[0].folder if loaded else alone[0],
    )


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


def _check_splits(alone: Sequence[Path], runs: Sequence[LoadedRun]) -> None:
    """An artifact far from its run may be measured on another run's images only if these were split alike."""
    for place in alone:
        if (
            read_artifact(place, check_hashes=False).source.get("split_hash")
            != runs[0].run.split_hash
        ):
            raise EdgekdError(
                f"{place} was trained on another split than {runs[0].run.name}, so it may have seen its test images.",
                "Measure it alone: with --data, or with --ood on images that it has not seen.",
            )


def lone_suites_of(path: Path, data: str) -> list[Suite]:
    """What a lone artifact is measured on: the suites of its run where `data` are its images, else by domain."""
    artifact = read_artifact(path, check_hashes=False)
    images = spoken_as(load_images(data), artifact.classes, data)
    return lone_suites(images, artifact.source)
