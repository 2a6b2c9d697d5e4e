"""The target `executorch`, through ExecuTorch's own runtime; skipped where the extra is not installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from export_fakes import block_model, export_block, pictures

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import sha256_file
from edgekd.export.artifact import torch_logits
from edgekd.targets.session import open_session

needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None, reason='needs pip install "edgekd[executorch]"'
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("executorch")
    found = {}
    for precision in ("fp32", "int8"):
        export_block(found.setdefault(precision, home / precision), "executorch", precision)
    return found


@needs_executorch
def test_files_compute_the_model(folders: dict[str, Path]) -> None:
    images = pictures(100, seed=2)
    reference = torch_logits(block_model(), images)
    exact = open_session(folders["fp32"])
    np.testing.assert_allclose(exact.run(images), reference, atol=1e-5)
    assert read_artifact(folders["fp32"]).parity["run_by"] == exact.provider
    rounded = open_session(folders["int8"]).run(images)
    centred = reference - reference.mean(axis=0)
    assert not np.array_equal(reference, rounded)
    assert np.square(rounded - reference).mean() < 0.2 * np.square(centred).mean()


@needs_executorch
def test_a_damaged_file_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["fp32"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.pte").write_bytes(b"\0" * 64)
    artifact = read_artifact(tmp_path, check_hashes=False)
    files = {**artifact.files, "model.pte": sha256_file(tmp_path / "model.pte")}
    artifact.model_copy(update={"files": files}).write(tmp_path)
    with pytest.raises(EdgekdError, match="cannot load") as caught:
        open_session(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("executorch", "executorch.exir", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotHere) as caught:
        export_block(tmp_path / "a", "executorch", "fp32")
    assert "edgekd[executorch]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
