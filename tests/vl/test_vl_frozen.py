"""A frozen backbone and a teacher are asked once per picture, and nothing about the student changes by that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from vl_fakes import colours as colours
from vl_fakes import small as small

from edgekd.artifacts.vl import train_vl
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_root
from edgekd.distill.vl.build import load_vl_run
from edgekd.distill.vl.data import load_vl_data
from edgekd.distill.vl.evaluate import evaluate_vl, torch_predict
from edgekd.distill.vl.kept import kept
from edgekd.distill.vl.split import spread
from edgekd.distill.vl.student import VlStudent
from edgekd.distill.vl.teacher_tokens import TokenTeacher

Small = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


def test_a_frozen_backbone_looks_once_and_stays_as_it_was(
    small: Small, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(
        student_weights=weights, freeze_backbone=True, control="clip-td", test_domain="dark"
    )
    first = train_vl(**settings, out=tmp_path / "first")
    assert first.student.backbone is not None
    start = load_file(weights)
    for name, value in first.student.backbone.state_dict().items():
        assert torch.equal(value, start[name]), name
    rows = evaluate_vl(first)
    assert {row["suite"] for row in rows} == {"id", "ood:dark"}
    # The exported graph's way, picture by picture through the backbone, answers the same.
    assert evaluate_vl(first, predict=torch_predict(first.student)) == rows

    monkeypatch.setattr(VlStudent, "look", lambda *_: pytest.fail("the backbone was asked again"))
    monkeypatch.setattr(
        TokenTeacher, "images", lambda *_: pytest.fail("the teacher was asked again")
    )
    second = train_vl(**settings, out=tmp_path / "second")
    for (name, value), other in zip(
        first.student.state_dict().items(), second.student.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert evaluate_vl(second) == rows


def test_an_unfrozen_backbone_trains(small: Small, weights: Path, tmp_path: Path) -> None:
    run = train_vl(**small(student_weights=weights), out=tmp_path / "run")
    assert run.student.backbone is not None
    start = load_file(weights)
    moved = [
        not torch.equal(value, start[name])
        for name, value in run.student.backbone.named_parameters()
    ]
    assert all(moved)
    rows = evaluate_vl(run)
    assert evaluate_vl(load_vl_run(run.folder), predict=torch_predict(run.student)) == rows


def test_a_frozen_backbone_without_weights_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="sees nothing"):
        train_vl(**small(freeze_backbone=True), out=tmp_path / "run")


def test_kept_asks_again_for_other_facts_and_for_a_damaged_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def ask() -> dict[str, torch.Tensor]:
        asked.append(1)
        return {"x": torch.arange(3.0)}

    for _ in range(2):
        assert torch.equal(kept("test-1", ("a",), ask)["x"], torch.arange(3.0))
    assert len(asked) == 1
    kept("test-1", ("b",), ask)
    assert len(asked) == 2
    for path in (cache_root() / "vl").glob("test-1-*.safetensors"):
        path.write_bytes(b"torn")
    assert torch.equal(kept("test-1", ("a",), ask)["x"], torch.arange(3.0))
    assert len(asked) == 3
    assert "made again" in capsys.readouterr().err


def test_what_is_tested_in_part_has_every_kind_of_sentence(colours: Path) -> None:
    data = load_vl_data("ve", str(colours))
    everything = np.arange(len(data))
    shown = spread(everything, len(data) // 3)
    assert len(shown) == len(set(shown.tolist())) == len(data) // 3
    assert (np.diff(shown) > 0).all()
    assert set(data.labels[shown].tolist()) == {0, 1, 2}  # every third one would be of one label
    assert (shown == spread(everything, len(data) // 3)).all()
    assert (spread(everything, 10**6) == everything).all()
