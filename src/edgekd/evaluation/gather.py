"""What is measured on what: runs and artifacts, each with the suites of test images that it is to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.manifest import read_artifact
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import read_split, read_stored_split
from edgekd.data.unlabelled import NO_DATA, load_unlabelled
from edgekd.distill.load import LoadedRun, load_run
from edgekd.evaluation.prompt_variants import in_other_words
from edgekd.evaluation.special_suites import (
    CORRUPTION_IMAGES,
    clean_suite,
    corruption_suites,
    cue_conflict_suite,
    unknown_suites,
)
from edgekd.evaluation.subjects import COPIED, distinct, lone_artifact, run_of, subjects_of
from edgekd.evaluation.suites import (
    folder_suites,
    hold_out_suite,
    lone_suites,
    named_folders,
    split_suites,
)
from edgekd.evaluation.trained import (
    SEEN_IN,
    SuiteKind,
    Trained,
    all_trained,
    read_trained,
    suite_kind,
    trained_of_source,
)
from edgekd.evaluation.vocabulary import spoken_as
from edgekd.evaluation.wilds import wilds_named, wilds_suites

COMPUTED = ("corruptions",)
"""Suites that are made from in-domain test images."""


def suites_of(
    loaded: LoadedRun, data: str | None, run: str | None, beside: Sequence[LoadedRun] = ()
) -> list[Suite]:
    """The run's own ID and OOD test images; with other `data`, a suite of every domain of it.

    Args:
        beside: further runs that are measured on these suites; what one of them saw is unseen for none.
    """
    if data is None and loaded.run.data == NO_DATA:
        return []
    images, trained = loaded.images(data), trained_of([loaded, *beside])
    try:
        split = read_split(loaded.folder / "split.json", images)
    except EdgekdError:
        if data is None:
            raise
        say(
            f"{images.name} is not the data of this run: each of its domains is a suite, without what the run has seen"
        )
        return _foreign(data, loaded, trained, run)
    return split_suites(images, split, run, trained)


def _foreign(data: str, loaded: LoadedRun, trained: Trained, run: str | None) -> list[Suite]:
    """Every domain of images that the run was not split on."""
    images = load_images(data)
    suites = folder_suites(images.name, data, loaded.run.classes, trained=trained, run=run)
    # Domains are called by their own names here, as there is only one set of images.
    return [replace(suite, name=suite.name.replace(f":{images.name}/", ":", 1)) for suite in suites]


def trained_of(runs: Sequence[LoadedRun]) -> Trained:
    """What the runs have seen in training, all together."""
    return all_trained([read_trained(loaded.folder / "split.json") for loaded in runs])


_PART_OF: dict[SuiteKind, str] = {"seen": "test", "adapted": "adapted", "ood": "unseen"}


def parts_of(
    loaded: LoadedRun, images: ImageSet, data: str | None
) -> list[tuple[str, NDArray[np.int64]]]:
    """Indices of images by the part that they have in the run: those of `SEEN_IN`, test, adapted, unseen, unused.

    `test` are the run's own test images and others of domains that trained, `adapted` those of domains that it saw
    without labels, `unseen` images of other domains or classes; `unused` are images of the run's data in no part of
    its split.
    """
    stored = read_stored_split(loaded.folder / "split.json")
    trained = trained_of([loaded])
    left_out = suite_kind({stored.test_domain or ""}, {}, trained)
    part = dict.fromkeys(stored.roles["ood_test"].values(), _PART_OF[left_out])
    part |= dict.fromkeys(stored.roles["id_test"].values(), "test")
    part |= trained.roles
    of_domain = []
    for d, domain in enumerate(images.domains):
        keys = [images.keys[i] for i in np.flatnonzero(images.domain_of == d)]
        overlap = {role: n / len(keys) for role, n in trained.excluded(keys).items()}
        names = {images.name} if images.domains == ("all",) else {domain}
        of_domain.append(_PART_OF[suite_kind(names, overlap, trained)])
    found = []
    for index, key in enumerate(images.keys):
        known = images.classes[images.labels[index]] in loaded.run.classes
        other = "unused" if data is None else of_domain[images.domain_of[index]]
        found.append(part.get(key, other if known else "unseen"))
    return [
        (name, np.flatnonzero([one == name for one in found]))
        for name in (*SEEN_IN, *_PART_OF.values(), "unused")
        if name in found
    ]


def context_of(loaded: LoadedRun) -> dict[str, Any]:
    """What the report says about a run besides its numbers."""
    run, split = loaded.run, read_stored_split(loaded.folder / "split.json")
    unlabelled = split.roles.get("unlabelled", {})
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
        "split_rule": split.rule,
        "split_hash": run.split_hash,
        "test_domain": run.test_domain,
        **({"unlabelled": len(unlabelled)} if unlabelled else {}),
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
    test: Sequence[str] = (),
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
    further = Further(
        named_folders(plain, "--ood"), named_folders(test, "--test"), benches, texture_shape
    )
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
    given = bool(data) or further.any
    for place in alone:
        subjects.append(
            distinct(lone_artifact(place, given, elsewhere=elsewhere), subjects, loaded)
        )
    same_split = len({one.run.split_hash for one in loaded}) <= 1
    measured: list[Suite] = []
    if loaded:
        _check_splits(alone, loaded)
        for one in loaded[:1] if same_split else loaded:
            measured += (
                suites_of(one, data, None, loaded[1:])
                if same_split
                else suites_of(one, data, one.run.name)
            )
    trained = {one.run.name: trained_of([one]) for one in loaded}
    for place in alone:
        source = read_artifact(place, check_hashes=False).source
        said = trained_of_source(source)
        if data and not loaded and place == alone[0]:
            own, said = lone_suites_of(place, data)
            measured += own
        same = [one for one in loaded if one.run.split_hash == source.get("split_hash")]
        trained.setdefault(str(source.get("run", "")), trained_of(same) if same else said)
    measured += further.suites(subjects, trained, measured)
    measured += _beside_id(
        subjects,
        measured,
        strangers,
        all_trained(list(trained.values())),
        (corruption_images or CORRUPTION_IMAGES) if "corruptions" in suites else 0,
    )
    if not measured and loaded:
        loaded[0].check_labelled()
    if vocabulary:
        subjects, measured = in_other_words(loaded, subjects, measured, vocabulary)
    return Gathered(
        subjects,
        measured,
        [context_of(one) for one in loaded],
        loaded[0].folder if loaded else alone[0],
    )


def _beside_id(
    subjects: Sequence[Subject],
    measured: Sequence[Suite],
    strangers: Sequence[tuple[str, ImageSet]],
    trained: Trained,
    corrupted: int,
) -> list[Suite]:
    """Suites that belong to in-domain test images: clean counterparts of subsets, unknown images, corruptions.

    Args:
        strangers: (name, images) of no known class.
        corrupted: images in each cell of the corruptions; 0 for none.

    Raises:
        EdgekdError: there are no in-domain test images for what is wanted.
    """
    found: list[Suite] = []
    insides = [suite for suite in measured if suite.kind == "id"]
    for wanted, what in ((strangers, "tell unknown ones from"), (corrupted, "corrupt")):
        if wanted and not insides:
            raise EdgekdError(
                f"There are no in-domain test images to {what}.",
                "Give the run, or with a lone artifact the images of its run: --data DIR.",
            )
    for inside in insides:
        subsets = [
            suite
            for suite in measured
            if suite.kind == "subset" and suite.run in (None, inside.run)
        ]
        found += [clean for subset in subsets if (clean := clean_suite(subset, inside)) is not None]
        classes = next(subject.classes for subject in subjects if inside.run in (None, subject.run))
        for name, images in strangers:
            found += unknown_suites(name, images, inside, classes, trained=trained)
        if corrupted:
            found += corruption_suites(inside, corrupted)
    return found


@dataclass(frozen=True)
class Further:
    """Images that were named besides a run's own: (name, folder) of `--ood`, `--test` and WILDS; cue conflicts."""

    ood: Sequence[tuple[str, str]]
    test: Sequence[tuple[str, str]]
    benches: Sequence[tuple[str, str]]
    texture_shape: str | None

    @property
    def any(self) -> bool:
        return bool(self.ood or self.test or self.benches or self.texture_shape)

    def suites(
        self,
        subjects: Sequence[Subject],
        trained: Mapping[str, Trained],
        measured: Sequence[Suite],
    ) -> list[Suite]:
        """Suites for all subjects together where their runs know and saw the same, else for each run.

        Args:
            trained: run → what it saw.
            measured: the runs' own suites; images of their unseen domains would count twice in the mean.
        """
        runs = dict.fromkeys(subject.run for subject in subjects)
        classes = {subject.run: subject.classes for subject in subjects}
        saw = {run: trained.get(run.removesuffix(COPIED), Trained()) for run in runs}
        first = next(iter(runs))
        shared = all((classes[run], saw[run]) == (classes[first], saw[first]) for run in runs)
        found: list[Suite] = []
        for run in [first] if shared else runs:
            owner, words = None if shared else run, classes[run]
            for name, folder in self.ood:
                outside = saw[run].with_tested(_unseen_keys([*measured, *found], run))
                found += folder_suites(name, folder, words, trained=outside, run=owner)
            for name, folder in self.test:
                found.append(hold_out_suite(name, folder, words, trained=saw[run], run=owner))
            for name, root in self.benches:
                found += wilds_suites(name, root, words, owner, saw[run])
            if (cues := self.texture_shape) is not None:
                found.append(
                    cue_conflict_suite("texture-shape", cues, words, trained=saw[run], run=owner)
                )
        return found


def _unseen_keys(suites: Sequence[Suite], run: str) -> Iterator[str]:
    """Content keys of the images in a run's suites of unseen domains."""
    for suite in suites:
        if suite.run in (None, run) and suite.name.startswith("ood:"):
            yield from (suite.images.keys[index] for index in suite.indices)


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


def lone_suites_of(path: Path, data: str) -> tuple[list[Suite], Trained]:
    """Suites of a lone artifact, those of its run where `data` are its images; and what is known of its training."""
    artifact = read_artifact(path, check_hashes=False)
    images = spoken_as(load_images(data), artifact.classes, data)
    return lone_suites(images, artifact.source)
