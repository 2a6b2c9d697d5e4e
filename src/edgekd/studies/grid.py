"""Running the cells of a study: one after the other here, or several side by side in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.machine import usable_cores
from edgekd.studies.cell import run_cell
from edgekd.studies.plan import Cell, Plan
from edgekd.studies.store import Store

_CHECKPOINT_S = 20.0
"""Given to a cell that is ended to write its checkpoint."""


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and why, in a line."""

    cell: Cell
    reason: str


def run_cells(plan: Plan, store: Store, *, jobs: int, keep: bool) -> list[Failure]:
    """Run every cell that is not finished; one that fails does not keep the others from running."""
    finished = {done.cell for done in store.done(plan.cells)}
    todo = [cell for cell in plan.cells if cell not in finished]
    if finished:
        say(f"study: {len(finished)} of {len(plan.cells)} cells are finished already")
    run = _here if jobs == 1 else _side_by_side
    return run(plan, store, todo, jobs, keep) if todo else []


def _here(plan: Plan, store: Store, todo: Sequence[Cell], jobs: int, keep: bool) -> list[Failure]:
    failures = []
    for number, cell in enumerate(todo, 1):
        say(f"study: cell {number} of {len(todo)}: {cell.key}")
        try:
            run_cell(store, cell, plan.configs[cell.recipe], keep=keep, oracle=plan.oracle)
        except EdgekdError as error:
            failures.append(_failed(cell, str(error)))
        except Exception as error:  # whatever befell this cell, the others are worth their time
            failures.append(_failed(cell, f"{type(error).__name__}: {error}"))
    return failures


def _side_by_side(
    plan: Plan, store: Store, todo: Sequence[Cell], jobs: int, keep: bool
) -> list[Failure]:
    """At most `jobs` processes, each with its share of the cores and, where there are any, a GPU of its own."""
    import torch

    threads = max(1, usable_cores() // jobs)
    gpus = torch.cuda.device_count() if plan.configs[todo[0].recipe].accelerator != "cpu" else 0
    slots = list(range(min(jobs, gpus) if gpus else jobs))
    if gpus and gpus < jobs:
        say(f"study: {gpus} processes instead of {jobs}, one for each GPU")
    logs = store.folder / "logs"
    logs.mkdir(exist_ok=True)
    waiting = list(reversed(todo))
    running: dict[subprocess.Popen[bytes], tuple[Cell, int]] = {}
    failures = []
    with ExitStack() as stack:
        stack.callback(_end, running)
        while waiting or running:
            while waiting and slots:
                cell, slot = waiting.pop(), slots.pop()
                environment = _environment(threads, slot if gpus else None)
                process = _start(
                    store.folder, cell, logs / f"{cell.key}.txt", environment, keep, plan.oracle
                )
                running[process] = cell, slot
                say(f"study: {cell.key} started, {len(waiting)} more to start")
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                cell, slot = running.pop(process)
                slots.append(slot)
                if process.returncode:
                    failures.append(
                        _failed(cell, _last_words(logs / f"{cell.key}.txt", process.returncode))
                    )
            if not ended:
                time.sleep(0.1)
    return failures


def _end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    """End cells that still run: a checkpoint each where there is time, as there is before a machine is switched off."""
    for process in running:
        process.terminate()
    until = time.monotonic() + _CHECKPOINT_S
    for process in running:
        try:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _environment(threads: int, gpu: int | None) -> dict[str, str]:
    variables = dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    if gpu is not None:
        given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        variables["CUDA_VISIBLE_DEVICES"] = given[gpu] if given else str(gpu)
    return variables


def _start(
    folder: Path, cell: Cell, log: Path, environment: dict[str, str], keep: bool, oracle: bool
) -> subprocess.Popen[bytes]:
    words = ["-m", "edgekd.studies.cell", str(folder), json.dumps(asdict(cell))]
    words += ["keep" if keep else "drop", "oracle" if oracle else "blind"]
    with open(log, "wb") as handle:
        return subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=handle, stderr=handle
        )


def _failed(cell: Cell, reason: str) -> Failure:
    warn(f"{cell.key} failed: {reason}")
    return Failure(cell, reason)


def _last_words(log: Path, code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}; see {log}"
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return (lines[-1].removeprefix("error: ") if lines else f"exit code {code}") + f" (see {log})"
