from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Run
from edgekd.distill.classification.load import load_run
from edgekd.distill.teachers import load_teacher
from edgekd.distill.train import train

Trainer = Callable[..., Run]


@pytest.fixture
def base(
    make_domain_folder: Callable[..., Path], tmp_path: Path, tiny_teacher: Path
) -> dict[str, Any]:
    return {
        "student": "test_efficientnet",
        "pretrained": "scratch",
        "data": str(make_domain_folder(tmp_path / "data", count=10)),
        "teacher": f"local-dir:{tiny_teacher}",
        "size": 32,
        "batch_size": 4,
        "steps": 2,
        "views": 1,
        "log_every": 1,
        "accelerator": "cpu",
        "out": tmp_path / "run",
    }


def terms(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["terms"])


def test_descriptions_are_in_the_bank_that_trains_and_predicts(
    base: dict[str, Any], tmp_path: Path, tiny_teacher: Path
) -> None:
    (tmp_path / "d.json").write_text('{"cat": "A small cat.", "dog": ["It barks.", "It runs."]}')
    made = train(
        TrainConfig.model_validate(
            base | {"recipe": "vlm-ood", "descriptions": str(tmp_path / "d.json")}
        )
    )
    assert made.folder is not None
    kept = json.loads((made.folder / "descriptions.json").read_text())
    assert kept == {"cat": ["A small cat."], "dog": ["It barks.", "It runs."]}
    loaded = load_run(made.folder)
    assert loaded.bank is not None
    assert loaded.bank.described
    teacher = load_teacher(f"local-dir:{tiny_teacher}")
    prompts = [
        f"a photo of a {text}"
        for text in ("cat . A small cat.", "dog . It barks.", "dog . It runs.")
    ]
    own = torch.nn.functional.normalize(teacher.embed_texts(prompts), dim=-1)  # type: ignore[union-attr]
    expected = torch.nn.functional.normalize(torch.stack([own[0], own[1:].mean(dim=0)]), dim=-1)
    assert torch.allclose(loaded.bank.vectors, expected, atol=1e-6)


def test_captions_are_embedded_once_and_learned_from(
    base: dict[str, Any], tmp_path: Path, own_cache: Path
) -> None:
    names = [
        path.relative_to(base["data"]).as_posix() for path in Path(base["data"]).rglob("*.png")
    ]
    (tmp_path / "c.json").write_text(
        json.dumps({name: f"picture {n % 5}" for n, name in enumerate(names)})
    )
    settings = base | {"recipe": "vlm-ood", "captions": tmp_path / "c.json"}
    made = train(TrainConfig.model_validate(settings))
    assert made.folder is not None
    assert set(terms(made.folder)) == {"text_ce", "im_nce", "vlprox", "caption_nce"}
    shards = list((own_cache / "embeddings").glob("*-captions/*.keys.npy"))
    assert len(shards) == 1
    train(TrainConfig.model_validate(settings | {"overwrite": True}))
    assert list((own_cache / "embeddings").glob("*-captions/*.keys.npy")) == shards
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(EdgekdError, match="no caption for"):
        train(TrainConfig.model_validate(settings | {"out": tmp_path / "other"}))
    assert not (tmp_path / "other").exists()


def test_a_vocabulary_is_distilled_for_and_the_classes_are_predicted(
    base: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "v.txt").write_text("house\ntree\nbird\n")
    made = train(
        TrainConfig.model_validate(base | {"recipe": "lgd", "vocabulary": tmp_path / "v.txt"})
    )
    own = train(TrainConfig.model_validate(base | {"recipe": "lgd", "out": tmp_path / "own"}))
    assert made.folder is not None
    assert own.folder is not None
    assert terms(made.folder) != terms(own.folder)
    loaded = load_run(made.folder)
    assert loaded.bank is not None
    assert loaded.bank.classes == ("cat", "dog")
    assert len(loaded.bank.templates) == 80
    assert loaded.student.neck is not None


def test_descriptions_are_of_the_vocabulary_too(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("house\ntree\ncat\n")
    told = {"cat": "A small cat.", "dog": "It barks."}

    def lgd(out: str, **more: str) -> Run:
        (tmp_path / "d.json").write_text(json.dumps(told | more))
        words = {
            "recipe": "lgd",
            "vocabulary": tmp_path / "v.txt",
            "descriptions": str(tmp_path / "d.json"),
        }
        return train(TrainConfig.model_validate(base | words | {"out": tmp_path / out}))

    with pytest.raises(EdgekdError, match="no description of 2 of 4 classes: house, tree"):
        lgd("none")
    one, other = (
        lgd("one", house="Of stone.", tree="Green."),
        lgd("other", house="A roof on it.", tree="Tall."),
    )
    assert one.folder is not None
    assert other.folder is not None
    assert set(json.loads((one.folder / "descriptions.json").read_text())) == {
        "cat",
        "dog",
        "house",
        "tree",
    }
    assert terms(one.folder) != terms(other.folder)  # the texts that it distils for are others
    banks = [load_run(folder).bank for folder in (one.folder, other.folder)]
    assert banks[0] is not None
    assert banks[1] is not None
    assert torch.equal(banks[0].vectors, banks[1].vectors)  # those of its classes are not


def test_domain_texts_need_domains(base: dict[str, Any], tmp_path: Path) -> None:
    for name in ("photo", "sketch"):  # one source domain and the unseen one
        (tmp_path / "two").mkdir(exist_ok=True)
        (Path(base["data"]) / name).rename(tmp_path / "two" / name)
    with pytest.raises(EdgekdError, match="compares source domains, and there is 1"):
        train(TrainConfig.model_validate(base | {"recipe": "rise", "data": str(tmp_path / "two")}))


def test_class_vectors_that_train_start_as_texts(base: dict[str, Any]) -> None:
    made = train(TrainConfig.model_validate(base | {"recipe": "rise", "lr": 1e-9, "ema": 0}))
    assert made.folder is not None
    loaded = load_run(made.folder)
    assert loaded.bank is not None
    assert loaded.vectors is not None
    assert torch.allclose(loaded.vectors, loaded.bank.vectors, atol=1e-4)
    assert loaded.vectors is not loaded.bank.vectors


def test_prompts_that_are_too_long_are_said_once_with_the_class(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.txt").write_text("cat: " + "very " * 40 + "small\ndog: It barks.\n")
    # rise has texts about every domain besides.
    words = {"recipe": "rise", "prompts": "photo", "descriptions": str(tmp_path / "d.txt")}
    train(TrainConfig.model_validate(base | words))
    said = capsys.readouterr().err
    assert said.count("longer than the teacher reads") == 1
    assert "1 of 2 classes" in said
    assert '"cat" has 49 tokens, 16 fit' in said
