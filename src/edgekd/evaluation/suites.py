"""Create the benchmark's suites from a run's test images and from folders, without training images."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.results.rows import Family
from edgekd.benchmark.subjects import Suite
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import plain_name
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.sources.layouts import known_layout, unwrapped
from edgekd.data.split import Split, make_split
from edgekd.evaluation.class_names import called, spoken_as
from edgekd.evaluation.trained_on import Trained, suite_kind, trained_of_source, trained_of_split

CORRUPTION_IMAGES = 200
"""Images in each of the 75 cells of the corruptions by default."""
_NAME = re.compile(r"[\w.+-]+")
_CUE = re.compile(r"(.+?)\d*-(.+?)\d*$")
_IMAGENET_O = re.compile(r"imagenet[-_]?o", re.IGNORECASE)
_KIND_REMARKS = {
    "seen": "the run was trained on this domain, so the suite is in domain and in no mean over unseen domains.",
    "adapted": "a run was trained on unlabelled images of this domain, so it is in no mean over unseen domains.",
}
_ROLES = {
    "train": "trained",
    "val": "were used for validation",
    "unlabelled": "were trained on without labels",
    "before": "were used to train the run that this one started from",
    "tested": "are in another suite of an unseen domain",
}


@dataclass(frozen=True)
class SuiteBuilder:
    """Make suites for subjects that have the same classes and the same training images.

    Every method leaves out and counts images whose content is in `trained`. All raise `EdgekdError` for images that
    cannot be loaded, for a class that is not in `classes`, and if no image is left. Only subjects of `run` are measured
    on the suites (None: all subjects).
    """

    classes: tuple[str, ...]
    trained: Trained = field(default_factory=Trained)
    run: str | None = None

    def split(self, images: ImageSet, split: Split) -> list[Suite]:
        """Return suites of the ID test images, the ID validation images (for temperatures) and the unseen domain."""
        suites = []
        if len(split.id_test):
            suites.append(Suite("id", images, split.id_test, self.run))
            suites.append(Suite("val", images, split.val, self.run))
        if split.test_domain is not None:
            suites.append(self._domain(Suite(split.test_domain, images, split.ood_test, self.run)))
        return suites or [Suite("id", images, split.val, self.run)]

    def folder(self, name: str, spec: str) -> list[Suite]:
        """Return a suite `ood:NAME/DOMAIN` of every domain; `seen:` or `adapted:` if the domain was used in training.

        `spec` is an argument of `load_images`; a DomainBed layout may be one folder deeper.
        """
        if _IMAGENET_O.fullmatch(name):
            raise EdgekdError(
                "ImageNet-O has only images of unknown classes, so it measures detection and top-1 is not "
                "defined.",
                f"Measure out-of-distribution detection: --unknown {name}={spec}",
            )
        images, held, remarks = self._held_out(name, spec)
        family: Family = "subset" if len(images.classes) < len(self.classes) else "folder"
        suites = []
        for d, domain in enumerate(images.domains):
            indices = held[images.domain_of[held] == d]
            if not len(indices):
                continue
            flat = images.domains == ("all",)
            suite = Suite(
                name if flat else f"{name}/{domain}", images, indices, self.run, family, remarks
            )
            suites.append(self._domain(suite, images.name if flat else domain))
        return _not_empty(suites, spec)

    def hold_out(self, name: str, spec: str) -> Suite:
        """Return in-domain test images of all domains as one suite `test:NAME`; arguments as for `folder`.

        Raises:
            EdgekdError: also for a domain without labelled training images.
        """
        images, held, remarks = self._held_out(name, spec)
        names = {domain for domain in images.domains if domain != "all"} or {name, images.name}
        outside = self.trained.left_out | self.trained.unlabelled_domains
        for domain in sorted(names):
            if plain_name(domain) in outside - self.trained.domains:
                raise EdgekdError(
                    f'The run has no labelled training images of the domain "{domain}" of {spec}.',
                    f"Measure it as unseen: --ood {name}={spec}",
                )
        remarks = (*remarks, "given as an in-domain test, so it is in no mean over unseen domains.")
        suite = Suite(f"test:{name}", images, held, self.run, "test", remarks)
        return _not_empty([self._unseen(suite)], spec)[0]

    def cue_conflict(self, name: str, spec: str) -> Suite:
        """Return images named `SHAPE1-TEXTURE2.png` in folders named by shape (Geirhos et al. 2019).

        Images with shape and texture of the same class are left out.

        Raises:
            EdgekdError: also for another file name, and for a folder that does not match the shape.
        """
        images = load_images(spec)
        spoken = spoken_as(images, self.classes, name)
        place = {shape: number for number, shape in enumerate(images.classes)}
        texture = np.empty(len(images), dtype=np.int64)
        for i, image_id in enumerate(images.ids):
            found = _CUE.fullmatch(Path(image_id).stem)
            if found is None or place.get(found[1]) != images.labels[i] or found[2] not in place:
                raise EdgekdError(
                    f"{image_id} does not have the name of a cue-conflict image.",
                    "Use SHAPE/SHAPE1-TEXTURE2.png, where both are names of class folders.",
                )
            texture[i] = place[found[2]]
        conflict = np.flatnonzero(texture != images.labels)
        if not len(conflict):
            raise EdgekdError(
                f"No image of {spec} has shape and texture of different classes.",
                "Check the folder.",
            )
        remarks = []
        if len(conflict) < len(images):
            remarks.append(f"{len(images) - len(conflict)} images without conflict are left out.")
        if len(images.classes) < len(self.classes):
            remarks.append(self._fewer_classes(images))
        suite = self._unseen(
            Suite(f"cue:{name}", spoken, conflict, self.run, "cue-conflict", tuple(remarks))
        )
        return _not_empty([replace(suite, texture=texture[suite.indices])], spec)[0]

    def unknown(self, name: str, images: ImageSet, inside: Suite) -> list[Suite]:
        """Return out-of-distribution images as `unknown:NAME`, to be distinguished from the images of `inside`.

        ImageNet-O (recognised by `name`) names its folders after the classes that the images are mistaken for. If the
        subjects have these classes, both sides are restricted to them, as its authors do, and the known images are
        returned as an additional `clean:` suite. Images that are also in the data of `inside` are left out.

        Raises:
            EdgekdError: also for a folder named like one of the classes.
        """
        folders = sorted({part for image_id in images.ids for part in image_id.split("/")[:-1]})
        words = {f: f if f in self.classes else called([f], self.classes)[0] for f in folders}
        known = {folder: word for folder, word in words.items() if word is not None}
        if known and not _IMAGENET_O.fullmatch(name):
            folder, word = next(iter(known.items()))
            meaning = "" if folder == word else f' ("{word}")'
            hint = (
                "Remove that folder. Use --ood NAME=DIR for images of classes that the model has."
            )
            if re.fullmatch(r"n\d{8}", folder):
                hint += " For ImageNet-O, use --unknown imagenet-o=DIR."
            raise EdgekdError(
                f'The folder "{folder}" of {images.name} is named like a class of the model{meaning}.',
                hint,
            )
        beside, suites = inside, []
        if known:
            subset = clean_suite(inside, dict.fromkeys(known.values()), f"unknown:{name}")
            if subset is not None and len(subset.images.classes) > 1:
                beside, suites = subset, [subset]
        own = {*self.trained.roles, *inside.images.keys}
        kept = np.flatnonzero([key not in own for key in images.keys])
        if not len(kept):
            raise EdgekdError(
                f"All images of {images.name} are in the run's own data, so their classes are known.",
                "Give images of other classes.",
            )
        remarks = [
            f"images of unknown classes, to be distinguished from those of {beside.name}; they are in no mean."
        ]
        if beside is not inside:
            remarks.append(
                f"only the logits of the {len(beside.images.classes)} classes in its folder names are used."
            )
        if len(kept) < len(images):
            remarks.append(
                f"{len(images) - len(kept)} images are left out, since they are in the run's own data."
            )
        unknown = replace(images, classes=beside.images.classes)
        suite = Suite(
            f"unknown:{name}",
            unknown,
            kept,
            inside.run,
            "unknown",
            tuple(remarks),
            base=beside.name,
            excluded=self.trained.excluded(images.keys),
        )
        return [*suites, suite]

    def _held_out(
        self, name: str, spec: str
    ) -> tuple[ImageSet, NDArray[np.int64], tuple[str, ...]]:
        """Return images with the subjects' class names, the indices to measure, and remarks."""
        images = spoken_as(load_images(unwrapped(spec), one_class=True), self.classes, name)
        layout = known_layout(images.domains)
        remarks = [] if layout is None else [layout.remark]
        held = np.ones(len(images), dtype=bool)
        if images.roles is not None and "test" in images.roles:
            held = np.asarray([role == "test" for role in images.roles])
            remarks.append("only its test folder is measured.")
        if len(images.classes) == 1:
            # With one candidate class, every prediction would be correct.
            labels = np.full(len(images), self.classes.index(images.classes[0]), dtype=np.int64)
            images = replace(images, classes=self.classes, labels=labels)
            remarks.append(f"all images are of one class, chosen among all {len(self.classes)}.")
        elif len(images.classes) < len(self.classes):
            remarks.append(self._fewer_classes(images))
        return images, np.flatnonzero(held), tuple(remarks)

    def _fewer_classes(self, images: ImageSet) -> str:
        return f"predictions are restricted to these {len(images.classes)} of the {len(self.classes)} classes."

    def _unseen(self, suite: Suite) -> Suite:
        """Return the suite without the images used in training; it may be empty."""
        keys = [suite.images.keys[index] for index in suite.indices]
        excluded = self.trained.excluded(keys)
        kept = suite.indices[[key not in self.trained.roles for key in keys]]
        remarks = (*suite.remarks, *left_out(excluded))
        return replace(suite, indices=kept, excluded=excluded, remarks=remarks)

    def _domain(self, suite: Suite, *names: str) -> Suite:
        """Return a suite of one domain, also known as `names`, with the prefix given by `suite_kind`."""
        unseen = self._unseen(suite)
        overlap = {role: n / len(suite.indices) for role, n in unseen.excluded.items()}
        kind = suite_kind({suite.name, *names}, overlap, self.trained)
        name = f"{kind}:{suite.name}"
        if kind == "ood":
            return replace(unseen, name=name)
        return replace(
            unseen, name=name, family=kind, remarks=(*unseen.remarks, _KIND_REMARKS[kind])
        )


def left_out(excluded: Mapping[str, int]) -> list[str]:
    """Return a remark about images that were used in training, if there are any."""
    return [f"images left out: {_counted(excluded)}."] if excluded else []


def _counted(excluded: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {_ROLES[role]}" for role, count in excluded.items())


def _not_empty(suites: Sequence[Suite], spec: str) -> list[Suite]:
    """Return the suites that have images left, and warn about the others."""
    kept = [suite for suite in suites if len(suite.indices)]
    if not kept:
        raise EdgekdError(
            f"No image of {spec} is left to measure: {_counted(suites[0].excluded)}.",
            "Give images that were not used in training.",
        )
    for suite in suites:
        if not len(suite.indices):
            warn(f"{suite.name} is left out: of its images {_counted(suite.excluded)}.")
    return kept


def lone_suites(images: ImageSet, source: dict[str, Any]) -> tuple[list[Suite], Trained]:
    """Return suites for an artifact without its run, and the known facts about its training.

    The split is recomputed with the rule and the seed recorded in the artifact. If its hash matches, the images are
    those of the run and so are the suites. Otherwise each domain is a suite, named by `suite_kind` from the training
    domains recorded in the artifact.
    """
    trained = trained_of_source(source)
    if (split := _remade(images, source)) is not None:
        roles = trained_of_split(split.entries).roles
        return SuiteBuilder(images.classes, trained).split(images, split), replace(
            trained, roles=roles
        )
    suites = []
    for d, domain in enumerate(images.domains):
        title = images.name if images.domains == ("all",) else domain
        kind = suite_kind({title}, {}, trained)
        family: Family | None = "folder" if kind == "ood" else kind
        remarks: tuple[str, ...] = ("Without the run's split, these may include training images.",)
        if kind == "seen":
            remarks = (f"The artifact was trained on this domain: not a test result. {remarks[0]}",)
        elif kind == "adapted":
            remarks = (_KIND_REMARKS[kind],)
        elif plain_name(title) in trained.left_out:
            family, remarks = None, ()
        indices = np.flatnonzero(images.domain_of == d)
        suites.append(Suite(f"{kind}:{title}", images, indices, None, family, remarks))
    return suites, trained


def _remade(images: ImageSet, source: dict[str, Any]) -> Split | None:
    if "split_seed" not in source or source.get("split_hash") is None:
        return None
    try:
        split = make_split(
            images, test_domain=source.get("test_domain") or "none", seed=source["split_seed"]
        )
    except EdgekdError:
        return None  # other images, to which the rule does not apply
    return split if split.hash == source["split_hash"] else None


def clean_suite(inside: Suite, names: Collection[str], suite: str) -> Suite | None:
    """Return the ID images of these classes, with predictions restricted to them, as the `clean:` pair of `suite`."""
    images = inside.images
    wanted = [images.classes.index(name) for name in names if name in images.classes]
    indices = inside.indices[np.isin(inside.labels, wanted)]
    if not len(indices):
        return None
    place = {old: new for new, old in enumerate(wanted)}
    labels = np.asarray([place.get(int(label), 0) for label in images.labels], dtype=np.int64)
    fewer = replace(images, classes=tuple(images.classes[c] for c in wanted), labels=labels)
    remark = f"the in-domain images of the {len(wanted)} classes of {suite}, with predictions restricted to them."
    title = suite.partition(":")[2]
    return Suite(f"clean:{title}", fewer, indices, inside.run, "clean", (remark,))


def corruption_suites(inside: Suite, count: int = CORRUPTION_IMAGES) -> list[Suite]:
    """Return suites of 15 corruptions at 5 severities on up to `count` images, evenly spaced in the ID test images."""
    from edgekd.data.corruptions import NAMES, REMARKS, SEVERITIES

    chosen, remarks = inside.indices, tuple(REMARKS)
    if len(chosen) > count:
        chosen = chosen[np.linspace(0, len(chosen) - 1, count).round().astype(int)]
        remarks += (f"{count} of the {len(inside.indices)} in-domain test images, evenly spaced.",)
    cell = Suite("", inside.images, chosen, inside.run, "corruption", remarks)
    return [
        replace(cell, name=f"corruption:{name}:{severity}", corruption=(name, severity))
        for name in NAMES
        for severity in SEVERITIES
    ]


def named_folders(given: Sequence[str], option: str, what: str = "DIR") -> list[tuple[str, str]]:
    """Return `NAME=DIR` strings as pairs; another form, or a name given twice, is an `EdgekdError`."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or _NAME.fullmatch(name) is None:
            raise EdgekdError(
                f'"{text}" does not name a suite.',
                f"Write {option} NAME={what}, with letters, digits and . _ + - in the name.",
            )
        if name in pairs:
            raise EdgekdError(
                f'The suite "{name}" is given twice.', f"Give each {option} another name."
            )
        pairs[name] = folder
    return list(pairs.items())
