"""Runs of a comparison, each a line of a file as soon as it is finished, so that a stopped one goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def finished(
    path: Path,
    fields: Sequence[str],
    wanted: Sequence[tuple[Any, ...]],
    run: Callable[..., Cell],
    minutes: float,
) -> tuple[list[Cell], int]:
    """Run what is wanted and not in the file yet.

    Args:
        path: JSON lines, a cell each; made where it is not there.
        fields: of a cell, which identify it.
        wanted: their values, a cell each.
        run: called with such values.
        minutes: no run starts after so many.

    Returns:
        Every cell of the file, and how many of the wanted ones are among them.
    """
    until = time.monotonic() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(cell[field] for field in fields) for cell in cells}
    for values in wanted:
        if values not in done and time.monotonic() < until:
            cells.append(run(*values))
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(cells[-1]) + "\n")
            done.add(values)
    return cells, len(done & set(wanted))
