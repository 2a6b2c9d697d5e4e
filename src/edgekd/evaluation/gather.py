"""Collect runs and artifacts with their suites of test images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.subjects import Subject, Suite
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.manifest import newest_run, read_artifact
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import read_split, read_stored_split
from edgekd.data.unlabelled import NO_DATA, load_unlabelled
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.evaluation import suites as made
from edgekd.evaluation.class_names import spoken_as
from edgekd.evaluation.prompt_variants import with_prompt_variants
from edgekd.evaluation.subjects import COPIED, compared_of, lone_artifact, run_of, subjects_of
from edgekd.evaluation.suites import SuiteBuilder, named_folders
from edgekd.evaluation.trained_on import (
    SEEN_IN,
    SuiteKind,
    Trained,
    all_trained,
    read_trained,
    suite_kind,
    trained_of_source,
)
from edgekd.evaluation.wilds import wilds_named, wilds_suites

COMPUTED = ("corruptions",)
"""Suites computed from in-domain test images."""
_PART_OF: dict[SuiteKind, str] = {"seen": "test", "adapted": "adapted", "ood": "unseen"}


def suites_of(
    loaded: LoadedRun, data: str | None, run: str | None, beside: Sequence[LoadedRun] = ()
) -> list[Suite]:
    """Return suites of the run's own ID and OOD test images or, with other `data`, of each of its domains.

    Args:
        beside: further runs to measure on these suites; training images of any run are left out for all.
    """
    if data is None and loaded.run.data == NO_DATA:
        return []
    images = loaded.images(data)
    builder = SuiteBuilder(loaded.run.classes, trained_of([loaded, *beside]), run)
    try:
        return builder.split(images, read_split(loaded.folder / "split.json", images))
    except EdgekdError:
        if data is None:
            raise
    say(
        f"{images.name} is not the data of this run: each domain is a suite, without images used in training"
    )
    name = load_images(data).name
    # There is only one set of images here, so domains keep their own names.
    return [
        replace(suite, name=suite.name.replace(f":{name}/", ":", 1))
        for suite in builder.folder(name, data)
    ]


def trained_of(runs: Sequence[LoadedRun]) -> Trained:
    """Return the combined training data of all runs."""
    return all_trained([read_trained(loaded.folder / "split.json") for loaded in runs])


def parts_of(
    loaded: LoadedRun, images: ImageSet, data: str | None
) -> list[tuple[str, NDArray[np.int64]]]:
    """Return indices of images by their part in the run.

    `train`, `val`, `unlabelled` and `before` are as in its split. `test` has the run's test images and other images of
    training domains, `adapted` images of domains with unlabelled training images, `unseen` images of other domains or
    classes, and `unused` images of the run's data that are not in its split.
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
    """Return facts about a run for the report, without measurements."""
    run, split = loaded.run, read_stored_split(loaded.folder / "split.json")
    fields = {
        "name", "student", "recipe", "teacher", "data", "seed", "steps", "train_seconds", "selection", "split_hash",
        "test_domain",
    }  # fmt: skip
    unlabelled = split.roles.get("unlabelled", {})
    return {
        **run.model_dump(include=fields),
        "split_rule": split.rule,
        **({"unlabelled": len(unlabelled)} if unlabelled else {}),
        "templates": list(loaded.bank.templates) if loaded.bank else [],
    }


@dataclass(frozen=True)
class Gathered:
    """The subjects and suites of a benchmark.

    Attributes:
        contexts: one mapping per run; see `context_of`.
        home: the folder in which `benchmark/` is the default report folder.
        compared: the two artifacts to compare, or None.
    """

    subjects: list[Subject]
    suites: list[Suite]
    contexts: list[dict[str, Any]]
    home: Path
    compared: tuple[Subject, Subject] | None = None


def gather(config: BenchmarkConfig) -> Gathered:
    """Return runs and artifacts with the suites to measure them on.

    Raises:
        EdgekdError: another path, images that do not fit, an unknown suite, or artifacts of different splits.
    """
    for name in config.suites:
        check_known(name, COMPUTED, f'"{name}" is not a computed suite.')
    wilds, plain = wilds_named(config.ood)
    named: dict[str, Any] = {
        "ood": named_folders(plain, "--ood"),
        "test": named_folders(config.test, "--test"),
        "wilds": wilds,
        "texture_shape": config.texture_shape,
    }
    folders = named_folders(config.unknown, "--unknown")
    unknown = [(name, load_unlabelled(folder)) for name, folder in folders]
    places = list(config.paths) or [newest_run()]
    runs: dict[Path, list[str]] = {}
    alone: list[Path] = []
    for place in places:
        if (place / "artifact.json").is_file() and not (place.parent.parent / "run.json").is_file():
            alone.append(place)
        else:
            folder, artifacts = run_of(place)
            runs.setdefault(folder, []).extend(artifacts)
    loaded = [load_run(folder) for folder in runs]
    elsewhere = bool(config.device) or config.result is not None
    subjects: list[Subject] = []
    for one in loaded:
        subjects += subjects_of(one, runs[one.folder], elsewhere=elsewhere)
    for place in alone:
        if not config.data and not any(named.values()):
            raise EdgekdError(
                f"{place} is not in its run's folder, so its images cannot be found.",
                "Give test images: --data DIR or --ood NAME=DIR.",
            )
        subjects.append(lone_artifact(place, subjects, loaded, elsewhere=elsewhere))
    suites, trained = _own_suites(loaded, alone, config.data)
    suites += further_suites(subjects, trained, suites, **named)
    corrupted = (config.corruption_images or made.CORRUPTION_IMAGES) if config.suites else 0
    seen = all_trained(list(trained.values()))
    suites += _beside_id(subjects, suites, unknown, seen, corrupted=corrupted)
    if not suites and loaded:
        loaded[0].check_labelled()
    if config.vocabulary:
        subjects, suites = with_prompt_variants(loaded, subjects, suites, config.vocabulary)
    return Gathered(
        subjects,
        suites,
        [context_of(one) for one in loaded],
        loaded[0].folder if loaded else alone[0],
        compared_of(subjects, places) if config.compare else None,
    )


def _own_suites(
    loaded: Sequence[LoadedRun], alone: Sequence[Path], data: str | None
) -> tuple[list[Suite], dict[str, Trained]]:
    """Return the suites of runs and lone artifacts, and run → its training data.

    An artifact without its run is measured on another run's images only if both have the same split.
    """
    suites: list[Suite] = []
    if len({one.run.split_hash for one in loaded}) == 1:
        suites += suites_of(loaded[0], data, None, loaded[1:])
    else:
        for one in loaded:
            suites += suites_of(one, data, one.run.name)
    trained = {one.run.name: trained_of([one]) for one in loaded}
    for place in alone:
        artifact = read_artifact(place, check_hashes=False)
        source = artifact.source
        if loaded and source.get("split_hash") != loaded[0].run.split_hash:
            raise EdgekdError(
                f"{place} was trained on another split than {loaded[0].run.name}, perhaps on its test images.",
                "Measure it separately with --data, or with --ood on images not used in its training.",
            )
        known = trained_of_source(source)
        if data and not loaded and place == alone[0]:
            images = spoken_as(load_images(data), artifact.classes, data)
            own, known = made.lone_suites(images, source)
            suites += own
        same = [one for one in loaded if one.run.split_hash == source.get("split_hash")]
        trained.setdefault(str(source.get("run", "")), trained_of(same) if same else known)
    return suites, trained


def _beside_id(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    unknown: Sequence[tuple[str, ImageSet]],
    trained: Trained,
    *,
    corrupted: int,
) -> list[Suite]:
    """Return the suites that need in-domain test images: clean counterparts, unknown images, corruptions.

    `corrupted` is the number of images per corruption and severity; 0 for no corruptions.
    """
    more: list[Suite] = []
    insides = [suite for suite in suites if suite.kind == "id"]
    for wanted, what in ((unknown, "compare unknown ones with"), (corrupted, "corrupt")):
        if wanted and not insides:
            raise EdgekdError(
                f"There are no in-domain test images to {what}.",
                "Give the run or, for an artifact without its run, the run's images: --data DIR.",
            )
    for inside in insides:
        for subset in suites:
            if subset.kind == "subset" and subset.run in (None, inside.run):
                clean = made.clean_suite(inside, subset.images.classes, subset.name)
                more += [clean] if clean is not None else []
        classes = next(subject.classes for subject in subjects if inside.run in (None, subject.run))
        for name, images in unknown:
            more += SuiteBuilder(classes, trained, inside.run).unknown(name, images, inside)
        if corrupted:
            more += made.corruption_suites(inside, corrupted)
    return more


def further_suites(
    subjects: Sequence[Subject],
    trained: Mapping[str, Trained],
    own: Sequence[Suite],
    *,
    ood: Sequence[tuple[str, str]] = (),
    test: Sequence[tuple[str, str]] = (),
    wilds: Sequence[tuple[str, str]] = (),
    texture_shape: str | None = None,
) -> list[Suite]:
    """Return suites of named folders, shared by all subjects whose runs have the same classes and training images.

    Args:
        trained: run → its training data.
        own: the runs' own suites, whose images of unseen domains are left out, since they would count twice.
        ood, test, wilds: (name, folder).
    """
    builders = {}
    for one in subjects:
        seen = trained.get(one.run.removesuffix(COPIED), Trained())
        builders[one.run] = SuiteBuilder(one.classes, seen, one.run)
    first = next(iter(builders))
    shared = replace(builders[first], run=None)
    if all(replace(builder, run=None) == shared for builder in builders.values()):
        builders = {first: shared}
    more: list[Suite] = []
    for run, builder in builders.items():
        for name, folder in ood:
            seen = builder.trained.with_tested(_unseen_keys([*own, *more], run))
            more += replace(builder, trained=seen).folder(name, folder)
        more += [builder.hold_out(name, folder) for name, folder in test]
        for name, root in wilds:
            more += wilds_suites(name, root, builder.classes, builder.run, builder.trained)
        if texture_shape is not None:
            more.append(builder.cue_conflict("texture-shape", texture_shape))
    return more


def _unseen_keys(suites: Sequence[Suite], run: str) -> Iterator[str]:
    """Yield the content keys of the images in a run's suites of unseen domains."""
    for suite in suites:
        if suite.run in (None, run) and suite.name.startswith("ood:"):
            yield from (suite.images.keys[index] for index in suite.indices)
