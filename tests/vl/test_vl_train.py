"""The verbs of `edgekd vl`: run folder, export, what users get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vl_fakes import SMALL
from vl_fakes import colours as colours
from vl_fakes import small as small

import edgekd.cli as cli
from edgekd.artifacts.vl import evaluate_vl, export_vl, train_vl
from edgekd.core.errors import EdgekdError
from edgekd.distill.vl.examples import order


def test_a_student_learns_what_only_the_picture_tells(
    small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes = {"task": "choice", "steps": 60, "width": 32, "lr": 3e-3, "batch_size": 24}
    seeing = train_vl(**small(**changes), out=tmp_path / "seeing")
    blind = train_vl(**small(**changes, **{"control": "question-only"}), out=tmp_path / "blind")
    (seen,), (guessed,) = evaluate_vl(seeing.folder), evaluate_vl(blind.folder)
    assert seen["n"] == guessed["n"] == 6
    assert seen["accuracy"] > 0.8
    assert seen["synthetic"]
    assert guessed["accuracy"] < 0.8
    with pytest.raises(EdgekdError, match="is a control"):
        export_vl(blind.folder)


@pytest.mark.slow
def test_train_evaluate_export_on_the_command_line(
    colours: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "heads"]
    common = [
        "--task",
        "ve",
        "--data",
        str(colours),
        "--teacher",
        "toy",
        "--test-domain",
        "dark",
        "--out",
        str(out),
    ]
    cli.app(["vl", "train", *common, *options], standalone_mode=False)
    record = json.loads((out / "vl_run.json").read_text())
    assert record["synthetic"]
    assert record["config"]["teacher"] == "toy"
    assert record["teacher_id"]
    assert record["counts"]["ood_test"] == 3 * 36
    assert {path.name for path in out.iterdir()} == {
        "vl_run.json", "config.json", "metrics.jsonl", "split.json", "student.safetensors"
    }  # fmt: skip
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(steps[-1]) == {"step", "ce", "token_td"}
    names = set(load_file(out / "student.safetensors"))
    assert {name.split(".")[0] for name in names} == {
        "backbone", "project", "patch_place", "embed", "text_place", "first", "blocks", "norm", "head", "rows"
    }  # fmt: skip
    cli.app(["vl", "export", str(out)], standalone_mode=False)
    assert "100.0 % of" in capsys.readouterr().out
    cli.app(["vl", "evaluate", str(out)], standalone_mode=False)
    torch_says = capsys.readouterr().out
    assert "ood:dark" in torch_says
    assert "synthetic" in torch_says
    with pytest.raises(EdgekdError, match="exists"):
        export_vl(out)
    monkeypatch.setattr(
        "edgekd.distill.vl.evaluate.student_answers",
        lambda *_, **__: pytest.fail("torch was asked"),
    )
    cli.app(["vl", "evaluate", str(out), "--onnx"], standalone_mode=False)
    assert capsys.readouterr().out == torch_says
    record = json.loads((out / "artifacts" / "onnxruntime-fp32" / "vl_artifact.json").read_text())
    assert record["parity"]["passed"]
    assert record["answers"] == ["entailment", "contradiction", "neutral"]


@pytest.mark.parametrize("control", ["pooled-only", "random-tokens", "shuffled-teacher"])
def test_controls_train(control: str, small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first, second = (
        train_vl(**small(control=control, task="choice", fraction=0.1), out=tmp_path / name)
        for name in "ab"
    )
    assert first.record["train_pictures"] == 6
    for (name, value), other in zip(
        first.student.state_dict().items(), second.student.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name  # the same seed gives the same student


def test_order_covers_everything_in_turn() -> None:
    seen = np.concatenate([order(10, 4, 0, step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert (order(10, 4, 0, 3) == order(10, 4, 0, 3)).all()
    assert (order(10, 4, 1, 0) != order(10, 4, 0, 0)).any()


def test_mistakes(small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(EdgekdError, match="exists"):
            train_vl(**small(), out=tmp_path / "there", overwrite=overwrite)
    assert (tmp_path / "there" / "thesis.txt").read_text() == "mine"
    with pytest.raises(EdgekdError, match="no vision-language run"):
        evaluate_vl(tmp_path / "there")
    with pytest.raises(EdgekdError, match="sketch"):
        train_vl(**small(test_domain="sketch"), out=tmp_path / "new")
    with pytest.raises(EdgekdError, match="The term ce is nan at step"):
        train_vl(**small(lr=1e30, steps=6), out=tmp_path / "nan")
    with pytest.raises(EdgekdError, match="not been exported"):
        evaluate_vl(train_vl(**small(), out=tmp_path / "plain").folder, onnx=True)
