"""`edgekd push` and `edgekd pull` against a hub on this machine, with the hub's own client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from artifact_fakes import write_artifact
from export_fakes import build, export
from hub_fake import FakeHub, fake_hub
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

import edgekd
from edgekd.cli import app
from edgekd.core.errors import EdgekdError
from edgekd.core.hub import hub_reachable

CLASSES = ["cat", "dog"]
pytestmark = pytest.mark.usefixtures("one_thread", "graphs_once")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "right")
        hub_reachable.cache_clear()
        yield server
    hub_reachable.cache_clear()


@pytest.fixture(scope="module")
def picture(tiny_run: Path) -> Image.Image:
    return Image.open(tiny_run.parent / "data" / "art" / "cat" / "00.png").convert("RGB")


def expected(run: Path, picture: Image.Image) -> dict[str, float]:
    (found,) = edgekd.load(run).predict([picture])
    return dict(zip(found.classes, found.probabilities, strict=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_timm_loads_the_student_with_its_classes_and_pixels(
    hub: FakeHub, tiny_run: Path, picture: Image.Image
) -> None:
    edgekd.push(tiny_run, "me/small", private=True)
    assert hub.private["me/small"]
    model = timm.create_model("hf-hub:me/small", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(model)
    pixels = timm.data.create_transform(**settings)(picture)
    with torch.inference_mode():
        found = softmax(model(pixels[None])[0].numpy())
    names = model.pretrained_cfg["label_names"]
    wanted = expected(tiny_run, picture)
    assert [wanted[name] for name in names] == pytest.approx(found, abs=0.02)
    assert sorted(names) == CLASSES


def test_files_follow_the_conventions_of_transformers_and_come_back(
    hub: FakeHub, tiny_run: Path, picture: Image.Image, tmp_path: Path
) -> None:
    edgekd.push(tiny_run, "me/small")
    files = hub.repos["me/small"]
    labels = json.loads(files["config.json"])["id2label"]
    how = json.loads(files["preprocessor_config.json"])
    size = (how["size"]["width"], how["size"]["height"])
    pixels = np.asarray(picture.resize(size, how["resample"]), dtype=np.float32)
    values = (pixels * how["rescale_factor"] - how["image_mean"]) / how["image_std"]
    planes = values.transpose(2, 0, 1)[None].astype(np.float32)
    for file, tolerance in (("model.onnx", 0.02), ("model_quantized.onnx", 0.12)):
        session = onnxruntime.InferenceSession(files[f"onnx/{file}"])
        (logits,) = session.run(["logits"], {"pixel_values": planes})
        found = {labels[str(number)]: value for number, value in enumerate(softmax(logits[0]))}
        assert found == pytest.approx(expected(tiny_run, picture), abs=tolerance)

    folder = edgekd.pull("me/small", out=tmp_path / "pulled")
    own = edgekd.load(tiny_run / "artifacts" / "onnxruntime-int8").predict([picture])
    assert edgekd.load(folder / "artifacts" / "onnxruntime-int8").predict([picture]) == own
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept == set(files)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == len(CLASSES)


def test_transformers_opens_a_pulled_student(
    hub: FakeHub, tiny_run: Path, picture: Image.Image, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    edgekd.push(tiny_run, "me/small")
    folder = edgekd.pull("me/small", out=tmp_path / "pulled")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    with torch.inference_mode():
        values = softmax(model(**inputs).logits[0].numpy())
    found = {model.config.id2label[number]: value for number, value in enumerate(values)}
    assert found == pytest.approx(expected(tiny_run, picture), abs=0.02)


def test_the_card_is_the_newest_benchmarks(hub: FakeHub, tiny_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    facts = json.loads((copy / "run.json").read_text())
    facts["teacher"] = "![seen](http://elsewhere/x.png)<b>"
    (copy / "run.json").write_text(json.dumps(facts))
    edgekd.push(copy, "me/small")
    plain = hub.repos["me/small"]["README.md"].decode()
    assert "elsewhere" in plain
    assert "![seen](" not in plain
    assert "<b>" not in plain
    (copy / "benchmark").mkdir()
    card = "---\ntags: [edgekd]\n---\n# Measured\n"
    (copy / "benchmark" / "MODEL_CARD.md").write_text(card)
    edgekd.push(copy, "me/small")
    measured = hub.repos["me/small"]["README.md"].decode()
    for text in (plain, measured):
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["library_name"] == "timm"
        assert "edgekd" in front["tags"]
        assert 'timm.create_model("hf-hub:me/small"' in text
    assert "# Measured" in measured


@pytest.fixture
def means(tmp_path: Path) -> Path:
    """An artifact alone, whose logits are the channel means."""
    return write_artifact(tmp_path / "onnxruntime-fp32")


def test_artifacts_alone(
    hub: FakeHub, means: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = CliRunner().invoke(app, ["push", str(means), "me/means"])
    assert result.exit_code == 0, result.output
    assert "model.safetensors" not in hub.repos["me/means"]
    folder = edgekd.pull("me/means", out=tmp_path / "pulled")
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    assert edgekd.load(folder / "artifacts" / "onnxruntime-fp32").predict(red)[0].label == "r"
    # A file that resizes is pushed, but not as planes.
    picture = np.full((40, 50, 3), 90, dtype=np.uint8)
    export(build(), tmp_path / "a", "fp32", input="picture", pictures=lambda: (picture,))
    edgekd.push(tmp_path / "a", "me/picture")
    names = set(hub.repos["me/picture"])
    assert any(name.startswith("artifacts/") and name.endswith(".onnx") for name in names)
    assert not any(name.startswith("onnx/") for name in names)
    assert "left out" in capsys.readouterr().err


def test_nothing_foreign_is_taken_and_nothing_of_the_users_lost(
    hub: FakeHub, means: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgekd.push(means, "me/means")
    files = hub.repos["me/means"]
    names = ["../evil.json", "artifacts/../../evil", "weights.bin", "modeling.py", "onnx/a.py"]
    files.update(dict.fromkeys(names, b"evil"))
    folder = edgekd.pull("me/means", out=tmp_path / "here" / "pulled")
    assert not {path.name for path in tmp_path.rglob("*")} & {Path(name).name for name in names}
    with pytest.raises(EdgekdError):  # what is there stays
        edgekd.pull("me/means", out=folder)
    download = huggingface_hub.hf_hub_download

    def meanwhile(*given: Any, **settings: Any) -> str:
        (tmp_path / "pulled").mkdir(exist_ok=True)
        (tmp_path / "pulled" / "notes.txt").write_text("mine")
        return str(download(*given, **settings))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", meanwhile)
        with pytest.raises(EdgekdError):
            edgekd.pull("me/means", out=tmp_path / "pulled")
    assert (tmp_path / "pulled" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "pulled-2" / "config.json").is_file()
    files["artifacts/onnxruntime-fp32/model.onnx"] += b"more"
    with pytest.raises(EdgekdError):
        edgekd.pull("me/means", out=tmp_path / "altered")
    assert not (tmp_path / "altered").exists()


def test_mistakes_are_one_sentence(
    hub: FakeHub, means: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["me/empty"] = {"weights.pkl": b""}
    for folder, repo in ((tmp_path, "me/x"), (means, "no name/at all")):
        with pytest.raises(EdgekdError):
            edgekd.push(folder, repo)
    for repo in ("me/absent", "me/empty"):
        with pytest.raises(EdgekdError):
            edgekd.pull(repo, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    for token in ("wrong", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(EdgekdError, match="token"):
            edgekd.push(means, "me/x")
    assert "me/x" not in hub.repos
