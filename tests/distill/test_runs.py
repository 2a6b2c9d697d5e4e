from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from study_data import draw_domains, tiny_settings
from term_reference import unit

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.data.split import make_split, read_stored_split
from edgekd.distill.classification.load_run import continue_from, load_run
from edgekd.distill.classification.plan import settle, split_after
from edgekd.distill.models.students import make_student
from edgekd.distill.models.teachers import load_teacher
from edgekd.distill.train import train
from edgekd.evaluation.trained_on import read_trained

pytestmark = pytest.mark.usefixtures("one_thread")

Trainer = Callable[..., Path]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    data = draw_domains(tmp_path_factory.mktemp("data") / "d", ("cat", "dog"))
    return tiny_settings(data, tiny_teacher) | {"batch_size": 4, "log_every": 1}


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """`run(**changes)` trains into `tmp_path/run` and returns the folder."""

    def start(**changes: Any) -> Path:
        given = settings | {"out": tmp_path / "run"} | changes
        return train(TrainConfig.model_validate(given)).folder

    return start


def terms(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["terms"])


def test_descriptions_are_in_the_bank_that_trains_and_predicts(
    run: Trainer, tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"cat": ["very " * 40 + "small"], "dog": ["It barks.", "It runs."]}
    (tmp_path / "d.json").write_text(json.dumps(told))
    folder = run(recipe="vlm-ood", descriptions=str(tmp_path / "d.json"))
    printed = capsys.readouterr().err
    assert printed.count("truncated by the tokenizer") == 1
    assert '"cat" has' in printed
    assert json.loads((folder / "descriptions.json").read_text()) == told
    bank = load_run(folder).bank
    assert bank.described
    texts = (f"cat . {told['cat'][0]}", "dog . It barks.", "dog . It runs.")
    teacher: Any = load_teacher(f"local-dir:{tiny_teacher}")
    own = unit(teacher.embed_texts([f"a photo of a {text}" for text in texts]))
    expected = unit(torch.stack([own[0], own[1:].mean(dim=0)]))
    assert torch.allclose(bank.vectors, expected, atol=1e-6)


def test_captions_are_embedded_once_and_trained_on(
    run: Trainer, settings: dict[str, Any], tmp_path: Path, own_cache: Path
) -> None:
    names = load_images(settings["data"]).ids
    captions = {name: f"image {number % 5}" for number, name in enumerate(names)}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    own = {"train": {"terms": {"caption_nce": 0.3}}}
    changes: dict[str, Any] = {"recipe": "vlm-ood", "captions": tmp_path / "c.json"}
    assert set(terms(run(**changes))) == {"text_ce", "im_nce", "vlprox", "caption_nce"}
    shards = list((own_cache / "embeddings").glob("*-captions/*.keys.npy"))
    assert len(shards) == 1
    assert load_run(run(**changes, stages=own, overwrite=True)).config.stages == own
    assert list((own_cache / "embeddings").glob("*-captions/*.keys.npy")) == shards
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(EdgekdError, match="no caption for"):
        run(**changes, out=tmp_path / "other")


def test_a_vocabulary_is_distilled_for(run: Trainer, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("house\ntree\nbird\n")
    folder = run(recipe="lgd", vocabulary=tmp_path / "v.txt", projector="mlp-gelu")
    assert terms(folder) != terms(run(recipe="lgd", out=tmp_path / "own", projector="mlp-gelu"))
    loaded = load_run(folder)
    assert (loaded.bank.classes, len(loaded.bank.templates)) == (("cat", "dog"), 80)
    assert any(isinstance(module, torch.nn.GELU) for module in loaded.student.neck.modules())


def test_domain_texts_need_domains(run: Trainer, tmp_path: Path) -> None:
    data = draw_domains(tmp_path / "d", ("cat", "dog"), count=4)
    shutil.rmtree(data / "art")  # one source domain and the unseen one remain
    with pytest.raises(EdgekdError, match=r"source domains.* 1"):
        run(recipe="rise", data=str(data))


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run; its images were moved to `images` afterwards."""
    home = tmp_path_factory.mktemp("trained")
    data = {"data": str(draw_domains(home / "before")), "recipe": "vl2v-adip", "out": home / "run"}
    train(TrainConfig.model_validate(settings | data))
    (home / "before").rename(home / "images")
    return home


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, moved away from where it was trained."""
    return Path(shutil.copytree(trained / "run", tmp_path / "moved"))


def test_a_run_reads_back_whole_after_a_move(finished: Path, trained: Path) -> None:
    loaded = load_run(finished)
    state = load_file(finished / "student.safetensors")
    for name, value in loaded.student.state_dict().items():
        assert torch.equal(value, state[name])
    assert loaded.student.scale.item() == state["scale"].item() != 1
    assert loaded.run.preprocess == loaded.student.preprocess
    assert torch.equal(loaded.vectors, loaded.bank.head)
    assert loaded.bank.classes == loaded.run.classes == ("cat", "dog")
    with pytest.raises(EdgekdError):
        loaded.data()
    _, split = loaded.data(str(trained / "images"))
    assert split.hash == loaded.run.split_hash


def test_a_damaged_run_is_one_sentence(finished: Path) -> None:
    names = ("student.safetensors", "text_bank.safetensors", "config.json", "run.json")
    for path in (finished / name for name in names):
        whole = path.read_bytes()
        path.write_bytes(whole[:40])
        with pytest.raises(EdgekdError) as caught:
            load_run(finished)
        assert caught.value.hint
        assert str(finished) in caught.value.message
        path.write_bytes(whole)
    other = make_student("test_resnet", pretrained="scratch", size=32, dim=12)
    save_file(other.state_dict(), finished / "student.safetensors")
    with pytest.raises(EdgekdError, match="test_efficientnet"):
        load_run(finished)


@pytest.fixture(scope="module")
def erm(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = draw_domains(tmp_path_factory.mktemp("start") / "d", ("ant", "bee", "cat"), count=4)
    return settings | {"data": str(data), "recipe": "erm", "batch_size": 6}


@pytest.fixture(scope="module")
def before(erm: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ant and cat."""
    out = tmp_path_factory.mktemp("runs") / "before"
    train(TrainConfig.model_validate(erm | {"unseen_classes": ("bee",), "out": out}))
    return out


def test_weights_and_rows_of_earlier_classes_are_taken_over(before: Path) -> None:
    old: Any = load_run(before).student
    new: Any = make_student("test_efficientnet", pretrained="scratch", size=32, classes=3)
    fresh = new.head.weight.clone()
    continue_from(before, new, ("ant", "bee", "cat"))
    assert torch.equal(new.head.weight[[0, 2]], old.head.weight)
    assert torch.equal(new.head.weight[1], fresh[1])
    assert (new.scale == 1, old.scale == 1) == (True, False)
    for name, value in old.backbone.state_dict().items():
        assert torch.equal(new.backbone.state_dict()[name], value)


def test_a_run_goes_on_from_another(before: Path, erm: dict[str, Any], tmp_path: Path) -> None:
    own = {name: erm[name] for name in erm if name not in ("student", "pretrained", "size")}
    own |= {"unseen_classes": ("bee",), "shots": 2, "start": before, "lr": 1e-9}
    train(TrainConfig.model_validate(own | {"out": tmp_path / "after"}))
    loaded, old = load_run(tmp_path / "after"), load_run(before)
    config = loaded.config
    assert (config.student, config.size, config.bn) == ("test_efficientnet", 32, "frozen")
    stems: Any = [each.student.backbone.get_parameter("conv_stem.weight") for each in (loaded, old)]
    assert torch.allclose(stems[0], stems[1], atol=1e-5)
    images, split = loaded.data()
    assert (images.labels == 1).sum() == (images.labels[split.train] == 1).sum() == 2


def test_what_does_not_fit_the_run_to_start_from(before: Path, tmp_path: Path) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"start": tmp_path},
        {"student_weights": Path("w.safetensors")},
        {"pretrained": "hub"},
        {"student": "resnet18"},
        {"size": 48},
    )
    for words in wrong:
        with pytest.raises(EdgekdError):
            settle(TrainConfig(**{"start": before} | words))
    embedding = make_student("test_efficientnet", pretrained="scratch", size=32, dim=8)
    with pytest.raises(EdgekdError, match=r"\(erm\)"):
        continue_from(before, embedding, ("ant", "cat"))


def test_what_an_earlier_run_of_the_chain_trained_on_is_no_test_either(
    before: Path, tmp_path: Path, make_domain_folder: Callable[..., Path]
) -> None:
    """a → b → c: the images of b do not show what a trained on, and a may be gone."""
    stored = read_stored_split(before / "split.json")
    folder = make_domain_folder(tmp_path / "m", domains=(), classes=("ant", "cat"), count=3)
    split = split_after(before, make_split(load_images(folder), test_domain="none"))
    (tmp_path / "b").mkdir()
    split.write(tmp_path / "b" / "split.json")
    images = load_images(load_run(before).config.data)
    with pytest.raises(EdgekdError, match=r"of the .* test images"):
        split_after(tmp_path / "b", make_split(images, test_domain="none", seed=stored.seed + 1))
    seen = read_trained(tmp_path / "b" / "split.json")
    assert seen.excluded(stored.roles["train"].values()) == {"before": len(stored.roles["train"])}
