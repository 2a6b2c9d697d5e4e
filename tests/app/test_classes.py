"""A class is added to an artifact, here and by the agent on a device, and the real runtime recognises it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_fakes import write_artifact
from embedding_fakes import colour, red_and_green, write_colours
from PIL import Image

import edgekd
from edgekd.cli import main
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact
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


def command(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 0


def run_agent(agent: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, str(agent), *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_session_gives_logits_and_embeddings(artifact: Path) -> None:
    session, images = open_session(artifact, threads=1), pictures()
    means = images.mean(axis=(1, 2), dtype=np.float64)
    units = means / np.sqrt((means**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(session.embed(images), units, atol=1e-5)
    np.testing.assert_allclose(session.run(images), 10 * units[:, :2], atol=1e-4)
    with pytest.raises(EdgekdError, match="takes uint8"):
        session.embed(images[:, :8])


def test_a_file_of_logits_has_no_embedding(tmp_path: Path) -> None:
    session = open_session(write_artifact(tmp_path / "logits"), threads=1)
    with pytest.raises(EdgekdError, match="gives no embedding"):
        session.embed(np.zeros((1, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(EdgekdError, match="ends in the logits of fixed classes"):
        edgekd.add_class(tmp_path / "logits", "blue", images=[tmp_path])


def test_bank_of_other_classes_is_refused(artifact: Path) -> None:
    data = json.loads((artifact / "artifact.json").read_text())
    (artifact / "artifact.json").write_text(json.dumps({**data, "classes": ["green", "red"]}))
    with pytest.raises(EdgekdError, match="holds other classes than"):
        open_session(artifact)


def test_a_class_from_images_is_recognised_and_the_others_stay(
    artifact: Path, photos: Path
) -> None:
    before = open_session(artifact, threads=1).run(pictures())
    assert before.argmax(axis=1).tolist()[:2] == [0, 1]
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
    command(["classes", "add", str(artifact), "blue", "--text-vector", str(tmp_path / "blue.npy")])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "classes: red, green, blue"
    assert told[1].startswith("blue: a class without images seldom wins")
    assert open_session(artifact, threads=1).run(pictures()).argmax(axis=1).tolist() == [0, 1, 2]
    command(["classes", "remove", str(artifact), "blue"])
    assert capsys.readouterr().out == "classes: red, green\n"
    assert open_session(artifact, threads=1).run(pictures()).shape == (3, 2)


def test_a_class_by_name_needs_the_teacher_of_the_run(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path, tmp_path: Path
) -> None:
    from edgekd.distill import teachers

    asked: list[Any] = []

    class Stand:
        id = "t"

        def text_bank(self, classes: list[str], templates: list[str], described: Any) -> Any:
            assert (classes, templates) == (["blue"], ["a {}"])
            import torch

            asked.append(described)
            return type("Bank", (), {"vectors": torch.tensor([[0.0, 0.0, 1.0]])})

    with pytest.raises(EdgekdError, match="is not the teacher in whose space"):
        edgekd.add_class(artifact, "blue", teacher=f"local-dir:{tiny_teacher}")
    monkeypatch.setattr(teachers, "load_teacher", lambda spec: Stand() if spec == "toy" else None)
    changed = edgekd.add_class(artifact, "blue")
    assert changed.bank is not None
    bank = read_bank(artifact / changed.bank)
    np.testing.assert_array_equal(bank.vectors[2], [0, 0, 1])
    assert bank.facts["added"][0]["templates"] == ["a {}"]
    assert "descriptions" not in bank.facts["added"][0]
    edgekd.remove_class(artifact, "blue")
    (tmp_path / "d.txt").write_text("blue: The colour of the sky.\nred: That of fire.\n")
    changed = edgekd.add_class(artifact, "blue", descriptions=str(tmp_path / "d.txt"))
    assert asked == [None, {"blue": ("The colour of the sky.",)}]
    assert changed.bank is not None
    assert read_bank(artifact / changed.bank).facts["added"][0]["descriptions"] == [
        "The colour of the sky."
    ]


def test_what_cannot_be_added_is_one_sentence(artifact: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    (tmp_path / "bad.npy").write_bytes(b"")
    np.save(tmp_path / "wide.npy", np.ones(5))
    np.save(tmp_path / "words.npy", np.array(["blue"]))
    before = (artifact / "artifact.json").read_bytes()
    for arguments, message in (
        ({"images": [tmp_path / "empty"]}, "There are no images"),
        ({"images": [tmp_path / "nowhere"]}, "There is no image at"),
        ({"images": [tmp_path / "torn.png"]}, "An image cannot be read"),
        ({"text_vector": tmp_path / "bad.npy"}, "not readable npy"),
        ({"text_vector": tmp_path / "wide.npy"}, "do not fit into a space of 3"),
        ({"text_vector": tmp_path / "words.npy"}, "holds no vector of floats"),
        ({"images": [photos], "teacher": "toy"}, "from one source"),
        ({"images": [photos], "descriptions": "d.txt"}, "its name is not used"),
    ):
        with pytest.raises(EdgekdError, match=message):
            edgekd.add_class(artifact, "blue", **arguments)  # type: ignore[arg-type]
    with pytest.raises(EdgekdError, match='has the class "red"'):
        edgekd.add_class(artifact, "red", images=[photos])
    assert (artifact / "artifact.json").read_bytes() == before


def test_the_agent_adds_a_class_on_the_device_and_sees_it(
    artifact: Path, photos: Path, tmp_path: Path
) -> None:
    write_agent(tmp_path / "agent.pyz")
    before = open_session(artifact, threads=1).run(pictures())
    code, said = run_agent(tmp_path / "agent.pyz", "add", str(artifact), "blue", str(photos))
    assert (code, len(said)) == (0, 1)
    assert (
        "has 3 classes now; blue: 3 of its 3 images are recognised by the others of them"
        in said[0]["say"]
    )
    # What the device wrote is what edgekd reads: hashes, classes, and the vector that edgekd itself would have made.
    other = write_colours(tmp_path / "other")
    edgekd.add_class(other, "blue", images=[photos])
    here, there = (
        read_bank(folder / str(read_artifact(folder).bank)) for folder in (other, artifact)
    )
    np.testing.assert_allclose(there.vectors, here.vectors, atol=1e-6)
    np.testing.assert_array_equal(open_session(artifact, threads=1).run(pictures())[:, :2], before)
    images = []
    for number, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        images.append(str(tmp_path / f"{number}.png"))
    code, said = run_agent(tmp_path / "agent.pyz", "classify", str(artifact), *images)
    assert [answer["found"] for answer in said] == ["red", "green", "blue"]
    code, said = run_agent(tmp_path / "agent.pyz", "add", str(artifact), "blue", str(photos))
    assert code == 2
    assert 'has the class "blue" already' in said[0]["error"][0]


def test_the_agent_says_what_is_wrong(artifact: Path, photos: Path, tmp_path: Path) -> None:
    write_agent(tmp_path / "agent.pyz")
    logits = write_artifact(tmp_path / "logits")
    code, said = run_agent(tmp_path / "agent.pyz", "add", str(logits), "blue", str(photos))
    assert (code, said[0]["error"][0].endswith("gives no embedding.")) == (2, True)
    code, said = run_agent(tmp_path / "agent.pyz", "classify", str(tmp_path / "nowhere"), "x.png")
    assert (code, "There is no artifact" in said[0]["error"][0]) == (2, True)
    code, said = run_agent(tmp_path / "agent.pyz", "classify", str(artifact), "x.png")
    assert (code, "x.png" in said[0]["error"][0]) == (2, True)
    shutil.copy(logits / "model.onnx", artifact / "model.onnx")
    code, said = run_agent(tmp_path / "agent.pyz", "add", str(artifact), "blue", str(photos))
    assert (code, "is not the file that was exported" in said[0]["error"][0]) == (2, True)
    code, said = run_agent(tmp_path / "agent.pyz", "add", str(artifact), "blue")
    assert (code, said) == (2, [])


def test_left_out_images_are_counted_by_hand() -> None:
    bank = red_and_green()
    embeddings = unit(np.array([[0, 0, 1], [0, 0.1, 1], [1, 0, 0.2]], dtype=np.float32))
    # The third is red; the prototype of the others is (0, .05, 1). The first two: their prototypes hold half of the
    # third and lie near (.5, 0, .6), closer to them than red or green.
    assert recognised(bank, embeddings) == 2
    assert recognised(bank, embeddings[:1]) is None
