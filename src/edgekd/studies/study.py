"""Run the cells of a study, sequentially or in parallel processes, and write its tables."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgekd.benchmark.report.render import markdown
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.files import write_json, write_text
from edgekd.core.machine import usable_cores
from edgekd.distill.inputs.cache import cached_tensors, plain_embeddings
from edgekd.distill.models.teachers import load_teacher
from edgekd.distill.text_bank import templates_for
from edgekd.distill.text_files import descriptions_for, read_vocabulary, stored_descriptions
from edgekd.studies.cell import remove_bases, run_cell
from edgekd.studies.plan import Plan, description_file, with_description_file
from edgekd.studies.store import Cell, Store
from edgekd.studies.tables import Table, make_tables
from edgekd.studies.write import draw_study, study_csv, study_document

_CHECKPOINT_S = 20.0
"""Time for a stopped cell to write its checkpoint."""


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and the reason in one line."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Study:
    """A finished study. `folder` has `study.json`, `cells.jsonl`, `cells/`, and `table.md`, `.csv` and `.png`."""

    folder: Path
    tables: tuple[Table, ...]
    failures: tuple[Failure, ...]


def run_study(
    plan: Plan, folder: Path, *, jobs: int, keep: bool, part: tuple[int, int] = (1, 1)
) -> Study:
    """Run the unfinished cells and write the tables again.

    Args:
        part: (i, n) runs only the i-th of n parts of the cells and writes no tables; the others may run in parallel.

    Raises:
        EdgekdError: the folder has another study or something else, or no cell finished.
    """
    store = Store(folder)
    store.check()
    number, parts = part
    if parts > 1:
        with _resumable():
            with store.claiming():
                store.claim(plan.settings())
                plan = describe_once(plan, folder)
            own = dataclasses.replace(plan, cells=plan.cells[number - 1 :: parts])
            return Study(folder, (), tuple(_run_cells(own, store, jobs=jobs, keep=keep)))
    with store.running(), _resumable():
        store.claim(plan.settings())
        plan = describe_once(plan, folder)
        failures = _run_cells(plan, store, jobs=jobs, keep=keep)
        if not keep and not failures:
            remove_bases(plan, folder)
        done = store.done(plan.cells)
        if not done:
            raise EdgekdError(
                f"None of the {len(plan.cells)} cells finished: {failures[0].reason}",
                "Fix the cause and run the command again.",
            )
        tables = make_tables(plan, done, teacher_scores(plan))
        write_text(folder / "table.md", markdown(study_document(folder.name, tables)))
        write_text(folder / "table.csv", study_csv(tables))
        draw_study(tables, folder / "table.png")
    return Study(folder, tuple(tables), tuple(failures))


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """If a signal stops a cell, raise `Stopped` with a hint to resume the study."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(
            number,
            "Stopped; finished cells are kept, and the running one has a checkpoint.",
            "Resume with the same command.",
        ) from stopped


def describe_once(plan: Plan, folder: Path) -> Plan:
    """Run every command for descriptions once, for all classes and vocabularies, since language models vary.

    Stored descriptions are reused. All files are read before the first training.

    Returns:
        The plan with these descriptions for the runs, the unseen classes and the teacher's row.

    Raises:
        EdgekdError: a command fails, or a class is missing in a file.
    """
    wanted: dict[str, list[str]] = {}
    for config in plan.configs.values():
        if config.descriptions is not None:
            more = read_vocabulary(config.vocabulary) if config.vocabulary else ()
            wanted.setdefault(config.descriptions, list(plan.images.classes)).extend(more)
    for spec, names in wanted.items():
        if spec.startswith("command:"):
            path = description_file(folder, spec)
            kept = stored_descriptions(path, spec, tuple(dict.fromkeys(names)), may_run=True)
            write_json(path, {name: list(sentences) for name, sentences in kept.items()})
        else:
            descriptions_for(spec, names)
    configs = {name: with_description_file(one, folder) for name, one in plan.configs.items()}
    return dataclasses.replace(plan, configs=configs)


def teacher_scores(plan: Plan) -> NDArray[np.float32] | None:
    """Return zero-shot scores on all images, float32 `[N, C]`; None if no recipe has a teacher."""
    distilled = [name for name in plan.recipes if plan.uses_teacher(name)]
    if not distilled:
        return None
    config, images = plan.configs[distilled[0]], plan.images
    teacher = load_teacher(config.teacher)
    # All cells share one classifier, so its templates do not depend on the domain left out.
    templates = templates_for("photo" if config.prompts in (None, "domain") else config.prompts)
    spec = config.descriptions
    described = descriptions_for(spec, images.classes) if spec else None
    bank = teacher.text_bank(images.classes, templates, described)

    def embed() -> dict[str, Tensor]:
        say(f"study: embedding {len(images):,} images with the teacher")
        return {"embeddings": plain_embeddings(teacher, images, np.arange(len(images)))}

    stored = cached_tensors("plain", (teacher.id, *images.keys), embed)
    scores: NDArray[np.float32] = bank.zero_shot(stored["embeddings"]).numpy()
    return scores


def _run_cells(plan: Plan, store: Store, *, jobs: int, keep: bool) -> list[Failure]:
    """Run every unfinished cell; the others still run if one fails."""
    finished = {done.cell for done in store.done(plan.cells)}
    todo = [cell for cell in plan.cells if cell not in finished]
    if finished:
        say(f"study: {len(finished)} of {len(plan.cells)} cells are already finished")
    if todo and jobs > 1:
        return _side_by_side(plan, store, todo, jobs, keep)
    failures = []
    for number, cell in enumerate(todo, 1):
        say(f"study: cell {number} of {len(todo)}: {cell.key}")
        try:
            run_cell(store, cell, plan.configs[cell.recipe], keep=keep, oracle=plan.oracle)
        except EdgekdError as error:
            failures.append(_failed(cell, str(error)))
        except Exception as error:  # any error: the other cells still run
            failures.append(_failed(cell, f"{type(error).__name__}: {error}"))
    return failures


def _side_by_side(
    plan: Plan, store: Store, todo: Sequence[Cell], jobs: int, keep: bool
) -> list[Failure]:
    """Run at most `jobs` processes, each with an equal share of the cores and, if there are GPUs, its own GPU."""
    import torch

    threads = max(1, usable_cores() // jobs)
    gpus = torch.cuda.device_count() if plan.configs[todo[0].recipe].accelerator != "cpu" else 0
    slots = list(range(min(jobs, gpus) if gpus else jobs))
    if gpus and gpus < jobs:
        say(f"study: running {gpus} processes instead of {jobs}, one per GPU")
    logs = store.folder / "logs"
    logs.mkdir(exist_ok=True)
    flags = ("keep" if keep else "drop", "oracle" if plan.oracle else "blind")
    waiting = list(reversed(todo))
    running: dict[subprocess.Popen[bytes], tuple[Cell, int]] = {}
    failures = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, running)
        while waiting or running:
            while waiting and slots:
                cell, slot = waiting.pop(), slots.pop()
                words = [str(store.folder), json.dumps(dataclasses.asdict(cell)), *flags]
                environment = _environment(threads, slot if gpus else None)
                running[_start(words, logs / f"{cell.key}.txt", environment)] = cell, slot
                say(f"study: {cell.key} started, {len(waiting)} waiting")
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                cell, slot = running.pop(process)
                slots.append(slot)
                if code := process.returncode:
                    failures.append(_failed(cell, _last_words(logs / f"{cell.key}.txt", code)))
            if not ended:
                time.sleep(0.1)
    return failures


def _start(words: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgekd.studies.cell", *words]
    with open(log, "wb") as handle:
        return subprocess.Popen(command, env=environment, stdout=handle, stderr=handle)


def _end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    """Stop the running cells, with time to write a checkpoint."""
    for process in running:
        process.terminate()
    until = time.monotonic() + _CHECKPOINT_S
    for process in running:
        try:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _environment(threads: int, gpu: int | None) -> dict[str, str]:
    cores = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if gpu is None:
        return {**os.environ, **cores}
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {**os.environ, **cores, "CUDA_VISIBLE_DEVICES": given[gpu] if given else str(gpu)}


def _failed(cell: Cell, reason: str) -> Failure:
    warn(f"{cell.key} failed: {reason}")
    return Failure(cell, reason)


def _last_words(log: Path, code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}; see {log}"
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    last = text.splitlines()[-1].strip().removeprefix("error: ") if text else f"exit code {code}"
    return f"{last} (see {log})"
