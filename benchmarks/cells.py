"""Run the cells of a comparison, and append each finished cell to a file so that the comparison can be resumed."""

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
    """Run the wanted cells that are not in the file.

    Args:
        path: JSON lines file with one cell per line, created if missing.
        fields: names of the fields that identify a cell.
        wanted: values of these fields for each cell.
        run: called with these values.
        minutes: time after which no run is started.

    Returns:
        All cells of the file, and the number of wanted ones among them.
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
