"""Class vectors beside an artifact: logits by hand, the way of a text into the student's space, classes that come."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from embedding_fakes import red_and_green, write_colours

from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact
from edgekd.targets import bank_change
from edgekd.targets.bank import ClassBank, read_bank, unit
from edgekd.targets.bank_change import change_bank


def random_bank(classes: int, dim: int) -> ClassBank:
    vectors = unit(np.random.default_rng(classes).standard_normal((classes, dim)))
    return ClassBank(
        tuple(f"c{number}" for number in range(classes)), vectors, 7.5, None, {"added": []}
    )


def test_logits_are_scaled_cosines() -> None:
    bank = red_and_green()
    embeddings = np.array([[1, 0, 0], [0, 0.6, 0.8]], dtype=np.float32)
    np.testing.assert_allclose(bank.logits(embeddings), [[10, 0], [0, 6]], rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("dim", [12, 64, 513])
def test_a_class_that_is_added_leaves_the_others_logits_as_they_are(batch: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    bank, embeddings = random_bank(1, dim), unit(rng.standard_normal((batch, dim)))
    before = bank.logits(embeddings)
    for number in range(40):
        bank = bank.with_class(
            f"new {number}", rng.standard_normal(dim).astype(np.float32), {"by": "test"}
        )
        now = bank.logits(embeddings)
        np.testing.assert_array_equal(now[:, :-1], before)
        np.testing.assert_allclose(now, 7.5 * embeddings @ bank.vectors.T, atol=1e-4)
        before = now


def test_a_text_goes_the_way_of_the_training() -> None:
    mean = np.array([0.0, 0.0, 0.5], dtype=np.float32)
    prompts = np.array([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]], dtype=np.float32)
    average = np.array([0.6, 1.0, 0.8]) / np.sqrt(
        2.0
    )  # of the unit vectors (.6, 0, .8) and (0, 1, 0), at length 1
    np.testing.assert_allclose(red_and_green().of_text(prompts), average, atol=1e-6)
    centred = average - mean
    np.testing.assert_allclose(
        red_and_green(mean).of_text(prompts), centred / np.sqrt(centred @ centred), atol=1e-6
    )


def test_file_keeps_everything_and_needs_numpy_alone(tmp_path: Path) -> None:
    bank = red_and_green(np.array([0.1, 0.2, 0.3], dtype=np.float32)).with_class(
        "élan", np.array([0, 3, 4], dtype=np.float32), {"by": "test"}
    )
    (tmp_path / "bank.npz").write_bytes(bank.to_bytes())
    again = read_bank(tmp_path / "bank.npz")
    assert again.classes == ("red", "green", "élan")
    np.testing.assert_array_equal(again.vectors, bank.vectors)
    assert (again.logit_scale, again.facts) == (10.0, bank.facts)
    np.testing.assert_array_equal(again.text_mean, bank.text_mean)
    assert again.to_bytes() == bank.to_bytes()
    with np.load(tmp_path / "bank.npz") as plain:  # as somebody without edgekd reads it
        np.testing.assert_allclose(
            plain["logit_scale"] * plain["vectors"] @ [0, 0.6, 0.8], [0, 6, 10 * 0.6**2 + 6.4]
        )


def test_damaged_or_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    good = red_and_green().to_bytes()
    for number, data in enumerate([b"", b"no zip", good[: len(good) // 2]]):
        (tmp_path / f"{number}.npz").write_bytes(data)
        with pytest.raises(EdgekdError, match="class bank"):
            read_bank(tmp_path / f"{number}.npz")
    with pytest.raises(EdgekdError, match="class bank"):
        read_bank(tmp_path / "absent.npz")


def test_names_and_vectors_that_do_not_fit_are_refused() -> None:
    bank, vector = red_and_green(), np.ones(3, dtype=np.float32)
    for name in ("", "  ", "two\nlines"):
        with pytest.raises(EdgekdError, match="needs a name"):
            bank.with_class(name, vector, {})
    with pytest.raises(EdgekdError, match='has the class "Red"'):
        bank.with_class("Red", vector, {})
    with pytest.raises(EdgekdError, match="do not fit into a space of 3 dimensions"):
        bank.of_text(np.ones(4))
    for broken in (np.zeros(3), np.array([np.nan, 1, 1])):
        with pytest.raises(EdgekdError, match="zero or not finite"):
            bank.of_text(broken)


def test_only_an_added_class_can_be_taken_out() -> None:
    bank = red_and_green().with_class("blue", np.array([0, 0, 1], dtype=np.float32), {"by": "test"})
    with pytest.raises(EdgekdError, match='"red" is no class that was added') as caught:
        bank.without_class("red")
    assert "blue" in caught.value.hint
    left = bank.without_class("blue")
    assert left.classes == ("red", "green")
    assert left.to_bytes() == red_and_green().to_bytes()


def add_blue(bank: ClassBank) -> ClassBank:
    return bank.with_class("blue", np.array([0, 0, 1], dtype=np.float32), {"by": "test"})


def test_changing_keeps_the_artifact_whole(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "a")
    change_bank(folder, add_blue)
    artifact = read_artifact(folder)  # checks every hash
    assert artifact.classes == ("red", "green", "blue")
    assert artifact.bank is not None
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["artifact.json", "labels.txt", "model.onnx", artifact.bank]
    )
    assert (folder / "labels.txt").read_text().splitlines() == ["red", "green", "blue"]
    assert [entry["class"] for entry in read_bank(folder / artifact.bank).facts["added"]] == [
        "blue"
    ]


def test_a_change_that_is_cut_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_colours(tmp_path / "a")
    before = (folder / "artifact.json").read_bytes()
    renamed = []

    def replace(source: Path, target: Path) -> None:
        renamed.append(Path(target).name)
        raise OSError("power cut")

    monkeypatch.setattr(bank_change.os, "replace", replace)
    with pytest.raises(OSError, match="power cut"):
        change_bank(folder, add_blue)
    assert len(renamed) == 1
    assert renamed[0].startswith("bank-"), "the manifest must come last"
    assert (folder / "artifact.json").read_bytes() == before
    assert read_artifact(folder).classes == ("red", "green")
    assert not list(folder.glob(".tmp-*"))


def test_two_changes_at_once_do_not_swallow_one(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "a")

    def slow(bank: ClassBank) -> ClassBank:
        change_bank(folder, add_blue)
        return bank.with_class("grey", np.ones(3, dtype=np.float32), {"by": "test"})

    with pytest.raises(EdgekdError, match="Somebody else changed"):
        change_bank(folder, slow)
    assert read_artifact(folder).classes == ("red", "green", "blue")


def test_altered_bank_and_artifact_without_one_are_refused(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "a")
    (folder / "bank.npz").write_bytes(add_blue(red_and_green()).to_bytes())
    with pytest.raises(EdgekdError, match="is not the file that artifact"):
        change_bank(folder, add_blue)
    manifest = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**manifest, "bank": None}))
    with pytest.raises(EdgekdError, match="ends in the logits of fixed classes"):
        change_bank(folder, add_blue)
    with pytest.raises(EdgekdError, match="There is no artifact"):
        change_bank(tmp_path / "nowhere", add_blue)
