from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from artifact_fakes import channel_means, network, write_artifact
from device_fakes import run_agent
from onnx import ModelProto, TensorProto, helper
from PIL import Image
from typer.testing import CliRunner

import edgekd
from edgekd.cli import app
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact, read_run
from edgekd.data.image_set import load_images
from edgekd.inference.demo import models_of
from edgekd.targets.devices.payload import write_agent

pytestmark = pytest.mark.usefixtures("graphs_once")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "onnxruntime-fp32")


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_probabilities_are_the_softmax_of_the_logits_sorted(artifact: Path) -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[...] = (3, 5, 4)
    (found,) = edgekd.load(artifact, threads=1).predict(pixels)
    weights = np.exp([5.0, 4.0, 3.0])
    assert found.classes == ("g", "b", "r")
    np.testing.assert_allclose(found.probabilities, weights / weights.sum(), rtol=1e-5)
    assert (found.label, found.probability) == found.top(1)[0]
    assert "66.5 %" in found._repr_html_()
    assert "onnxruntime-fp32" in read_artifact(artifact)._repr_html_()


def test_all_kinds_of_images_in_order(artifact: Path, tmp_path: Path) -> None:
    model = edgekd.load(artifact)
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = paint(tmp_path / "red.png", red)
    mixed = [path, str(path), Image.new("RGB", (9, 9), green), np.full((5, 7, 3), blue, np.uint8)]
    assert [one.label for one in model.predict(mixed)] == ["r", "r", "g", "b"]
    batch = np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in (blue, green)])
    assert [one.label for one in model.predict(batch)] == ["b", "g"]
    many = model.predict(np.full((8, 8, 3), (red, green)[n % 2], np.uint8) for n in range(37))
    assert [one.label for one in many] == ["rg"[n % 2] for n in range(37)]
    assert model.predict([]) == []
    assert [one.label for one in model.predict(path)] == ["r"]
    # As in files, transparency lies on white and a palette is resolved.
    (clear,) = model.predict(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert clear.probabilities == pytest.approx([1 / 3] * 3)
    assert model.predict(Image.new("RGB", (8, 8), green).convert("P"))[0].label == "g"


NINE = helper.make_tensor("nine", TensorProto.INT64, [3], [9, 9, 9])


@pytest.mark.parametrize(
    "model",
    [
        channel_means(float("nan")),
        network(helper.make_node("Concat", ["mean", "mean"], ["logits"], axis=1)),
        network(helper.make_node("Gather", ["mean", "nine"], ["logits"], axis=1), NINE),
    ],
    ids=["not finite", "six logits", "fails"],
)
def test_a_file_that_does_not_score_its_classes_predicts_nothing(
    tmp_path: Path, model: ModelProto
) -> None:
    folder = write_artifact(tmp_path / "a", model.SerializeToString())
    image = paint(tmp_path / "image.png", (255, 0, 0))
    result = CliRunner().invoke(app, ["predict", str(folder), str(image)])
    assert isinstance(result.exception, EdgekdError)
    write_agent(tmp_path / "agent.pyz")
    words = ("classify", str(folder), str(image))
    code, [message] = run_agent(sys.executable, tmp_path / "agent.pyz", *words)
    assert (code, list(message)) == (2, ["error"])


def test_what_cannot_be_read_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edgekd.load(artifact)
    for shape, kind in (((4, 4, 3), "float32"), ((4, 4), "uint8"), ((4, 4, 4), "uint8")):
        with pytest.raises(EdgekdError):
            model.predict([np.zeros(shape, dtype=kind)])
    with pytest.raises(EdgekdError):
        model.predict([7])  # type: ignore[list-item]
    (tmp_path / "empty").mkdir()
    bad, pipe, clip = (tmp_path / name for name in ("bad.jpg", "pipe.mp4", "clip.mp4"))
    for path in (bad, clip):
        path.write_bytes(b"junk")
    os.mkfifo(pipe)
    with pytest.raises(EdgekdError, match=r"bad\.jpg"):
        model.predict(bad)
    with pytest.raises(EdgekdError):
        edgekd.load(tmp_path)
    for source in (bad, pipe, tmp_path / "empty", "nowhere.jpg", "camera:front", "camera:-1"):
        with pytest.raises(EdgekdError):
            list(edgekd.predict(artifact, [str(source)]))
    monkeypatch.setitem(sys.modules, "cv2", None)
    for source in (clip, "camera:0"):
        with pytest.raises(EdgekdError) as caught:
            list(edgekd.predict(artifact, [str(source)]))
        assert "edgekd[video]" in caught.value.hint


def test_the_command_writes_everything_and_counts_what_it_skips(
    artifact: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    paint(images / "a" / "one.png", (250, 0, 0))
    paint(images / "b" / "one.png", (0, 0, 250))
    (images / "b" / "torn.jpg").write_bytes(b"junk")
    table, copies = tmp_path / "out.csv", tmp_path / "copies"
    arguments = ["predict", str(artifact), str(images), "--top", "2", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--csv", str(table), "--annotate", str(copies)])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["classes"][0]["class"] for line in lines] == ["r", "b"]
    assert [len(line["classes"]) for line in lines] == [2, 2]
    assert "1 × not an image" in done.stderr
    rows = list(csv.reader(table.open(encoding="utf-8")))
    assert rows[0] == ["image", "class", "probability", "class_2", "probability_2"]
    assert [(Path(row[0]).parent.name, row[1]) for row in rows[1:]] == [("a", "r"), ("b", "b")]
    assert sorted(path.name for path in copies.iterdir()) == ["one-2.jpg", "one.jpg"]
    with Image.open(copies / "one.jpg") as copy:
        assert copy.size == (30, 20)


def test_copies_are_not_classified_too_and_nothing_is_written_over(
    artifact: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for number in range(80):  # more than are read ahead
        image = paint(images / f"{number:02d}.png", (250, 0, 0))
    found = list(edgekd.predict(artifact, [str(images)], annotate=images / "z" / "copies"))
    assert len(found) == len(list((images / "z" / "copies").iterdir())) == 80
    kept = tmp_path / "kept.csv"
    kept.write_text("mine")
    with pytest.raises(EdgekdError):
        edgekd.predict(artifact, [str(image)], csv=kept)
    with pytest.raises(EdgekdError):
        edgekd.predict(artifact, [str(image)], annotate=image.parent)
    assert kept.read_text() == "mine"


def test_video_frames(artifact: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    clip = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(clip, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for number in range(7):
        blue, red = (0, 255) if number < 4 else (255, 0)
        writer.write(np.full((48, 64, 3), (blue, 0, red), np.uint8))
    writer.release()
    found = list(edgekd.predict(artifact, [clip], every=2, annotate=tmp_path / "copies"))
    assert [one.label for one in found] == ["r", "r", "b", "b"]
    assert [one.name.rpartition("#")[2] for one in found] == ["0", "2", "4", "6"]
    assert (tmp_path / "copies" / "clip-000006.jpg").is_file()
    (tmp_path / "bad.mp4").write_bytes(b"junk")
    for source in (str(tmp_path / "bad.mp4"), "camera:97"):
        with pytest.raises(EdgekdError):
            list(edgekd.predict(artifact, [source]))


def test_an_artifact_needs_no_torch(artifact: Path, tmp_path: Path) -> None:
    image = paint(tmp_path / "one.png", (250, 0, 0))
    script = f"""
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name in ("torch", "timm", "open_clip"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import edgekd
print(edgekd.load({str(artifact)!r}).predict({str(image)!r})[0].label)
from edgekd.cli import main
main(["predict", {str(artifact)!r}, {str(image)!r}, "--top", "1"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["r", f"{image}: r 100.0 %"]


def test_student_and_file_predict_the_same(tiny_run: Path) -> None:
    """And the demo has every model of the run."""
    images = load_images(tiny_run.parent / "data")
    some = [images.read(index) for index in range(0, len(images), 5)]
    student = edgekd.load(tiny_run).predict(some)
    file = edgekd.load(tiny_run / "artifacts" / "onnxruntime-fp32").predict(some)
    assert [one.label for one in student] == [one.label for one in file]
    for a, b in zip(student, file, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)
        assert sum(a.probabilities) == pytest.approx(1)
    models = models_of(tiny_run)
    assert [model.name for model in models] == [
        "teacher, zero-shot", "student, torch", "onnxruntime-fp32", "onnxruntime-int8",
    ]  # fmt: skip
    (alone,) = models_of(tiny_run / "artifacts" / "onnxruntime-fp32")
    assert alone.predict(some[0]) == models[2].predict(some[0])
    run = read_run(tiny_run)
    assert run.student in run._repr_html_()
    assert "<script>" not in run.model_copy(update={"name": "<script>"})._repr_html_()
