"""Safe readers for each file format, and the rules for names from files.

Files are not trusted: readers check them before they allocate memory, and every failure is a one-sentence error. Part
of the device agent: Python 3.9 and numpy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgekd.core.errors import EdgekdError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESTORE = "Make it again, or restore it."
"""Default hint for a file that cannot be read."""

MAX_TEXT_BYTES = 2**30
"""Largest JSON or text file that is read."""
MAX_SETTINGS_BYTES = 10**6
"""Largest TOML or YAML file that is read; they are written by hand, and their parsers are slow."""
MAX_DEPTH = 64
"""Deepest nesting of a JSON or TOML value."""
MAX_INFLATED_BYTES = 2**30
"""Maximum inflated size of a small npz file; a large file may inflate to 20 times its size."""
NOT_REGULAR = "not a regular file"

# C0 and C1 controls, line separators, bidirectional controls, and lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` with control characters escaped (such as `\\x1b`), so that it cannot control a terminal."""

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _CONTROL.sub(escaped, text)


def printable_values(value: Any) -> Any:
    """Return a JSON value with every text in it `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_values(key): printable_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(printable_values(item) for item in value)
    return value


def plain_name(name: str) -> str:
    """Normalise a name for comparison: case, spaces, underscores, hyphens, Unicode forms."""
    name = unicodedata.normalize("NFKC", name)
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()


def like_names(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return groups of names that differ only in case, spaces, hyphens and underscores."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plain_name(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def plain_path(name: object) -> str:
    """Return `name` if it is a plain relative path below a folder: parts of printable characters between `/`.

    Raises:
        ValueError: not text, empty, absolute, with `..`, a drive letter, a backslash or a control character.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 1024:
        raise ValueError("a file name must be text of 1 to 1024 characters")
    parts = name.split("/")
    if any(part in ("", ".", "..") or len(part) > 255 for part in parts) or re.search(
        r'[\\:*?"<>|]', name
    ):
        raise ValueError(f'"{printable(name)}" is not a plain relative path')
    if _CONTROL.search(name):
        raise ValueError(f'"{printable(name)}" has control characters')
    return name


def inside(folder: Path, name: object) -> Path:
    """Return the path of the file `name` in `folder`.

    Raises:
        EdgekdError: `name` is not a plain relative path, or a symbolic link leads out of the folder.
    """
    try:
        path = Path(folder) / plain_path(name)
    except ValueError as error:
        raise EdgekdError(
            f"{folder} has an illegal file name: {error}.", "Do not trust that folder."
        ) from error
    top = os.path.realpath(folder)
    if os.path.commonpath([top, os.path.realpath(path)]) != top:
        raise EdgekdError(f"{path} leads out of its folder.", "Do not trust that folder.")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened; `strerror` is `NOT_REGULAR` for a device, pipe, folder or impossible name.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, NOT_REGULAR) from error
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_REGULAR)
    return open(path, "rb")


@contextlib.contextmanager
def read_errors(path: Path, what: str, kind: str, hint: str = RESTORE) -> Iterator[None]:
    """Turn any error of parsing a damaged or hostile file into an `EdgekdError` that calls the file `what`."""
    try:
        yield
    except EdgekdError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EdgekdError(f"There is no {what} at {path}.", "Check the path.") from error
    except OSError as error:
        raise EdgekdError(
            f"The {what} at {path} cannot be read ({_reason(error.strerror or error)}).", hint
        ) from error
    # On malformed files, parsers raise ValueError, zlib.error, struct.error, MemoryError, RecursionError and others.
    except Exception as error:
        raise EdgekdError(
            f"The {what} at {path} is not readable {kind} ({_reason(error)}).", hint
        ) from error


def _reason(error: object) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__)[:160].rstrip(".")


def read_text(path: Path, what: str, hint: str = RESTORE, most: int = MAX_TEXT_BYTES) -> str:
    """Read UTF-8 text of at most `most` bytes, with or without a byte order mark.

    Raises:
        EdgekdError: missing, not a regular file, too large, or not UTF-8.
    """
    with read_errors(path, what, "UTF-8 text", hint), open_regular(path) as handle:
        data = handle.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it has more than {most // 10**6} MB")
        return data.decode("utf-8-sig")


def read_json(path: Path, what: str, hint: str = RESTORE) -> Any:
    """Read JSON; errors as for `read_text` and `parse_json`."""
    with read_errors(path, what, "JSON", hint):
        return parse_json(read_text(path, what, hint))


def read_object(path: Path, what: str, hint: str = RESTORE) -> dict[str, Any]:
    """Read a JSON object; errors as for `read_json`, or if the value is not an object."""
    value = read_json(path, what, hint)
    if not isinstance(value, dict):
        raise EdgekdError(f"The {what} at {path} is not a JSON object.", hint)
    return value


def parse_json(text: str | bytes, *, pairs: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        pairs: return objects as lists of pairs, to detect duplicate names.

    Raises:
        ValueError: not JSON, nested deeper than `MAX_DEPTH`, a lone surrogate in a text, or a number that is not finite
            or not of 64 bits.
    """
    return _bounded(lambda: json.loads(text, object_pairs_hook=list if pairs else None))


def read_toml(path: Path, what: str, hint: str = RESTORE) -> dict[str, Any]:
    """Read TOML; errors as for `read_text` and `parse_toml`."""
    with read_errors(path, what, "TOML", hint):
        return parse_toml(read_text(path, what, hint, MAX_SETTINGS_BYTES))


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text.

    Raises:
        ValueError: not TOML, nested deeper than `MAX_DEPTH`, or a number that is not finite or not of 64 bits.
    """
    import tomllib

    found: dict[str, Any] = _bounded(lambda: tomllib.loads(text))
    return found


def read_yaml(path: Path, what: str, hint: str = RESTORE) -> Any:
    """Read YAML of plain types. Aliases are not allowed, since their expansion has no bound.

    Raises:
        EdgekdError: as for `read_text`; not YAML, an alias, nested deeper than `MAX_DEPTH`, or a number that is not
            finite or not of 64 bits.
    """
    import yaml

    def parse() -> Any:
        try:
            depth = 0
            for event in yaml.parse(text):
                if isinstance(event, yaml.AliasEvent):
                    raise ValueError("it has an alias")
                depth += isinstance(event, yaml.CollectionStartEvent)
                depth -= isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_DEPTH:
                    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error

    with read_errors(path, what, "YAML", hint):
        text = read_text(path, what, hint, MAX_SETTINGS_BYTES)
        return _bounded(parse)


def _bounded(parse: Callable[[], Any]) -> Any:
    try:
        value = parse()
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, (list, tuple)):
                below.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is not finite")
            elif isinstance(item, str) and _SURROGATE.search(item):
                raise ValueError("a text is not Unicode")
            elif isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise ValueError("a whole number has more than 64 bits")
        if not below:
            return value
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def read_arrays(path: Path, what: str, hint: str = RESTORE) -> dict[str, NDArray[Any]]:
    """Read every array of an npz file: booleans, numbers and text.

    Each header is checked against the size of its member before memory is allocated.

    Raises:
        EdgekdError: missing, not a zip file, encrypted, truncated, with objects or with impossible shapes.
    """
    import zipfile

    with (
        read_errors(path, what, "npz", hint),
        open_regular(path) as handle,
        zipfile.ZipFile(handle) as archive,
    ):
        members = archive.infolist()
        limit = max(MAX_INFLATED_BYTES, 20 * os.fstat(handle.fileno()).st_size)
        if sum(member.file_size for member in members) > limit:
            raise ValueError(f"its arrays inflate to more than {limit // 10**6} MB")
        found: dict[str, NDArray[Any]] = {}
        for member in members:
            with archive.open(member) as data:
                header = _npy_header(data, member.file_size)
                found[member.filename.removesuffix(".npy")] = _as_array(data.read(), *header)
        return found


def read_array(path: Path, what: str, hint: str = RESTORE) -> NDArray[Any]:
    """Read an npy file: booleans, numbers, text or records of them; errors as `read_arrays`."""
    with read_errors(path, what, "npy", hint), open_regular(path) as handle:
        header = _npy_header(handle, os.fstat(handle.fileno()).st_size, _PLAIN + "V")
        return _as_array(handle.read(), *header)


def map_array(path: Path, what: str, shape: Sequence[int], dtype: type[Any]) -> NDArray[Any]:
    """Map an npy file into memory, read-only; raise `EdgekdError` if it has another shape or dtype."""
    import numpy as np

    with read_errors(path, what, "npy"), open_regular(path) as handle:
        header = _npy_header(handle, os.fstat(handle.fileno()).st_size)
        if header != (tuple(shape), False, np.dtype(dtype)):
            raise ValueError(f"it holds {header[2]} {list(header[0])}")
        return np.memmap(handle, dtype, "r", handle.tell(), tuple(shape))


_PLAIN = "biufSU"
"""Kinds of dtype: booleans, whole numbers, real numbers, bytes and text."""


def _npy_header(
    data: Any, size: int, kinds: str = _PLAIN
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and dtype of npy data of `size` bytes, and leave `data` behind its header."""
    import numpy as np

    version = np.lib.format.read_magic(data)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the npy format is not read")
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(data)
    if dtype.hasobject or dtype.kind not in kinds:
        raise ValueError(f"it holds values of type {dtype}, not numbers or text")
    if any(length < 0 for length in shape) or (
        math.prod(shape) * dtype.itemsize + data.tell() != size
    ):
        raise ValueError(f"its shape {list(shape)[:8]} does not fit its size")
    return shape, fortran, dtype


def _as_array(
    data: bytes, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]
) -> NDArray[Any]:
    import numpy as np

    flat: NDArray[Any] = np.frombuffer(data, dtype).copy() if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes (`hashlib.file_digest` needs Python 3.11)."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
