"""Class names as people write them (the device agent carries this module)."""

from __future__ import annotations

from collections.abc import Iterable


def plain_name(name: str) -> str:
    """Return the name without what people write differently: case, spaces, underscores and hyphens."""
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()


def like_names(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return groups of names that differ in case, spaces, hyphens and underscores only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plain_name(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]
