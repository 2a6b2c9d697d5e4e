"""Further text files a run may be given: the label set it distils for, and a caption per image."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import parse_json, printable, read_text
from edgekd.distill.prompts import readable


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Names, one per line; empty lines and lines that begin with # are left out.

    Raises:
        EdgekdError: unreadable, fewer than two names, a name twice (after `_` → space, without case).
    """
    text = read_text(path, "vocabulary", "Check --vocabulary.")
    lines = [printable(line.strip()) for line in text.splitlines()]
    names = tuple(line for line in lines if line and not line.startswith("#"))
    twice = [
        name
        for name, count in Counter(readable(name).lower() for name in names).items()
        if count > 1
    ]
    if twice:
        raise EdgekdError(
            f"The vocabulary {path} has the same name more than once: {', '.join(twice[:8])}.",
            "Two equal rows would share what the teacher sees in them; keep one.",
        )
    if len(names) < 2:
        raise EdgekdError(
            f"The vocabulary {path} has fewer than two names.",
            "Write one per line.",
        )
    return names


def read_captions(path: Path, ids: Sequence[str]) -> list[str]:
    """The caption of each image of `ids`, from a JSON object (id → caption) or a CSV with columns image and caption.

    Raises:
        EdgekdError: unreadable, an image without a caption or with two.
    """
    text = read_text(path, "captions file", "Check --captions.")
    if path.suffix.lower() == ".json":
        try:
            entries = parse_json(text, pairs=True)
        except ValueError as error:
            raise EdgekdError(
                f"{path} is not valid JSON ({error}).", "Write image ids mapped to captions."
            ) from error
        pairs = (
            [entry for entry in entries if isinstance(entry, tuple)]
            if isinstance(entries, list)
            else []
        )
    else:
        rows = csv.DictReader(text.splitlines())
        try:
            if not {"image", "caption"} <= set(rows.fieldnames or ()):
                raise EdgekdError(
                    f"{path} lacks a column image or caption.",
                    "Its first line must be: image,caption.",
                )
            pairs = [(row["image"], row["caption"]) for row in rows]
        except csv.Error as error:
            raise EdgekdError(
                f"{path} is not readable CSV ({error}).", "Write lines of image,caption."
            ) from error
    found: dict[str, str] = {}
    for name, caption in pairs:
        if name in found:
            raise EdgekdError(f"{path} has two captions for {name}.", "Keep one.")
        if isinstance(caption, str) and caption.strip():
            found[name] = caption.strip()
    missing = [name for name in ids if name not in found]
    if missing:
        raise EdgekdError(
            f"{path} has no caption for {len(missing):,} of {len(ids):,} training images, for example {missing[0]}.",
            "Images are named by their path inside the data folder, with forward slashes.",
        )
    return [found[name] for name in ids]
