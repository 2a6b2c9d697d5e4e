from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.config import TrainConfig, load_config
from edgekd.errors import EdgekdError


def refusal(flags: dict[str, Any] | None = None, **sources: Any) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        load_config(flags or {}, **sources)
    assert caught.value.hint
    return caught.value


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_without_sources_everything_is_as_documented() -> None:
    assert load_config({}) == TrainConfig()
    assert TrainConfig().recipe == "vl2v-adip"


def test_later_sources_win(tmp_path: Path) -> None:
    file = toml(tmp_path, 'student = "resnet18"\nlr = 0.1\nseed = 3\nbatch_size = 8\n')
    config = load_config(
        {"lr": 0.2, "seed": 4, "size": None}, file=file, settings=["seed=5", "data=some/folder"]
    )
    assert (config.student, config.batch_size) == ("resnet18", 8)
    assert (config.lr, config.seed) == (0.2, 5)
    assert config.data == "some/folder"  # a word needs no quotes


def test_other_commands_may_share_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, '[train]\nrecipe = "erm"\n[export]\ntarget = "coreml"\n')
    assert load_config({}, file=file).recipe == "erm"


def test_settings_reach_into_tables(tmp_path: Path) -> None:
    file = toml(tmp_path, "[stages.distill]\nlr = 2.0\n")
    config = load_config(
        {},
        file=file,
        settings=["stages.distill.terms.cos_img.weight=0.7", "student_options.pad_type=same"],
    )
    assert config.stages == {"distill": {"lr": 2.0, "terms": {"cos_img": {"weight": 0.7}}}}
    assert config.student_options == {"pad_type": "same"}


def test_the_callers_own_tables_are_left_alone() -> None:
    stages: dict[str, Any] = {"distill": {"lr": 2.0}}
    load_config({"stages": stages}, settings=["stages.distill.lr=3.0"])
    assert stages == {"distill": {"lr": 2.0}}


def test_values_keep_their_kind() -> None:
    config = load_config({}, settings=["epochs=1.5", "smoke=true", "size=64", "ema=0"])
    assert (config.epochs, config.smoke, config.size, config.ema) == (1.5, True, 64, 0.0)


def test_a_misspelt_setting_is_answered_with_the_closest() -> None:
    assert '"batch_size"' in refusal(settings=["batchsize=8"]).message


def test_all_problems_come_in_one_message() -> None:
    message = refusal(
        {"lr": -1.0, "devices": 0}, settings=["recipie=erm", "precision=float"]
    ).message
    assert all(word in message for word in ("lr", "devices", '"recipe"', "precision"))


@pytest.mark.parametrize("setting", ["seed", "=3", " =3", "seed.a=3"])
def test_what_is_no_setting_is_refused(setting: str) -> None:
    refusal({"seed": 1}, settings=[setting])


def test_steps_and_epochs_exclude_each_other() -> None:
    refusal({"steps": 10, "epochs": 2.0})


@pytest.mark.parametrize("content", [b"lr = ", b"\xff\xfe\x00", b"lr = 1\nlr = 2"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert "run.toml" in refusal(file=path).message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "absent.toml" in refusal(file=tmp_path / "absent.toml").message
    assert str(tmp_path) in refusal(file=tmp_path).message


def test_a_configuration_can_be_written_and_read_back() -> None:
    config = load_config(
        {"student_weights": Path("a/b.pt"), "out": Path("runs/x")}, settings=["stages.align.lr=1.0"]
    )
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
