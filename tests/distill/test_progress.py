from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from edgekd.core.errors import EdgekdError
from edgekd.distill import progress as module
from edgekd.distill.progress import Progress, counting, evaluation_steps


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(progress: Progress, step: int, waited_s: float = 0.0) -> None:
    loss = torch.tensor(float(step))
    progress.step(step, "train", loss, {"ce": loss / 2}, 0.1, 8, waited_s)


def test_every_nth_step_and_the_last_are_written(tmp_path: Path, fabric: Fabric) -> None:
    with Progress(tmp_path, 8, 3, fabric, 0) as progress:
        for step in range(8):
            record(progress, step)
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 8]
    first = lines(tmp_path)[0]
    assert (first["stage"], first["loss"], first["terms"], first["lr"]) == (
        "train",
        2.0,
        {"ce": 1.0},
        0.1,
    )


def test_resuming_keeps_what_the_checkpoint_covers(tmp_path: Path, fabric: Fabric) -> None:
    with Progress(tmp_path, 6, 1, fabric, 0) as progress:
        for step in range(5):
            record(progress, step)
        progress.evaluated(4, 0.5)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 1, "terms": {"ce": 0.1}')
    with Progress(tmp_path, 6, 1, fabric, 4) as progress:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4]
        record(progress, 4)
    assert lines(tmp_path)[-1]["step"] == 5


def test_speed_and_waiting_leave_out_the_first_step(tmp_path: Path, fabric: Fabric) -> None:
    with Progress(tmp_path, 3, 10, fabric, 0) as progress:
        time.sleep(0.3)
        record(progress, 0, waited_s=0.25)
        started = time.perf_counter()
        time.sleep(0.1)
        record(progress, 1, waited_s=0.05)
        speed, part, seconds = (
            progress.images_per_second,
            progress.data_wait_percent,
            time.perf_counter() - started,
        )
    assert speed == pytest.approx(8 / seconds, rel=0.1)
    assert part == pytest.approx(100 * 0.05 / seconds, rel=0.1)
    assert progress.seconds > 0.4


def test_a_pause_is_no_training(
    tmp_path: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    with Progress(tmp_path, 3, 10, fabric, 0) as progress:
        for step in range(3):
            clock[0] += 2
            record(progress, step, waited_s=0.5)
            with progress.paused():
                clock[0] += 30
        assert progress.seconds == 6
        assert progress.images_per_second == 16 / 4  # the last two steps
        assert progress.data_wait_percent == 25


def test_before_two_steps_there_is_no_speed(tmp_path: Path, fabric: Fabric) -> None:
    with Progress(tmp_path, 3, 10, fabric, 0) as progress:
        record(progress, 0)
        assert progress.images_per_second == 0
        assert progress.data_wait_percent == 0


def test_the_end_is_said_where_there_is_no_terminal(
    tmp_path: Path, fabric: Fabric, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(tmp_path, 2, 10, fabric, 0) as progress:
        record(progress, 0)
        record(progress, 1)
    said = capsys.readouterr().err
    assert "step 2/2" in said
    assert "data_wait" in said
    assert "images/s" in said


def test_counting_says_how_many_and_how_long(
    fabric: Fabric, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    with counting("passes", 10, fabric) as advance:
        advance(4)
        advance(8)  # processes may round up together
    said = capsys.readouterr().err
    assert "passes: 4 of 10, about" in said
    assert "passes: 10 of 10, about 0 s left" in said
    assert "passes: 10 in" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path, fabric: Fabric) -> None:
    with Progress(tmp_path, 2, 1, fabric, 0) as progress:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(EdgekdError, match="full"):
            record(progress, 0)


def test_only_process_0_writes(tmp_path: Path) -> None:
    other: Any = SimpleNamespace(is_global_zero=False, all_reduce=lambda value, reduce_op: value)
    with Progress(tmp_path, 1, 1, other, 0) as progress:
        record(progress, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("span", "every", "expected"),
    [
        (range(20), None, (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)),
        (range(100, 125), None, (103, 105, 108, 110, 113, 115, 118, 120, 123, 125)),
        (range(5, 8), None, (6, 7, 8)),  # fewer steps than evaluations
        (range(3, 10), 4, (4, 8, 10)),  # of the run's steps, not the stage's
        (range(3), 50, (3,)),
    ],
)
def test_evaluations_end_with_the_stage(
    span: range, every: int | None, expected: tuple[int, ...]
) -> None:
    assert evaluation_steps(span, every) == expected
