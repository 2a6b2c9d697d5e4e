"""Read Hugging Face `datasets` by name, or saved with `save_to_disk` (`hf:NAME[:split]`, `hf:FOLDER[:split]`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.ahead import map_ahead
from edgekd.core.console import Tally, say
from edgekd.core.errors import EdgekdError, check_known, first_line
from edgekd.core.files import read_index, short_hash, write_index
from edgekd.core.readers import printable
from edgekd.data.images import check_content, read_bytes
from edgekd.data.sources.scan import ROLES, Entry
from edgekd.data.sources.source import PackedReader, Source

_AHEAD = 64
_LABELS = ("label", "labels", "class", "category")


@dataclass(frozen=True, eq=False)
class TableBytes:
    """Row over all splits → encoded image."""

    tables: tuple[Any, ...]
    column: str

    def __call__(self, row: int) -> bytes:
        for table in self.tables:
            if row < len(table):
                cell = table[row][self.column]
                return bytes(cell["bytes"]) if cell["bytes"] else read_bytes(Path(cell["path"]))
            row -= len(table)
        raise IndexError(row)


def list_table(spec: str, *, labelled: bool) -> Source:
    """List the images of a dataset; see `sources.open_source`.

    Without a split, `train`, `validation` and `test` are read and give the images' roles.
    """
    tables = _load(spec)
    import datasets

    features = next(iter(tables.values())).features
    image = _image_column(spec, features)
    label = _label_column(spec, features) if labelled else None
    if isinstance(features[image], datasets.Image):
        encoded = datasets.Image(decode=False)
        tables = {name: table.cast_column(image, encoded) for name, table in tables.items()}
    roles = {name: ROLES.get(name.lower()) for name in tables}
    kept = {name for name, role in roles.items() if role or len(tables) == 1}
    has_roles = len(kept) > 1 and "train" in roles.values()
    chosen = {name: table for name, table in tables.items() if name in kept}
    content = TableBytes(tuple(chosen.values()), image)
    entries: list[Entry] = []
    keys: list[str] = []
    rows: list[int] = []
    left_out = Tally()
    first = 0
    for split, table in chosen.items():
        labels = _names(table, label) if label is not None else [""] * len(table)
        domains = _names(table, "domain") if "domain" in features else None
        for number, (key, reason) in enumerate(_checked(spec, table, image)):
            name = f"{split}/{number}"
            reason = reason or ("no label" if labelled and not labels[number] else "")
            if reason:
                left_out.add(reason, name)
                continue
            domain = domains[number] if domains is not None else None
            role = roles[split] if has_roles else None
            entries.append(Entry(name, labels[number], domain, role))
            keys.append(key)
            rows.append(first + number)
        first += len(table)
    return Source(
        name=printable(Path(spec.partition(":")[0]).name),
        entries=tuple(entries),
        keys=tuple(keys),
        reader=PackedReader(content, np.array(rows, dtype=np.int64), f"hf:{spec}"),
        left_out=left_out,
    )


def _load(spec: str) -> dict[str, Any]:
    """Return split → dataset."""
    try:
        import datasets
    except ImportError as error:
        raise EdgekdError(
            "hf: needs the package datasets, which is not installed.",
            'Install it: pip install "edgekd[datasets]".',
        ) from error
    name, _, split = spec.partition(":")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if Path(name).expanduser().is_dir():
            found = datasets.load_from_disk(str(Path(name).expanduser()))
        else:
            from edgekd.core.hub import prefer_local_cache

            prefer_local_cache()
            found = datasets.load_dataset(name)
        tables = dict(found) if isinstance(found, Mapping) else {split or "all": found}
        for table in tables.values():
            table.data.validate(full=True)  # pyarrow does not check damaged offsets
    except Exception as error:  # datasets raises many types
        raise EdgekdError(
            f"The dataset {name} cannot be loaded ({first_line(error)}).",
            "Give a dataset of the hub, or a folder written by save_to_disk.",
        ) from error
    if not split:
        return tables
    check_known(split, tables, f'{name} has no split "{split}".')
    return {split: tables[split]}


def _image_column(spec: str, features: Mapping[str, Any]) -> str:
    import datasets

    for name, feature in features.items():
        fields = feature if isinstance(feature, dict) else getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image) or (
            isinstance(fields, dict) and {"bytes", "path"} <= set(fields)
        ):
            return name
    raise EdgekdError(f"hf:{spec} has no image column.", f"Its columns are {_described(features)}.")


def _label_column(spec: str, features: Mapping[str, Any]) -> str:
    import datasets

    known = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in _LABELS if name in features]
    if not known and not named:
        raise EdgekdError(
            f"hf:{spec} has no label column.",
            f"Name it label; the columns are {_described(features)}.",
        )
    name = next((one for one in named if one in known), (known or named)[0])
    kind = getattr(features[name], "dtype", "")
    if name not in known and not str(kind).startswith(("string", "large_string", "int", "uint")):
        raise EdgekdError(
            f"The column {name} of hf:{spec} has the type {kind or features[name]}, not one class per image.",
            "Use ClassLabel, strings or integers.",
        )
    return name


def _described(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())


def _names(table: Any, column: str) -> list[str]:
    """Return a column as text (names for a ClassLabel), empty for missing values."""
    values = table.with_format(None)[column]
    names = getattr(table.features[column], "names", None)

    def name(value: Any) -> str:
        if value is None or (names and not 0 <= value < len(names)):
            return ""
        return printable(str(names[value] if names else value))

    return [name(value) for value in values]


def _checked(spec: str, table: Any, column: str) -> list[tuple[str, str]]:
    """Return content key and reason of each row, from the cache if the dataset is unchanged."""
    stamp = short_hash("table", str(table._fingerprint), column)
    index = f"table-{stamp}"
    stored = read_index(index, list[tuple[str, str]])
    if stored is not None and len(stored) == len(table):
        return stored
    say(f"reading {len(table):,} images of hf:{spec} once …")
    rows = list(map_ahead(check_content, _contents(table, column), _AHEAD))
    write_index(index, rows)
    return rows


def _contents(table: Any, column: str) -> Iterator[bytes | Path]:
    for row in table.select_columns([column]):
        cell = row[column] or {"bytes": b"", "path": None}
        yield bytes(cell["bytes"]) if cell["bytes"] or not cell["path"] else Path(cell["path"])
