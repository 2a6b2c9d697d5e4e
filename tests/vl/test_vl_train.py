from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from study_data import after_step, json_lines, same_weights
from vl_fakes import SMALL
from vl_fakes import colours as colours
from vl_fakes import small as small

import edgekd.cli as cli
from edgekd.artifacts.vl import evaluate_vl as evaluate_verb
from edgekd.artifacts.vl import export_vl, train_vl
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.distill.vl.run import evaluate_vl, load_vl_run, torch_predict
from edgekd.distill.vl.student import VlStudent
from edgekd.distill.vl.teacher import TokenTeacher

Small = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


def test_a_student_learns_what_only_the_picture_shows(small: Small, tmp_path: Path) -> None:
    changes = {"task": "choice", "steps": 60, "width": 32, "lr": 3e-3, "batch_size": 24}
    seeing = train_vl(**small(**changes), out=tmp_path / "seeing")
    changes |= {"control": "question-only", "steps": 10}
    blind = train_vl(**small(**changes), out=tmp_path / "blind")
    (seen,), (guessed,) = evaluate_verb(seeing.folder), evaluate_verb(blind.folder)
    assert seen["n"] == guessed["n"] == 6
    assert seen["accuracy"] > 0.8
    assert seen["synthetic"]
    assert guessed["accuracy"] < 0.8
    with pytest.raises(EdgekdError, match="is a control"):
        export_vl(blind.folder)


def test_a_stopped_run_resumes(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = {"student_options": {"drop_path_rate": 0.2}, "student": "test_vit", "size": 160}
    settings = small(control="random-tokens", task="choice", steps=6, **dropout)
    whole = train_vl(**settings, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        after_step(4, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as caught:
            train_vl(**settings, out=tmp_path / "run")
    assert "edgekd vl train --resume" in caught.value.hint
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    resumed = train_vl(out=tmp_path / "run", resume=True)
    assert resumed.config.steps == 6
    assert same_weights(resumed.folder, whole.folder)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with pytest.raises(EdgekdError, match="is finished"):
        train_vl(out=tmp_path / "run", resume=True)


def test_a_frozen_backbone_is_unchanged_and_runs_once(
    small: Small, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = {"student_weights": weights, "freeze_backbone": True}
    settings = small(**frozen, control="clip-td", test_domain="dark")
    first = train_vl(**settings, out=tmp_path / "first")
    start = load_file(weights)
    for name, value in first.student.backbone.state_dict().items():
        assert torch.equal(value, start[name]), name
    rows = evaluate_vl(first)
    assert {row["suite"] for row in rows} == {"id", "ood:dark"}
    # The exported graph, picture by picture through the backbone, answers the same.
    assert evaluate_vl(first, predict=torch_predict(first.student)) == rows
    monkeypatch.setattr(VlStudent, "encode", lambda *_: pytest.fail("the backbone ran again"))
    monkeypatch.setattr(TokenTeacher, "images", lambda *_: pytest.fail("the teacher ran again"))
    second = train_vl(**settings, out=tmp_path / "second")
    assert same_weights(first.folder, second.folder)
    assert evaluate_vl(second) == rows


def test_an_unfrozen_backbone_trains(small: Small, weights: Path, tmp_path: Path) -> None:
    run = train_vl(**small(student_weights=weights), out=tmp_path / "run")
    start = load_file(weights)
    for name, value in run.student.backbone.named_parameters():
        assert not torch.equal(value, start[name]), name
    rows = evaluate_vl(run)
    assert evaluate_vl(load_vl_run(run.folder), predict=torch_predict(run.student)) == rows
    with pytest.raises(EdgekdError, match="not been exported"):
        evaluate_verb(run.folder, onnx=True)


@pytest.mark.slow
def test_train_evaluate_export_on_the_command_line(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    out = tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "heads"]
    data = ["--task", "ve", "--data", str(colours), "--teacher", "toy", "--test-domain", "dark"]
    cli.app(["vl", "train", *data, "--out", str(out), *options], standalone_mode=False)
    record = json.loads((out / "vl_run.json").read_text())
    assert record["synthetic"]
    assert record["config"]["teacher"] == "toy"
    assert record["teacher_id"]
    assert record["counts"]["ood_test"] == 3 * 36
    expected = "vl_run.json config.json metrics.jsonl split.json student.safetensors tensorboard"
    assert {path.name for path in out.iterdir()} == set(expected.split())
    lines = json_lines(out / "metrics.jsonl")
    assert set(lines[-1]["terms"]) == {"ce", "token_td"}
    cli.app(["vl", "export", str(out)], standalone_mode=False)
    assert "100.0 % of" in capsys.readouterr().out
    cli.app(["vl", "evaluate", str(out)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "ood:dark" in printed
    assert "synthetic" in printed
    with pytest.raises(EdgekdError, match="exists"):
        export_vl(out)
    monkeypatch.setattr(VlStudent, "fuse", lambda *_: pytest.fail("torch ran"))
    cli.app(["vl", "evaluate", str(out), "--onnx"], standalone_mode=False)
    assert capsys.readouterr().out == printed
    record = json.loads((out / "artifacts" / "onnxruntime-fp32" / "vl_artifact.json").read_text())
    assert record["parity"]["passed"]
    assert record["answers"] == ["entailment", "contradiction", "neutral"]


def test_controls_train_and_one_seed_gives_one_student(small: Small, tmp_path: Path) -> None:
    settings = small(control="shuffled-teacher", task="choice", fraction=0.1)
    first, second = (train_vl(**settings, out=tmp_path / name) for name in "ab")
    assert first.record["train_pictures"] == 6
    assert same_weights(first.folder, second.folder)
    settings = small(control="pooled-only", task="choice", fraction=0.1)
    assert not same_weights(train_vl(**settings, out=tmp_path / "c").folder, first.folder)


def test_mistakes(small: Small, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(EdgekdError, match="exists"):
            train_vl(**small(), out=tmp_path / "there", overwrite=overwrite)
    assert (tmp_path / "there" / "thesis.txt").read_text() == "mine"
    for wrong, match in (
        ({"test_domain": "sketch"}, "sketch"),
        ({"lr": 1e30, "steps": 6}, "not finite: ce"),
        ({"freeze_backbone": True}, "frozen backbone"),
    ):
        with pytest.raises(EdgekdError, match=match):
            train_vl(**small(**wrong), out=tmp_path / "wrong")
    with pytest.raises(EdgekdError, match="no vision-language run"):
        evaluate_verb(tmp_path / "there")
