from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import edgekd
from edgekd.api import fetch
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.plan import settle
from edgekd.distill.students import make_student
from edgekd.distill.teachers import ClipTeacher, load_teacher

STUDENT = "mobilenetv3_small_050.lamb_in1k"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's cache with one student, and no network."""
    torch.manual_seed(0)
    folder = tmp_path / "hub" / f"models--timm--{STUDENT}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(timm.create_model(STUDENT).state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: False)


@pytest.mark.usefixtures("hub_cache")
def test_what_was_fetched_trains_elsewhere(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"local-dir:{tiny_teacher}"
    folder, student = fetch(spec, STUDENT, to=tmp_path / "weights")
    copy, original = load_teacher(f"local-dir:{folder}"), load_teacher(spec)
    assert isinstance(copy, ClipTeacher)
    assert copy.id == original.id
    online = make_student(STUDENT, pretrained="hub").state_dict()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    given = {"student": STUDENT, "weights_dir": tmp_path / "weights"}
    settled = settle(TrainConfig.load(**given, pretrained="hub"))
    assert settled.student_weights == student
    assert settled.weights_dir is None
    assert settle(TrainConfig.load(**given)).student_weights is None  # the toy data need no hub
    offline = make_student(STUDENT, pretrained="hub", weights=settled.student_weights).state_dict()
    assert online.keys() == offline.keys()
    assert all(torch.equal(online[name], offline[name]) for name in online)


@pytest.mark.usefixtures("hub_cache")
def test_what_is_there_already_stays(tmp_path: Path, tiny_teacher: Path) -> None:
    spec = f"local-dir:{tiny_teacher}"
    own = tmp_path / "weights" / f"{STUDENT}.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"fine-tuned for weeks")
    folder, _ = fetch(spec, STUDENT, to=own.parent)
    (folder / "notes.txt").write_text("mine")
    assert fetch(spec, STUDENT, to=own.parent) == [folder, own]
    assert own.read_bytes() == b"fine-tuned for weeks"
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_teacher_is_taken_from_the_folder_by_its_name(tmp_path: Path) -> None:
    name = "ViT-B-32:laion2b_s34b_b79k"
    (tmp_path / "ViT-B-32-laion2b_s34b_b79k").mkdir()
    given = {"weights_dir": tmp_path, "teacher": name, "pretrained": "scratch"}
    settled = settle(TrainConfig.load(**given))
    assert settled.teacher == f"local-dir:{tmp_path / 'ViT-B-32-laion2b_s34b_b79k'}"
    assert settled.student_weights is None
    with pytest.raises(EdgekdError) as caught:
        settle(TrainConfig.load(**given | {"teacher": "ViT-L-14:openai"}))
    assert "edgekd fetch" in caught.value.hint


def test_a_student_that_was_not_fetched_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="vit_tiny"):
        edgekd.train("vit_tiny", pretrained="hub", weights_dir=tmp_path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_of_embeddings_needs_no_fetching(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError):
        fetch(f"embeddings:{tmp_path / 'absent.npz'}", to=tmp_path)
