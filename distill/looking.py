"""Where on its way a run's weights are looked at: to validate them, or to show them to whoever asked."""

from __future__ import annotations

from edgekd.configs.train import TrainConfig
from edgekd.distill.job import Job
from edgekd.distill.progress import Progress
from edgekd.distill.students import Student

PLACES = 10
"""Where source validation is looked at at the end alone."""


def validation_every(config: TrainConfig, steps: int) -> int | None:
    """Steps between evaluations on source validation in a last stage of `steps`; None: none on the way."""
    return config.eval_every or (max(1, steps // 8) if config.select == "best" else None)


def places(span: range, every: int | None) -> tuple[int, ...]:
    """Numbers of steps done, rising: the multiples of `every` within a stage, or ten evenly spread, and its end.

    Args:
        span: the stage's steps, counted from 0 over the whole run.
    """
    if every:
        found = {done for done in range(span.start + 1, span.stop) if done % every == 0}
    else:
        found = {span.start + -(-len(span) * part // PLACES) for part in range(1, PLACES)}
    return tuple(sorted(found | {span.stop}))


def show(
    job: Job, student: Student, done: int, all_places: tuple[int, ...], progress: Progress
) -> None:
    """Let the job's `look` see the weights; the other processes wait, and the run's clock stands."""
    with progress.paused():
        if job.fabric.is_global_zero and job.look is not None:
            job.look(job, student, done, all_places)
        job.fabric.barrier()
