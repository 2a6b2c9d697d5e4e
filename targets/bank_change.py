"""Another class bank in an artifact's folder, in one step, with numpy alone: here and on a device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import inside, open_regular, parse_json, read_errors
from edgekd.targets.bank import BANK_FILE, ClassBank, read_bank

MANIFEST = "artifact.json"
LABELS = "labels.txt"


def change_bank(folder: Path, change: Callable[[ClassBank], ClassBank]) -> ClassBank:
    """Put a changed bank into an artifact's folder: complete or not at all, whenever it is interrupted.

    The new bank is written under a name of its own; the manifest, replaced in one rename, is what makes it the
    artifact's. Sessions that are open keep the classes they were opened with.

    Args:
        folder: the artifact's.
        change: the bank as it is → as it is to be.

    Returns:
        The new bank.

    Raises:
        EdgekdError: an artifact without a bank, an altered one, or one that somebody else changed meanwhile.
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
    # The last one entered is renamed first: the manifest never names a file that is not there.
    with _written(folder / MANIFEST, _json(changed)), _written(folder / new, data):
        if (folder / MANIFEST).read_bytes() != before:
            raise EdgekdError(
                f"Somebody else changed {folder} at the same time.", "Run the same command again."
            )
    if new != old:
        (folder / old).unlink()
    with _written(folder / LABELS, "".join(f"{name}\n" for name in bank.classes).encode()):
        pass
    return bank


def bank_file(manifest: Mapping[str, Any], folder: Path) -> str:
    """Name of the sidecar by the JSON of an `artifact.json`.

    Raises:
        EdgekdError: the artifact has none.
    """
    name, files = manifest.get("bank"), manifest.get("files")
    if not isinstance(name, str) or not isinstance(files, dict) or name not in files:
        raise EdgekdError(
            f"{folder} ends in the logits of fixed classes, so none can be added.",
            "Export with --head embedding.",
        )
    return name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[None]:
    """`data` at `path` in one rename when the block ends; nothing when it raises."""
    scratch = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(scratch, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            scratch.unlink()
