"""The cells of a study, and the folder with its settings and results.

`study.json` has the settings, and `cells.jsonl` has one line per finished cell. `cells/KEY.npz` has two arrays for each
measure: `NAME`, bool `[n]`, and `NAME_labels`, int64 `[n]`. Its arrays are written before its line, both atomically.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors, short_hash, write_bytes, write_json, write_text
from edgekd.core.folders import CLAIM, LOCK, STUDY, held
from edgekd.core.readers import parse_json, printable_values, read_arrays, read_object, read_text

NONE_UNLABELLED = "no unlabelled images"
_SCHEMA_VERSION = 1
_FACTS: tuple[tuple[str, Any, bool], ...] = (
    ("seconds", (int, float), True), ("selection", str, True), ("steps", int, True), ("size", int, True),
    ("tuning_steps", int, False), ("oracle_places", int, False),
)  # fmt: skip
"""Facts of a cell that the tables use: name, type, and whether every cell has it."""


@dataclass(frozen=True)
class Cell:
    """One training run and its test.

    Attributes:
        recipe: its name in the study.
        domain: the unseen domain, or None.
        fraction: share of the training labels that is used, above 0 and at most 1.
        shots: number of labelled images of each unseen class.
        adapt: number of unlabelled training images of the unseen domain; the test is on the other half of it.
    """

    recipe: str
    seed: int
    domain: str | None = None
    fraction: float = 1.0
    shots: int = 0
    adapt: int | None = None

    @property
    def table(self) -> str:
        """Title of the cell's table; empty for a study's only table."""
        if self.adapt is not None:
            adapted = f"{self.adapt} unlabelled images of the new domain"
            return adapted if self.adapt else NONE_UNLABELLED
        if self.shots:
            return f"{self.shots} image{'' if self.shots == 1 else 's'} of each unseen class"
        return "" if self.fraction == 1 else f"{100 * self.fraction:g} % of the training labels"

    @property
    def column(self) -> str:
        """The unseen domain, or an empty string."""
        return self.domain or ""

    @property
    def key(self) -> str:
        """A file name that identifies the cell in its study."""
        words = (
            self.recipe,
            self.column,
            "" if self.fraction == 1 else f"{self.fraction:g}",
            f"{self.shots}shot" if self.shots else "",
            f"{self.adapt}unlabelled" if self.adapt is not None else "",
            str(self.seed),
        )
        name = "-".join(word for word in words if word)
        plain = re.sub(r"[^\w.+-]", "_", name)
        return plain if plain == name else f"{plain}-{short_hash(name)[:6]}"


@dataclass(frozen=True, eq=False)
class Outcome:
    """Which images of one test a student classified correctly, bool `[n]`, and their labels, int64 `[n]`."""

    correct: NDArray[np.bool_]
    labels: NDArray[np.int64]

    def accuracy(self, *, macro: bool) -> float:
        """Return the percentage of correct images, or its unweighted mean over classes (`macro`)."""
        if not macro:
            return 100 * float(self.correct.mean())
        return 100 * float(
            np.mean([self.correct[self.labels == c].mean() for c in np.unique(self.labels)])
        )


@dataclass(frozen=True, eq=False)
class Done:
    """A finished cell: outcomes by measure, and facts about its run.

    The facts are scores (n; top1 and macro in percent), split, selection, steps, size, seconds, teacher_id.
    """

    cell: Cell
    outcomes: Mapping[str, Outcome]
    facts: Mapping[str, Any]


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a compressed npz file atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


class Store:
    """Reads and writes a study's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "cells.jsonl"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Lock the folder for one running study. The lock of a killed process is released."""
        with held(self.folder / LOCK, f"A study is already running in {self.folder}."):
            yield

    @contextlib.contextmanager
    def claiming(self) -> Iterator[None]:
        """Lock the settings during the block; other parts of the study wait."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / CLAIM):
            yield

    def check(self) -> None:
        """Raise an `EdgekdError` if the folder has something other than a study."""
        if not STUDY.is_at(self.folder):
            STUDY.refuse(self.folder, overwrite=False)

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, or continue an existing study with the same settings.

        Raises:
            EdgekdError: the folder has something other than a study, or a study with other settings.
        """
        self.check()
        path = self.folder / "study.json"
        merged = dict(settings)
        if path.exists():
            stored = self.settings()
            is_known = stored.get("schema_version") == _SCHEMA_VERSION
            if not is_known or not isinstance(stored.get("recipes"), dict):
                raise EdgekdError(
                    f"The study at {self.folder} was written by another version of edgekd.",
                    "Choose another --out.",
                )
            differing = list(differences(stored, settings))
            if differing:
                more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise EdgekdError(
                    f"The study at {self.folder} was made with other settings: {'; '.join(differing[:3])}{more}.",
                    "Use the same settings, or choose another --out. (Recipes, seeds and domains can be added.)",
                )
            merged["recipes"] = stored["recipes"] | settings["recipes"]
        write_json(path, {"schema_version": _SCHEMA_VERSION} | merged)

    def settings(self) -> dict[str, Any]:
        """Return the content of `study.json`."""
        return read_object(self.folder / "study.json", "study")

    def add(self, done: Done) -> None:
        """Write a finished cell. Safe to call from several processes."""
        arrays: dict[str, Any] = {}
        scores: dict[str, Any] = {}
        for name, outcome in done.outcomes.items():
            arrays |= {name: outcome.correct, f"{name}_labels": outcome.labels}
            kinds = {"top1": outcome.accuracy(macro=False), "macro": outcome.accuracy(macro=True)}
            scores[name] = {"n": len(outcome.correct), **kinds}
        write_arrays(self._arrays(done.cell), arrays)
        record = {"cell": asdict(done.cell), "scores": scores, **done.facts}
        line = json.dumps(record, ensure_ascii=False)
        with FileLock(self.folder / ".cells.lock"):
            before = self._lines.read_text(encoding="utf-8") if self._lines.exists() else ""
            write_text(self._lines, before + line + "\n")

    def done(self, cells: Sequence[Cell]) -> list[Done]:
        """Return the finished ones among `cells`, in that order."""
        facts: dict[Cell, dict[str, Any]] = {}
        lines = read_text(self._lines, "list of cells").splitlines() if self._lines.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = printable_values(parse_json(line))
                cell = Cell(**record.pop("cell"))
                for name, kind, required in _FACTS:
                    if (required or name in record) and not isinstance(record[name], kind):
                        raise ValueError(f"{name} has the wrong type")
                facts[cell] = record
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise EdgekdError(
                    f"Line {number} of {self._lines} is damaged.",
                    "Remove the line, and its cell runs again.",
                ) from error
        return [Done(cell, self._read(cell), facts[cell]) for cell in cells if cell in facts]

    def _arrays(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.key}.npz"

    def _read(self, cell: Cell) -> dict[str, Outcome]:
        path = self._arrays(cell)
        hint = f"Remove the line of this cell from {self._lines.name}, and the cell runs again."
        file = read_arrays(path, "outcome of a cell", hint)
        found = {}
        for name in [name for name in file if not name.endswith("_labels")]:
            correct, labels = file[name], file.get(f"{name}_labels")
            if (
                labels is None
                or correct.dtype != np.bool_
                or labels.dtype.kind not in "iu"
                or correct.ndim != 1
                or correct.shape != labels.shape
            ):
                raise EdgekdError(f"The outcome of a cell at {path} is damaged.", hint)
            found[name] = Outcome(correct, labels)
        return found


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], place: str = ""
) -> Iterator[str]:
    """Yield a sentence about every setting that differs, except for recipes that only one side has."""
    for name, value in wanted.items():
        before = stored.get(name)
        if place == "recipes." and name not in stored:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from differences(before, value, f"{place}{name}.")
        elif name == "images" and before != value:
            yield "the images have changed"
        elif before != value:
            where = f"{place}{name}".removeprefix("recipes.")
            yield f"{where} was {_shown(before)}, is {_shown(value)}"


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
