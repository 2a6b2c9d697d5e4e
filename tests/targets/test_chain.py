"""`edgekd verify`: the parity check again, in the run, far from it, and when a link is broken."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from artifact_fakes import rehash
from onnx import numpy_helper

import edgekd
from edgekd.cli import main
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact


def exit_code(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    return leaving.value.code


def alter(folder: Path, factor: float) -> None:
    """Scale the head's bias and weights, with the hash of the altered file: damage that only parity can find."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    head = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    scaled = numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
    onnx.save(model, path)
    rehash(folder)


def test_chain_inside_the_run_repeats_the_export(tiny_run: Path) -> None:
    links = edgekd.verify(tiny_run / "artifacts" / "onnxruntime-int8")
    names = ("torch student", "fp32 ONNX", "onnxruntime-int8")
    pairs = itertools.combinations(names, 2)
    assert {link["link"] for link in links} == {f"{one} → {other}" for one, other in pairs}
    assert links[0]["passed"]
    recorded = read_artifact(tiny_run / "artifacts" / "onnxruntime-int8").parity
    assert links[2]["top1_agreement"] == recorded["top1_agreement"]
    assert links[2]["n"] == recorded["n"]
    assert links[2]["max_abs_error"] == pytest.approx(recorded["max_abs_error"], rel=1e-3)


def test_copied_artifact_finds_its_images_by_content(
    tiny_run: Path, tmp_path: Path, make_domain_folder: Callable[..., Path]
) -> None:
    shutil.copytree(tiny_run / "artifacts" / "onnxruntime-fp32", tmp_path / "a")
    with pytest.raises(EdgekdError, match="lies outside its run") as caught:
        edgekd.verify(tmp_path / "a")
    assert "--data" in caught.value.hint
    (link,) = edgekd.verify(tmp_path / "a", data=str(tiny_run.parent / "data"))
    assert link["passed"]
    assert link["n"] == read_artifact(tmp_path / "a").parity["n"]
    images = make_domain_folder(tmp_path / "images", count=2)
    with pytest.raises(EdgekdError, match="None of the"):
        edgekd.verify(tmp_path / "a", data=str(images))
    with pytest.raises(EdgekdError, match="is a run") as caught:
        edgekd.verify(tiny_run)
    assert "onnxruntime-fp32, onnxruntime-int8" in caught.value.hint


def test_a_file_trained_with_its_rounding_is_compared_with_its_own_logits(
    tiny_run: Path, tmp_path: Path
) -> None:
    """Files of `--qat`, which earlier versions had: their weights are not those of the run's student."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    folder = copy / "artifacts" / "onnxruntime-int8"
    artifact = read_artifact(folder)
    quantization = {**(artifact.quantization or {}), "qat": {"chosen_step": 1, "steps": 2}}
    artifact.model_copy(update={"quantization": quantization}).write(folder)
    (link,) = edgekd.verify(folder)
    assert link["link"] == "trained network in torch → onnxruntime-int8"
    assert link["passed"]


def test_broken_links_are_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    fp32, int8 = copy / "artifacts" / "onnxruntime-fp32", copy / "artifacts" / "onnxruntime-int8"
    alter(fp32, 1.2)
    assert exit_code("verify", str(int8)) == 1
    assert "BROKEN: torch student → fp32 ONNX" in capsys.readouterr().out
    assert exit_code("verify", str(fp32)) == 1
    shutil.copytree(tiny_run / "artifacts" / "onnxruntime-fp32", fp32, dirs_exist_ok=True)
    (int8 / "model.onnx").write_bytes(b"no longer the file")
    assert exit_code("verify", str(int8)) == 2
    assert "SHA-256" in capsys.readouterr().err
