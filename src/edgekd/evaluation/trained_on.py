"""Images and domains that runs used in training, and the kinds of test suites that follow from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgekd.core.readers import plain_name
from edgekd.data.split import read_stored_split

SEEN_IN = ("train", "val", "unlabelled", "before")
"""Roles of `split.json` whose images are not test images."""
TESTED = "tested"
"""Role of images that are already in a suite of the run and would count twice."""
SuiteKind = Literal["ood", "seen", "adapted"]
LARGEST_OVERLAP = 0.1
"""If at least this share of a domain's images were used in training, the domain counts as trained."""


@dataclass(frozen=True)
class Trained:
    """Training data of one or several runs; domain names are compared without case, spaces, `_` and `-`.

    Attributes:
        roles: content key → `train`, `val` (used to select weights), `unlabelled`, `before` (in a run from which this
            one started), or `tested`.
        domains: domains with labelled training images.
        unlabelled_domains: domains with only unlabelled training images.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    domains: frozenset[str] = frozenset()
    unlabelled_domains: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()

    def excluded(self, keys: Iterable[str]) -> dict[str, int]:
        """Return role → number of these image contents with it, without zeros."""
        count = Counter(self.roles[key] for key in keys if key in self.roles)
        return {role: count[role] for role in (*SEEN_IN, TESTED) if count[role]}

    def with_tested(self, keys: Iterable[str]) -> Trained:
        """Return the same with further image contents as `tested`."""
        return replace(self, roles=dict.fromkeys(keys, TESTED) | dict(self.roles))


def _plain(names: Iterable[str]) -> frozenset[str]:
    return frozenset(map(plain_name, names))


def read_trained(path: Path) -> Trained:
    """Read the training data of a run from its `split.json`."""
    stored = read_stored_split(path)
    domains: Iterable[str] | None = stored.train_domains
    if domains is None:  # an older split.json: the ids of domain/class/image folders have them
        domains = {name.split("/")[0] for name in stored.roles["train"] if name.count("/") >= 2}
    return replace(
        trained_of_split(stored.roles),
        domains=_plain(domains),
        unlabelled_domains=_plain(stored.unlabelled_domains),
        left_out=_plain([] if stored.test_domain is None else [stored.test_domain]),
    )


def trained_of_split(roles: Mapping[str, Mapping[str, str]]) -> Trained:
    """Return the image contents of a split's roles, each role {image id: content key}, without domains."""
    return Trained(
        {key: role for role in reversed(SEEN_IN) for key in roles.get(role, {}).values()}
    )


def trained_of_source(source: Mapping[str, Any]) -> Trained:
    """Return the training domains recorded in an artifact without its run; image contents are not known."""
    left_out = source.get("test_domain")
    return Trained(
        {},
        _plain(name for name in source.get("train_domains") or () if name != "all"),
        _plain(source.get("unlabelled_domains") or ()),
        _plain([] if left_out is None else [left_out]),
    )


def all_trained(parts: Sequence[Trained]) -> Trained:
    """Return the union of the training data of several runs; roles have the priority of `SEEN_IN`."""
    return Trained(
        {
            key: role
            for wanted in reversed(SEEN_IN)
            for part in parts
            for key, role in part.roles.items()
            if role == wanted
        },
        frozenset().union(*(part.domains for part in parts)),
        frozenset().union(*(part.unlabelled_domains for part in parts)),
        frozenset().union(*(part.left_out for part in parts)),
    )


def suite_kind(names: Collection[str], overlap: Mapping[str, float], trained: Trained) -> SuiteKind:
    """Return whether a domain counts as unseen (`ood`), trained (`seen`) or trained without labels (`adapted`).

    Args:
        names: names of the domain: of its folder and of the suite.
        overlap: role → share 0–1 of the domain's images that have the role.
    """
    labelled = sum(overlap.get(role, 0.0) for role in ("train", "val", "before"))
    if _plain(names) & trained.domains or labelled > LARGEST_OVERLAP:
        return "seen"
    unlabelled = overlap.get("unlabelled", 0.0)
    if _plain(names) & trained.unlabelled_domains or unlabelled > LARGEST_OVERLAP:
        return "adapted"
    return "ood"
