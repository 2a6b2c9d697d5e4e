"""Suites of special images: the clean counterpart of a class subset, unknown classes, cue conflicts, corruptions."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.evaluation.suites import IMAGENET_O, NOTHING, left_out, not_empty
from edgekd.evaluation.trained import Trained
from edgekd.evaluation.vocabulary import called, spoken_as

_CUE = re.compile(r"(.+?)\d*-(.+?)\d*$")
CORRUPTION_IMAGES = 200
"""Images in each of the 75 cells, unless told otherwise."""


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
    trained: Trained = NOTHING,
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
        trained: what the runs saw; images with such content, and with that of any image of `inside`'s data, are left
            out.

    Raises:
        EdgekdError: a folder called by one of the classes, or only images of the run.
    """
    known = _known_folders(images, classes)
    beside, found = inside, []
    if known and not IMAGENET_O.fullmatch(name):
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
    own = {*trained.roles, *inside.images.keys}
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
            excluded=trained.excluded(images.keys),
        )
    )
    return found


def _known_folders(images: ImageSet, classes: tuple[str, ...]) -> dict[str, str]:
    """Names of the folders that the images lie in, at any depth, which are classes → the class."""
    names = sorted({part for image_id in images.ids for part in image_id.split("/")[:-1]})
    words = ((name, name if name in classes else called([name], classes)[0]) for name in names)
    return {name: word for name, word in words if word is not None}


def cue_conflict_suite(
    name: str,
    spec: str,
    classes: tuple[str, ...],
    *,
    trained: Trained = NOTHING,
    run: str | None = None,
) -> Suite:
    """Images named `SHAPE1-TEXTURE2.png` in folders named by shape (Geirhos et al. 2019).

    Images whose texture is of the shape's own class show no conflict and are left out, and so are those that training
    has seen.

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
    keys = [images.keys[index] for index in conflict]
    excluded = trained.excluded(keys)
    conflict = conflict[[key not in trained.roles for key in keys]]
    suite = Suite(
        f"cue:{name}", spoken, conflict, run, "cue-conflict", (*remarks, *left_out(excluded)),
        texture[conflict], excluded=excluded,
    )  # fmt: skip
    return not_empty([suite], spec)[0]


def corruption_suites(inside: Suite, count: int = CORRUPTION_IMAGES) -> list[Suite]:
    """The 15 × 5 cells on up to `count` images, spread evenly over the ID test images."""
    from edgekd.data.corruptions import NAMES, REMARKS, SEVERITIES

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
