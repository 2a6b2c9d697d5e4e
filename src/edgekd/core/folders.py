"""Output folders with one writer at a time, in which only files of edgekd are removed."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors, sweep
from edgekd.core.readers import read_json, read_text

LOCK = ".running.lock"
"""Lock file of a folder that is filled step by step: a run, a study."""
CLAIM = ".claim.lock"
"""Lock file of a study's folder while its settings are written."""
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class Kind:
    """A kind of output folder.

    Attributes:
        marker: the file by which such a folder is recognised.
        keys: required keys of a JSON marker, since a `config.json` may belong to another program.
        patterns: `fnmatch` patterns of entries that edgekd writes, besides those listed in the marker's key `files`.
        early: entries written before the first checkpoint.
        loggers: logger → its entries, if the marker lists it; also written before the first checkpoint.
        text: required text in a marker that is not JSON.
    """

    name: str
    marker: str
    keys: tuple[str, ...]
    patterns: tuple[str, ...]
    early: tuple[str, ...] = ()
    text: str = ""
    loggers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def is_at(self, folder: Path) -> bool:
        """Return whether `folder` is of this kind."""
        marker = folder / self.marker
        if not marker.is_file() or not all(key in _fields(marker) for key in self.keys):
            return False
        with contextlib.suppress(EdgekdError):
            return not self.text or self.text in read_text(marker, "marker of a folder")
        return False

    def owned(self, folder: Path) -> list[str]:
        """Return the sorted names of the entries of `folder` that edgekd wrote."""
        fields = _fields(folder / self.marker)
        files = fields.get("files") if "files" in self.keys else None
        listed = (
            {str(name).partition("/")[0] for name in files}
            if isinstance(files, (dict, list))
            else set()
        )
        patterns = (self.marker, *self.early, *self.patterns)
        used = fields.get("logger")
        for name, entries in self.loggers.items():
            if isinstance(used, list) and name in used:
                listed.update(entries)
        return sorted(
            name
            for name in os.listdir(folder)
            if name in listed or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        )

    def stopped_at_start(self, folder: Path) -> bool:
        """Return whether a run ended before its first checkpoint, so that it cannot be resumed or used."""
        early = {self.marker, *self.early, *itertools.chain(*self.loggers.values())}
        return bool(self.early) and self.is_at(folder) and early.issuperset(self.owned(folder))

    def refuse(self, folder: Path, *, overwrite: bool) -> None:
        """Check that `folder` may be written: it is absent, empty, or with `overwrite` of this kind.

        Raises:
            EdgekdError: it may not be written.
        """
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise EdgekdError(
                f"{folder} is a file and not a {self.name}, so it is not overwritten.",
                "Choose another folder.",
            )
        if not _holds_anything(folder):
            return
        if not self.is_at(folder):
            raise EdgekdError(
                f"{folder} exists already and is not a {self.name}, so it is not overwritten.",
                "Choose a new or empty folder.",
            )
        if not overwrite:
            raise EdgekdError(
                f"{folder} exists already and holds a {self.name}.",
                "Choose another folder, or add --overwrite.",
            )


RUN = Kind(
    "run",
    "config.json",
    ("student", "pretrained", "teacher"),
    (
        "run.json",
        "vl_run.json",
        "checkpoint.pt",
        "student.safetensors",
        "text_bank.safetensors",
        "oracle.npz",
        "artifacts",
        "benchmark",
        "benchmark-[0-9]*",
    ),
    early=("split.json", "descriptions.json", "metrics.jsonl", "loggers.json", "best.pt", "swad"),
    loggers={
        "tensorboard": ("tensorboard",),
        "csv": ("csv",),
        "wandb": ("wandb",),
        "mlflow": ("mlruns", "mlflow.db"),
    },
)
ARTIFACT = Kind(
    "artifact", "artifact.json", ("target", "files"), ("bank*.npz", "labels.txt", "kit")
)
VL_ARTIFACT = Kind("artifact", "vl_artifact.json", ("files",), ())
REPORT = Kind(
    "report",
    "report.json",
    ("schema_version", "summary"),
    (
        "report.html",
        "report.md",
        "report.png",
        "MODEL_CARD.md",
        "corruptions.csv",
        "predictions.npz",
        "latency.npz",
    ),
)
MODEL = Kind("model", "", (), ())
"""Kind of a pull or a fetch, which never replaces a folder."""
PAGE = '<meta name="generator" content="edgekd'
"""Text that identifies an HTML page of edgekd."""
BUNDLE = Kind("bundle", "README.txt", (), ())
STUDY = Kind("study", "study.json", ("schema_version", "recipes"), ())
COMPARISON = Kind("comparison", "comparison.html", (), ("comparison.md",), text=PAGE)


def refuse_page(path: Path, *, overwrite: bool) -> None:
    """Check that a page may be written to `path`: it is absent, or with `overwrite` a page of edgekd.

    Raises:
        EdgekdError: it may not be written.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise EdgekdError(f"{path} exists already.", "Choose another --out, or add --overwrite.")
    if PAGE not in read_text(path, "earlier page", "Choose another --out."):
        raise EdgekdError(
            f"{path} exists already and is not a page of edgekd, so it is not overwritten.",
            "Choose another --out.",
        )


@contextlib.contextmanager
def held(lock: Path, message: str) -> Iterator[None]:
    """Hold a lock file during the block; raise `EdgekdError` with `message` if another process holds it."""
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        claim = FileLock(lock)
        try:
            claim.acquire(timeout=0)
        except Timeout as error:
            raise EdgekdError(message, "Wait for it, or choose another --out.") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        claim.release()


@contextlib.contextmanager
def growing(folder: Path, kind: Kind, *, overwrite: bool, resume: bool = False) -> Iterator[None]:
    """Lock a folder that is filled step by step, without removing anything in it.

    Args:
        resume: continue an existing folder, so its content is not checked.

    Raises:
        EdgekdError: another process writes to `folder`, or it may not be written.
    """
    if not resume and not kind.stopped_at_start(folder):
        kind.refuse(folder, overwrite=overwrite)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with held(folder / LOCK, f"Another process is writing {folder}."):
        if not resume and not kind.stopped_at_start(folder):
            kind.refuse(folder, overwrite=overwrite)
        try:
            yield
        except BaseException:
            # Remove an empty folder of a run that failed before training, so that the same command works again.
            if kind.stopped_at_start(folder) and not (folder / "metrics.jsonl").exists():
                clear(folder, kind)
            raise
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # stops at the first folder that is not empty
                for path in made:
                    path.rmdir()


def clear(folder: Path, kind: Kind, *, marker: bool = True) -> None:
    """Remove the files written by edgekd from a folder of this kind, the marker last or not at all.

    Raises:
        EdgekdError: the folder is of another kind.
    """
    if not kind.is_at(folder):
        if _holds_anything(folder):
            kind.refuse(folder, overwrite=True)
        return
    # Remove the marker last, so that an incomplete folder is still recognised.
    first = ("run.json", "vl_run.json", "checkpoint.pt")
    names = sorted(kind.owned(folder), key=lambda name: (name not in first, name == kind.marker))
    with disk_errors(folder):
        for name in names if marker else [name for name in names if name != kind.marker]:
            _remove(folder / name)


@contextlib.contextmanager
def publishing(folder: Path, kind: Kind, *, overwrite: bool) -> Iterator[Path]:
    """Write a folder atomically: yield a new folder next to it, which is renamed to `folder` at the end.

    An existing folder of this kind is replaced only with `overwrite`, and foreign files in it are kept.

    Raises:
        EdgekdError: another process writes there, or `folder` may not be written; the result is then next to it.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    kind.refuse(folder, overwrite=overwrite)
    if folder.name in ("", ".."):
        raise EdgekdError(
            f"{folder} cannot be the name of a {kind.name}.",
            "Give the folder a name: --out NAME.",
        )
    lock = folder.with_name(f".{folder.name}.lock")
    with disk_errors(folder), held(lock, f"Another process is writing {folder}."):
        for old in folder.parent.glob(f".old-*-{folder.name}"):
            if re.fullmatch(rf"\.old-[0-9a-f]{{12}}-{re.escape(folder.name)}", old.name):
                _settle_old(old, folder, kind)  # a process was killed between two renames
        kind.refuse(folder, overwrite=overwrite)
        sweep(folder)
        scratch = folder.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{folder.name}")
        scratch.mkdir()
        try:
            yield scratch
            if scratch.is_dir():
                _put(scratch, folder, kind, overwrite=overwrite)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def free_name(path: Path) -> Path:
    """Return `path`, or the first of `path-2`, `path-3`, … that does not exist."""
    found, number = path, 2
    while os.path.lexists(found):
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def _put(scratch: Path, folder: Path, kind: Kind, *, overwrite: bool) -> None:
    try:
        os.rename(scratch, folder)  # the target is absent or empty
        return
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
    if not (overwrite and kind.is_at(folder)):
        beside = free_name(folder)
        os.rename(scratch, beside)
        raise EdgekdError(
            f"{folder} was meanwhile written by another program.", f"The result is in {beside}."
        )
    old = folder.with_name(f".old-{uuid.uuid4().hex[:12]}-{folder.name}")
    os.rename(folder, old)
    os.rename(scratch, folder)
    _settle_old(old, folder, kind)


def _settle_old(old: Path, folder: Path, kind: Kind) -> None:
    """Remove a replaced folder after moving foreign files to the new one; restore it if there is no new one."""
    if not os.path.lexists(folder):
        os.rename(old, folder)
        return
    owned = set(kind.owned(old))
    for name in os.listdir(old):
        if name not in owned:
            os.rename(old / name, free_name(folder / name))
    shutil.rmtree(old)


def _holds_anything(folder: Path) -> bool:
    return any(name not in (LOCK, CLAIM) for name in os.listdir(folder))


def _fields(marker: Path) -> dict[str, Any]:
    """Return the fields of a marker that is a JSON object; empty for any other marker."""
    try:
        found = read_json(marker, "marker of a folder")
    except EdgekdError:
        return {}
    return found if isinstance(found, dict) else {}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
