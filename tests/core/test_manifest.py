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
    """Set fields of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | fields
    gone = {name for name, value in fields.items() if value is None}
    path.write_text(json.dumps({name: data[name] for name in data.keys() - gone}))


def refusal(read: Any, folder: Path) -> str:
    with pytest.raises(EdgekdError) as caught:
        read(folder)
    assert caught.value.hint
    return caught.value.message


def test_an_artifact_goes_round_may_move_and_is_checked(tmp_path: Path) -> None:
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    assert artifact.model_file == "model.onnx"
    assert artifact.inputs[0].shape == ("batch", 16, 16, 3)
    folder = tmp_path / "b"
    shutil.move(tmp_path / "a", folder)
    moved = read_artifact(folder)
    assert moved.folder == folder
    assert str(tmp_path) not in (folder / "artifact.json").read_text()
    assert moved.model_copy(update={"folder": None}) == artifact.model_copy(update={"folder": None})
    whole = (folder / "artifact.json").read_bytes()
    for fields, word in (
        ({"schema_version": 2}, "version 2"), ({"schema_version": None}, "schema version"),
        ({"precision": "fp8"}, "precision"), ({"extra": 1}, "extra"),
        ({"source": {"unlabelled_domains": 5}}, "unlabelled_domains"),
        ({"source": {"unlabelled_domains": [5]}}, "unlabelled_domains"),
    ):  # fmt: skip
        change(folder / "artifact.json", **fields)
        assert word in refusal(read_artifact, folder)
        (folder / "artifact.json").write_bytes(whole)
    (folder / "model.onnx").write_bytes(b"grapn")
    assert "SHA-256" in refusal(read_artifact, folder)
    assert read_artifact(folder, check_hashes=False).precision == "fp32"
    (folder / "model.onnx").unlink()
    assert "model.onnx" in refusal(read_artifact, folder)


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


def test_a_run_that_is_missing_unfinished_or_damaged_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in refusal(read_run, tmp_path / "absent")
    folder = write_run(tmp_path / "a")
    change(folder / "run.json", schema_version=None)  # as in older runs
    assert read_run(folder).schema_version == 1
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
