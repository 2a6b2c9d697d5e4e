from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_data import tiny_settings

import edgekd
from edgekd.api import plan_training
from edgekd.configs.train import TrainConfig
from edgekd.configs.vl import VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import newest_run
from edgekd.distill.classification.plan import (
    DEFAULT_EPOCHS,
    TOY_BATCH,
    TOY_SIZE,
    TOY_STEPS,
    settle,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settled(**settings: Any) -> TrainConfig:
    return settle(TrainConfig.model_validate(settings))


def test_defaults(tmp_path: Path) -> None:
    config = settled()
    assert (config.pretrained, config.bn, config.size) == ("toy", "frozen", TOY_SIZE)
    assert (config.steps, config.batch_size) == (TOY_STEPS, TOY_BATCH)
    assert (config.augment, config.balance) == ("restyle", "classes")
    plain = settled(recipe="kd")
    assert (plain.prompts, plain.augment, plain.balance) == ("domain", "plain", "domains")
    assert settled(recipe="lgd").prompts is None  # the recipe has an ensemble of its own
    random = settled(student="mobilenetv3_small")
    assert (random.pretrained, random.bn) == ("scratch", "train")
    assert settled(student="vit_tiny").lr == settled(student="deit_tiny_patch16_224").lr == 5e-4
    assert random.lr == settled(student="mobilevit_xxs").lr == 2e-3
    assert settled(student_weights="w.safetensors").bn == "frozen"
    adapted = settled(unlabelled=["toy:sketch"])
    assert (adapted.augment, adapted.balance) == ("plain", "domains")
    assert settled(unlabelled=["toy:sketch"], augment="restyle").augment == "restyle"
    # Real data start from the hub's weights with frozen statistics.
    (tmp_path / "photos").mkdir()
    real = settled(data="photos", teacher="local-dir:clip", student_weights=None)
    assert (real.pretrained, real.bn, real.size) == ("hub", "frozen", None)
    assert (real.steps, real.epochs) == (None, DEFAULT_EPOCHS)
    assert real.data == str(tmp_path / "photos")
    assert real.teacher == f"local-dir:{tmp_path / 'clip'}"
    assert (real.lr or 1) < (config.lr or 0)


def test_the_toy_teacher_is_for_other_images_only_by_name(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert settled(data="photos", teacher="toy").teacher == "toy"
    assert settled(data="photos", recipe="erm").teacher == "toy"  # which needs none
    entailment = {"task": "ve", "data": "photos"}
    assert VlTrainConfig.load(**entailment, control="none").teacher == "toy"
    for unnamed in (
        lambda: settled(data="photos"),
        lambda: settled(data="photos", recipe="erm", student="teacher"),
        lambda: edgekd.evaluate(data="photos"),
        lambda: VlTrainConfig.load(**entailment),
    ):
        with pytest.raises(EdgekdError, match="No teacher"):
            unnamed()


def test_chosen_settings_stay(tmp_path: Path) -> None:
    sizes = {"size": 48, "lr": 0.5, "epochs": 2.0, "batch_size": 48}
    chosen = sizes | {"pretrained": "scratch", "bn": "frozen", "out": tmp_path}
    config = settled(**chosen)
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert config.steps is None
    config = settled(smoke=True, epochs=50.0)
    assert (config.steps or 99) < 10
    assert (config.epochs, config.views) == (None, 1)


def folder(name: str, *, finished: bool, age: int) -> Path:
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"student": "resnet18", "steps": 5}))
    if finished:
        (path / "run.json").write_text("{}")
        os.utime(path / "run.json", (1e9 - age, 1e9 - age))
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_run_is_found_and_resumed_with_its_settings() -> None:
    with pytest.raises(EdgekdError, match="no finished run"):
        newest_run()
    folder("a", finished=True, age=10)
    newest = folder("done", finished=True, age=5)
    assert newest_run() == newest
    with pytest.raises(EdgekdError, match="no unfinished run"):
        settled(resume=True)
    older = folder("older", finished=False, age=2)
    newer = folder("newer", finished=False, age=1)
    assert newest_run().name == "done"
    config = settled(resume=True, student="mobilenetv3", steps=99)
    assert (config.out, config.student, config.steps, config.resume) == (newer, "resnet18", 5, True)
    assert settled(resume=True, out=older).out == older
    with pytest.raises(EdgekdError, match="finished"):
        settled(resume=True, out="runs/done")
    for damaged in ("{", '{"steps": "many"}', '{"nonsense": 1}', "[]"):
        (newer / "config.json").write_text(damaged)
        with pytest.raises(EdgekdError):
            settled(resume=True, out=newer)


@pytest.fixture
def small(
    tmp_path: Path, own_cache: Path, tiny_teacher: Path, make_domain_folder: Callable[..., Path]
) -> dict[str, Any]:
    """Three domains of two classes with ten images each, of which two domains train 8 of 10."""
    settings = tiny_settings(make_domain_folder(tmp_path / "data"), tiny_teacher)
    return settings | {"views": 3, "steps": None}


def test_a_plan_counts_and_measures_and_leaves_nothing(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan_training(**small | {"recipe": "vl2v-adip", "epochs": 5})
    assert found.images == {"train": 32, "unlabelled": 0, "val": 4, "ID test": 4, "unseen test": 20}
    assert found.test_domain in found.lines()[0]
    assert (len(found.stages), found.steps) == (2, 5 * 32 // 8)
    assert (found.teacher_views, found.teacher_passes) == (32 * 3, 32 * 3)
    measured = (found.disk_mb, found.teacher_seconds, found.decode_seconds, found.train_seconds)
    assert all(value is not None and value > 0 for value in measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    without = plan_training(**small | {"recipe": "erm", "steps": 7})
    assert (without.steps, without.teacher_views, without.teacher_seconds) == (7, 0, None)
    # A run prints its plan.
    capsys.readouterr()
    settings = small | {"recipe": "vl2v-adip", "steps": 4}
    run = edgekd.train(**settings, out=tmp_path / "run")
    printed = capsys.readouterr().err
    again = plan_training(**settings)
    assert again.schedule in printed
    assert "stage 2 of 2" in printed
    assert "plan" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert (again.steps, again.teacher_passes) == (run.steps, 0)
