from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_data import (
    after_step,
    answers,
    draw_domains,
    json_lines,
    raised,
    same_weights,
    tiny_settings,
)

import edgekd
from edgekd.configs.train import TrainConfig
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.classification.load_run import load_run
from edgekd.distill.classification.predict import predict_all, student_predict
from edgekd.distill.classification.task import Classification
from edgekd.distill.models.students import Student
from edgekd.distill.train import train
from edgekd.studies import cell as cells

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = "plain=erm,swad=erm,vl2v-adip"

OWN = [
    "plain:average=none",
    "plain:student_options.drop_rate=0.3",
    "swad:average=swad",
    "vl2v-adip:select=best",
]

STEPS = 24

LOGGED = ("step", "stage", "loss", "terms", "lr", "val_top1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    settings = tiny_settings(
        draw_domains(tmp_path_factory.mktemp("data") / "domains"), tiny_teacher
    )
    return settings | {
        "steps": STEPS,
        "lr": 0.03,
        "test_domains": "sketch",
        "seeds": 1,
        "checkpoint_every": 7,
    }


@pytest.fixture(scope="module")
def made(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same study with the flag (True) and without."""
    folder = tmp_path_factory.mktemp("studies")
    for oracle in (False, True):
        edgekd.study(
            RECIPES, out=folder / str(oracle), keep=True, oracle=oracle, recipe_settings=OWN, **base
        )
    return {oracle: folder / str(oracle) for oracle in (False, True)}


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["cell"]["recipe"]: line for line in json_lines(folder / "cells.jsonl")}


def test_watching_changes_no_weight_and_no_other_number(made: dict[bool, Path]) -> None:
    for name in lines(made[False]):
        key = f"{name}-sketch-0"
        runs = [made[oracle] / "runs" / key for oracle in (False, True)]
        assert same_weights(*runs)
        blind_log, seeing_log = (
            [
                {part: line.get(part) for part in LOGGED}
                for line in json_lines(run / "metrics.jsonl")
            ]
            for run in runs
        )
        assert blind_log == seeing_log
        blind, seeing = answers(made[False], key), answers(made[True], key)
        assert seeing.keys() - blind.keys() == {"oracle", "oracle_labels"}
        assert all(np.array_equal(blind[part], seeing[part]) for part in blind)
        assert lines(made[False])[name]["selection"] == lines(made[True])[name]["selection"]
    assert "racle" not in (made[False] / "table.md").read_text()
    assert "chosen on these very images: not a result" in (made[True] / "table.md").read_text()


def weights_on_the_way(config: TrainConfig) -> dict[int, Student]:
    """What a run shows, by the steps done."""
    shown: dict[int, Student] = {}

    def keep(task: Classification, student: Student, done: int, steps: tuple[int, ...]) -> None:
        assert done in steps
        shown[done] = copy.deepcopy(student)

    train(config, keep)
    return shown


def test_the_oracle_is_the_best_of_all_weights_that_were_shown(
    made: dict[bool, Path], base: dict[str, Any], tmp_path: Path
) -> None:
    images = load_images(base["data"])
    unseen = np.flatnonzero(images.domain_of == images.domains.index("sketch"))
    better = set()
    for name, line in lines(made[True]).items():
        key = f"{name}-sketch-0"
        run = made[True] / "runs" / key
        loaded = load_run(run)
        shown = weights_on_the_way(loaded.config.model_copy(update={"out": tmp_path / name}))
        assert line["oracle_places"] == len(shown)
        rights = {
            done: predict_all(
                student_predict(student, loaded.vectors), images, unseen, loaded.run.preprocess
            ).argmax(1)
            == images.labels[unseen]
            for done, student in shown.items()
        }
        found = answers(made[True], key)
        best = max(right.sum() for right in rights.values())
        assert found["oracle"].sum() == max(best, found["ood"].sum())
        if best > found["ood"].sum():
            better.add(name)
            assert rights[line["oracle_step"]].sum() == best
            assert np.array_equal(rights[line["oracle_step"]], found["oracle"])
        else:
            assert line["oracle_step"] is None
            assert np.array_equal(found["ood"], found["oracle"])
    assert better  # else nothing was put to the test


def test_nothing_reads_unseen_images_without_the_flag(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load_images(base["data"])
    unseen = {
        images.ids[i] for i in np.flatnonzero(images.domain_of == images.domains.index("sketch"))
    }
    read: list[str] = []
    real, finish = ImageSet.read, cells.run_outcomes

    def reading(self: ImageSet, i: int, **rest: Any) -> Any:
        read.append(self.ids[i])
        return real(self, i, **rest)

    during: dict[bool, list[str]] = {}

    def trained(loaded: Any, *, oracle: bool) -> Any:
        during[oracle] = [name for name in read if name in unseen]
        return finish(loaded, oracle=oracle)

    monkeypatch.setattr(ImageSet, "read", reading)
    monkeypatch.setattr(cells, "run_outcomes", trained)
    for oracle in (False, True):
        read.clear()
        edgekd.study("erm", out=tmp_path / str(oracle), oracle=oracle, **base)
    assert during[False] == []
    assert sorted(during[True]) == sorted(10 * list(unseen))  # all of them, at every place


def test_a_study_that_goes_on_with_the_flag_has_gaps(base: dict[str, Any], tmp_path: Path) -> None:
    words = base | {"out": tmp_path / "s", "test_domains": "art,sketch"}
    edgekd.study("erm", **words)
    study = edgekd.study("erm,plain=erm", oracle=True, recipe_settings=OWN[:2], **words)
    assert study.tables[0].measures == ("ood", "oracle")
    gap, whole = study.tables[0].rows[-2:]
    assert (gap.name, gap.oracle, ("art", "oracle") in gap.columns) == ("erm", None, False)
    both = [whole.columns[name, "oracle"].mean for name in ("art", "sketch")]
    assert whole.oracle.mean == pytest.approx(np.mean(both))
    without = edgekd.study("erm,plain=erm", recipe_settings=OWN[:2], **words)
    assert "oracle" not in without.tables[0].measures


def stopped(base: dict[str, Any], folder: Path, after: int, *, oracle: bool) -> None:
    """A study whose training is cut off after a step."""
    with pytest.MonkeyPatch.context() as patch:
        after_step(after, patch, raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            edgekd.study("plain=erm", out=folder, oracle=oracle, recipe_settings=OWN[:2], **base)


def test_an_interrupted_cell_keeps_its_oracle(
    made: dict[bool, Path], base: dict[str, Any], tmp_path: Path
) -> None:
    # The checkpoint is of step 14, place 15 comes twice.
    stopped(base, tmp_path / "a", 16, oracle=True)
    edgekd.study("plain=erm", out=tmp_path / "a", oracle=True, recipe_settings=OWN[:2], **base)
    again, whole = lines(tmp_path / "a")["plain"], lines(made[True])["plain"]
    assert (again["oracle_places"], again["oracle_step"]) == (10, whole["oracle_step"])
    key = "plain-sketch-0"
    assert np.array_equal(
        answers(tmp_path / "a", key)["oracle"], answers(made[True], key)["oracle"]
    )
    stopped(base, tmp_path / "b", 16, oracle=False)  # five places passed unseen
    study = edgekd.study(
        "plain=erm", out=tmp_path / "b", oracle=True, recipe_settings=OWN[:2], **base
    )
    assert "oracle" not in answers(tmp_path / "b", key)
    assert ("sketch", "oracle") not in study.tables[0].rows[-1].columns


@pytest.mark.slow
def test_two_processes_of_one_run_watch_once(base: dict[str, Any], tmp_path: Path) -> None:
    edgekd.study("erm", out=tmp_path / "s", oracle=True, settings=["devices=2"], **base)
    assert lines(tmp_path / "s")["erm"]["oracle_places"] == 10
