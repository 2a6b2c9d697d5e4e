"""Writing that cannot leave half a file behind, the cache folder, and hashes of what was written."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs
from filelock import FileLock

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import map_array, read_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Stored = TypeVar("Stored")
_ABANDONED_S = 24 * 3600


def cache_root() -> Path:
    """Return folder of everything that can be made again: `$EDGEKD_CACHE`, else the platform's user cache."""
    chosen = os.environ.get("EDGEKD_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("edgekd"))


def cache_folder(name: str) -> Path:
    """Return a folder of the cache, made if it is not there; one that cannot be used is an `EdgekdError`."""
    path = cache_root() / name
    reason: object = "permission denied"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.R_OK | os.W_OK | os.X_OK):
            return path
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
    raise EdgekdError(
        f"The cache folder {path} cannot be used ({reason}).",
        "Set EDGEKD_CACHE to a folder of your own.",
    )


def stored_array(
    path: Path,
    what: str,
    shape: tuple[int, ...],
    make: Callable[[], Iterable[NDArray[np.uint8]]],
) -> NDArray[np.uint8]:
    """Return a uint8 array of the cache, mapped read-only; `make` yields its parts where it is not stored yet.

    Its CRC-32 is kept in `<path>.crc32` and compared at every opening; a damaged array is made again, with a warning
    that calls it `what`.

    Raises:
        EdgekdError: the disk is full, or not writable.
    """
    import numpy as np

    mark = path.with_name(f"{path.name}.crc32")  # written last
    with FileLock(f"{path}.lock"):
        if mark.exists():
            try:
                found = map_array(path, what, shape, np.uint8)
                if f"{zlib.crc32(found.data):08x}" == read_text(mark, "checksum").strip():
                    return found
                raise EdgekdError(f"The {what} at {path} are damaged.")
            except EdgekdError as error:
                warn(f"{error.message} They are made again.")
        checksum = 0
        # Plain writes and not a mapping: on a full disk a mapping kills the process, a write raises.
        with replacing(path) as scratch, open(scratch, "wb") as handle:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(handle, header)
            for part in make():
                data = part.tobytes()
                handle.write(data)
                checksum = zlib.crc32(data, checksum)
        write_text(mark, f"{checksum:08x}\n")
        return map_array(path, what, shape, np.uint8)


def read_index(name: str, kind: type[Stored]) -> Stored | None:
    """Return what `write_index` stored under `name`, of type `kind`; None without it or, with a warning, if damaged."""
    from pydantic import TypeAdapter

    path = cache_root() / "index" / name
    if not os.path.exists(path):  # or this user may not read its folder
        return None
    try:
        digest, _, body = read_text(path, "index of images").partition("\n")
        if digest == short_hash(body):
            return TypeAdapter(kind).validate_json(body, strict=True)
    except (EdgekdError, ValueError):
        pass
    warn(f"the index {path} is damaged; the images are read again.")
    return None


def write_index(name: str, value: Any) -> None:
    """Store what was found in a source of images, as JSON behind its hash; a failure is a warning."""
    path = cache_root() / "index" / name
    body = json.dumps(value)
    try:
        write_text(path, f"{short_hash(body)}\n{body}")
    except (EdgekdError, OSError) as error:
        warn(f"the images will be read again next time, since {path} was not written ({error}).")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left", "too large" and "permission denied" under `path` into an `EdgekdError`."""
    try:
        yield
    except OSError as error:
        number = _number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise EdgekdError(
                f"The disk holding {path} is full.",
                "Free some space and run again; nothing half-written was kept.",
            ) from error
        if number == errno.EFBIG:
            raise EdgekdError(
                f"{path} would be larger than a file may be there.",
                "Raise the limit (ulimit -f), or use a disk without one, as FAT32 has.",
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise EdgekdError(
                f"{path} cannot be written.", "Choose another folder or mend its permissions."
            ) from error
        raise


def _number(error: OSError) -> int | None:
    """Return the system's number of an error; `shutil.copytree` collects several and keeps no more than their words."""
    number = re.search(r"\[Errno (\d+)\]", str(error)) if isinstance(error, shutil.Error) else None
    return int(number[1]) if number else error.errno


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder in the system's temporary place, gone afterwards; where that is full, the error names it."""
    with (
        disk_errors(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="edgekd-") as name,
    ):
        yield Path(name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file beside `path`; on success it becomes `path` in one rename, else it is removed.

    A killed process leaves at most a `.tmp-*` file that nothing reads; `sweep` removes it.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent / f".tmp-{uuid.uuid4().hex[:12]}-{path.name}"
        try:
            yield scratch
            with open(scratch, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed processes left of `replacing` or `publishing` of `path`, if nothing in it changed for a day.

    A day, because somebody else may be writing the same path just now, on another machine even.
    """
    ours = re.compile(rf"\.tmp-[0-9a-f]{{12}}-{re.escape(path.name)}")
    for left in [entry for entry in path.parent.glob(".tmp-*") if ours.fullmatch(entry.name)]:
        with contextlib.suppress(FileNotFoundError):  # somebody else sweeps too
            newest = max(entry.lstat().st_mtime for entry in (left, *left.rglob("*")))
            if time.time() - newest > _ABANDONED_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write bytes in one step.

    Files that torch, safetensors and numpy write themselves fail on a full disk with errors that do not name the cause:
    let them write to memory and hand the bytes over.
    """
    with replacing(path) as scratch:
        scratch.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step; a file name in it that is no UTF-8 is an `EdgekdError`."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise EdgekdError(
            f"{path} cannot be written: a file name in it is no UTF-8 text.",
            "Rename that file or folder, or set PYTHONUTF8=1 where the names are UTF-8.",
        ) from error
    write_bytes(path, data)


def render_template(package: str, name: str, **values: Any) -> str:
    """Return a Jinja template of a package as plain text; nothing in it is escaped."""
    from jinja2 import StrictUndefined, Template

    source = (files(package) / name).read_text(encoding="utf-8")
    template = Template(
        source, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return str(template.render(values))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, in one step; a number that is not finite, for which JSON has no word, becomes null."""
    write_text(
        path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV. A text cell that a spreadsheet would run as a formula gets an apostrophe before it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(cell) for cell in row])
    return buffer.getvalue()


def _cell(cell: object) -> object:
    dangerous = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if dangerous else cell


def short_hash(*parts: str) -> str:
    """Return 16 hex digits over the parts, for names of folders and ids."""
    data = "\0".join(parts).encode(
        errors="surrogateescape"
    )  # a path may have bytes that are no UTF-8
    return hashlib.sha256(data).hexdigest()[:16]
