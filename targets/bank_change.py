"""Classes that are added to an exported artifact, or taken out again: numpy alone, here and on a device."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import inside, open_regular, parse_json, printable, read_errors
from edgekd.data.images import EXTENSIONS, UnreadableImage, read_bytes
from edgekd.targets.agent.store import written
from edgekd.targets.bank import BANK_FILE, ClassBank, read_bank
from edgekd.targets.session import Session

MANIFEST = "artifact.json"
LABELS = "labels.txt"


def change_bank(folder: Path, change: Callable[[ClassBank], ClassBank]) -> ClassBank:
    """Put a changed bank into an artifact's folder, complete or not at all, whenever it is interrupted; return it.

    The new bank is written under a name of its own; the manifest, replaced in one rename, is what makes it the
    artifact's. Sessions that are open keep the classes they were opened with. A bank that is missing, altered, or
    changed meanwhile is an `EdgekdError`.
    """
    path = folder / MANIFEST
    with read_errors(path, "artifact", "JSON"), open_regular(path) as handle:
        before = handle.read()
        manifest = parse_json(before)
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
    old = bank_file(manifest, folder)
    if (
        not inside(folder, old).is_file()
        or _digest((folder / old).read_bytes()) != manifest["files"][old]
    ):
        raise EdgekdError(
            f"{folder / old} is not the file that {MANIFEST} names.", "Copy the artifact again."
        )
    bank = change(read_bank(folder / old))
    data = bank.to_bytes()
    digest = _digest(data)
    new = f"{Path(BANK_FILE).stem}-{digest[:8]}.npz"
    files = {
        new if name == old else name: digest if name == old else known
        for name, known in manifest["files"].items()
    }
    changed = {**manifest, "bank": new, "files": files, "classes": list(bank.classes)}
    text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    # The last one entered is renamed first: the manifest never names a file that is not there.
    with written(folder / MANIFEST, text.encode()), written(folder / new, data):
        if (folder / MANIFEST).read_bytes() != before:
            raise EdgekdError(
                f"Somebody else changed {folder} at the same time.", "Run the same command again."
            )
    if new != old:
        (folder / old).unlink()
    with written(folder / LABELS, "".join(f"{name}\n" for name in bank.classes).encode()):
        pass
    return bank


def bank_file(manifest: Mapping[str, Any], folder: Path) -> str:
    """Return the name of the sidecar by the JSON of an `artifact.json`; without one it is an `EdgekdError`."""
    name, files = manifest.get("bank"), manifest.get("files")
    if not isinstance(name, str) or not isinstance(files, dict) or name not in files:
        raise EdgekdError(
            f"{folder} ends in the logits of fixed classes, so none can be added.",
            "Export with --head embedding.",
        )
    return name


def add_by_images(folder: Path, name: str, places: Sequence[Path], session: Session) -> ClassBank:
    """Add the class `name` to the artifact in `folder`, opened as `session`: the mean of its images' embeddings."""
    contents = [content(path) for path in _files(places)]
    digests = [_digest(content) for content in contents]
    embeddings = np.stack([session.embed(session.prepare(one)[None])[0] for one in contents])
    name = printable(name)

    def with_it(bank: ClassBank) -> ClassBank:
        found = recognised(bank, embeddings)
        how = provenance(
            "images", images=digests, **({} if found is None else {"recognised_left_out": found})
        )
        return bank.with_class(name, bank.of_images(embeddings), how)

    return change_bank(folder, with_it)


def recognised(bank: ClassBank, embeddings: NDArray[np.float32]) -> int | None:
    """Return how many of a new class's images `[N, D]` get it from the mean of the others, beside the bank's classes.

    None for a single image.
    """
    if len(embeddings) < 2:
        return None
    found = 0
    for left in range(len(embeddings)):
        vector = bank.of_images(np.delete(embeddings, left, axis=0))
        old = bank.logits(embeddings[left : left + 1]).max()
        found += int(bank.logit_scale * float(vector @ embeddings[left]) > old)
    return found


def describe_last(bank: ClassBank) -> str:
    """Return what the last added class means in practice, in a sentence."""
    entry = bank.facts["added"][-1]
    if "recognised_left_out" in entry:
        known, images = entry["recognised_left_out"], len(entry["images"])
        return f"{known} of its {images} images are recognised by the others of them"
    if entry["by"] == "images":
        return "one image represents a class poorly; with a few more its recall is estimated"
    return "a class without images seldom wins against trained ones; measure it on images of it, or add it by some"


def provenance(by: str, **facts: Any) -> dict[str, Any]:
    """Return the entry of `added` in a bank's facts: how a class was added, when and where."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017  Python 3.9 has no datetime.UTC
    return {"by": by, **facts, "at": now, "on": platform.node()}


def content(path: Path) -> bytes:
    """Return the bytes of an image file; an `EdgekdError` where it is missing, no regular file or too large."""
    try:
        return read_bytes(path)
    except UnreadableImage as error:
        raise EdgekdError(f"{path} cannot be read: {error.reason}.", "Leave it out.") from error


def _files(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.iterdir() if path.suffix.lower() in EXTENSIONS)
        elif place.is_file():
            found.append(place)
        else:
            raise EdgekdError(
                f"There is no image at {place}.", "Name images, or a folder of images."
            )
    if not found:
        raise EdgekdError(
            f"There are no images in {', '.join(map(str, places)) or 'what was named'}.",
            "Five to twenty will do.",
        )
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
