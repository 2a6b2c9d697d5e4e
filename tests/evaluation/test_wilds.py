from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_fakes import SHORT, fake_measurements, model, subject
from PIL import Image
from sklearn.metrics import f1_score

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.results.storage import read_report
from edgekd.core.errors import EdgekdError
from edgekd.evaluation.trained_on import Trained
from edgekd.evaluation.wilds import wilds_named, wilds_suites

NAMES = ("empty", "deer", "cow")

SPLITS = {"train": 0, "val": 1, "test": 2, "id_val": 3, "id_test": 4}


class Plain:
    """60 painted images in five splits; what the data sets of the package have and edgekd reads."""

    split_dict, n_classes, version = SPLITS, 3, "2.0"

    def __init__(self, folder: Path) -> None:
        self.data_dir, self.split_array = str(folder), np.arange(60) % 5
        self.y_array = torch.arange(60) // 5 % 3
        self.metadata_array = torch.stack([torch.arange(60) % 2, self.y_array], dim=1)

    def get_input(self, idx: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (int(self.y_array[idx]), idx, 0))

    def eval(self, y_pred: Any, y_true: Any, metadata: Any, prediction_fn: Any = None) -> Any:
        assert len(y_pred) == len(y_true) == len(metadata)
        assert torch.equal(metadata[:, 1], y_true)
        score = f1_score(y_true, y_pred, average="macro", labels=np.unique(y_true))
        return {"F1-macro_all": torch.tensor(score), "acc_group:none": float("nan")}, ""


def plant(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    module = types.ModuleType("wilds")
    module.get_dataset = make  # type: ignore[attr-defined]
    module.__version__ = "2.0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wilds", module)


def write_names(folder: Path) -> None:
    (folder / "categories.csv").write_text(
        "y,name\n" + "".join(f"{n},{name}\n" for n, name in enumerate(NAMES))
    )


def test_the_report_has_the_packages_own_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_names(tmp_path)

    def get_dataset(dataset: str, root_dir: str, download: bool) -> Plain:
        assert (dataset, download) == ("iwildcam", False)
        return Plain(Path(root_dir))

    plant(monkeypatch, get_dataset)
    test, inside = wilds_suites("iwildcam", str(tmp_path), NAMES)
    assert (test.name, inside.name) == ("ood:iwildcam", "wilds:iwildcam/id_test")
    assert test.indices.tolist() == list(range(2, 60, 5))
    assert test.images.classes == NAMES
    fake_measurements(monkeypatch, {})
    subjects = [subject("torch", "torch", model(3), classes=NAMES)]
    report = run_benchmark(subjects, [test, inside], tmp_path / "out", speed=SHORT)
    assert read_report(report.folder) == report
    row = report.own_metrics[0]
    labels = test.labels
    answers = (labels + (test.indices % 3 == 0)) % 3
    f1 = f1_score(labels, answers, average="macro")
    assert row.metrics == {"F1-macro_all": pytest.approx(f1)}
    assert row.source == "wilds 2.0.0, iwildcam.eval"
    right = pytest.approx((labels == answers).mean())
    assert report.summary[0].ood == {"iwildcam": right}  # id_test enters no mean
    assert "F1-macro_all" in (tmp_path / "out" / "report.html").read_text()


def test_classes_are_numbers_where_wilds_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda dataset, root_dir, download: Plain(tmp_path))
    assert wilds_suites("rxrx1", "x", ("0", "1", "2"))[0].images.classes == ("0", "1", "2")
    with pytest.raises(EdgekdError, match="does not have"):
        wilds_suites("rxrx1", "x", NAMES)


def test_what_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, rest = wilds_named(["a=b", "wilds:fmow=d", "wilds:iwildcam"])
    assert (named, rest) == ([("fmow", "d"), ("iwildcam", "data")], ["a=b"])
    with pytest.raises(EdgekdError, match='no image classification data set "amazon"'):
        wilds_named(["wilds:amazon"])

    def absent(dataset: str, root_dir: str, download: bool) -> Plain:
        raise FileNotFoundError("could not be found")

    plant(monkeypatch, absent)
    with pytest.raises(EdgekdError, match=r"The images of fmow of WILDS are not in"):
        wilds_suites("fmow", str(tmp_path), NAMES)
    monkeypatch.setitem(sys.modules, "wilds", None)
    with pytest.raises(EdgekdError, match="The package wilds"):
        wilds_suites("fmow", str(tmp_path), NAMES)


def test_images_that_trained_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every other suite, by the content of the file that the package opens."""

    class Stored(Plain):
        def get_input(self, idx: int) -> Image.Image:
            return Image.open(Path(self.data_dir) / f"{idx}.png").convert("RGB")

    write_names(tmp_path)
    data = Stored(tmp_path)
    key = []
    for idx in range(60):
        Plain.get_input(data, idx).save(tmp_path / f"{idx}.png")
        key.append(hashlib.sha256((tmp_path / f"{idx}.png").read_bytes()).hexdigest()[:32])
    plant(monkeypatch, lambda dataset, root_dir, download: data)
    saw = Trained({key[2]: "train", key[7]: "val", key[9]: "train", key[0]: "train"})
    test, inside = wilds_suites("iwildcam", str(tmp_path), NAMES, None, saw)
    assert test.indices.tolist() == list(range(12, 60, 5))
    assert (test.excluded, inside.excluded) == ({"train": 1, "val": 1}, {"train": 1})
    assert test.own_metrics(test.labels)["F1-macro_all"] == 1
    assert test.images.read(2).size == (8, 8)
