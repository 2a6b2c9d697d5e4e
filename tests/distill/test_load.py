from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.distill.classification.load import load_run
from edgekd.distill.students import make_student
from edgekd.distill.train import train

Make = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(make_domain_folder: Make, folder: Path, teacher: Path, recipe: str) -> Path:
    make_domain_folder(folder / "data", domains=("art", "photo"), count=4)
    config = TrainConfig(
        student="test_efficientnet",
        student_options={"drop_rate": 0.1},
        pretrained="scratch",
        data=str(folder / "data"),
        teacher=f"local-dir:{teacher}",
        recipe=recipe,
        size=32,
        batch_size=4,
        steps=2,
        views=1,
        accelerator="cpu",
        out=folder / "run",
    )
    run = train(config)
    assert run.folder is not None
    return run.folder


@pytest.fixture
def folder(make_domain_folder: Make, tmp_path: Path, tiny_teacher: Path) -> Path:
    return trained(make_domain_folder, tmp_path, tiny_teacher, "vl2v-adip")


def test_a_text_student_reads_back_whole_after_a_move(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "moved")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    loaded = load_run(tmp_path / "moved")
    state = load_file(tmp_path / "moved" / "student.safetensors")
    assert all(
        torch.equal(value, state[name]) for name, value in loaded.student.state_dict().items()
    )
    assert loaded.student.scale.item() == state["scale"].item() != 1
    assert loaded.run.preprocess == loaded.student.preprocess
    assert loaded.bank is not None
    assert torch.equal(loaded.vectors, loaded.bank.head)
    assert loaded.bank.classes == loaded.run.classes == ("cat", "dog")
    with pytest.raises(EdgekdError):
        loaded.data()
    images, split = loaded.data(str(tmp_path / "elsewhere"))
    assert split.hash == loaded.run.split_hash
    assert len(images) == 16


def test_a_linear_student_has_no_text_head(
    make_domain_folder: Make, tmp_path: Path, tiny_teacher: Path
) -> None:
    loaded = load_run(trained(make_domain_folder, tmp_path, tiny_teacher, "kd"))
    assert loaded.vectors is None
    with torch.inference_mode():
        assert loaded.student.scores(torch.zeros(1, 3, 32, 32), loaded.vectors).shape == (1, 2)


@pytest.mark.parametrize(
    "name", ["student.safetensors", "text_bank.safetensors", "config.json", "run.json"]
)
def test_a_damaged_run_is_one_sentence(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(EdgekdError) as caught:
        load_run(folder)
    assert caught.value.hint
    assert str(path.parent) in caught.value.message


def test_another_students_weights_are_refused(folder: Path) -> None:
    other = make_student("test_resnet", pretrained="scratch", size=32, dim=12)
    save_file(
        {name: value.contiguous() for name, value in other.state_dict().items()},
        folder / "student.safetensors",
    )
    with pytest.raises(EdgekdError, match="test_efficientnet"):
        load_run(folder)


def test_the_statistics_are_the_runs(folder: Path) -> None:
    loaded = load_run(folder)
    assert isinstance(loaded.student.preprocess, Preprocess)
    assert loaded.student.mean.flatten().tolist() == pytest.approx(loaded.run.preprocess.mean)
    assert loaded.student.std.flatten().tolist() == pytest.approx(loaded.run.preprocess.std)


def test_an_unfinished_run_is_not_loaded(folder: Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(EdgekdError, match="no finished run") as caught:
        load_run(folder)
    assert "--resume" in caught.value.hint
