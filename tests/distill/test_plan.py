from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd.configs.train import TrainConfig
from edgekd.configs.vl import VlTrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.plan import (
    DEFAULT_EPOCHS,
    TOY_BATCH,
    TOY_SIZE,
    TOY_STEPS,
    newest_run,
    settle,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settled(**settings: Any) -> TrainConfig:
    return settle(TrainConfig.model_validate(settings))


def test_the_toy_run_starts_from_the_shipped_weights(capsys: pytest.CaptureFixture[str]) -> None:
    config = settled()
    assert (config.pretrained, config.bn, config.size, config.steps) == (
        "toy",
        "frozen",
        TOY_SIZE,
        TOY_STEPS,
    )
    assert "random weights" not in capsys.readouterr().err
    assert config.batch_size == TOY_BATCH
    assert settled(batch_size=48).batch_size == 48


def test_toy_prompts_name_the_styles_unless_told_otherwise(tmp_path: Path) -> None:
    assert settled(recipe="kd").prompts == "domain"
    assert settled(prompts="photo").prompts == "photo"
    assert settled(recipe="lgd").prompts is None  # the recipe has an ensemble of its own
    (tmp_path / "photos").mkdir()
    assert settled(data="photos", teacher="toy").prompts is None


def test_views_are_the_recipes_unless_unlabelled_images_train() -> None:
    assert settled().augment == "restyle"
    assert settled(recipe="kd").augment == "plain"
    assert (settled().balance, settled(recipe="kd").balance) == ("classes", "domains")
    adapted = settled(unlabelled=["toy:sketch"])
    assert (adapted.augment, adapted.balance) == ("plain", "domains")
    assert settled(unlabelled=["toy:sketch"], augment="restyle").augment == "restyle"


def test_the_toy_teacher_is_for_other_images_only_by_name(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(EdgekdError, match="No teacher was named for photos"):
        settled(data="photos")
    assert settled(data="photos", teacher="toy").teacher == "toy"
    assert settled(data="photos", recipe="erm").teacher == "toy"  # which needs none
    with pytest.raises(EdgekdError, match="No teacher was named"):
        settled(data="photos", recipe="erm", student="teacher")
    with pytest.raises(EdgekdError, match="No teacher was named"):
        edgekd.evaluate(data="photos")
    with pytest.raises(EdgekdError, match="No teacher was named"):
        VlTrainConfig.load(**{"task": "ve", "data": "photos"})
    assert (
        VlTrainConfig.load(**{"task": "ve", "data": "photos", "control": "none"}).teacher == "toy"
    )
    assert VlTrainConfig.load(**{"task": "ve", "data": "photos", "teacher": "toy"}).data == "photos"


def test_a_toy_run_without_shipped_weights_starts_from_random_ones_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = settled(student="mobilenetv3_small")
    assert (config.pretrained, config.bn) == ("scratch", "train")
    assert "mobilenetv3_small_100 from random weights" in capsys.readouterr().err


def test_real_data_start_from_the_hubs_weights_with_frozen_statistics(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    config = settled(data="photos", teacher="local-dir:clip", student_weights=None)
    assert (config.pretrained, config.bn, config.size) == ("hub", "frozen", None)
    assert (config.steps, config.epochs) == (None, DEFAULT_EPOCHS)
    assert config.data == str(tmp_path / "photos")
    assert config.teacher == f"local-dir:{tmp_path / 'clip'}"
    assert config.lr is not None
    assert config.lr < (settled().lr or 0)


def test_weights_from_a_file_are_not_from_scratch(tmp_path: Path) -> None:
    config = settled(student_weights="w.safetensors")
    assert config.bn == "frozen"
    assert config.student_weights == tmp_path / "w.safetensors"


def test_what_was_chosen_stays(tmp_path: Path) -> None:
    chosen = {
        "pretrained": "scratch",
        "bn": "frozen",
        "size": 48,
        "lr": 0.5,
        "epochs": 2.0,
        "out": tmp_path / "mine",
    }
    config = settled(**chosen)
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert config.steps is None


@pytest.mark.parametrize(
    "wrong", [{"student": "mobilnetv3"}, {"recipe": "vl2v"}, {"stages": {"allign": {}}}]
)
def test_unknown_names_are_refused_before_any_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(EdgekdError):
        settled(**wrong)


def test_names_of_runs_do_not_collide(tmp_path: Path) -> None:
    first = settled().out
    assert first is not None
    first.mkdir(parents=True)
    second = settled().out
    assert second is not None
    assert second != first
    assert second.parent == first.parent == Path("runs")


def test_smoke_is_short() -> None:
    config = settled(smoke=True, epochs=50.0)
    assert config.steps is not None
    assert config.steps < 10
    assert config.epochs is None
    assert config.views == 1


def folder(name: str, *, finished: bool, age: int) -> Path:
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"student": "resnet18", "steps": 5}))
    if finished:
        (path / "run.json").write_text("{}")
        os.utime(path / "run.json", (1e9 - age, 1e9 - age))
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_finished_run_is_found() -> None:
    with pytest.raises(EdgekdError, match="no finished run"):
        newest_run()
    folder("a", finished=True, age=10)
    newest = folder("b", finished=True, age=5)
    folder("c", finished=False, age=1)
    assert newest_run() == newest


def test_resuming_takes_the_settings_it_was_started_with() -> None:
    folder("done", finished=True, age=1)
    with pytest.raises(EdgekdError, match="no unfinished run"):
        settled(resume=True)
    older = folder("older", finished=False, age=20)
    newer = folder("newer", finished=False, age=10)
    config = settled(resume=True, student="mobilenetv3", steps=99)
    assert (config.out, config.student, config.steps, config.resume) == (newer, "resnet18", 5, True)
    assert settled(resume=True, out=older).out == older
    with pytest.raises(EdgekdError, match="finished"):
        settled(resume=True, out="runs/done")


@pytest.mark.parametrize("content", ["{", '{"steps": "many"}', '{"nonsense": 1}', "[]"])
def test_a_damaged_configuration_cannot_be_resumed(content: str) -> None:
    path = folder("a", finished=False, age=1)
    (path / "config.json").write_text(content)
    with pytest.raises(EdgekdError):
        settled(resume=True, out=path)
