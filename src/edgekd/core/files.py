"""Atomic writes, the cache folder, and hashes."""

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
    """Return the cache folder: `$EDGEKD_CACHE`, else the platform's user cache."""
    chosen = os.environ.get("EDGEKD_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("edgekd"))


def cache_folder(name: str) -> Path:
    """Return a folder of the cache, created if missing; raise `EdgekdError` if it cannot be used."""
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
    """Return a uint8 array of the cache, mapped read-only. If it is not stored, `make` yields its parts.

    Its CRC-32 in `<path>.crc32` is checked whenever it is opened. A damaged array is made again, with a warning that
    calls it `what`.

    Raises:
        EdgekdError: the disk is full or not writable.
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
        # Write without a mapping: on a full disk a write raises, but a mapping kills the process.
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
    """Return the value of type `kind` stored by `write_index`; None if missing or, with a warning, if damaged."""
    from pydantic import TypeAdapter

    path = cache_root() / "index" / name
    if not os.path.exists(path):  # or its folder is not readable
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
    """Store the index of a source of images as JSON with a hash; warn on failure."""
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
                "Free some space and run the command again; partial files were removed.",
            ) from error
        if number == errno.EFBIG:
            raise EdgekdError(
                f"{path} would exceed the maximum file size.",
                "Raise the limit (ulimit -f), or use a file system without one (FAT32 has one).",
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise EdgekdError(
                f"{path} cannot be written.", "Choose another folder or fix its permissions."
            ) from error
        raise


def _number(error: OSError) -> int | None:
    """Return the errno of an error, including those that `shutil.copytree` collects as text."""
    number = re.search(r"\[Errno (\d+)\]", str(error)) if isinstance(error, shutil.Error) else None
    return int(number[1]) if number else error.errno


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder, which is removed afterwards; errors about a full disk include its path."""
    with (
        disk_errors(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="edgekd-") as name,
    ):
        yield Path(name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which is renamed to `path` on success and removed otherwise.

    A killed process leaves at most an unused `.tmp-*` file, which `sweep` removes.
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
    """Remove temporary files of killed processes for `path` that have not changed for a day.

    Newer ones may belong to another process or machine that is writing the same path.
    """
    ours = re.compile(rf"\.tmp-[0-9a-f]{{12}}-{re.escape(path.name)}")
    for left in [entry for entry in path.parent.glob(".tmp-*") if ours.fullmatch(entry.name)]:
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            newest = max(entry.lstat().st_mtime for entry in (left, *left.rglob("*")))
            if time.time() - newest > _ABANDONED_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write bytes atomically.

    torch, safetensors and numpy give unclear errors on a full disk, so let them write to memory and pass the bytes.
    """
    with replacing(path) as scratch:
        scratch.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; a file name in it that is not valid UTF-8 is an `EdgekdError`."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise EdgekdError(
            f"{path} cannot be written, because a file name in it is not valid UTF-8.",
            "Rename that file or folder, or set PYTHONUTF8=1 where the names are UTF-8.",
        ) from error
    write_bytes(path, data)


def render_template(package: str, name: str, **values: Any) -> str:
    """Render a Jinja template of a package as plain text, without escaping."""
    from jinja2 import StrictUndefined, Template

    source = (files(package) / name).read_text(encoding="utf-8")
    template = Template(
        source, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return str(template.render(values))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; numbers that are not finite become null."""
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
    """Return rows as CSV. Text cells that a spreadsheet would run as a formula are prefixed with an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(cell) for cell in row])
    return buffer.getvalue()


def _cell(cell: object) -> object:
    dangerous = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if dangerous else cell


def short_hash(*parts: str) -> str:
    """Return a hash of the parts as 16 hex digits, for names of folders and ids."""
    data = "\0".join(parts).encode(
        errors="surrogateescape"
    )  # a path may have bytes that are not UTF-8
    return hashlib.sha256(data).hexdigest()[:16]
