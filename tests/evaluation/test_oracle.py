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

PLAIN = ["plain:average=none", "plain:student_options.drop_rate=0.3"]

OWN = [*PLAIN, "swad:average=swad", "vl2v-adip:select=best"]

LOGGED = ("step", "stage", "loss", "terms", "lr", "val_top1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    data = draw_domains(tmp_path_factory.mktemp("data") / "domains")
    more = {"steps": 12, "lr": 0.03, "test_domains": "sketch", "seeds": 1, "checkpoint_every": 5}
    return tiny_settings(data, tiny_teacher) | more


@pytest.fixture(scope="module")
def made(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same study with the flag (True) and without; no unseen image is read in a training without it."""
    folder = tmp_path_factory.mktemp("studies")
    unseen = {name for name in load_images(base["data"]).ids if name.startswith("sketch/")}
    read: list[str] = []
    real, start, finish = ImageSet.read, cells.train, cells.run_outcomes

    def reading(self: ImageSet, i: int, **rest: Any) -> Any:
        read.append(self.ids[i])
        return real(self, i, **rest)

    def training(*words: Any) -> Any:
        read.clear()
        return start(*words)

    def trained(loaded: Any, *, oracle: bool) -> Any:
        assert set(read) & unseen == (unseen if oracle else set())
        return finish(loaded, oracle=oracle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "read", reading)
        patch.setattr(cells, "train", training)
        patch.setattr(cells, "run_outcomes", trained)
        for oracle in (False, True):
            out = folder / str(oracle)
            edgekd.study(RECIPES, out=out, keep=True, oracle=oracle, recipe_settings=OWN, **base)
    return {oracle: folder / str(oracle) for oracle in (False, True)}


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["cell"]["recipe"]: line for line in json_lines(folder / "cells.jsonl")}


def test_watching_changes_no_weight_and_no_other_number(made: dict[bool, Path]) -> None:
    for name in lines(made[False]):
        key = f"{name}-sketch-0"
        runs = [made[oracle] / "runs" / key for oracle in (False, True)]
        assert same_weights(*runs)
        blind_log, seeing_log = (json_lines(run / "metrics.jsonl") for run in runs)
        for blind_line, seeing_line in zip(blind_log, seeing_log, strict=True):
            assert all(blind_line.get(part) == seeing_line.get(part) for part in LOGGED)
        blind, seeing = answers(made[False], key), answers(made[True], key)
        assert seeing.keys() - blind.keys() == {"oracle", "oracle_labels"}
        assert all(np.array_equal(blind[part], seeing[part]) for part in blind)
        assert lines(made[False])[name]["selection"] == lines(made[True])[name]["selection"]
    assert "racle" not in (made[False] / "table.md").read_text()
    assert "chosen on the test images" in (made[True] / "table.md").read_text()


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


def test_an_oracle_of_all_places_or_none(
    made: dict[bool, Path], base: dict[str, Any], tmp_path: Path
) -> None:
    """A cell that was stopped keeps its oracle; where places passed unseen, before the flag was given, it has none."""
    key, whole = "plain-sketch-0", lines(made[True])["plain"]
    words = base | {"recipe_settings": PLAIN}
    for first in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            # The checkpoint is older, so some places come twice.
            after_step(9, patch, raised(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                edgekd.study("plain=erm", out=tmp_path / str(first), oracle=first, **words)
        study = edgekd.study("plain=erm", out=tmp_path / str(first), oracle=True, **words)
        found = answers(tmp_path / str(first), key)
        if first:
            again = lines(tmp_path / "True")["plain"]
            assert all(again[name] == whole[name] for name in ("oracle_places", "oracle_step"))
            assert np.array_equal(found["oracle"], answers(made[True], key)["oracle"])
        else:
            assert "oracle" not in found
            assert ("sketch", "oracle") not in study.tables[0].rows[-1].columns
    # Cells that were finished without the flag have gaps in the table.
    words |= {"out": tmp_path / "False"}
    study = edgekd.study("plain=erm,erm", oracle=True, **words)
    assert study.tables[0].measures == ("ood", "oracle")
    gap, other = study.tables[0].rows[-2:]
    assert gap.oracle is None
    assert other.oracle.mean == other.columns["sketch", "oracle"].mean
    assert "oracle" not in edgekd.study("plain=erm,erm", **words).tables[0].measures


@pytest.mark.slow
def test_two_processes_of_one_run_watch_once(base: dict[str, Any], tmp_path: Path) -> None:
    edgekd.study("erm", out=tmp_path / "s", oracle=True, settings=["devices=2"], **base)
    assert lines(tmp_path / "s")["erm"]["oracle_places"] > 5
