"""A study from first to last: plan, cells, tables."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekd.benchmark.report.render import markdown
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.files import write_text
from edgekd.studies.descriptions import ask_once
from edgekd.studies.grid import Failure, run_cells
from edgekd.studies.numbers import Table
from edgekd.studies.picture import draw_study
from edgekd.studies.plan import Plan
from edgekd.studies.shots import remove_bases
from edgekd.studies.store import Store
from edgekd.studies.tables import make_tables
from edgekd.studies.teacher import teacher_scores
from edgekd.studies.write import study_csv, study_document


@dataclass(frozen=True)
class Study:
    """A study that ran. `failures` is empty when every cell finished.

    Attributes:
        folder: holds `study.json`, `cells.jsonl`, `cells/`, and `table.md`, `.csv` and `.png`.
        tables: the numbers of those files.
    """

    folder: Path
    tables: tuple[Table, ...]
    failures: tuple[Failure, ...]


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Say how a study goes on that a signal stops, in whichever cell."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(
            number,
            "Stopped; finished cells are kept, and the running one has a checkpoint.",
            "Go on with the same command.",
        ) from stopped


def run_study(plan: Plan, folder: Path, *, jobs: int, keep: bool) -> Study:
    """Run the cells that are not finished and write the tables anew.

    Raises:
        EdgekdError: the folder holds another study or something else; no cell finished.
    """
    store = Store(folder)
    store.check()
    with store.running(), _resumable():
        store.claim(plan.settings())
        plan = ask_once(plan, folder)
        failures = run_cells(plan, store, jobs=jobs, keep=keep)
        if not keep and not failures:
            remove_bases(plan, folder)
        done = store.done(plan.cells)
        if not done:
            raise EdgekdError(
                f"None of the {len(plan.cells)} cells finished: {failures[0].reason}",
                "Mend this and run it again.",
            )
        tables = make_tables(plan, done, teacher_scores(plan, store))
        write_text(folder / "table.md", markdown(study_document(folder.name, tables)))
        write_text(folder / "table.csv", study_csv(tables))
        draw_study(tables, folder / "table.png")
    return Study(folder, tuple(tables), tuple(failures))
