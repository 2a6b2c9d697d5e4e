from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import draw_nothing
from device_fakes import be_brief
from study_data import draw_domains, tiny_settings
from typer.testing import CliRunner

import edgekd
from edgekd.api import check_data
from edgekd.benchmark.results.storage import read_report
from edgekd.cli import app, main
from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.evaluation.auto_target import available, make_candidates
from edgekd.evaluation.data_check import near_pairs

pytestmark = pytest.mark.usefixtures("own_cache", "graphs_once")


def test_what_a_budget_needs() -> None:
    config = ExportConfig.load(target="auto", budget="ood_avg_drop<=1.0, mb<=5")
    assert config.budget == ("ood_avg_drop<=1.0", "mb<=5")
    for given, message in (
        ({"target": "auto", "precision": "int8"}, "precision"),
        ({"target": "onnxruntime", "budget": "mb<=5"}, "--budget"),
        ({"target": "onnxruntime", "device": "local"}, "--device"),
    ):
        with pytest.raises(EdgekdError, match=message):
            ExportConfig.load(**given)
    with pytest.raises(EdgekdError, match="speed<=3"):
        edgekd.export(Path("no run"), target="auto", budget="speed<=3")


def test_the_best_file_for_a_device_without_a_runtime(
    tmp_path: Path,
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The others are measured, INT8 with and without padding; where none meets the budget, the nearest is named."""
    be_brief(monkeypatch)
    draw_nothing(monkeypatch)
    (tmp_path / "openvino.py").write_text("raise ImportError('lib is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = tiny_settings(draw_domains(tmp_path / "data", count=12), tiny_teacher)
    folder = tmp_path / "run"
    edgekd.train(recipe="erm", out=folder, **settings | {"student": "lcnet_035"})
    with pytest.raises(SystemExit) as leaving:
        main(["export", str(folder), "--target", "auto", "--device", "local", "--budget", "mb<=0"])
    assert leaving.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: openvino" in said
    assert "lib is missing" in said
    assert "The nearest is onnxruntime-int8" in said
    kinds = ("fp32", "fp16", "int8", "int8-unpadded")
    measured = {row.subject for row in read_report(folder / "benchmark").exported}
    assert measured == {f"onnxruntime-{kind}@local" for kind in kinds}
    base = folder / "artifacts" / "onnxruntime-fp32" / "model.onnx"
    base.write_bytes(b"damaged")
    config = ExportConfig.load(run=folder, target="auto", device="local")
    folders, left_out = make_candidates(config)
    assert "onnxruntime-fp32" in dict(left_out)
    assert folder / "artifacts" / "onnxruntime-int8" in folders
    bare, padded = (
        (folder / "artifacts" / f"onnxruntime-{kind}" / "model.onnx").stat().st_size
        for kind in ("int8-unpadded", "int8")
    )
    assert bare < padded


def test_a_runtime_that_no_agent_takes_counts_in_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("executorch", "runtime.py"), ("executorch-1.5.dist-info", "METADATA")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("Name: executorch\nVersion: 1.5\n" * ("-" in folder))
    monkeypatch.syspath_prepend(str(tmp_path))
    targets, left_out = available(None)
    assert {"onnxruntime", "executorch"} <= {target.name for target in targets}
    assert "Core ML" in dict(left_out)["coreml"]


def test_near_pairs_by_hand() -> None:
    """Centred, these are two close vectors, their opposites, and one of equal content."""
    vectors = np.array([[1, 0], [1, 0.1], [-1, 0], [-1, -0.1], [1, 0]], dtype=np.float32)
    pairs = near_pairs(vectors, ["a", "b", "c", "d", "a"], 0.99)
    centred = vectors - vectors.mean(axis=0)
    for pair in pairs:
        a, b = centred[pair.first], centred[pair.second]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert pair.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert {(pair.first, pair.second) for pair in pairs} == {(0, 1), (1, 4), (2, 3)}
    assert [pair.cosine for pair in pairs] == sorted((p.cosine for p in pairs), reverse=True)


def test_many_near_pairs_do_not_fill_the_memory() -> None:
    """One scene, seen first and last among 6,000 pictures, makes many pairs; the closest are kept."""
    pictures = np.random.default_rng(0).normal(size=(6000, 64)).astype(np.float32)
    scene = np.r_[:200, 5800:6000]
    pictures[scene] = pictures[scene] / 100 + np.eye(64, dtype=np.float32)[0]
    keys = [f"{number}" for number in range(6000)]
    pairs = near_pairs(pictures, keys, 0.9, most=50)
    assert len(pairs) == 50
    assert {pair.first for pair in pairs} | {pair.second for pair in pairs} <= set(scene)
    assert pairs == near_pairs(pictures, keys, 0.9)[:50]


def test_duplicates_unreadable_files_and_balance(
    tmp_path: Path, make_domain_folder: Callable[..., Path]
) -> None:
    root = make_domain_folder(tmp_path / "data", domains=("art", "photo"), count=3)
    shutil.copy(root / "art" / "cat" / "0000.png", root / "photo" / "cat" / "copy.png")
    shutil.copy(root / "art" / "cat" / "0001.png", root / "art" / "cat" / "copy.png")
    shutil.copy(root / "art" / "cat" / "0002.png", root / "art" / "dog" / "copy.png")
    (root / "art" / "dog" / "<b>torn.png").write_bytes(b"\x89PNG")
    found = check_data(root, out=tmp_path / "page.html")
    names = found.images.ids
    across = {names[pair.second]: found.across(pair) for pair in found.duplicates}
    # The first of equal contents is the original, by path.
    assert across == {
        "art/cat/copy.png": "",
        "art/dog/copy.png": "labels",
        "photo/cat/copy.png": "domains",
    }
    assert found.unreadable == (("art/dog/<b>torn.png", "truncated"),)
    assert found.counts.tolist() == [[4, 4], [4, 3]]
    assert (found.near_duplicates, found.label_errors) == (None, None)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert "&lt;b&gt;torn.png" in page
    check_data(root, out=tmp_path / "page.html", overwrite=True)
    # Only a page is overwritten.
    notes, link = tmp_path / "notes.txt", tmp_path / "link.html"
    notes.write_text("mine")
    link.symlink_to(tmp_path / "unmounted")
    for out, overwrite in (
        (tmp_path / "page.html", False), (notes, True), (tmp_path, True), (link, False),
    ):  # fmt: skip
        with pytest.raises(EdgekdError):
            check_data(root, out=out, overwrite=overwrite)
    assert notes.read_text() == "mine"
    assert link.is_symlink()


@pytest.mark.slow
def test_the_teacher_finds_a_wrong_label(tmp_path: Path) -> None:
    toy = load_images("toy")
    photo = toy.domains.index("photo")
    for name in toy.classes[:3]:
        place = toy.classes.index(name)
        chosen = np.flatnonzero((toy.labels == place) & (toy.domain_of == photo))[:8]
        for number, index in enumerate(chosen.tolist()):
            swapped = number == 0 and place == 0
            folder = tmp_path / "data" / (toy.classes[1] if swapped else name)
            folder.mkdir(parents=True, exist_ok=True)
            toy.read(index).save(folder / f"{'wrong' if swapped else name}{number}.png")
    out = tmp_path / "page.html"
    arguments = [str(tmp_path / "data"), "--teacher", "toy", "--sure", "0.6", "--out", str(out)]
    done = CliRunner().invoke(app, ["data", "check", *arguments])
    assert done.exit_code == 0, done.output
    strict = {"teacher": "toy", "sure": 0.6, "near": 0.9999}
    found = check_data(tmp_path / "data", **strict, out=out, overwrite=True)
    doubts = {found.images.ids[one.index]: one.teacher for one in found.label_errors}
    assert doubts[f"{toy.classes[1]}/wrong0.png"] == toy.classes[0]
    assert len(doubts) <= 4
    assert found.zero_shot > 0.8
    assert "wrong0.png" in out.read_text()
    loose = check_data(tmp_path / "data", teacher="toy", near=0.1, out=out, overwrite=True)
    assert len(loose.near_duplicates) > len(found.near_duplicates)
