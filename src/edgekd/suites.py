"""Test images of every kind as the benchmark room's suites: a run's own, folders, class subsets, unknown classes, cue
conflicts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.accuracy import Suite
from edgekd.benchmark.report.rows import Family
from edgekd.data import ImageSet, load_images
from edgekd.errors import EdgekdError
from edgekd.layouts import known_layout, unwrapped
from edgekd.split import Split, make_split
from edgekd.vocabulary import called, spoken_as

SEEN = (
    "The artifact was trained on this domain and its split is not here, so training images may be among these: "
    "not a test result."
)
_NAME = re.compile(r"[\w.+-]+")
_CUE = re.compile(r"(.+?)\d*-(.+?)\d*$")
_IMAGENET_O = re.compile(r"imagenet[-_]?o", re.IGNORECASE)
CORRUPTION_IMAGES = 200
"""Images in each of the 75 cells, unless told otherwise."""


def split_suites(images: ImageSet, split: Split, run: str | None) -> list[Suite]:
    """ID test, ID validation (for temperatures) and the domain left out."""
    suites = []
    if len(split.id_test):
        suites.append(Suite("id", images, split.id_test, run))
        suites.append(Suite("val", images, split.val, run))
    if split.test_domain is not None:
        suites.append(Suite(f"ood:{split.test_domain}", images, split.ood_test, run))
    return suites or [Suite("id", images, split.val, run)]


def lone_suites(images: ImageSet, source: dict[str, Any]) -> list[Suite]:
    """Suites for an artifact that was copied away from its run.

    The split is made again by the rule and the seed the artifact names; where its hash is the artifact's, the images
    are those of the run and the suites are its own. Otherwise each domain is a suite: `seen:` where the artifact was
    trained on a domain of that name, `ood:` where not.
    """
    if (split := _remade(images, source)) is not None:
        return split_suites(images, split, None)
    trained = source.get("train_domains")
    suites = []
    for d, domain in enumerate(images.domains):
        indices = np.flatnonzero(images.domain_of == d)
        if trained is None:
            remark = "The artifact does not say which domains it was trained on, so training images may be among these."
            suites.append(
                Suite(f"ood:{_title(images, domain)}", images, indices, None, "folder", (remark,))
            )
        elif domain in trained and images.domains != ("all",):
            suites.append(Suite(f"seen:{domain}", images, indices, None, "seen", (SEEN,)))
        elif domain == source.get("test_domain"):
            suites.append(Suite(f"ood:{domain}", images, indices))
        else:
            remark = "Whether the artifact was trained on some of these images cannot be told without its split."
            suites.append(
                Suite(f"ood:{_title(images, domain)}", images, indices, None, "folder", (remark,))
            )
    return suites


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


def _title(images: ImageSet, domain: str) -> str:
    return images.name if images.domains == ("all",) else domain


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
    trained_on: Collection[str] = (),
    run: str | None = None,
) -> list[Suite]:
    """Every domain of any images as an `ood:` suite, `ood:NAME` where they have no domains.

    Args:
        name: the suite's name.
        spec: anything `load_images` takes; a DomainBed layout may lie one folder deeper.
        classes: of the subjects; the images may have fewer (a subset suite).
        trained_on: content keys of training and validation images; images with such content are left out.
        run: only subjects of this run are measured on them.

    Raises:
        EdgekdError: images that cannot be loaded or have a class that is not in `classes`, or none that was not
            trained on.
    """
    if _IMAGENET_O.fullmatch(name):
        raise EdgekdError(
            "ImageNet-O shows objects of no class that a model knows: it measures detection, and top-1 means nothing.",
            f"Measure how well the model tells them from what it knows: --unknown {name}={spec}",
        )
    images = spoken_as(load_images(unwrapped(spec)), classes, name)
    layout = known_layout(images.domains)
    remarks = [] if layout is None else [layout.remark]
    held = np.ones(len(images), dtype=bool)
    if images.roles is not None and "test" in images.roles:
        held = np.asarray([role == "test" for role in images.roles])
        remarks.append("only its test folder is measured.")
    known = np.asarray([key in trained_on for key in images.keys])
    if (held & known).any():
        remarks.append(
            f"{int((held & known).sum())} images left out, since the run trained or selected on them."
        )
    kept = held & ~known
    if not kept.any():
        raise EdgekdError(
            f"All images of {spec} are training or validation images of the run.",
            "Give images that it did not see.",
        )
    family: Family = "folder"
    if len(images.classes) < len(classes):
        family = "subset"
        remarks.append(
            f"the class is chosen among these {len(images.classes)}, out of the {len(classes)} known."
        )
    suites = []
    for d, domain in enumerate(images.domains):
        indices = np.flatnonzero(kept & (images.domain_of == d))
        if len(indices):
            title = name if images.domains == ("all",) else f"{name}/{domain}"
            suites.append(Suite(f"ood:{title}", images, indices, run, family, tuple(remarks)))
    return suites


def clean_suite(subset: Suite, inside: Suite) -> Suite | None:
    """The ID images of the subset's classes, chosen among just these; None where there are none."""
    return _of_classes(inside, subset.images.classes, subset.name)


def _of_classes(inside: Suite, names: Collection[str], suite: str) -> Suite | None:
    """The suite `clean:…` of `suite`: the ID images of these classes, chosen among just these."""
    images = inside.images
    wanted = [images.classes.index(name) for name in names if name in images.classes]
    indices = inside.indices[np.isin(inside.labels, wanted)]
    if not len(indices):
        return None
    place = {old: new for new, old in enumerate(wanted)}
    labels = np.asarray([place.get(int(label), 0) for label in images.labels], dtype=np.int64)
    fewer = replace(images, classes=tuple(images.classes[c] for c in wanted), labels=labels)
    title = suite.partition(":")[2]
    remark = (
        f"the in-domain images of the {len(wanted)} classes of {suite}, chosen among just these."
    )
    return Suite(f"clean:{title}", fewer, indices, inside.run, "clean", (remark,))


def unknown_suites(
    name: str,
    images: ImageSet,
    inside: Suite,
    classes: tuple[str, ...],
    *,
    trained_on: Collection[str] = (),
) -> list[Suite]:
    """Images that show none of the classes as `unknown:NAME`, to be told from the images of `inside`.

    ImageNet-O, known by its suite's name, calls its folders by the classes that its images are mistaken for. Where the
    subjects know these, both sides are restricted to them as its authors do, and the known images are a `clean:` suite
    that comes along.

    Args:
        name: the suite's name.
        images: from `load_unlabelled`.
        inside: in-domain test images of the same subjects.
        classes: of the subjects.
        trained_on: content keys of training and validation images; images with such content, and with that of any
            image of `inside`'s data, are left out.

    Raises:
        EdgekdError: a folder called by one of the classes, or only images of the run.
    """
    known = _known_folders(images, classes)
    beside, found = inside, []
    if known and not _IMAGENET_O.fullmatch(name):
        place, word = next(iter(known.items()))
        spoken = "" if place == word else f' ("{word}")'
        hint = "Leave that folder out; images of classes that the model knows are measured with --ood NAME=DIR."
        if re.fullmatch(r"n\d{8}", place):
            hint += " ImageNet-O, whose folders only say what its images are mistaken for: --unknown imagenet-o=DIR."
        raise EdgekdError(
            f'The folder "{place}" of {images.name} is called by a class that the model knows{spoken}.',
            hint,
        )
    if known:
        subset = _of_classes(inside, dict.fromkeys(known.values()), f"unknown:{name}")
        if subset is not None and len(subset.images.classes) > 1:
            beside, found = subset, [subset]
    own = {*trained_on, *inside.images.keys}
    kept = np.flatnonzero([key not in own for key in images.keys])
    if not len(kept):
        raise EdgekdError(
            f"All images of {images.name} are images of the run's own data, whose classes the model knows.",
            "Give images of something else.",
        )
    remarks = [
        f"images of no class that the model knows, to be told from those of {beside.name}; they enter no mean."
    ]
    if beside is not inside:
        remarks.append(
            f"only the logits of the {len(beside.images.classes)} classes that its folders name are looked at."
        )
    if len(kept) < len(images):
        remarks.append(
            f"{len(images) - len(kept)} images left out, since they are among the run's own."
        )
    unknown = replace(images, classes=beside.images.classes)
    found.append(
        Suite(
            f"unknown:{name}",
            unknown,
            kept,
            inside.run,
            "unknown",
            tuple(remarks),
            base=beside.name,
        )
    )
    return found


def _known_folders(images: ImageSet, classes: tuple[str, ...]) -> dict[str, str]:
    """Names of the folders that the images lie in, at any depth, which are classes → the class."""
    names = sorted({part for image_id in images.ids for part in image_id.split("/")[:-1]})
    words = ((name, name if name in classes else called([name], classes)[0]) for name in names)
    return {name: word for name, word in words if word is not None}


def cue_conflict_suite(
    name: str, spec: str, classes: tuple[str, ...], *, run: str | None = None
) -> Suite:
    """Images named `SHAPE1-TEXTURE2.png` in folders named by shape (Geirhos et al. 2019).

    Images whose texture is of the shape's own class show no conflict and are left out.

    Raises:
        EdgekdError: a file name of another form, a folder that is not its shape, a class that is not in `classes`.
    """
    images = load_images(spec)
    spoken = spoken_as(images, classes, name)
    place = {shape: number for number, shape in enumerate(images.classes)}
    texture = np.empty(len(images), dtype=np.int64)
    for i, image_id in enumerate(images.ids):
        stem = Path(image_id).stem
        found = _CUE.fullmatch(stem)
        shape = images.classes[images.labels[i]]
        if found is None or found[1] != shape or found[2] not in place:
            raise EdgekdError(
                f"{image_id} does not follow the file names of cue-conflict images.",
                "They are SHAPE/SHAPE1-TEXTURE2.png, shape and texture both names of class folders.",
            )
        texture[i] = place[found[2]]
    conflict: NDArray[np.int64] = np.flatnonzero(texture != images.labels)
    if not len(conflict):
        raise EdgekdError(
            f"No image of {spec} has shape and texture of different classes.", "Check the folder."
        )
    remarks = (
        [f"{len(images) - len(conflict)} images without conflict left out."]
        if len(conflict) < len(images)
        else []
    )
    if len(images.classes) < len(classes):
        remarks.append(
            f"the class is chosen among these {len(images.classes)}, out of the {len(classes)} known."
        )
    return Suite(
        f"cue:{name}", spoken, conflict, run, "cue-conflict", tuple(remarks), texture[conflict]
    )


def corruption_suites(inside: Suite, count: int = CORRUPTION_IMAGES) -> list[Suite]:
    """The 15 × 5 cells on up to `count` images, spread evenly over the ID test images."""
    from edgekd.benchmark.corruptions import NAMES, REMARKS, SEVERITIES

    chosen = inside.indices
    remarks: tuple[str, ...] = REMARKS
    if len(chosen) > count:
        chosen = chosen[np.linspace(0, len(chosen) - 1, count).round().astype(int)]
        remarks = (
            *REMARKS,
            f"{count} of the {len(inside.indices)} in-domain test images, spread evenly.",
        )
    return [
        Suite(
            f"corruption:{name}:{severity}", inside.images, chosen, inside.run, "corruption", remarks,
            corruption=(name, severity),
        )
        for name in NAMES
        for severity in SEVERITIES
    ]  # fmt: skip
