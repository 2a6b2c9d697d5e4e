from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd.api import plan_training
from edgekd.core.errors import EdgekdError


@pytest.fixture
def small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, tiny_teacher: Path,
    make_domain_folder: Callable[..., Path],
) -> dict[str, Any]:  # fmt: skip
    """Three domains of two classes with ten images each, of which two domains train 8 of 10."""
    monkeypatch.chdir(tmp_path)
    return {
        "student": "mobilenetv3_small_050",
        "pretrained": "scratch",
        "size": 32,
        "data": make_domain_folder(tmp_path / "data"),
        "teacher": f"local-dir:{tiny_teacher}",
        "batch_size": 8,
        "views": 3,
    }


def test_a_plan_counts_and_measures_and_leaves_nothing(
    small: dict[str, Any], tmp_path: Path
) -> None:
    found = plan_training(**small, recipe="vl2v-adip", epochs=5)
    assert found.images == {"train": 32, "unlabelled": 0, "val": 4, "ID test": 4, "unseen test": 20}
    assert len(found.stages) == 2
    assert found.steps == 5 * 32 // 8
    assert found.epochs == pytest.approx(5)
    assert (found.teacher_views, found.teacher_passes) == (32 * 3, 32 * 3)
    assert found.disk_mb > 0
    for seconds in (found.teacher_seconds, found.decode_seconds, found.train_seconds):
        assert seconds is not None
        assert seconds > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_run_without_a_teacher_has_no_passes(small: dict[str, Any]) -> None:
    found = plan_training(**small, recipe="erm", steps=7)
    assert (found.steps, found.teacher_views, found.teacher_seconds) == (7, 0, None)


def test_a_run_prints_its_plan_and_which_stage_it_is_in(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan_training(**small, recipe="vl2v-adip", steps=4)
    capsys.readouterr()
    run = edgekd.train(**small, recipe="vl2v-adip", steps=4, out=tmp_path / "run")
    said = capsys.readouterr().err
    assert planned.schedule in said
    assert "stage 2 of 2" in said
    assert "plan" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert run.steps == planned.steps
    again = plan_training(**small, recipe="vl2v-adip", steps=4)
    assert again.teacher_passes == 0


def test_a_plan_is_no_run(small: dict[str, Any]) -> None:
    with pytest.raises(EdgekdError):
        edgekd.train(**small, plan=True)
    with pytest.raises(EdgekdError):
        plan_training(**small, recipe="no-such-recipe")
