from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_data import draw_domains, tiny_settings

import edgekd
from edgekd.benchmark.evaluate.agreement import (
    angle_degrees,
    m_neigh,
    m_vlalign,
    recall_at,
    squared_distance,
)
from edgekd.cli import main
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.distill.classification.load_run import load_run
from edgekd.distill.models.teachers import ClipTeacher

pytestmark = pytest.mark.usefixtures("graphs_once")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    data = draw_domains(tmp_path_factory.mktemp("compare") / "data", count=12)
    shutil.rmtree(data / "art")
    return tiny_settings(data, tiny_teacher) | {"batch_size": 4}


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "lgd"
    edgekd.train(recipe="lgd", out=folder, **settings)
    edgekd.export(folder)
    edgekd.export(folder, head="embedding")
    # A class more, which is nobody's answer here.
    edgekd.add_class(folder / "artifacts" / "onnxruntime-fp32-embedding", "aardvark")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes that no run was trained on."""
    return draw_domains(tmp_path_factory.mktemp("other"), ("horse", "house"), count=2) / "art"


def test_agreement_is_measured_before_and_after_export(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", str(run), "--agreement"])
    assert leaving.value.code == 0
    assert "M_neigh@10 %" in capsys.readouterr().out
    rows = edgekd.evaluate(run, agreement=True)
    kinds = ("student", "onnxruntime-fp32", "onnxruntime-fp32-embedding")
    named = [(row["subject"], row["domain"]) for row in rows]
    assert named == [(kind, domain) for domain in ("photo", "sketch") for kind in kinds]
    for student, file, embedding in (rows[:3], rows[3:]):
        assert 0 <= student["m_rel"] <= student["recall"] <= 1
        assert 0 < student["angle"] < 180
        assert 0 < student["distance"] < 4
        assert file["m_rel"] is None  # a file gives logits, not embeddings
        for other in (file, embedding):
            assert other["n"] == student["n"]
            assert other["top1_agreement"] == pytest.approx(student["top1_agreement"], abs=0.02)
            assert other["m_vlalign"] == pytest.approx(student["m_vlalign"], abs=0.1)
        for name in ("m_rel", "recall", "m_neigh", "angle", "distance"):
            assert embedding[name] == pytest.approx(student[name], abs=0.02)

    def elsewhere(folder: Path, **words: Any) -> Any:
        raise NotHere("It runs on another machine.", "Go there.")

    monkeypatch.setattr("edgekd.evaluation.evaluate.open_session", elsewhere)
    assert {row["subject"] for row in edgekd.evaluate(run, agreement=True)} == {"student"}
    assert "onnxruntime-fp32 is left out: It runs on another" in capsys.readouterr().err


def test_features_are_probed_on_the_runs_own_split(run: Path) -> None:
    rows = edgekd.evaluate(run, probe=True)
    _, split = load_run(run).data()
    assert {row["subject"] for row in rows} == {"linear", "knn"}
    unseen = [row for row in rows if (row["subject"], row["domain"]) == ("knn", "sketch")]
    assert sum(row["n"] for row in unseen) == len(split.ood_test)
    assert all(0 <= row["top1"] <= 1 for row in rows)


def test_what_a_student_of_labels_cannot_tell(
    run: Path, other: Path, tiny_run: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = edgekd.evaluate(run, data=str(other))
    assert {row["subject"] for row in rows} == {"teacher", "student"}
    with pytest.raises(EdgekdError, match='has a class "horse" that the student was not made for'):
        edgekd.evaluate(tiny_run, data=str(other))
    edgekd.train(recipe="erm", out=tmp_path / "erm", **settings)
    with pytest.raises(EdgekdError, match="no teacher to agree with"):
        edgekd.evaluate(tmp_path / "erm", agreement=True)
    rows = edgekd.evaluate(tmp_path / "erm", agreement=True, teacher=settings["teacher"])
    assert rows[0]["angle"] is None


def test_new_classes_are_described_as_those_of_the_run(
    other: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"cat": "It purrs.", "dog": "It barks.", "horse": "It neighs.", "house": "It stands."}
    (tmp_path / "d.json").write_text(json.dumps(told))
    (tmp_path / "mine.txt").write_text("horse: Fast.\nhouse: Slow.\n")
    words = {"descriptions": str(tmp_path / "d.json"), "prompts": "imagenet7"}
    edgekd.train(recipe="vlm-ood", out=tmp_path / "run", **words, **settings)
    seen: list[Any] = []
    real = ClipTeacher.text_bank

    def recorded(
        self: ClipTeacher, classes: Any, templates: Any, descriptions: Any = None, **more: Any
    ) -> Any:
        seen.append((tuple(classes), len(templates), descriptions))
        return real(self, classes, templates, descriptions, **more)

    monkeypatch.setattr(ClipTeacher, "text_bank", recorded)
    for changes in ({}, {"prompts": "photo"}, {"descriptions": str(tmp_path / "mine.txt")}):
        edgekd.evaluate(tmp_path / "run", data=str(other), **changes)
    both = ("horse", "house")
    assert seen == [
        (both, 7, {"horse": ("It neighs.",), "house": ("It stands.",)}),
        (both, 1, None),
        (both, 7, {"horse": ("Fast.",), "house": ("Slow.",)}),
    ]


RNG = np.random.default_rng(0)

STUDENT, TEACHER = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 6))

TEACHER = STUDENT + 0.8 * TEACHER


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows * rows).sum(axis=1))[:, None]


def nearest(rows: np.ndarray, to: np.ndarray) -> list[int]:
    """Positions of rows, the nearest to `to` first."""
    return sorted(range(len(rows)), key=lambda j: float(((rows[j] - to) ** 2).sum()))


def test_positions_and_neighbours_are_counted_image_by_image() -> None:
    s, t = unit(STUDENT), unit(TEACHER)
    ranks = [nearest(t, s[i]).index(i) for i in range(40)]
    for k in (1, 5):
        assert recall_at(STUDENT, TEACHER, k) == sum(rank < k for rank in ranks) / 40
    assert 0 < recall_at(STUDENT, TEACHER, 1) < recall_at(STUDENT, TEACHER, 5) < 1
    shared = sum(
        len(set(nearest(s, s[i])[1:4]) & set(nearest(t, t[i])[1:4])) for i in range(40)
    )  # the first is the image itself
    assert m_neigh(STUDENT, TEACHER, 3) == pytest.approx(shared / 120)
    assert m_neigh(STUDENT, 2 * STUDENT, 3) == 1
    assert m_neigh(STUDENT[:3], TEACHER[:3], 10) == 1  # two others are all there are
    assert math.isnan(m_neigh(STUDENT[:1], TEACHER[:1], 3))
    # However many rows are compared at once.
    many = RNG.normal(size=(1100, 4))
    near = many + 0.1 * RNG.normal(size=many.shape)
    first = (unit(many) @ unit(near).T).argmax(axis=1)
    assert recall_at(many, near, 1) == pytest.approx(np.mean(first == np.arange(1100)))
    one, other = np.array([[1.0, 0], [0, 2.0]]), np.array([[1.0, 1.0], [0, 1.0]])
    assert angle_degrees(one, other) == pytest.approx(22.5, abs=1e-3)
    assert squared_distance(one, other) == pytest.approx((2 - math.sqrt(2)) / 2, abs=1e-6)


def test_inversions_are_counted_pair_by_pair() -> None:
    s, t = RNG.normal(size=(20, 7)), RNG.normal(size=(20, 7))
    total = 0
    for ours, theirs in zip(s, t, strict=True):
        best = sorted(range(7), key=lambda c: -theirs[c])[:4]
        total += sum(ours[a] < ours[b] for a, b in itertools.combinations(best, 2))
    assert m_vlalign(s, t, 4) == pytest.approx(total / 20)
    assert m_vlalign(t, t, 5) == 0
    assert m_vlalign(-t, t, 5) == 10
    assert m_vlalign(s, t, 7) == m_vlalign(s, t, 100)
