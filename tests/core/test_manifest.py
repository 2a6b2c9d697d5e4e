from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from artifact_fakes import write_artifact, write_run

from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact, read_run


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(read: Any, folder: Path) -> str:
    with pytest.raises(EdgekdError) as caught:
        read(folder)
    assert caught.value.hint
    return caught.value.message


def test_an_artifact_goes_round_and_may_move(tmp_path: Path) -> None:
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    assert artifact.model_file == "model.onnx"
    assert artifact.inputs[0].shape == ("batch", 16, 16, 3)
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = read_artifact(tmp_path / "b")
    assert moved.folder == tmp_path / "b"
    assert str(tmp_path) not in (tmp_path / "b" / "artifact.json").read_text()
    assert moved.model_copy(update={"folder": None}) == artifact.model_copy(update={"folder": None})


@pytest.mark.parametrize(
    ("precision", "method", "now"),
    [
        ("w8a8", "activations int8 per tensor with zero point", "int8"),
        ("int8", "weights int8 per channel, symmetric; activations float16", "int8-weights"),
        ("int8", "NNCF post-training quantization", "int8"),
    ],
)
def test_precisions_of_earlier_artifacts_have_their_new_names(
    tmp_path: Path, precision: str, method: str, now: str
) -> None:
    folder = write_artifact(tmp_path / "a")
    change(folder / "artifact.json", precision=precision, quantization={"method": method})
    assert read_artifact(folder).precision == now


def test_an_altered_file_is_noticed(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "a")
    (folder / "model.onnx").write_bytes(b"grapn")
    assert "SHA-256" in refusal(read_artifact, folder)
    assert read_artifact(folder, check_hashes=False).precision == "fp32"
    (folder / "model.onnx").unlink()
    assert "model.onnx" in refusal(read_artifact, folder)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"schema_version": 2}, "version 2"),
        ({"precision": "fp8"}, "precision"),
        ({"extra": 1}, "extra"),
        ({"source": {"unlabelled_domains": 5}}, "unlabelled_domains"),
        ({"source": {"unlabelled_domains": [5]}}, "unlabelled_domains"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, fields: dict[str, Any], word: str
) -> None:
    folder = write_artifact(tmp_path / "a")
    change(folder / "artifact.json", **fields)
    assert word in refusal(read_artifact, folder)


def test_only_a_run_may_name_no_schema_version(tmp_path: Path) -> None:
    for path in (
        write_artifact(tmp_path / "a") / "artifact.json",
        write_run(tmp_path / "b") / "run.json",
    ):
        data = json.loads(path.read_text())
        del data["schema_version"]
        path.write_text(json.dumps(data))
    assert "schema version" in refusal(read_artifact, tmp_path / "a")
    assert read_run(tmp_path / "b").schema_version == 1


def test_a_run_that_is_missing_unfinished_or_damaged_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in refusal(read_run, tmp_path / "absent")
    folder = write_run(tmp_path / "a")
    change(folder / "run.json", schema_version=2)
    assert "version 2" in refusal(read_run, folder)
    change(folder / "run.json", schema_version=1, steps="many")
    assert "steps" in refusal(read_run, folder)
    for content in (b"{", b"\xff\xfe"):
        (folder / "run.json").write_bytes(content)
        assert "not readable" in refusal(read_run, folder)
    (folder / "run.json").unlink()
    assert "no finished run" in refusal(read_run, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(EdgekdError) as caught:
        read_run(folder)
    assert "--resume" in caught.value.hint
