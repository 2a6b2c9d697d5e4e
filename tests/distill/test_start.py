from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from study_data import draw_domains

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.data.split import make_split, read_stored_split
from edgekd.distill.classification.load import continue_from, load_run
from edgekd.distill.classification.plan import settle, split_after
from edgekd.distill.classification.task import Classification
from edgekd.distill.students import make_student
from edgekd.distill.train import train
from edgekd.evaluation.trained import read_trained


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = draw_domains(tmp_path_factory.mktemp("start") / "d", ("ant", "bee", "cat"), count=4)
    return {
        "data": str(root),
        "recipe": "erm",
        "batch_size": 6,
        "steps": 2,
        "views": 1,
        "accelerator": "cpu",
    }


@pytest.fixture(scope="module")
def before(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ant and cat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "before"
    student = {"student": "test_efficientnet", "pretrained": "scratch", "size": 32}
    train(TrainConfig(**settings, **student, unseen_classes=("bee",), out=out))
    torch.set_num_threads(threads)
    return out


def test_weights_and_rows_of_known_classes_are_taken_over(before: Path) -> None:
    old = load_run(before).student
    assert old.scale != 1
    new = make_student("test_efficientnet", pretrained="scratch", size=32, classes=3)
    assert new.head is not None
    fresh = new.head.weight.clone()
    continue_from(before, new, ("ant", "bee", "cat"))
    assert new.head is not None
    assert old.head is not None
    assert torch.equal(new.head.weight[[0, 2]], old.head.weight)
    assert torch.equal(new.head.weight[1], fresh[1])
    assert new.scale == 1
    for name, value in old.backbone.state_dict().items():
        assert torch.equal(new.backbone.state_dict()[name], value)


def test_a_run_goes_on_from_another(
    before: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Classification.forward

    def watched(task: Any, *rest: Any) -> Any:
        seen.append(task.student.backbone.conv_stem.weight.detach().clone())
        return real(task, *rest)

    monkeypatch.setattr(Classification, "forward", watched)
    run = train(
        TrainConfig(
            **settings, unseen_classes=("bee",), shots=2, start=before, out=tmp_path / "after"
        )
    )
    assert torch.equal(seen[0], load_run(before).student.backbone.get_parameter("conv_stem.weight"))
    assert run.classes == ("ant", "bee", "cat")
    loaded = load_run(tmp_path / "after")
    assert (loaded.config.student, loaded.config.size, loaded.config.bn) == (
        "test_efficientnet",
        32,
        "frozen",
    )
    images, split = loaded.data()
    assert (images.labels == 1).sum() == (images.labels[split.train] == 1).sum() == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"student_weights": Path("w.safetensors")}, "student_weights has no effect"),
        ({"pretrained": "hub"}, "pretrained has no effect"),
        ({"student": "resnet18"}, r"another student \(test_efficientnet\)"),
        ({"size": 48}, r"another size \(32\)"),
    ],
)
def test_what_does_not_fit_the_run_to_start_from(
    before: Path, words: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EdgekdError, match=sentence):
        settle(TrainConfig(start=before, **words))


def test_a_run_that_is_none_and_parts_that_are_missing(before: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError):
        settle(TrainConfig(start=tmp_path))
    embedding = make_student("test_efficientnet", pretrained="scratch", size=32, dim=8)
    with pytest.raises(EdgekdError, match=r"\(erm\) lacks the parts that this recipe needs"):
        continue_from(before, embedding, ("ant", "cat"))


def test_what_the_other_run_trained_on_is_no_test(before: Path) -> None:
    stored = read_stored_split(before / "split.json")
    images = load_images(load_run(before).config.data)
    assert stored.train_domains
    leaving_out = make_split(images, test_domain=stored.train_domains[0])
    with pytest.raises(EdgekdError, match="not unseen"):
        split_after(before, leaving_out)
    with pytest.raises(EdgekdError, match=r"of the .* test images"):
        split_after(before, make_split(images, test_domain="none", seed=stored.seed + 1))
    same = make_split(images, test_domain="none", seed=stored.seed)
    other = replace(same, train_domains=("elsewhere",))
    assert set(split_after(before, other).train_domains) == {"elsewhere", *stored.train_domains}


def test_what_an_earlier_run_of_the_chain_trained_on_is_no_test_either(
    before: Path, tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    """a → b → c: b's own images do not show what a trained on, and a may be gone."""
    stored = read_stored_split(before / "split.json")
    for place in (
        "m/ant/1.png",
        "m/ant/2.png",
        "m/ant/3.png",
        "m/cat/1.png",
        "m/cat/2.png",
        "m/cat/3.png",
    ):
        make_image(tmp_path / place, seed=zlib.crc32(place.encode()))
    middle = load_images(tmp_path / "m")
    (tmp_path / "b").mkdir()
    second = split_after(before, make_split(middle, test_domain="none"))
    second.write(tmp_path / "b" / "split.json")
    images = load_images(load_run(before).config.data)
    with pytest.raises(EdgekdError, match=r"of the .* test images"):
        split_after(tmp_path / "b", make_split(images, test_domain="none", seed=stored.seed + 1))
    seen = read_trained(tmp_path / "b" / "split.json")
    assert seen.excluded(stored.roles["train"].values()) == {"before": len(stored.roles["train"])}
