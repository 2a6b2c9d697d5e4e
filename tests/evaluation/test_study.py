from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from study_data import after_step, answers, draw_domains, json_lines, raised, tiny_settings

import edgekd
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import take_shots, unseen_test
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.distill.classification.predict import predict_all, student_predict, teacher_predict
from edgekd.distill.inputs.batches import squashed, store_side
from edgekd.distill.inputs.views import ViewPolicy, render, view_params
from edgekd.distill.models.teachers import load_teacher
from edgekd.evaluation.few_shot import teacher_keys
from edgekd.evaluation.gather import suites_of
from edgekd.studies import cell as cells
from edgekd.studies import study as studies

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    return tiny_settings(draw_domains(tmp_path_factory.mktemp("data") / "domains"), tiny_teacher)


@pytest.fixture(scope="module")
def made(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two recipes, two unseen domains and two seeds, with its run folders."""
    folder = tmp_path_factory.mktemp("studies") / "whole"
    edgekd.study("erm,vl2v-adip", seeds=2, test_domains="art,sketch", out=folder, keep=True, **base)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "cells.jsonl")


def test_every_cell_is_a_line_and_an_array(made: Path) -> None:
    found = lines(made)
    assert {
        (line["cell"]["recipe"], line["cell"]["domain"], line["cell"]["seed"]) for line in found
    } == {
        (recipe, domain, seed)
        for recipe in ("erm", "vl2v-adip")
        for domain in ("art", "sketch")
        for seed in (0, 1)
    }
    assert len(list((made / "cells").glob("*.npz"))) == len(found) == 8
    for line in found:
        assert line["scores"]["ood"]["n"] == 20  # all images of the unseen domain
        assert line["scores"]["id"]["n"] == 4  # a tenth of two domains with two classes of ten


def test_a_cell_holds_what_its_run_answers(made: Path, base: dict[str, Any]) -> None:
    loaded = load_run(made / "runs" / "vl2v-adip-art-1")
    assert (loaded.run.test_domain, loaded.run.seed) == ("art", 1)
    images = load_images(base["data"])
    unseen = np.flatnonzero(images.domain_of == images.domains.index("art"))
    scores = predict_all(
        student_predict(loaded.student, loaded.vectors), images, unseen, loaded.run.preprocess
    )
    found = answers(made, "vl2v-adip-art-1")
    assert np.array_equal(found["ood"], scores.argmax(axis=1) == images.labels[unseen])
    assert np.array_equal(found["ood_labels"], images.labels[unseen])


def test_the_tables_say_the_same_in_every_form(made: Path) -> None:
    text = (made / "table.md").read_text()
    header, _, teacher, erm, adip = [line for line in text.splitlines() if line.startswith("|")]
    columns = (
        "ID avg | OOD art | OOD sketch | OOD avg | − erm | over seeds | over images | s per run"
    )
    assert header == f"|  | {columns} |"
    assert teacher.startswith("| teacher zero-shot | ")
    assert "±" not in teacher
    assert erm.count(" ± ") == adip.count(" ± ") == 4
    splits = {line["split"] for line in lines(made)}
    for word in ("last EMA 0.99", "seeds 0, 1", "2 steps of 8 images at 32 px", *splits):
        assert word in text
    with open(made / "table.csv") as handle:
        rows = list(csv.DictReader(handle))
    numbers = {(row["recipe"], row["column"], row["measure"]): row for row in rows}
    own = [line["scores"]["ood"]["top1"] for line in lines(made) if line["cell"]["recipe"] == "erm"]
    average = numbers["erm", "average", "ood"]
    assert float(average["value"]) == pytest.approx(np.mean(own))
    assert f"{float(average['value']):.1f} ± {float(average['standard_error']):.1f}" in erm
    with Image.open(made / "table.png") as picture:
        assert picture.size[0] > 900


def test_a_finished_study_trains_nothing_and_may_grow(
    made: Path, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "train", lambda *_: pytest.fail("trained again"))
    again = edgekd.study("erm,vl2v-adip", seeds=2, test_domains="art", out=made, **base)
    assert not again.failures
    assert again.tables[0].columns == ("art",)
    with pytest.raises(EdgekdError, match=r"erm\.steps was 2, is 3"):
        edgekd.study("erm", seeds=1, out=made, **(base | {"steps": 3}))


def test_a_failed_cell_leaves_the_others_and_the_study_goes_on(
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []
    real = cells.train

    def flaky(config: Any, watch: Any) -> Any:
        started.append(config.out.name)
        if config.out.name == "erm-sketch-1":
            raise EdgekdError("The disk burnt.", "Buy one.")
        if config.out.name == "erm-sketch-2":
            raise MemoryError("no more")
        return real(config, watch)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "train", flaky)
        study = edgekd.study("erm", seeds=3, test_domains="sketch", out=tmp_path / "s", **base)
    assert [failure.cell.seed for failure in study.failures] == [1, 2]
    assert study.failures[0].reason == "The disk burnt. Buy one."
    assert study.failures[1].reason == "MemoryError: no more"
    (row,) = study.tables[0].rows
    assert row.average.seeds == 1
    study = edgekd.study("erm", seeds=3, test_domains="sketch", out=tmp_path / "s", **base)
    assert not study.failures
    assert [line["cell"]["seed"] for line in lines(tmp_path / "s")] == [0, 1, 2]
    assert not list((tmp_path / "s" / "runs").iterdir())  # without keep


def without_a_line(made: Path, folder: Path, key: str) -> Path:
    """Copy a study without the line of one cell, which then is not finished."""
    shutil.copytree(made, folder)
    kept = [
        line for line in lines(made) if key != "-".join(map(str, list(line["cell"].values())[:3]))
    ]
    assert len(kept) == 7
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


@pytest.mark.parametrize("damage", ["fewer images", "other images", "no images"])
def test_outcomes_on_other_images_make_no_table(
    made: Path, base: dict[str, Any], tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made, folder)
    arrays = answers(folder, "erm-art-0")
    if damage == "other images":
        arrays["ood_labels"] = np.zeros_like(arrays["ood_labels"])
    else:
        kept = slice(3 if damage == "fewer images" else 0)
        arrays |= {name: arrays[name][kept] for name in ("ood", "ood_labels")}
    np.savez(folder / "cells" / "erm-art-0.npz", **arrays)
    with pytest.raises(EdgekdError, match="erm-art-0"):
        edgekd.study("erm,vl2v-adip", seeds=2, test_domains="art,sketch", out=folder, **base)


def test_a_run_of_another_cell_is_not_taken_for_this_one(
    made: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = without_a_line(made, tmp_path / "s", "erm-1-art")
    shutil.rmtree(folder / "runs" / "erm-art-1")
    shutil.copytree(folder / "runs" / "erm-art-0", folder / "runs" / "erm-art-1")
    study = edgekd.study("erm,vl2v-adip", seeds=2, test_domains="art,sketch", out=folder, **base)
    assert [failure.cell.key for failure in study.failures] == ["erm-art-1"]
    assert "another seed" in study.failures[0].reason


def test_what_the_user_put_into_a_cells_run_stays(
    made: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = without_a_line(made, tmp_path / "s", "erm-1-art")
    (folder / "runs" / "erm-art-1" / "notes.txt").write_text("mine")
    edgekd.study("erm,vl2v-adip", seeds=2, test_domains="art,sketch", out=folder, **base)
    assert [path.name for path in (folder / "runs" / "erm-art-1").iterdir()] == ["notes.txt"]


def test_names_that_give_one_folder_are_refused(base: dict[str, Any], tmp_path: Path) -> None:
    data = draw_domains(tmp_path / "domains")
    (data / "photo").rename(data / "b-art")
    with pytest.raises(EdgekdError, match="r-b-art-0"):
        edgekd.study("r-b=erm,r=kd", seeds=1, out=tmp_path / "s", **(base | {"data": data}))


def test_a_killed_cell_resumes_to_the_same_answers(
    made: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    words: dict[str, Any] = {"seeds": 1, "test_domains": "art", "out": tmp_path / "s", **base}
    with pytest.MonkeyPatch.context() as patch:
        after_step(1, patch, raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            edgekd.study("erm", **words)
    edgekd.study("erm", **words)
    now, whole = (answers(folder, "erm-art-0") for folder in (tmp_path / "s", made))
    assert np.array_equal(now["ood"], whole["ood"])
    assert np.array_equal(now["id"], whole["id"])


@pytest.mark.slow
def test_side_by_side_gives_the_same_cells(
    made: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    edgekd.study("erm", seeds=2, test_domains="art", out=tmp_path / "s", jobs=2, **base)
    for seed in (0, 1):
        now, whole = (answers(folder, f"erm-art-{seed}") for folder in (tmp_path / "s", made))
        assert np.array_equal(now["ood"], whole["ood"])


def test_parts_make_up_the_study(base: dict[str, Any], tmp_path: Path) -> None:
    words = {"seeds": 3, "test_domains": "art", "out": tmp_path / "s", **base}
    for part, expected in (("2/2", 1), ("1/2", 3)):
        study = edgekd.study("erm", part=part, **words)
        assert not study.tables
        assert len((tmp_path / "s" / "cells.jsonl").read_text().splitlines()) == expected
    assert not (tmp_path / "s" / "table.md").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekd.studies.study.run_cell", None)  # nothing is left to train
        whole = edgekd.study("erm", **words)
    assert [row.name for row in whole.tables[0].rows][-1] == "erm"
    for part in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(EdgekdError):
            edgekd.study("erm", part=part, **words)


def test_processes_that_die_are_failures_with_their_last_words(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = iter(
        ["import os; os.kill(os.getpid(), 9)", "import sys; print('error: No luck.'); sys.exit(2)"]
    )
    seen = []

    def start(words: Any, log: Path, environment: dict[str, str]) -> Any:
        seen.append(environment["OMP_NUM_THREADS"])
        with open(log, "wb") as handle:
            return subprocess.Popen(
                [sys.executable, "-c", next(programs)], stdout=handle, stderr=handle
            )

    monkeypatch.setattr(studies, "_start", start)
    monkeypatch.setattr(studies, "usable_cores", lambda: 8)
    with pytest.raises(EdgekdError, match="None of the 2 cells finished") as caught:
        edgekd.study("erm", seeds=2, test_domains="art", out=tmp_path / "s", jobs=2, **base)
    assert "killed by signal 9" in str(caught.value) or "No luck." in str(caught.value)
    assert seen == ["4", "4"]


CLASS_DISJOINT, K_SHOT = {"protocol": "class-disjoint"}, {"protocol": "k-shot"}

FOUR = {"data": "four"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"recipes": "erm,vl2v-adp"}, r'no recipe "vl2v-adp"\. Did you mean "vl2v-adip"'),
        ({"recipes": ""}, "recipes is empty"),
        ({"recipes": "erm,kd=erm"}, r'name "kd" is taken'),
        ({"recipes": "a=erm,a=kd"}, r'name "a" is taken'),
        ({"recipes": "../a=erm"}, "cannot name a row"),
        ({"test_domains": "scetch"}, r'no domain "scetch"\. Did you mean "sketch"'),
        ({"seeds": 0}, "seeds is invalid.* 1"),
        ({"jobs": 0}, "jobs is invalid.* 1"),
        ({"protocol": "loco"}, r'no protocol "loco"\. Did you mean "lodo"'),
        ({"baseline": "kd"}, r'baseline "kd" is not among'),
        ({"test_domain": "sketch"}, "sets test_domain itself"),
        ({"settings": ["seed=4"]}, "sets seed itself"),
        ({"recipe_settings": ["kd:lr=1"]}, r'no recipe "kd"'),
        ({"recipe_settings": ["lr=1"]}, "not a setting of one recipe"),
        ({"student": "mobilnetv3"}, "mobilnetv3"),
        ({"unseen_classes": "dog"}, "Use --protocol class-disjoint"),
        (CLASS_DISJOINT | {"test_domains": "art"}, "Use --protocol lodo"),
        (CLASS_DISJOINT | {"unseen_classes": "dok"}, r'no class "dok"\. Did you mean "dog"'),
        (CLASS_DISJOINT | {"unseen_classes": "dog"}, "1 of 2 classes are unseen, and two must"),
        (CLASS_DISJOINT | FOUR | {"oracle": True}, r"class-disjoint takes no oracle\. .*low-shot"),
        ({"protocol": "low-shot", "fractions": "0"}, "0 is not a fraction of the labels"),
        ({"protocol": "low-shot", "fractions": "few"}, "not a list of numbers"),
        ({"fractions": "0.1"}, "lodo takes no fractions"),
        ({"step": 3}, r'unknown setting "step"'),
        (FOUR | {"shots": "4"}, "lodo takes no shots"),
        (K_SHOT | FOUR | {"shots": "0"}, "0 is not a number of images"),
        (K_SHOT | FOUR | {"shots": "1.5"}, "1.5 is not a number of images"),
        (K_SHOT | FOUR | {"shots": "1,6"}, r'6 images of the class "\w+" .* has 6 different'),
        ({"data": "flat"}, "no domains, so none can be left out"),
        ({"data": "flat", "protocol": "low-shot", "oracle": True}, "art has no domain to leave"),
        (
            {"data": "gap", "test_domains": "sketch"},
            "No training image is left when sketch is left out .*dog",
        ),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(
    words: dict[str, Any], message: str, base: dict[str, Any], tmp_path: Path
) -> None:
    if words.get("data") == "four":
        words = words | {
            "data": draw_domains(tmp_path / "d", ("ant", "bee", "cat", "dog"), count=2)
        }
    elif words.get("data") == "flat":
        words = words | {"data": Path(base["data"]) / "art"}
    elif words.get("data") == "gap":
        words = words | {"data": draw_domains(tmp_path / "d", count=4)}
        for domain in ("art", "photo"):
            (tmp_path / "d" / domain / "dog").rename(tmp_path / "d" / domain / "cow")
    with pytest.raises(EdgekdError, match=message):
        edgekd.study(**({"recipes": "erm", "out": tmp_path / "s"} | base | words))
    assert not (tmp_path / "s").exists()


def test_one_recipe_may_run_twice_under_two_names(base: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    words = {"seeds": 1, "test_domains": "art", "out": folder} | base
    edgekd.study("erm", **words)
    study = edgekd.study("erm,longer=erm", recipe_settings=["longer:steps=3"], **words)
    assert [row.name for row in study.tables[0].rows] == ["erm", "longer"]
    assert [(line["cell"]["recipe"], line["steps"]) for line in lines(folder)] == [
        ("erm", 2),
        ("longer", 3),
    ]
    with pytest.raises(EdgekdError, match=r"longer\.recipe was .*erm.*, is .*lp-ft"):
        edgekd.study("erm,longer=lp-ft", recipe_settings=["longer:steps=3"], **words)


def test_unseen_classes_are_named_by_their_texts(tiny_teacher: Path, tmp_path: Path) -> None:
    base = tiny_settings(
        draw_domains(tmp_path / "d", ("ant", "bee", "cat", "dog"), count=6), tiny_teacher
    )
    folder = tmp_path / "s"
    study = edgekd.study(
        "erm,vl2v-adip",
        protocol="class-disjoint",
        unseen_classes="bee,dog",
        seeds=1,
        out=folder,
        keep=True,
        **base,
    )
    (table,) = study.tables
    teacher, erm, adip = table.rows
    assert table.baseline == "vl2v-adip"  # the first that can name new classes
    assert erm.average is None
    assert "no zero-shot for erm" in table.notes[0]
    assert "| erm | " in (folder / "table.md").read_text()
    loaded = load_run(folder / "runs" / "vl2v-adip-0")
    assert loaded.run.classes == ("ant", "cat")
    assert loaded.run.test_domain is None
    # By hand: projected features against the teacher's two new texts, less what the classes share if it is centred.
    model = load_teacher(base["teacher"])
    texts = model.text_bank(("bee", "dog"), loaded.bank.templates).vectors
    if loaded.bank.text_centre is not None:
        texts = torch.nn.functional.normalize(texts - loaded.bank.text_centre, dim=-1)
    images = load_images(base["data"])
    unseen = [i for i, name in enumerate(images.ids) if "/bee/" in name or "/dog/" in name]
    pixels = np.stack([loaded.run.preprocess.pixels(images.read(i)) for i in unseen])
    with torch.inference_mode():
        told = (
            (loaded.student(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255) @ texts.T)
            .argmax(dim=1)
            .numpy()
        )
    truth = np.array(["/dog/" in images.ids[i] for i in unseen])
    found = answers(folder, "vl2v-adip-0")
    assert np.array_equal(found["ood"], told == truth)
    assert found["id"].shape == (12 // 6 * 3,)  # one image of each of 2 classes and 3 domains
    recalls = [(told == truth)[truth == side].mean() for side in (False, True)]
    assert adip.average.mean == pytest.approx(100 * np.mean(recalls))
    assert teacher.average is not None
    images_seen, split = loaded.data()
    assert not {images.keys[i] for i in unseen} & {images_seen.keys[i] for i in split.train}
    (suite, _) = suites_of(loaded, None, None)
    assert suite.images.classes == ("ant", "cat")


def test_a_command_describes_the_classes_once_for_all_runs(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """It gives another answer each time, as a language model does."""
    base = tiny_settings(
        draw_domains(tmp_path / "d", ("ant", "bee", "cat", "dog"), count=6), tiny_teacher
    )
    (tmp_path / "ask.py").write_text(
        "import sys; log = open(sys.argv[1], 'a+'); log.write('x'); log.seek(0); print('Answer', len(log.read()), '.')"
    )
    command = f"command:{sys.executable} {tmp_path / 'ask.py'} {tmp_path / 'log'}"
    words = base | {
        "protocol": "class-disjoint",
        "unseen_classes": "bee,dog",
        "seeds": 1,
        "out": tmp_path / "s",
    }
    words |= {
        "keep": True,
        "recipe_settings": [f"{name}:descriptions={command}" for name in ("vlm-ood", "vl2v-adip")],
    }
    study = edgekd.study("erm,vlm-ood,vl2v-adip", **words)
    edgekd.study("erm,vlm-ood,vl2v-adip", **words | {"seeds": 2})
    assert len((tmp_path / "log").read_text()) == 4  # once for each class
    (path,) = (tmp_path / "s").glob("descriptions-*.json")
    told = json.loads(path.read_text())
    assert {sentence for (sentence,) in told.values()} == {f"Answer {n} ." for n in range(1, 5)}
    for run in ("vlm-ood-0", "vl2v-adip-0", "vlm-ood-1"):
        kept = json.loads((tmp_path / "s" / "runs" / run / "descriptions.json").read_text())
        assert kept == {name: told[name] for name in ("ant", "cat")}
    (note,) = [note for note in study.tables[0].notes if note.startswith("Descriptions")]
    assert note.endswith("of: teacher zero-shot, vlm-ood, vl2v-adip.")
    model = load_teacher(base["teacher"])
    images = load_images(base["data"])
    bank = model.text_bank(images.classes, ("a photo of a {}",), told)
    predict, everything = teacher_predict(model, bank), np.arange(len(images))
    expected = predict_all(predict, images, everything, model.preprocess)
    unseen = np.array([images.classes.index(name) for name in ("bee", "dog")])
    tested = np.isin(images.labels, unseen)
    right = unseen[expected[tested][:, unseen].argmax(axis=1)] == images.labels[tested]
    (row,) = [row for row in study.tables[0].rows if row.name == "teacher zero-shot"]
    assert row.columns["", "ood"].mean == pytest.approx(100 * right.mean())


def test_few_labels_are_a_table_each(base: dict[str, Any], tmp_path: Path) -> None:
    words = base | {"protocol": "low-shot", "fractions": "1,0.1", "seeds": 1, "out": tmp_path / "s"}
    study = edgekd.study("erm", keep=True, **words)
    assert [table.title.split(" of")[0] for table in study.tables] == ["10 %", "100 %"]
    assert [table.columns for table in study.tables] == [("sketch",), ("sketch",)]
    few, whole = (
        load_run(tmp_path / "s" / "runs" / name).data()[1]
        for name in ("erm-sketch-0.1-0", "erm-sketch-0")
    )
    assert (len(few.train), len(whole.train)) == (4, 32)
    assert np.array_equal(few.ood_test, whole.ood_test)


def test_a_few_images_in_both_ways(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_settings(
        draw_domains(tmp_path / "d", ("ant", "bee", "cat", "dog"), count=4), tiny_teacher
    )
    folder, trained = tmp_path / "s", []
    real = cells.train
    monkeypatch.setattr(
        cells, "train", lambda config, _: (trained.append(config.out.name), real(config))[1]
    )
    words = base | {
        "protocol": "k-shot",
        "unseen_classes": "bee,dog",
        "seeds": 1,
        "out": folder,
        "steps": 5,
    }
    study = edgekd.study("erm,vl2v-adip", shots="4,1", keep=True, **words)
    assert [table.title for table in study.tables] == [
        "1 image of each unseen class",
        "4 images of each unseen class",
    ]
    # One run on the seen classes for both numbers of images, then a fine-tuning each.
    assert sorted(trained) == sorted(
        f"{recipe}-{part}0" for recipe in ("erm", "vl2v-adip") for part in ("", "1shot-", "4shot-")
    )
    tuned = load_run(folder / "runs" / "vl2v-adip-4shot-0")
    assert (tuned.run.classes, tuned.run.steps) == (("ant", "bee", "cat", "dog"), 1)
    assert tuned.config.start == folder / "runs" / "vl2v-adip-0"
    whole = load_images(base["data"])
    shown = {whole.keys[i] for i in take_shots(whole, ("bee", "dog"), 4, 0)}
    four, one = (answers(folder, f"erm-{shots}shot-0") for shots in (4, 1))
    assert set(four) == {
        f"{m}{s}" for m in ("id", "ood", "retrieval", "id_tuned") for s in ("", "_labels")
    }
    assert (len(four["ood"]), len(one["ood"])) == (24 - 8, 24 - 2)
    # The table of one image leaves out what the four have shown.
    alone = take_shots(whole, ("bee", "dog"), 1, 0)
    left = [i for i in unseen_test(whole, ("bee", "dog")) if i not in alone]
    common = np.array([whole.keys[i] not in shown for i in left])
    labels, correct = one["ood_labels"][common], one["ood"][common]
    erm = next(row for row in study.tables[0].rows if row.name == "erm")
    assert erm.columns["", "ood"].mean == pytest.approx(
        100 * np.mean([correct[labels == c].mean() for c in (0, 1)])
    )
    teacher = study.tables[1].rows[0]
    assert set(teacher.columns) == {("", "id"), ("", "zero_shot")}
    text = (folder / "table.md").read_text()
    shown = "| seen | unseen zero-shot | unseen retrieval | by teacher's keys | unseen fine-tuned | seen fine-tuned |"
    assert shown in text
    assert "fine-tuning 1 more" in text
    # The run that is there answers the same from the command.
    rows = edgekd.evaluate(folder / "runs" / "vl2v-adip-0", shots=4)
    by_teacher = edgekd.evaluate(folder / "runs" / "vl2v-adip-0", shots=4, keys="teacher")
    found = answers(folder, "vl2v-adip-4shot-0")
    for found_rows, subject, measure in (
        (rows, "zero-shot", "zero_shot"),
        (rows, "retrieval", "retrieval"),
        (by_teacher, "retrieval", "retrieval_teacher"),
    ):
        own = [row for row in found_rows if row["subject"] == subject]
        assert sum(row["n"] for row in own) == len(found[measure])
        assert sum(row["n"] * row["top1"] for row in own) == pytest.approx(found[measure].sum())
    with pytest.raises(EdgekdError, match="--shots"):
        edgekd.evaluate(folder / "runs" / "vl2v-adip-0", keys="teacher")
    for run, keys, sentence in (
        ("erm-0", "teacher", "has no text head"),
        ("erm-0", "teahcer", "There is no keys"),
    ):
        with pytest.raises(EdgekdError, match=sentence):
            edgekd.evaluate(folder / "runs" / run, shots=4, keys=keys)
    loaded = load_run(folder / "runs" / "vl2v-adip-0")
    keys_of(loaded, whole, take_shots(whole, ("bee", "dog"), 4, 0))
    with pytest.raises(EdgekdError, match="trained on the class bee"):
        edgekd.evaluate(folder / "runs" / "vl2v-adip-4shot-0", shots=1)
    # Nothing is kept when nothing is asked to be.
    edgekd.study("erm,vl2v-adip", shots="1", **words)
    assert not {"erm-0", "vl2v-adip-0"} & {path.name for path in (folder / "runs").iterdir()}


def keys_of(loaded: LoadedRun, whole: ImageSet, shots: np.ndarray) -> None:
    """The first copies are the plain images, the others vary about them; all as the student is to match them."""
    keys = teacher_keys(loaded, whole, shots).reshape(10, len(shots), -1)
    model = load_teacher(loaded.config.teacher)
    pixels = np.stack([model.preprocess.pixels(whole.read(i)) for i in shots])
    told = torch.nn.functional.normalize(
        model.embed_images(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255), dim=-1
    )
    expected = torch.nn.functional.normalize(told - loaded.bank.image_centre, dim=-1)
    assert torch.allclose(keys[0], expected, atol=1e-4)
    size = model.preprocess.size
    for copy, place in ((1, 0), (9, 5)):
        pixels = torch.from_numpy(squashed(whole, int(shots[place]), store_side(size)).copy())[None]
        view = render(
            pixels, view_params([whole.keys[shots[place]]], [copy - 1], ViewPolicy()), size
        )
        told = torch.nn.functional.normalize(model.embed_images(view)[0], dim=0)
        expected = torch.nn.functional.normalize(told - loaded.bank.image_centre, dim=0)
        assert torch.allclose(keys[copy, place], expected, atol=1e-4)
        assert not torch.allclose(keys[copy, place], keys[0, place], atol=1e-4)


def test_a_curve_over_unlabelled_images_of_a_new_domain(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = edgekd.study(
        "erm,pseudo-label,kd",
        protocol="adapt",
        seeds=1,
        test_domains="sketch",
        adapt_images=[4, 8, 99],
        keep=True,
        out=tmp_path / "s",
        **base,
    )
    assert "left out: 99" in " ".join(capsys.readouterr().err.split())
    assert [table.title for table in study.tables] == [
        "4 unlabelled images of the new domain",
        "8 unlabelled images of the new domain",
    ]
    for table in study.tables:
        rows = {row.name: row for row in table.rows}
        assert list(rows) == ["teacher zero-shot", "erm", "pseudo-label", "kd"]
        assert table.names["ood"] == "adapted"
    # Five trainings: the baseline reads no unlabelled image and is trained once.
    assert len(lines(tmp_path / "s")) == 5
    first, second = ({row.name: row for row in table.rows}["erm"] for table in study.tables)
    assert first.average == second.average
    four = load_run(tmp_path / "s" / "runs" / "kd-sketch-4unlabelled-0").data()[1]
    eight = load_run(tmp_path / "s" / "runs" / "kd-sketch-8unlabelled-0").data()[1]
    assert len(four.unlabelled) == 4
    assert set(four.unlabelled.values()) < set(eight.unlabelled.values())
    assert four.entries["ood_test"] == eight.entries["ood_test"]
    assert len(four.ood_test) == 10
    assert not set(eight.unlabelled.values()) & set(eight.entries["ood_test"].values())
    with pytest.raises(EdgekdError, match="fewer than 11"):
        edgekd.study("kd", protocol="adapt", adapt_images=[11], out=tmp_path / "t", **base)
