"""The split of images into train, val, ID test and OOD test, which is stored with the run.

Each group (one class of one domain) is sorted by a hash of the seed and the image's content, then split 80/10/10. The
split therefore does not depend on file names or folders, and added images only move those at the two boundaries.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from edgekd.core.console import Tally, warn
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.files import short_hash, write_json
from edgekd.core.readers import printable_values, read_object
from edgekd.data.image_set import ImageSet, some

ROLES = ("train", "val", "id_test", "ood_test")
_SCHEMA_VERSION = 1
_HELD_OUT = 10
"""One in this number of images is used for val, and as many for id_test."""


@dataclass(frozen=True, eq=False)
class Split:
    """Sorted int64 indices into an `ImageSet`, with the rule of the split.

    Attributes:
        train, val, id_test: images of the source domains.
        ood_test: all images of `test_domain`, the domain left out; empty if there is none.
        rule: the rule of the split, as a sentence.
        seed: seed of the order within a group.
        hash: 16 hex digits, a hash of contents and roles that does not depend on paths.
        entries: role → image id → content key, as in `split.json`.
        train_domains: sorted; empty if the data has no domains.
    """

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    id_test: NDArray[np.int64]
    ood_test: NDArray[np.int64]
    test_domain: str | None
    rule: str
    seed: int
    hash: str
    entries: dict[str, dict[str, str]]
    train_domains: tuple[str, ...] = ()
    unlabelled: Mapping[str, str] = field(default_factory=dict)
    """Image id → content key of unlabelled training images, which have no role and are not in the hash."""
    unlabelled_domains: tuple[str, ...] = ()
    """Possible names of domains with unlabelled training images: names of sources and their top-level folders."""
    before: Mapping[str, str] = field(default_factory=dict)
    """Content key → content key of every training image of the runs from which this one started."""

    def write(self, path: Path) -> None:
        """Write `split.json`: schema_version, rule, seed, test_domain, train_domains, hash, roles {image id: key}."""
        write_json(
            path,
            {
                "schema_version": _SCHEMA_VERSION,
                "rule": self.rule,
                "seed": self.seed,
                "test_domain": self.test_domain,
                "train_domains": list(self.train_domains),
                "hash": self.hash,
                "roles": self.entries
                | ({"unlabelled": self.unlabelled} if self.unlabelled else {})
                | ({"before": self.before} if self.before else {}),
                "unlabelled_domains": list(self.unlabelled_domains),
            },
        )


def with_roles(images: ImageSet, split: Split, rule: str, **roles: list[int]) -> Split:
    """Return the split with the given roles replaced and a sentence appended to its rule."""
    chosen = {role: getattr(split, role).tolist() for role in ROLES} | roles
    return build_split(
        images, chosen, test_domain=split.test_domain, rule=f"{split.rule} {rule}", seed=split.seed
    )


def make_split(images: ImageSet, *, test_domain: str = "auto", seed: int = 0) -> Split:
    """Split `images`.

    With several domains, one is left out as `ood_test`. Each class of each other domain is split 80/10/10 into train,
    val and id_test, or as given by folders or a manifest. One or two images of a class give one training image. Equal
    contents are never on both sides: images that are also in a given test set or in the unseen domain are not used.

    Args:
        test_domain: a domain's name, `auto` (the alphabetically last one, or none if there is only one) or `none`.

    Raises:
        EdgekdError: the domain is unknown, a class has no training image, or there are too few images.
    """
    left_out = _left_out(images, test_domain)
    out_index = -1 if left_out is None else images.domains.index(left_out)
    is_ood = images.domain_of == out_index
    ood_keys = {key for key, out in zip(images.keys, is_ood.tolist(), strict=True) if out}
    inside = np.flatnonzero(~is_ood).tolist()
    source = [index for index in inside if images.keys[index] not in ood_keys]
    clashing = [index for index in inside if images.keys[index] in ood_keys]
    _warn_dropped(images, clashing, f"content that is also in {left_out}")
    if images.roles is None:
        chosen = _cut_groups(images, source, seed)
        cut = "each class of each domain is cut 80/10/10 by content hash"
        if len(images.domains) == 1:
            cut = "each class is cut 80/10/10 by content hash"
        elif left_out is not None:
            cut = cut.replace("each domain", "each other domain")
    else:
        chosen, cut = _as_given(images, source, seed)
    outside = (
        f"All of domain {left_out} is ood_test" if left_out is not None else "No domain is left out"
    )
    chosen["ood_test"] = np.flatnonzero(is_ood).tolist()
    split = build_split(
        images,
        chosen,
        test_domain=left_out,
        rule=f"{outside}; {cut} into train, val and id_test.",
        seed=seed,
    )
    _check(images, split)
    return split


def _left_out(images: ImageSet, wanted: str) -> str | None:
    """Return the unseen domain, or None."""
    layered = images.domains != ("all",)
    if wanted == "none" or (wanted == "auto" and not layered):
        return None
    if wanted != "auto" and not layered:
        raise EdgekdError(
            f'{images.name} has no domains, so "{wanted}" cannot be left out.',
            "Use --test-domain none.",
        )
    if wanted != "auto":
        check_known(wanted, images.domains, f'{images.name} has no domain "{wanted}".')
    if len(images.domains) == 1:
        raise EdgekdError(
            f"{images.name} has only one domain, {images.domains[0]}, and it is needed for training.",
            "Use --test-domain none to split it only in domain.",
        )
    return images.domains[-1] if wanted == "auto" else wanted


def shuffled(images: ImageSet, indices: Iterable[int], seed: int) -> list[int]:
    """Return the indices in the order of SHA-256(seed, content key)."""
    return sorted(
        indices, key=lambda i: (hashlib.sha256(f"{seed}:{images.keys[i]}".encode()).digest(), i)
    )


def grouped(images: ImageSet, indices: Iterable[int]) -> list[list[int]]:
    """Return one list per (domain, class), with the first image of each content."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    seen: set[str] = set()
    for index in indices:
        if images.keys[index] not in seen:
            seen.add(images.keys[index])
            groups[int(images.domain_of[index]), int(images.labels[index])].append(index)
    return [groups[place] for place in sorted(groups)]


def _with_copies(
    images: ImageSet, pool: list[int], role_of: dict[str, str]
) -> dict[str, list[int]]:
    """Return role → indices of `pool` whose content has the role."""
    chosen: dict[str, list[int]] = {role: [] for role in ROLES}
    for index in pool:
        chosen[role_of[images.keys[index]]].append(index)
    return chosen


def _portion(count: int) -> int:
    """Return a tenth of `count`, with halves rounded up, and at least one."""
    return max(1, math.floor(count / _HELD_OUT + 0.5))


def _cut_groups(images: ImageSet, source: list[int], seed: int) -> dict[str, list[int]]:
    role_of: dict[str, str] = {}
    for group in grouped(images, source):
        order = shuffled(images, group, seed)
        held = _portion(len(order))
        if len(order) == 1:
            roles = ["train"]
        elif len(order) == 2:
            # Too few for val and id_test: the content hash determines which one gets the second image.
            roles = ["train", "val" if int(images.keys[order[1]], 16) % 2 else "id_test"]
        else:
            roles = ["val"] * held + ["id_test"] * held + ["train"] * (len(order) - 2 * held)
        role_of |= {images.keys[index]: role for index, role in zip(order, roles, strict=True)}
    return _with_copies(images, source, role_of)


def _as_given(images: ImageSet, source: list[int], seed: int) -> tuple[dict[str, list[int]], str]:
    """Return the roles given by the data; a missing set is a tenth of train."""
    assert images.roles is not None
    given: dict[str, list[int]] = {"test": [], "val": [], "train": []}
    holder: dict[str, str] = {}
    for role, indices in given.items():
        for index in source:
            if images.roles[index] == role and holder.setdefault(images.keys[index], role) == role:
                indices.append(index)
    clashing = {index for index in source if holder[images.keys[index]] != images.roles[index]}
    _warn_dropped(images, sorted(clashing), "content that is also held out")
    role_of = {key: {"test": "id_test"}.get(role, role) for key, role in holder.items()}
    missing = [role for role in ("val", "test") if not given[role]]
    for role in missing:
        name = "id_test" if role == "test" else role
        for group in grouped(
            images, (i for i in given["train"] if role_of[images.keys[i]] == "train")
        ):
            if len(group) > 1:
                held = shuffled(images, group, seed)[: _portion(len(group))]
                role_of |= {images.keys[index]: name for index in held}
    rule = "the data's own train, val and test are used"
    if missing:
        rule += f", with a tenth of train by content hash for the missing {' and '.join(missing)},"
    pool = [index for index in source if index not in clashing]
    return _with_copies(images, pool, role_of), rule


def _warn_dropped(images: ImageSet, indices: list[int], reason: str) -> None:
    dropped = Tally()
    for index in indices:
        dropped.add(reason, images.ids[index])
    dropped.warn(f"images of {images.name} left out of the split")


def build_split(
    images: ImageSet, chosen: dict[str, list[int]], *, test_domain: str | None, rule: str, seed: int
) -> Split:
    """Return a split of these indices per role, with its hash."""
    arrays = {role: np.array(sorted(chosen[role]), dtype=np.int64) for role in ROLES}
    entries = {
        role: {images.ids[i]: images.keys[i] for i in arrays[role].tolist()} for role in ROLES
    }
    trained = {images.domains[d] for d in images.domain_of[arrays["train"]].tolist()} - {"all"}
    return Split(
        train=arrays["train"],
        val=arrays["val"],
        id_test=arrays["id_test"],
        ood_test=arrays["ood_test"],
        test_domain=test_domain,
        rule=rule,
        seed=seed,
        hash=_hash(entries),
        entries=entries,
        train_domains=tuple(sorted(trained)),
    )


def _hash(entries: dict[str, dict[str, str]]) -> str:
    return short_hash(*sorted(f"{role}:{key}" for role in ROLES for key in entries[role].values()))


def _check(images: ImageSet, split: Split) -> None:
    trained = set(images.labels[split.train].tolist())
    untrained = [name for index, name in enumerate(images.classes) if index not in trained]
    if untrained:
        where = f" when {split.test_domain} is left out" if split.test_domain is not None else ""
        raise EdgekdError(
            f"No training image is left{where} for {len(untrained)} of {len(images.classes)} classes: "
            f"{some(untrained)}.",
            "Add images of them, remove them"
            + (", or leave out another domain with --test-domain." if where else "."),
        )
    for role, indices in (("val", split.val), ("id_test", split.id_test)):
        if not len(indices):
            raise EdgekdError(
                f"{images.name} has too few images to hold out any for {role}.",
                "Give at least 3 different images per class and domain.",
            )


def read_split(path: Path, images: ImageSet) -> Split:
    """Return the split of a `split.json`, finding its images in `images` by id and content, or only by content.

    Raises:
        EdgekdError: the file is not a split, or an image is missing or was changed.
    """
    stored = read_stored_split(path)
    entries = {role: stored.roles[role] for role in ROLES}
    if _hash(entries) != stored.hash:
        raise EdgekdError(
            f"The split at {path} was changed, since its hash differs.",
            "Restore the original file.",
        )
    chosen = _located(path, images, entries)
    used = {index for indices in chosen.values() for index in indices}
    without_label = set(stored.roles.get("unlabelled", {}).values())
    unused = sum(
        index not in used and key not in without_label for index, key in enumerate(images.keys)
    )
    if unused:
        warn(f"{unused} images of {images.name} are not in {path}; they are not used.")
    split = build_split(
        images, chosen, test_domain=stored.test_domain, rule=stored.rule, seed=stored.seed
    )
    return replace(
        split,
        unlabelled=stored.roles.get("unlabelled", {}),
        unlabelled_domains=stored.unlabelled_domains,
        before=stored.roles.get("before", {}),
    )


class StoredSplit(BaseModel):
    """Content of `split.json`, with control characters in texts escaped."""

    model_config = ConfigDict(frozen=True)
    rule: str
    seed: int
    test_domain: str | None
    hash: str
    roles: dict[str, dict[str, str]]
    """Role → image id → content key: `ROLES`, and if applicable `unlabelled` and `before` (images of earlier runs)."""
    train_domains: tuple[str, ...] | None = None
    """None in a file of an earlier version."""
    unlabelled_domains: tuple[str, ...] = ()

    @field_validator("roles")
    @classmethod
    def _has_all(cls, roles: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        if not set(ROLES) <= set(roles):
            raise ValueError("a role is missing")
        return roles


def read_stored_split(path: Path) -> StoredSplit:
    """Read a `split.json` without images; a missing or damaged file, or another version, is an `EdgekdError`."""
    data = printable_values(read_object(path, "split"))
    if data.get("schema_version") != _SCHEMA_VERSION:
        raise EdgekdError(
            f"The split at {path} has schema version {str(data.get('schema_version'))[:20]}, not {_SCHEMA_VERSION}.",
            "Use the edgekd that wrote it.",
        )
    try:
        return StoredSplit.model_validate(data)
    except ValidationError as error:
        raise EdgekdError(
            f"The split at {path} is damaged.", "Restore it, or train again with --overwrite."
        ) from error


def _located(
    path: Path, images: ImageSet, stored: dict[str, dict[str, str]]
) -> dict[str, list[int]]:
    by_name = {
        (name, key): index
        for index, (name, key) in enumerate(zip(images.ids, images.keys, strict=True))
    }
    free: dict[str, list[int]] = defaultdict(list)
    named = {(name, key) for names in stored.values() for name, key in names.items()}
    for place, index in by_name.items():
        if place not in named:
            free[place[1]].append(index)
    names_now = set(images.ids)
    chosen: dict[str, list[int]] = {role: [] for role in ROLES}
    lost: list[tuple[str, str]] = []
    for role, names in stored.items():
        for name, key in names.items():
            if (name, key) in by_name:
                chosen[role].append(by_name[name, key])
            elif free[key]:
                chosen[role].append(free[key].pop(0))
            else:
                lost.append((name, "altered" if name in names_now else "gone"))
    if lost:
        count = Counter(state for _, state in lost)
        kinds = " and ".join(
            f"{count[state]} {state}" for state in ("gone", "altered") if count[state]
        )
        raise EdgekdError(
            f"The split at {path} does not fit {images.name}: {kinds}, for example {lost[0][0]} ({lost[0][1]}).",
            "Restore those images, or start a new run on the data as it is now.",
        )
    return chosen
