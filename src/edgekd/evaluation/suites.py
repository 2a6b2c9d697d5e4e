"""Test images as the benchmark's suites: a run's own, and the domains of any folder, without what training has seen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.report.rows import Family
from edgekd.benchmark.subjects import Suite
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.layouts import known_layout, unwrapped
from edgekd.data.split import Split, make_split
from edgekd.evaluation.trained import Trained, suite_kind, trained_of_source, trained_of_split
from edgekd.evaluation.vocabulary import spoken_as
from edgekd.targets.bank import plain_name

SEEN = (
    "The artifact was trained on this domain and its split is not here, so training images may be among these: "
    "not a test result."
)
_NAME = re.compile(r"[\w.+-]+")
IMAGENET_O = re.compile(r"imagenet[-_]?o", re.IGNORECASE)
NOTHING = Trained()


def split_suites(
    images: ImageSet, split: Split, run: str | None, trained: Trained = NOTHING
) -> list[Suite]:
    """ID test, ID validation (for temperatures) and the domain left out."""
    suites = []
    if len(split.id_test):
        suites.append(Suite("id", images, split.id_test, run))
        suites.append(Suite("val", images, split.val, run))
    if split.test_domain is not None:
        suites.append(_domain_suite(images, split.ood_test, split.test_domain, trained, run=run))
    return suites or [Suite("id", images, split.val, run)]


def _domain_suite(
    images: ImageSet,
    indices: NDArray[np.int64],
    title: str,
    trained: Trained,
    *,
    names: Collection[str] = (),
    run: str | None = None,
    family: Family | None = None,
    remarks: Sequence[str] = (),
) -> Suite:
    """The images at `indices`, one domain, without those that trained, under the name that `suite_kind` gives them.

    Args:
        title: the suite's name after its kind.
        names: what the domain is called besides.
        family: of an `ood:` suite; None: a domain left out.

    Returns:
        The suite; its `indices` are empty where every image trained.
    """
    keys = [images.keys[index] for index in indices]
    excluded = trained.excluded(keys)
    overlap = {role: count / len(keys) for role, count in excluded.items()}
    kind = suite_kind({title, *names}, overlap, trained)
    kept = indices[[key not in trained.roles for key in keys]]
    told = [*remarks, *left_out(excluded)]
    if kind != "ood":
        told.append(_OF_KIND[kind])
        family = kind
    return Suite(f"{kind}:{title}", images, kept, run, family, tuple(told), excluded=excluded)


_OF_KIND = {
    "seen": "the run trained on this domain: an in-domain suite, in no mean over unseen domains.",
    "adapted": "the run saw this domain in unlabelled images: in no mean over unseen domains.",
}


def left_out(excluded: Mapping[str, int]) -> list[str]:
    """A remark about images that training saw, if there are any."""
    return [f"images left out: {_counted(excluded)}."] if excluded else []


_OF_ROLE = {
    "train": "trained",
    "val": "were validated on",
    "unlabelled": "were seen without labels",
    "before": "trained the run that this one started from",
    "tested": "are in another suite of an unseen domain",
}


def _counted(excluded: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {_OF_ROLE[role]}" for role, count in excluded.items())


def lone_suites(images: ImageSet, source: dict[str, Any]) -> tuple[list[Suite], Trained]:
    """Suites for an artifact that was copied away from its run, and what is known of its training.

    The split is made again by the rule and the seed the artifact names; where its hash is the artifact's, the images
    are those of the run and the suites are its own. Otherwise each domain is a suite, named by `suite_kind` from the
    domains that the artifact says it was trained on.
    """
    said = trained_of_source(source)
    if (split := _remade(images, source)) is not None:
        roles = trained_of_split(split.entries).roles
        return split_suites(images, split, None, said), replace(said, roles=roles)
    suites = []
    for d, domain in enumerate(images.domains):
        indices = np.flatnonzero(images.domain_of == d)
        title = images.name if images.domains == ("all",) else domain
        kind = suite_kind({title}, {}, said)
        family: Family | None = "folder" if kind == "ood" else kind
        remarks: tuple[str, ...] = (_UNSAID,)
        if kind != "ood":
            remarks = (SEEN if kind == "seen" else _OF_KIND[kind],)
        elif plain_name(title) in said.left_out:
            family, remarks = None, ()
        elif source.get("train_domains") is not None:
            remarks = (_UNTOLD,)
        suites.append(Suite(f"{kind}:{title}", images, indices, None, family, remarks))
    return suites, said


_UNSAID = "The artifact does not say which domains it was trained on, so training images may be among these."
_UNTOLD = (
    "Whether the artifact was trained on some of these images cannot be told without its split."
)


def _remade(images: ImageSet, source: dict[str, Any]) -> Split | None:
    if "split_seed" not in source or source.get("split_hash") is None:
        return None
    try:
        split = make_split(
            images, test_domain=source.get("test_domain") or "none", seed=source["split_seed"]
        )
    except EdgekdError:
        return None  # other images, which that rule cannot split
    return split if split.hash == source["split_hash"] else None


def named_folders(given: Sequence[str], option: str, what: str = "DIR") -> list[tuple[str, str]]:
    """`NAME=DIR` strings as pairs.

    Raises:
        EdgekdError: another form, or a name given twice.
    """
    pairs = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or _NAME.fullmatch(name) is None:
            raise EdgekdError(
                f'"{text}" does not name a suite.',
                f"Write {option} NAME={what}, the name of letters, digits and . _ + -",
            )
        pairs.append((name, folder))
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise EdgekdError(
                f'The suite "{name}" is given twice.', f"Give each {option} another name."
            )
    return pairs


def folder_suites(
    name: str,
    spec: str,
    classes: tuple[str, ...],
    *,
    trained: Trained = NOTHING,
    run: str | None = None,
) -> list[Suite]:
    """Every domain of any images as a suite: `ood:NAME/DOMAIN`, or `seen:` or `adapted:` where training saw the domain.

    Args:
        name: the suite's name; without `/DOMAIN` where the images have no domains.
        spec: anything `load_images` takes; a DomainBed layout may lie one folder deeper.
        classes: of the subjects; the images may have fewer (a subset suite).
        trained: what the runs saw; images with such content are left out and counted.
        run: only subjects of this run are measured on them.

    Raises:
        EdgekdError: images that cannot be loaded or have a class that is not in `classes`, or none that training has
            not seen.
    """
    if IMAGENET_O.fullmatch(name):
        raise EdgekdError(
            "ImageNet-O shows objects of no class that a model knows: it measures detection, and top-1 means nothing.",
            f"Measure how well the model tells them from what it knows: --unknown {name}={spec}",
        )
    images, held, remarks = _held_out(name, spec, classes)
    family: Family = "subset" if len(images.classes) < len(classes) else "folder"
    suites = []
    for d, domain in enumerate(images.domains):
        indices = held[images.domain_of[held] == d]
        if not len(indices):
            continue
        title, names = (
            (name, {images.name}) if images.domains == ("all",) else (f"{name}/{domain}", {domain})
        )
        suites.append(
            _domain_suite(
                images,
                indices,
                title,
                trained,
                names=names,
                run=run,
                family=family,
                remarks=remarks,
            )
        )
    return not_empty(suites, spec)


def _held_out(
    name: str, spec: str, classes: tuple[str, ...]
) -> tuple[ImageSet, NDArray[np.int64], list[str]]:
    """Images for a suite in the words of the subjects, which of them to measure, and remarks about them."""
    images = spoken_as(load_images(unwrapped(spec), one_class=True), classes, name)
    layout = known_layout(images.domains)
    remarks = [] if layout is None else [layout.remark]
    held = np.ones(len(images), dtype=bool)
    if images.roles is not None and "test" in images.roles:
        held = np.asarray([role == "test" for role in images.roles])
        remarks.append("only its test folder is measured.")
    if len(images.classes) == 1:
        # Chosen among one class, every answer would be right.
        labels = np.full(len(images), classes.index(images.classes[0]), dtype=np.int64)
        images = replace(images, classes=classes, labels=labels)
        remarks.append(f"all images are of one class, chosen among all {len(classes)}.")
    elif len(images.classes) < len(classes):
        remarks.append(
            f"the class is chosen among these {len(images.classes)}, out of the {len(classes)} known."
        )
    return images, np.flatnonzero(held), remarks


def not_empty(suites: Sequence[Suite], spec: str) -> list[Suite]:
    """The suites that have images left; the others are named.

    Raises:
        EdgekdError: none has.
    """
    kept = [suite for suite in suites if len(suite.indices)]
    if not kept:
        raise EdgekdError(
            f"No image of {spec} is left to measure: {_counted(suites[0].excluded)}.",
            "Give images that the run did not see.",
        )
    for suite in suites:
        if not len(suite.indices):
            warn(f"{suite.name} is left out: of its images {_counted(suite.excluded)}.")
    return kept


def hold_out_suite(
    name: str,
    spec: str,
    classes: tuple[str, ...],
    *,
    trained: Trained = NOTHING,
    run: str | None = None,
) -> Suite:
    """An in-domain hold-out as the suite `test:NAME`, all its domains together; arguments as for `folder_suites`.

    Raises:
        EdgekdError: as `folder_suites`, or a domain that the run left out or saw without labels alone.
    """
    images, held, remarks = _held_out(name, spec, classes)
    called = {domain for domain in images.domains if domain != "all"} or {name, images.name}
    outside = trained.left_out | trained.unlabelled_domains
    for domain in sorted(called):
        if plain_name(domain) in outside - trained.domains:
            raise EdgekdError(
                f'The domain "{domain}" of {spec} did not train, so it is no in-domain test.',
                f"Measure it as unseen: --ood {name}={spec}",
            )
    keys = [images.keys[index] for index in held]
    excluded = trained.excluded(keys)
    kept = held[[key not in trained.roles for key in keys]]
    remarks += ["given as an in-domain test; in no mean over unseen domains.", *left_out(excluded)]
    suite = Suite(f"test:{name}", images, kept, run, "test", tuple(remarks), excluded=excluded)
    return not_empty([suite], spec)[0]
