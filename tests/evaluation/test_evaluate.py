from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
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
from edgekd.core.errors import EdgekdError
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
    return folder


def test_agreement_is_measured_before_and_after_export(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = edgekd.evaluate(run, agreement=True)
    assert [(row["subject"], row["domain"]) for row in rows] == [
        ("student", "photo"),
        ("onnxruntime-fp32", "photo"),
        ("student", "sketch"),
        ("onnxruntime-fp32", "sketch"),
    ]
    for torch_row, file_row in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert torch_row["n"] == file_row["n"]
        assert torch_row["top1_agreement"] == file_row["top1_agreement"]
        assert torch_row["m_vlalign"] == pytest.approx(file_row["m_vlalign"], abs=0.1)
        assert 0 <= torch_row["m_rel"] <= torch_row["recall"] <= 1
        assert 0 < torch_row["angle"] < 180
        assert file_row["m_rel"] is None  # a file gives logits, not embeddings
    main_output(["evaluate", str(run), "--agreement"])
    shown = capsys.readouterr().out
    assert "M_neigh@10 %" in shown
    assert "onnxruntime-fp32" in shown


def test_a_file_that_embeds_is_compared_as_the_student_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgekd.core.errors import NotHere
    from edgekd.targets import session

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    edgekd.export(copy, head="embedding")
    edgekd.add_class(
        copy / "artifacts" / "onnxruntime-fp32-embedding", "aardvark"
    )  # is nobody's answer here
    open_it = session.open_session

    def but_one(folder: Path, **words: Any) -> Any:
        if folder.name == "onnxruntime-fp32":
            raise NotHere("It runs on another machine.", "Go there.")
        return open_it(folder, **words)

    monkeypatch.setattr("edgekd.evaluation.evaluate.open_session", but_one)
    rows = edgekd.evaluate(copy, agreement=True)
    assert "onnxruntime-fp32 is left out: It runs on another machine." in capsys.readouterr().err
    assert [row["subject"] for row in rows] == ["student", "onnxruntime-fp32-embedding"] * 2
    for before, after in ((rows[0], rows[1]), (rows[2], rows[3])):
        for name in ("top1_agreement", "m_rel", "recall", "m_neigh"):
            assert before[name] == pytest.approx(after[name], abs=0.02)
        assert before["angle"] == pytest.approx(after["angle"], abs=0.01)
        assert before["distance"] == pytest.approx(after["distance"], abs=1e-3)
        assert 0 < before["distance"] < 4
        assert before["m_vlalign"] == pytest.approx(after["m_vlalign"], abs=0.1)


def main_output(words: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 0


def test_features_are_probed_on_the_runs_own_split(run: Path) -> None:
    rows = edgekd.evaluate(run, probe=True)
    loaded = load_run(run)
    _, split = loaded.data()
    assert {row["subject"] for row in rows} == {"linear", "knn"}
    assert sum(
        row["n"] for row in rows if row["subject"] == "knn" and row["domain"] == "sketch"
    ) == len(split.ood_test)
    assert all(0 <= row["top1"] <= 1 for row in rows)


def test_an_embedding_student_classifies_new_classes(
    run: Path, make_domain_folder: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    other = make_domain_folder(tmp_path / "other", domains=(), classes=("horse", "house"), count=3)
    rows = edgekd.evaluate(run, data=str(other))
    assert {row["subject"] for row in rows} == {"teacher", "student"}
    kd = tmp_path / "kd"
    edgekd.train(recipe="kd", out=kd, **settings)
    with pytest.raises(EdgekdError, match='has a class "horse" that the student was not made for'):
        edgekd.evaluate(kd, data=str(other))


def test_new_classes_are_described_as_those_of_the_run(
    make_domain_folder: Callable[..., Path], tmp_path: Path, settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told = {"cat": "It purrs.", "dog": "It barks.", "horse": "It neighs.", "house": "It stands."}
    (tmp_path / "d.json").write_text(json.dumps(told))
    (tmp_path / "mine.txt").write_text("horse: Fast.\nhouse: Slow.\n")
    words = {"descriptions": str(tmp_path / "d.json"), "prompts": "imagenet7"}
    edgekd.train(recipe="vlm-ood", out=tmp_path / "run", **words, **settings)
    other = make_domain_folder(tmp_path / "other", domains=(), classes=("horse", "house"), count=3)
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


def test_labels_alone_have_no_teacher_to_agree_with(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    edgekd.train(recipe="erm", out=tmp_path / "erm", **settings)
    with pytest.raises(EdgekdError, match="no teacher to agree with"):
        edgekd.evaluate(tmp_path / "erm", agreement=True)
    rows = edgekd.evaluate(tmp_path / "erm", agreement=True, teacher=settings["teacher"])
    assert rows[0]["angle"] is None


RNG = np.random.default_rng(0)

STUDENT, TEACHER = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 6))

TEACHER = STUDENT + 0.8 * TEACHER


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows * rows).sum(axis=1))[:, None]


def test_relative_position_is_counted_image_by_image() -> None:
    s, t = unit(STUDENT), unit(TEACHER)
    ranks = [
        sorted(range(40), key=lambda j, i=i: float(((t[j] - s[i]) ** 2).sum())).index(i)
        for i in range(40)
    ]  # type: ignore[misc]
    assert recall_at(STUDENT, TEACHER, 1) == sum(rank == 0 for rank in ranks) / 40
    assert 0 < recall_at(STUDENT, TEACHER, 1) < recall_at(STUDENT, TEACHER, 5) < 1
    assert recall_at(STUDENT, TEACHER, 5) == sum(rank < 5 for rank in ranks) / 40


def test_common_neighbours_are_counted_image_by_image() -> None:
    def nearest(rows: np.ndarray, i: int) -> set[int]:
        u = unit(rows)
        return set(
            sorted(
                (j for j in range(40) if j != i), key=lambda j: float(((u[j] - u[i]) ** 2).sum())
            )[:3]
        )

    shared = sum(len(nearest(STUDENT, i) & nearest(TEACHER, i)) for i in range(40))
    assert m_neigh(STUDENT, TEACHER, 3) == pytest.approx(shared / 120)
    assert m_neigh(STUDENT, 2 * STUDENT, 3) == 1
    assert m_neigh(STUDENT[:3], TEACHER[:3], 10) == 1  # two others are all there are
    assert math.isnan(m_neigh(STUDENT[:1], TEACHER[:1], 3))


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


def test_angle_and_distance_say_the_same() -> None:
    one = np.array([[1.0, 0], [0, 2.0]])
    other = np.array([[1.0, 1.0], [0, 1.0]])
    assert angle_degrees(one, other) == pytest.approx(22.5, abs=1e-3)
    assert squared_distance(one, other) == pytest.approx((2 - math.sqrt(2)) / 2, abs=1e-6)


def test_metrics_do_not_depend_on_how_many_rows_are_compared_at_once() -> None:
    many = RNG.normal(size=(1100, 4))
    near = many + 0.1 * RNG.normal(size=many.shape)
    cosines = unit(many) @ unit(near).T
    assert recall_at(many, near, 1) == pytest.approx(
        np.mean(cosines.argmax(axis=1) == np.arange(1100))
    )
