"""Read manifests: `.csv` and `.parquet` files with the columns `path` and `label`, and optionally `domain` and
`split`."""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.readers import open_regular, printable, read_errors, read_text
from edgekd.data.sources.scan import Entry, Listing, role_of, shown

MANIFESTS = (".csv", ".parquet")
_COLUMNS = ("path", "label", "domain", "split")
_SAVE = "Save it as comma-separated UTF-8 text."


def list_manifest(path: Path, *, labelled: bool = True) -> Listing:
    """Read a manifest's rows. Paths are absolute or relative to its folder.

    Args:
        labelled: False to read only the column `path`.

    Raises:
        EdgekdError: the file is not readable, a column is missing or misspelt, a value is empty or unknown, or an image
            is listed twice with different values.
    """
    columns, rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _parquet_rows(path)
    if labelled:
        _check_columns(path, columns)
    elif "path" not in columns:
        raise EdgekdError(
            f'The manifest {path} has no column "path".',
            f"Unlabelled images need the column path; the columns are {', '.join(columns) or 'none'}.",
        )
    else:
        columns = ["path"]
    entries: dict[str, Entry] = {}
    merged = 0
    for number, row in rows:
        place = f"Row {number} of {path}"
        wanted = _COLUMNS[:3] if labelled else _COLUMNS[:1]
        absent = [name for name in wanted if name in columns and is_missing(row[name])]
        if absent:
            written = f' ("{row[absent[0]]}")' if row[absent[0]] else ""
            raise EdgekdError(
                f"{place} has no {absent[0]}{written}.",
                "Add it, or remove the "
                + ("row, or the column." if absent[0] == "domain" else "row."),
            )
        role = role_of(row["split"], place) if "split" in columns else None
        domain = printable(row["domain"]) if "domain" in columns else None
        entry = Entry(row["path"], printable(row["label"]) if labelled else "", domain, role)
        # The same file may be written as a relative path, with ./, or absolute.
        file = os.path.normpath(os.path.join(os.path.abspath(path.parent), entry.path))
        first = entries.setdefault(file, entry)
        if first is entry:
            continue
        for name in ("label", "domain", "role"):
            own, other = getattr(entry, name), getattr(first, name)
            if own != other:
                what = "split" if name == "role" else name
                raise EdgekdError(
                    f'{place} lists {shown(entry.path)} a second time, with the {what} "{own}" after "{other}".',
                    "Keep one row per image.",
                )
        merged += 1
    if merged:
        warn(f"{merged} rows of {path} repeat an image; each image is used once.")
    if not entries:
        raise EdgekdError(
            f"The manifest {path} has no rows.", "List one image per row: path,label."
        )
    ordered = sorted(entries.values(), key=lambda entry: entry.path)
    return Listing(path.parent, tuple(ordered))


_MISSING = ("", "nan", "<na>", "nat")
"""Texts for missing values (numpy, pandas), in lower case."""


def is_missing(value: str) -> bool:
    """Return whether a table cell stands for a missing value."""
    return value.strip().lower() in _MISSING


def _csv_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    try:
        lines = list(csv.reader(io.StringIO(read_text(path, "manifest", _SAVE), newline="")))
    except csv.Error as error:
        raise EdgekdError(f"{path} is not UTF-8 CSV ({error}).", _SAVE) from error
    columns = [printable(name.strip()) for name in lines[0]] if lines else []

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        for number, cells in enumerate(lines[1:], start=2):
            if any(cells):
                padded = [cell.strip() for cell in cells] + [""] * (len(columns) - len(cells))
                yield number, dict(zip(columns, padded, strict=False))

    return columns, rows()


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    import pyarrow
    import pyarrow.parquet

    with read_errors(path, "manifest", "Parquet", "Write it again."), open_regular(path) as handle:
        table = pyarrow.parquet.read_table(handle)
        columns = [printable(name) for name in table.column_names]
        wanted = table.select([name for name in _COLUMNS if name in columns]).to_pylist()
        rows = [
            (number, {name: "" if value is None else str(value) for name, value in row.items()})
            for number, row in enumerate(wanted, start=1)
        ]
    return columns, iter(rows)


def _check_columns(path: Path, columns: list[str]) -> None:
    unknown = [name for name in columns if name not in _COLUMNS]
    for name in ("path", "label"):
        if name not in columns:
            raise EdgekdError(
                f'The manifest {path} has no column "{name}".',
                f"A manifest has path,label[,domain][,split]; its columns are {', '.join(columns) or 'none'}.",
            )
    for name in unknown:
        # A misspelt optional column would silently change the split.
        if difflib.get_close_matches(name.lower(), set(_COLUMNS) - set(columns), n=1, cutoff=0.6):
            raise EdgekdError(
                f'The manifest {path} has an unknown column "{name}".',
                did_you_mean(name.lower(), _COLUMNS),
            )
    if unknown:
        warn(f"unused columns of {path}: {', '.join(unknown)}.")
