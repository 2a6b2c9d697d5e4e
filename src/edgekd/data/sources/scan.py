"""List the images of a source by the folder conventions, before any file is opened.

Layouts: `class/img`, `domain/class/img` (DomainBed), `train|val|test/class/img`. Hidden files and folders are skipped.
Links are followed, except in cycles.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgekd.core.console import Tally
from edgekd.core.errors import EdgekdError, check_known, did_you_mean
from edgekd.core.readers import like_names, printable, read_text
from edgekd.data.images import EXTENSIONS
from edgekd.data.sources.layouts import whole_parts

ROLES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CONVENTIONS = "edgekd reads class/image, domain/class/image, train|val|test/class/image, or a .csv/.parquet manifest."
_DEEPEST = 4
_OUTSIDE = "image outside a class folder"


@dataclass(frozen=True)
class Entry:
    """An image of a listing; `path` is relative to the root, `domain` and `role` are optional."""

    path: str
    label: str
    domain: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Listing:
    """The images found under `root`, sorted by path.

    Attributes:
        folders: class folders, including empty ones.
        left_out: files that are not images.
    """

    root: Path
    entries: tuple[Entry, ...]
    folders: tuple[str, ...] = ()
    left_out: Tally = field(default_factory=Tally)


def list_folder(root: Path) -> Listing:
    """List the images of `root`, with the layout determined by their depth.

    Raises:
        EdgekdError: there are no images, images at several depths or too deep, or role folders next to others.
    """
    left_out = Tally()
    images: dict[tuple[str, ...], list[str]] = {}
    for parts, names in walk(root):
        images[parts] = kept = []
        for name in names:
            if is_image(name) and parts:
                kept.append(name)
            elif is_image(name):
                left_out.add(_OUTSIDE, shown(name))
            elif parts:
                left_out.add(file_ending(name), shown("/".join((*parts, name))))
    depths: dict[int, str] = {}
    for parts, kept in images.items():
        if kept:
            depths.setdefault(len(parts), shown("/".join((*parts, kept[0]))))
    if not depths:
        _refuse_empty(root, left_out)
    if len(depths) > 1:
        raise EdgekdError(
            f"Images in {root} are at different depths: {' and '.join(depths.values())}.",
            f"Move them to one depth; {CONVENTIONS}",
        )
    depth, example = next(iter(depths.items()))
    if depth == 3 and (
        whole := whole_parts((parts[0], parts[1]) for parts, kept in images.items() if kept)
    ):
        images = {
            parts: kept for parts, kept in images.items() if kept and (parts[0], parts[1]) in whole
        }
    elif depth > 2:
        raise EdgekdError(
            f"Images in {root} are {depth} folders deep, such as {example}.", CONVENTIONS
        )
    tops = sorted({parts[0] for parts in images if len(parts) == depth})
    for parts in images:
        if len(parts) == 1 and parts[0] not in tops:
            left_out.add("folder without class folders", shown(parts[0]))
    roles = _role_folders(root, tops) if depth == 2 else None
    entries = [
        Entry(
            path="/".join((*parts, name)),
            label=parts[-1],
            domain=parts[0] if depth >= 2 and roles is None else None,
            role=roles[parts[0]] if roles is not None else None,
        )
        for parts, kept in images.items()
        if len(parts) == depth
        for name in kept
    ]
    folders = sorted({parts[-1] for parts in images if len(parts) == depth})
    ordered = tuple(sorted(entries, key=lambda entry: entry.path))
    return Listing(root, ordered, tuple(folders), left_out)


def list_all(root: Path) -> Listing:
    """Return all images at most 32 folders below `root`, without labels; raise `EdgekdError` if there are none."""
    entries, left_out = [], Tally()
    for parts, names in walk(root, deepest=32):
        for name in names:
            path = "/".join((*parts, name))
            if is_image(name):
                entries.append(Entry(path, ""))
            else:
                left_out.add(file_ending(name), shown(path))
    if not entries:
        raise EdgekdError(
            f"{root} has no images{f' ({left_out})' if left_out.reasons else ''}.",
            f"Images end in {', '.join(sorted(EXTENSIONS))}.",
        )
    ordered = tuple(sorted(entries, key=lambda entry: entry.path))
    return Listing(root, ordered, left_out=left_out)


def role_of(split: str, place: str) -> str:
    """Return the role of a split name; an unknown name is an `EdgekdError` that mentions `place`."""
    check_known(split.lower(), ROLES, f'{place} has the split "{printable(split)}".')
    return ROLES[split.lower()]


def is_image(name: str) -> bool:
    """Return whether a file name has the extension of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def file_ending(name: str) -> str:
    """Return the reason for skipping a file that is not an image."""
    return f"file ending {os.path.splitext(name)[1].lower() or 'in nothing'}"


def shown(path: str) -> str:
    """Return a path as printable text that can be stored as UTF-8.

    Control characters are escaped.
    """
    try:
        return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))
    except UnicodeEncodeError:  # a lone surrogate, from a manifest
        return printable(path)


def shown_names(paths: Iterable[str]) -> tuple[str, ...]:
    """Return `shown` of each path, with numbers for duplicates."""
    names: dict[str, None] = {}
    for path in paths:
        name, number = shown(path), 1
        while name in names:
            number += 1
            name = f"{shown(path)} ({number})"
        names[name] = None
    return tuple(names)


def walk(
    folder: Path,
    *,
    deepest: int = _DEEPEST,
    parts: tuple[str, ...] = (),
    above: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield (folder names below the first one, file names), sorted; `above` has the real paths of parent folders."""
    above = above or (os.path.realpath(folder),)
    names, folders = [], []
    try:
        with os.scandir(folder) as found:
            for item in found:
                if item.name.startswith(".") or item.name.lower() in (
                    "thumbs.db",
                    "desktop.ini",
                    "__macosx",
                ):
                    continue
                # os.path does not raise for a link that points at itself, as the entry does.
                if os.path.isdir(item.path) if item.is_symlink() else item.is_dir():
                    folders.append(item.name)
                elif os.path.isfile(item.path) if item.is_symlink() else item.is_file():
                    names.append(item.name)
                elif item.is_symlink() and not os.path.exists(item.path):
                    # A dangling link is reported as missing when it is opened; pipes and devices are never opened.
                    names.append(item.name)
    except PermissionError as error:
        raise EdgekdError(f"The folder {folder} cannot be read.", "Fix its permissions.") from error
    yield parts, sorted(names)
    if len(parts) == deepest:
        return
    for name in sorted(folders):
        real = os.path.realpath(folder / name)
        if real not in above:
            yield from walk(
                folder / name, deepest=deepest, parts=(*parts, name), above=(*above, real)
            )


def _refuse_empty(root: Path, left_out: Tally) -> None:
    if _OUTSIDE in left_out.reasons:
        raise EdgekdError(
            f"The images in {root} are not in class folders.",
            f"Make one folder per class; {CONVENTIONS}",
        )
    kinds = f" ({left_out})" if left_out.reasons else ""
    raise EdgekdError(f"The folder {root} has no images{kinds}.", CONVENTIONS)


def _role_folders(root: Path, tops: list[str]) -> dict[str, str] | None:
    """Return folder name → role if the top level is train/val/test, or None if it has domains."""
    roles = {top: ROLES[top.lower()] for top in tops if top.lower() in ROLES}
    if "train" not in roles.values():
        return None
    others = [top for top in tops if top not in roles]
    if others:
        raise EdgekdError(
            f"In {root}, the folder {others[0]} is next to train, where only val and test are allowed.",
            "Move it away, or describe domains and splits in a manifest with the columns path,label,domain,split.",
        )
    if len(set(roles.values())) < len(roles):
        raise EdgekdError(
            f"{root} has two folders for one role: {', '.join(sorted(roles))}.", "Keep one of them."
        )
    return roles


def order_classes(names: set[str]) -> list[str]:
    """Return the sorted names, by value if all are numbers, so that folder 10 is class 10."""
    if all(name.isdecimal() and len(name) < 1000 for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def display_names(root: Path, classes: list[str]) -> tuple[str, ...]:
    """Return the class names from `classes.txt` in `root`, or the folder names (manifest labels) if there is none.

    Lines are either one name per sorted folder, or `folder<TAB>name` in any order. Blank lines are ignored.

    Raises:
        EdgekdError: the lines do not match the folders, or two names are equal.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return tuple(shown(name) for name in classes)
    text = read_text(path, "list of classes", "Save it as UTF-8, one class name per line.")
    # Tabs are separators; other control characters are not allowed in names.
    lines = [
        "\t".join(printable(part) for part in line.strip().split("\t"))
        for line in text.splitlines()
        if line.strip()
    ]
    if len(lines) != len(classes):
        raise EdgekdError(
            f"{path} has {len(lines)} class names, but there are {len(classes)} classes.",
            "Write one line per class folder, in sorted order, or folder<TAB>name lines.",
        )
    pairs = [line.split("\t", 1) for line in lines]
    if any(len(pair) == 2 for pair in pairs):
        names: dict[str, str] = {}
        for number, (folder, *name) in enumerate(pairs, start=1):
            folder = folder.strip()
            if not name:
                raise EdgekdError(
                    f"Line {number} of {path} has no tab.", "Write folder<TAB>name on every line."
                )
            if folder not in classes or folder in names:
                again = " again" if folder in names else ""
                raise EdgekdError(
                    f'Line {number} of {path} names "{folder}"{again}.',
                    did_you_mean(folder, classes),
                )
            names[folder] = name[0].strip()
        chosen = tuple(names[folder] for folder in classes)
    else:
        chosen = tuple(lines)
    if alike := like_names(chosen):
        names_said = " and ".join(f'"{name}"' for name in dict.fromkeys(alike[0]))
        raise EdgekdError(
            f"{path} gives two classes the name {names_said}.",
            "Use different names; case, spaces, hyphens and underscores are ignored.",
        )
    return chosen
