from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from artifact_fakes import colour, red_and_green, write_artifact, write_colours
from device_fakes import run_agent
from PIL import Image

import edgekd
from edgekd.artifacts import kit as kits
from edgekd.artifacts.kit import write_kit
from edgekd.cli import main
from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact
from edgekd.distill.models import teachers
from edgekd.targets.bank import read_bank, unit
from edgekd.targets.bank_change import recognised
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.session import open_session

BLUE = (30, 40, 200)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "artifact")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(colour(BLUE, number)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def pictures() -> np.ndarray:
    shades = [(200, 20, 30), (20, 180, 40), BLUE]
    return np.stack([colour(shade, 10 + number) for number, shade in enumerate(shades)])


def command(*words: object) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["classes", *map(str, words)])
    assert leaving.value.code == 0


def test_a_class_from_images_is_recognised_and_the_others_stay(
    artifact: Path, photos: Path
) -> None:
    session, images = open_session(artifact, threads=1), pictures()
    means = images.mean(axis=(1, 2), dtype=np.float64)
    units = means / np.sqrt((means**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(session.embed(images), units, atol=1e-5)
    before = session.run(images)
    np.testing.assert_allclose(before, 10 * units[:, :2], atol=1e-4)
    with pytest.raises(EdgekdError, match="takes uint8"):
        session.embed(images[:, :8])
    changed = edgekd.add_class(artifact, "blue", images=[photos])
    assert changed.classes == ("red", "green", "blue")
    now = open_session(artifact, threads=1).run(pictures())
    np.testing.assert_array_equal(now[:, :2], before)
    assert now.argmax(axis=1).tolist() == [0, 1, 2]
    assert changed.bank is not None
    [entry] = read_bank(artifact / changed.bank).facts["added"]
    assert (entry["class"], entry["by"], len(entry["images"])) == ("blue", "images", 3)
    assert entry["recognised_left_out"] == 3


def test_a_class_from_text_vectors(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "blue.npy", np.array([[0.0, 0.1, 2.0], [0.1, 0.0, 0.9]]))
    command("add", artifact, "blue", "--text-vector", tmp_path / "blue.npy")
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "classes: red, green, blue"
    assert told[1].startswith("blue: a class without images seldom wins")
    assert open_session(artifact, threads=1).run(pictures()).argmax(axis=1).tolist() == [0, 1, 2]
    command("remove", artifact, "blue")
    assert capsys.readouterr().out == "classes: red, green\n"
    assert open_session(artifact, threads=1).run(pictures()).shape == (3, 2)


def test_a_class_by_name_needs_the_teacher_of_the_run(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []

    class Teacher:
        id = "t"

        def text_bank(self, *words: Any) -> Any:
            seen.append(words)
            return SimpleNamespace(vectors=torch.tensor([[0.0, 0.0, 1.0]]))

    def added() -> dict[str, Any]:
        bank = read_bank(artifact / str(read_artifact(artifact).bank))
        np.testing.assert_array_equal(bank.vectors[2], [0, 0, 1])
        return bank.facts["added"][0]

    with pytest.raises(EdgekdError, match="is not the teacher in whose space"):
        edgekd.add_class(artifact, "blue", teacher=f"local-dir:{tiny_teacher}")
    monkeypatch.setattr(teachers, "load_teacher", lambda spec: Teacher() if spec == "toy" else None)
    edgekd.add_class(artifact, "blue")
    assert added()["templates"] == ["a {}"]
    edgekd.remove_class(artifact, "blue")
    (tmp_path / "d.txt").write_text("blue: The colour of the sky.\nred: That of fire.\n")
    edgekd.add_class(artifact, "blue", descriptions=str(tmp_path / "d.txt"))
    assert added()["descriptions"] == ["The colour of the sky."]
    described = {"blue": ("The colour of the sky.",)}
    assert seen == [(["blue"], ["a {}"], None), (["blue"], ["a {}"], described)]


def test_what_cannot_be_added_is_one_sentence(artifact: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    np.save(tmp_path / "wide.npy", np.ones(5))
    np.save(tmp_path / "words.npy", np.array(["blue"]))
    before = (artifact / "artifact.json").read_bytes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"images": [tmp_path / "empty"]}, "There are no images"),
        ({"images": [tmp_path / "nowhere"]}, "There is no image at"),
        ({"images": [tmp_path / "torn.png"]}, "An image cannot be read"),
        ({"text_vector": tmp_path / "wide.npy"}, "do not fit into a space of 3"),
        ({"text_vector": tmp_path / "words.npy"}, "holds no vector of floats"),
        ({"images": [photos], "teacher": "toy"}, "one source"),
        ({"images": [photos], "descriptions": "d.txt"}, "not used"),
        ({"images": [photos], "name": "red"}, 'has the class "red"'),
    ]
    for words, message in cases:
        with pytest.raises(EdgekdError, match=message):
            edgekd.add_class(artifact, **{"name": "blue"} | words)
    assert (artifact / "artifact.json").read_bytes() == before
    logits = write_artifact(tmp_path / "logits")
    with pytest.raises(EdgekdError, match="ends in the logits of fixed classes"):
        edgekd.add_class(logits, "blue", images=[photos])
    with pytest.raises(EdgekdError, match="gives no embedding"):
        open_session(logits).embed(pictures())


def test_the_agent_adds_a_class_on_the_device_and_recognises_it(
    artifact: Path, photos: Path, tmp_path: Path
) -> None:
    agent = tmp_path / "agent.pyz"
    write_agent(agent)
    before = open_session(artifact, threads=1).run(pictures())
    code, said = run_agent(sys.executable, agent, "add", str(artifact), "blue", str(photos))
    assert (code, len(said)) == (0, 1)
    assert "has 3 classes now; blue: 3 of its 3 images" in said[0]["say"]
    # What the device wrote is what edgekd reads: hashes, classes, and the vector that edgekd itself would have made.
    other = write_colours(tmp_path / "other")
    edgekd.add_class(other, "blue", images=[photos])
    here, there = (read_bank(each / str(read_artifact(each).bank)) for each in (other, artifact))
    np.testing.assert_allclose(there.vectors, here.vectors, atol=1e-6)
    np.testing.assert_array_equal(open_session(artifact, threads=1).run(pictures())[:, :2], before)
    images = [tmp_path / f"{number}.png" for number in range(3)]
    for path, pixels in zip(images, pictures(), strict=True):
        Image.fromarray(pixels).save(path)
    _, said = run_agent(sys.executable, agent, "classify", str(artifact), *map(str, images))
    assert [answer["found"] for answer in said] == ["red", "green", "blue"]
    logits = write_artifact(tmp_path / "logits")
    shutil.copy(logits / "model.onnx", other / "model.onnx")
    for words, message in (
        (("add", str(logits), "blue", str(photos)), "gives no embedding."),
        (("add", str(artifact), "red", str(photos)), 'has the class "red" already'),
        (("classify", str(tmp_path / "nowhere"), "x.png"), "There is no artifact"),
        (("add", str(other), "grey", str(photos)), "is not the file that was exported"),
    ):
        code, said = run_agent(sys.executable, agent, *words)
        assert (code, message in said[0]["error"][0]) == (2, True)
    assert run_agent(sys.executable, agent, "add", str(artifact), "blue") == (2, [])


def test_left_out_images_are_counted_by_hand() -> None:
    bank = red_and_green()
    embeddings = unit(np.array([[0, 0, 1], [0, 0.1, 1], [1, 0, 0.2]], dtype=np.float32))
    # The third is red; the prototype of the others is (0, .05, 1). The first two: their prototypes hold half of the
    # third and lie near (.5, 0, .6), closer to them than red or green.
    assert recognised(bank, embeddings) == 2
    assert recognised(bank, embeddings[:1]) is None


def encoded_images(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (30 + number, 41, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if number % 2 else "JPEG")
        found.append(buffer.getvalue())
    return found


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    return write_kit(write_artifact(tmp_path / "artifact"), encoded_images(4))


def classify(kit: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "classify.py"]
    return subprocess.run(line, cwd=kit, capture_output=True, text=True, check=False)


def test_the_program_gives_the_same_pixels_and_logits(kit: Path) -> None:
    done = classify(kit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest difference of pixels 0,") == 4
    assert (kit / "2.jpeg").read_bytes() == encoded_images(4)[2]
    # The artifact's logits are channel means of the pixels.
    pixels = np.stack([np.asarray(Image.open(kit / f"{number}.ppm")) for number in range(4)])
    assert pixels.shape == (4, 16, 16, 3)
    logits = np.fromfile(kit / "logits.bin", "<f4").reshape(4, 3)
    np.testing.assert_allclose(logits, pixels.mean(axis=(1, 2)), rtol=1e-5)
    alter_logits(kit)
    assert classify(kit).returncode == 1


def alter_logits(kit: Path) -> None:
    """Make the expected logits of a kit wrong by twice the tolerance."""
    tolerance = json.loads((kit / "kit.json").read_text())["tolerance"]
    logits = np.fromfile(kit / "logits.bin", "<f4")
    (logits + np.float32(2 * tolerance)).tofile(kit / "logits.bin")


def check_program(kit: Path, *line: str) -> None:
    """A program passes, and fails on other logits."""
    tolerance = str(json.loads((kit / "kit.json").read_text())["tolerance"])
    subprocess.run([*line, tolerance], cwd=kit, check=True)
    alter_logits(kit)
    assert subprocess.run([*line, tolerance], cwd=kit, check=False).returncode == 1


def onnxruntime_folder(folder: Path) -> Path:
    """ONNX Runtime's headers and library: a release's, named in ONNXRUNTIME, else a stand-in and the package's."""
    if "ONNXRUNTIME" in os.environ:
        return Path(os.environ["ONNXRUNTIME"])
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("ONNX Runtime's package has no shared library here")
    (folder / "lib").mkdir(parents=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1", library.name):
        (folder / "lib" / name).symlink_to(library)
    (folder / "include").symlink_to(Path(__file__).parent / "onnxruntime_header")
    return folder


@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and C++"
)
def test_the_cpp_program_builds_and_compares(kit: Path, tmp_path: Path) -> None:
    place = f"-DONNXRUNTIME={onnxruntime_folder(tmp_path / 'onnxruntime')}"
    subprocess.run(["cmake", "-S", ".", "-B", "build", place], cwd=kit, check=True)
    subprocess.run(["cmake", "--build", "build"], cwd=kit, check=True)
    check_program(kit, "build/classify", "../model.onnx", ".", "4")


@pytest.mark.skipif(not (shutil.which("kotlinc") and shutil.which("java")), reason="needs Kotlin")
def test_the_kotlin_program_compiles_and_compares(kit: Path) -> None:
    sources = [PROGRAMS / "tflite.kt", Path(__file__).parent / "litert_stand_in.kt"]
    compiler = ["kotlinc", "-include-runtime", "-d", kit / "classify.jar"]
    subprocess.run([*compiler, *sources], check=True)
    check_program(kit, "java", "-cp", "classify.jar", "TfliteKt", "model", ".", "4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_no_half_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    write = Path.write_bytes

    def to_full_disk(self: Path, data: Any) -> int:
        if self.name.endswith("kit.json"):
            self.symlink_to("/dev/full")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", to_full_disk)
    with pytest.raises(EdgekdError, match="full"):
        write_kit(artifact, encoded_images(2))
    assert not (artifact / "kit").exists()
    with pytest.raises(EdgekdError, match="no test images"):
        write_kit(artifact, [])
    for given in ({"input": "float"}, {"head": "embedding"}):
        with pytest.raises(EdgekdError, match="test kit"):
            ExportConfig.load(test_kit=True, **given)


PROGRAMS = Path(kits.__file__).parent / "programs"


@pytest.mark.parametrize(
    ("language", "program"), [("kotlin", "tflite.kt"), ("swift", "coreml.swift")]
)
def test_programs_of_other_languages_parse(language: str, program: str) -> None:
    parsers = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip(f"tree_sitter_{language}")
    parser = parsers.Parser(parsers.Language(grammar.language()))
    assert not parser.parse((PROGRAMS / program).read_bytes()).root_node.has_error
