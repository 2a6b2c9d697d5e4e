from __future__ import annotations

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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

ANIMALS = ("ant", "bee", "cat", "dog")

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


def test_a_cell_holds_what_its_run_answers(made: Path, base: dict[str, Any]) -> None:
    found = lines(made)
    assert {tuple(line["cell"].values())[:3] for line in found} == set(
        itertools.product(("erm", "vl2v-adip"), (0, 1), ("art", "sketch"))
    )
    assert len(list((made / "cells").glob("*.npz"))) == len(found) == 8
    for line in found:
        assert line["scores"]["ood"]["n"] == 20  # all images of the unseen domain
        assert line["scores"]["id"]["n"] == 4  # a tenth of two domains with two classes of ten
    loaded = load_run(made / "runs" / "vl2v-adip-art-1")
    assert (loaded.run.test_domain, loaded.run.seed) == ("art", 1)
    images = load_images(base["data"])
    unseen = np.flatnonzero(images.domain_of == images.domains.index("art"))
    predict = student_predict(loaded.student, loaded.vectors)
    scores = predict_all(predict, images, unseen, loaded.run.preprocess)
    kept = answers(made, "vl2v-adip-art-1")
    assert np.array_equal(kept["ood"], scores.argmax(axis=1) == images.labels[unseen])
    assert np.array_equal(kept["ood_labels"], images.labels[unseen])


def test_the_tables_say_the_same_in_every_form(made: Path) -> None:
    text = (made / "table.md").read_text()
    _, _, teacher, erm, adip = [line for line in text.splitlines() if line.startswith("|")]
    assert "±" not in teacher
    assert erm.count(" ± ") == adip.count(" ± ") == 4
    assert all(line["split"] in text for line in lines(made))
    with open(made / "table.csv") as handle:
        rows = list(csv.DictReader(handle))
    numbers = {(row["recipe"], row["column"], row["measure"]): row for row in rows}
    own = [line["scores"]["ood"]["top1"] for line in lines(made) if line["cell"]["recipe"] == "erm"]
    average = numbers["erm", "average", "ood"]
    assert float(average["value"]) == pytest.approx(np.mean(own))
    assert f"{float(average['value']):.1f} ± {float(average['standard_error']):.1f}" in erm
    assert (made / "table.png").is_file()


def test_a_finished_study_trains_nothing_and_may_grow(
    made: Path, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"seeds": 2, "test_domains": "art,sketch"} | base
    with monkeypatch.context() as patch:
        patch.setattr(cells, "train", lambda *_: pytest.fail("trained again"))
        again = edgekd.study("erm,vl2v-adip", out=made, **words | {"test_domains": "art"})
        assert not again.failures
        assert again.tables[0].columns == ("art",)
    with pytest.raises(EdgekdError, match=r"erm\.steps was 2, is 3"):
        edgekd.study("erm", out=made, **(words | {"steps": 3}))

    # Without the lines of two cells these are not finished: one run is another cell's, one holds the user's notes.
    folder = Path(shutil.copytree(made, tmp_path / "s"))
    gone = [["erm", 1, "art"], ["erm", 1, "sketch"]]
    kept = [line for line in lines(made) if list(line["cell"].values())[:3] not in gone]
    assert len(kept) == 6
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(folder / "runs" / "erm-art-1")
    shutil.copytree(folder / "runs" / "erm-art-0", folder / "runs" / "erm-art-1")
    (folder / "runs" / "erm-sketch-1" / "notes.txt").write_text("mine")
    study = edgekd.study("erm,vl2v-adip", out=folder, **words)
    assert [failure.cell.key for failure in study.failures] == ["erm-art-1"]
    assert "setting seed differs" in study.failures[0].reason
    assert [path.name for path in (folder / "runs" / "erm-sketch-1").iterdir()] == ["notes.txt"]

    # Outcomes on other images make no table.
    arrays = answers(made, "erm-art-0")
    for damage in (
        {name: arrays[name][3:] for name in ("ood", "ood_labels")},
        {name: arrays[name][:0] for name in ("ood", "ood_labels")},
        {"ood_labels": np.zeros_like(arrays["ood_labels"])},
    ):
        np.savez(folder / "cells" / "erm-art-0.npz", **(arrays | damage))
        with pytest.raises(EdgekdError, match="erm-art-0"):
            edgekd.study("erm,vl2v-adip", out=folder, **words)


def test_a_killed_cell_resumes_and_the_study_goes_on_in_parts(
    made: Path, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"seeds": 2, "test_domains": "art", "out": tmp_path / "s", **base}
    with pytest.MonkeyPatch.context() as patch:
        after_step(1, patch, raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            edgekd.study("erm", **words)
    for part, expected in (("2/2", 1), ("1/2", 2)):
        study = edgekd.study("erm", part=part, **words)
        assert not study.tables
        assert len(lines(tmp_path / "s")) == expected
    assert not (tmp_path / "s" / "table.md").exists()
    for seed in (0, 1):
        now, whole = (answers(folder, f"erm-art-{seed}") for folder in (tmp_path / "s", made))
        assert np.array_equal(now["ood"], whole["ood"])
        assert np.array_equal(now["id"], whole["id"])
    with monkeypatch.context() as patch:
        patch.setattr("edgekd.studies.study.run_cell", None)  # nothing is left to train
        assert [row.name for row in edgekd.study("erm", **words).tables[0].rows][-1] == "erm"
    for part in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(EdgekdError):
            edgekd.study("erm", part=part, **words)
    # One recipe may run twice under two names.
    words |= {"seeds": 1, "recipe_settings": ["longer:steps=3"]}
    study = edgekd.study("erm,longer=erm", **words)
    assert [row.name for row in study.tables[0].rows] == ["erm", "longer"]
    last = lines(tmp_path / "s")[-1]
    assert (last["cell"]["recipe"], last["steps"]) == ("longer", 3)
    with pytest.raises(EdgekdError, match=r"longer\.recipe was .*erm.*, is .*lp-ft"):
        edgekd.study("erm,longer=lp-ft", **words)


@pytest.mark.slow
def test_side_by_side_gives_the_same_cells(
    made: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    edgekd.study("erm", seeds=2, test_domains="art", out=tmp_path / "s", jobs=2, **base)
    for key in ("erm-art-0", "erm-art-1"):
        assert np.array_equal(answers(tmp_path / "s", key)["ood"], answers(made, key)["ood"])


def test_a_failed_cell_leaves_the_others_and_the_study_goes_on(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cells.train

    def flaky(config: Any, watch: Any) -> Any:
        if config.out.name == "erm-sketch-1":
            raise EdgekdError("The disk burnt.", "Buy one.")
        if config.out.name == "erm-sketch-2":
            raise MemoryError("no more")
        return real(config, watch)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "train", flaky)
        study = edgekd.study("erm", seeds=3, test_domains="sketch", out=tmp_path / "s", **base)
    failures = {failure.cell.seed: failure.reason for failure in study.failures}
    assert failures == {1: "The disk burnt. Buy one.", 2: "MemoryError: no more"}
    (row,) = study.tables[0].rows
    assert row.average.seeds == 1
    study = edgekd.study("erm", seeds=3, test_domains="sketch", out=tmp_path / "s", **base)
    assert not study.failures
    assert [line["cell"]["seed"] for line in lines(tmp_path / "s")] == [0, 1, 2]
    assert not list((tmp_path / "s" / "runs").iterdir())  # without keep


def test_processes_that_die_are_failures_with_their_last_words(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = "import os; os.kill(os.getpid(), 9)"
    programs = iter([kill, "import sys; print('error: No luck.'); sys.exit(2)"])
    seen = []

    def start(words: Any, log: Path, environment: dict[str, str]) -> Any:
        seen.append(environment["OMP_NUM_THREADS"])
        command = [sys.executable, "-c", next(programs)]
        with open(log, "wb") as handle:
            return subprocess.Popen(command, stdout=handle, stderr=handle)

    monkeypatch.setattr(studies, "_start", start)
    monkeypatch.setattr(studies, "usable_cores", lambda: 8)
    with pytest.raises(EdgekdError, match="None of the 2 cells finished") as caught:
        edgekd.study("erm", seeds=2, test_domains="art", out=tmp_path / "s", jobs=2, **base)
    assert "killed by signal 9" in str(caught.value) or "No luck." in str(caught.value)
    assert seen == ["4", "4"]


FOUR = {"data": "four"}
CLASS_DISJOINT, K_SHOT = {"protocol": "class-disjoint"} | FOUR, {"protocol": "k-shot"} | FOUR


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"recipes": "erm,vl2v-adp"}, r'no recipe "vl2v-adp"\. Did you mean "vl2v-adip"'),
        ({"recipes": "erm,kd=erm"}, r'name "kd" is already used'),
        ({"recipes": "a=erm,a=kd"}, r'name "a" is already used'),
        ({"recipes": "../a=erm"}, "not a valid row name"),
        ({"recipes": "r-b=erm,r=kd", "data": "b-art"}, "r-b-art-0"),
        ({"test_domains": "scetch"}, r'no domain "scetch"'),
        ({"seeds": 0}, r"seeds is invalid.* 1"),
        ({"jobs": 0}, r"jobs is invalid.* 1"),
        ({"protocol": "loco"}, r'no protocol "loco"'),
        ({"baseline": "kd"}, r'baseline "kd" is not among'),
        ({"test_domain": "sketch"}, "sets test_domain itself"),
        ({"settings": ["seed=4"]}, "sets seed itself"),
        ({"recipe_settings": ["kd:lr=1"]}, r'no recipe "kd"'),
        ({"recipe_settings": ["lr=1"]}, "not a setting of a recipe"),
        ({"student": "mobilnetv3"}, "mobilnetv3"),
        ({"unseen_classes": "dog"}, "Use --protocol class-disjoint"),
        (CLASS_DISJOINT | {"test_domains": "art"}, "Use --protocol lodo"),
        (CLASS_DISJOINT | {"unseen_classes": "dok"}, r'no class "dok"'),
        ({"protocol": "class-disjoint", "unseen_classes": "dog"}, "1 of 2 classes are unseen, and training needs two"),
        (CLASS_DISJOINT | {"oracle": True}, r"class-disjoint takes no oracle\. .*low-shot"),
        ({"protocol": "low-shot", "fractions": "0"}, "0 is not a fraction of the labels"),
        ({"protocol": "low-shot", "fractions": "few"}, "not a list of numbers"),
        ({"fractions": "0.1"}, "lodo takes no fractions"),
        (FOUR | {"shots": "4"}, "lodo takes no shots"),
        (K_SHOT | {"shots": "1.5"}, "1.5 is not a number of images"),
        (K_SHOT | {"shots": "1,6"}, r'For 6 shots, the class "\w+" has too few different images \(6\)'),
        ({"data": "flat"}, "no domains, so none can be left out"),
        ({"data": "gap", "test_domains": "sketch"}, "No training image is left when sketch is left out .*dog"),
        ({"protocol": "adapt", "adapt_images": [21]}, "fewer than 21"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_sentence(
    words: dict[str, Any], message: str, base: dict[str, Any], tmp_path: Path
) -> None:
    data = words.get("data")
    if data == "four":
        words = words | {"data": draw_domains(tmp_path / "d", ANIMALS, count=2)}
    elif data == "flat":
        words = words | {"data": Path(base["data"]) / "art"}
    elif data:
        words = words | {"data": draw_domains(tmp_path / "d", count=4)}
        if data == "b-art":
            (tmp_path / "d" / "photo").rename(tmp_path / "d" / "b-art")
        else:
            for domain in ("art", "photo"):
                (tmp_path / "d" / domain / "dog").rename(tmp_path / "d" / domain / "cow")
    with pytest.raises(EdgekdError, match=message):
        edgekd.study(**({"recipes": "erm", "out": tmp_path / "s", "seeds": 1} | base | words))
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    """Settings of a study of four classes, of which two are unseen."""
    data = draw_domains(tmp_path_factory.mktemp("animals") / "d", ANIMALS, count=4)
    more = {"seeds": 1, "unseen_classes": "bee,dog", "keep": True}
    return tiny_settings(data, tiny_teacher) | more


def test_unseen_classes_are_named_by_their_texts(animals: dict[str, Any], tmp_path: Path) -> None:
    """A command, which gives another answer each time, describes them once for all runs."""
    (tmp_path / "ask.py").write_text(
        "import sys; log = open(sys.argv[1], 'a+'); log.write('x'); log.seek(0); print('Answer', len(log.read()), '.')"
    )
    command = f"command:{sys.executable} {tmp_path / 'ask.py'} {tmp_path / 'log'}"
    folder = tmp_path / "s"
    words = animals | {"protocol": "class-disjoint", "out": folder}
    words |= {
        "recipe_settings": [f"{name}:descriptions={command}" for name in ("vlm-ood", "vl2v-adip")]
    }
    study = edgekd.study("erm,vlm-ood,vl2v-adip", **words)
    (table,) = study.tables
    teacher, erm, _, adip = table.rows
    assert table.baseline == "vlm-ood"  # the first that can name new classes
    assert (erm.average, teacher.average is None) == (None, False)
    assert "| erm | " in (folder / "table.md").read_text()
    loaded = load_run(folder / "runs" / "vl2v-adip-0")
    assert (loaded.run.classes, loaded.run.test_domain) == (("ant", "cat"), None)

    edgekd.study("erm,vlm-ood,vl2v-adip", **words | {"seeds": 2})
    assert len((tmp_path / "log").read_text()) == 4  # once for each class
    (path,) = folder.glob("descriptions-*.json")
    told = json.loads(path.read_text())
    assert {sentence for (sentence,) in told.values()} == {f"Answer {n} ." for n in range(1, 5)}
    for run in ("vlm-ood-0", "vl2v-adip-0", "vlm-ood-1"):
        kept = json.loads((folder / "runs" / run / "descriptions.json").read_text())
        assert kept == {name: told[name] for name in ("ant", "cat")}
    model, images = load_teacher(animals["teacher"]), load_images(animals["data"])
    bank = model.text_bank(images.classes, ("a photo of a {}",), told)
    predict = teacher_predict(model, bank)
    expected = predict_all(predict, images, np.arange(len(images)), model.preprocess)
    new = np.array([images.classes.index(name) for name in ("bee", "dog")])
    tested = np.isin(images.labels, new)
    named = new[expected[tested][:, new].argmax(axis=1)] == images.labels[tested]
    assert teacher.columns["", "ood"].mean == pytest.approx(100 * named.mean())

    # By hand: projected features against the teacher's two new texts, less what the classes share if it is centred.
    texts = model.text_bank(("bee", "dog"), loaded.bank.templates, told).vectors
    if loaded.bank.text_centre is not None:
        texts = torch.nn.functional.normalize(texts - loaded.bank.text_centre, dim=-1)
    unseen = [i for i, name in enumerate(images.ids) if "/bee/" in name or "/dog/" in name]
    pixels = np.stack([loaded.run.preprocess.pixels(images.read(i)) for i in unseen])
    with torch.inference_mode():
        scores = loaded.student(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255) @ texts.T
    right = scores.argmax(dim=1).numpy() == ["/dog/" in images.ids[i] for i in unseen]
    found = answers(folder, "vl2v-adip-0")
    assert np.array_equal(found["ood"], right)
    assert found["id"].shape == (2 * 3,)  # one image of each of 2 classes and 3 domains
    recalls = [found["ood"][found["ood_labels"] == label].mean() for label in (0, 1)]
    assert adip.average.mean == pytest.approx(100 * np.mean(recalls))
    seen, split = loaded.data()
    assert not {images.keys[i] for i in unseen} & {seen.keys[i] for i in split.train}
    (suite, _) = suites_of(loaded, None, None)
    assert suite.images.classes == ("ant", "cat")


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
    animals: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trained = tmp_path / "s", []
    real = cells.train
    monkeypatch.setattr(
        cells, "train", lambda config, _: (trained.append(config.out.name), real(config))[1]
    )
    words = animals | {"protocol": "k-shot", "out": folder, "steps": 5}
    study = edgekd.study("erm,vl2v-adip", shots="4,1", **words)
    assert [table.title.partition(" image")[0] for table in study.tables] == ["1", "4"]
    # One run on the seen classes for both numbers of images, then a fine-tuning each.
    assert sorted(trained) == sorted(
        f"{recipe}-{part}0" for recipe in ("erm", "vl2v-adip") for part in ("", "1shot-", "4shot-")
    )
    tuned = load_run(folder / "runs" / "vl2v-adip-4shot-0")
    assert (tuned.run.classes, tuned.run.steps) == (ANIMALS, 1)
    assert tuned.config.start == folder / "runs" / "vl2v-adip-0"
    whole = load_images(animals["data"])
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
    recalls = [correct[labels == label].mean() for label in (0, 1)]
    assert erm.columns["", "ood"].mean == pytest.approx(100 * np.mean(recalls))
    teacher = study.tables[1].rows[0]
    assert set(teacher.columns) == {("", "id"), ("", "zero_shot")}
    assert "| unseen retrieval | by teacher's keys |" in (folder / "table.md").read_text()
    # The run that is there answers the same from the command.
    rows = edgekd.evaluate(folder / "runs" / "vl2v-adip-0", shots=4)
    by_teacher = edgekd.evaluate(folder / "runs" / "vl2v-adip-0", shots=4, keys="teacher")
    found = answers(folder, "vl2v-adip-4shot-0")
    for told, subject, measure in (
        (rows, "zero-shot", "zero_shot"), (rows, "retrieval", "retrieval"),
        (by_teacher, "retrieval", "retrieval_teacher"),
    ):  # fmt: skip
        own = [row for row in told if row["subject"] == subject]
        assert sum(row["n"] for row in own) == len(found[measure])
        assert sum(row["n"] * row["top1"] for row in own) == pytest.approx(found[measure].sum())
    for run, shots, keys, sentence in (
        ("vl2v-adip-0", None, "teacher", "--shots"),
        ("erm-0", 4, "teacher", "has no text head"),
        ("erm-0", 4, "teahcer", "There is no keys"),
        ("vl2v-adip-4shot-0", 1, None, "trained on the class bee"),
    ):
        given = {"shots": shots, "keys": keys}
        with pytest.raises(EdgekdError, match=sentence):
            edgekd.evaluate(folder / "runs" / run, **{k: v for k, v in given.items() if v})
    loaded = load_run(folder / "runs" / "vl2v-adip-0")
    keys_of(loaded, whole, take_shots(whole, ("bee", "dog"), 4, 0))
    # Nothing is kept when nothing is asked to be.
    edgekd.study("erm,vl2v-adip", shots="1", **words | {"keep": False})
    assert not {"erm-0", "vl2v-adip-0"} & {path.name for path in (folder / "runs").iterdir()}


def keys_of(loaded: LoadedRun, whole: ImageSet, shots: np.ndarray) -> None:
    """The first copies are the plain images, the others vary about them; all as the student is to match them."""
    keys = teacher_keys(loaded, whole, shots).reshape(10, len(shots), -1)
    model = load_teacher(loaded.config.teacher)
    size, unit = model.preprocess.size, torch.nn.functional.normalize

    def centred(views: torch.Tensor) -> torch.Tensor:
        return unit(unit(model.embed_images(views), dim=-1) - loaded.bank.image_centre, dim=-1)

    pixels = np.stack([model.preprocess.pixels(whole.read(i)) for i in shots])
    plain = centred(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert torch.allclose(keys[0], plain, atol=1e-4)
    for copy, place in ((1, 0), (9, 5)):
        stored = torch.from_numpy(squashed(whole, int(shots[place]), store_side(size)).copy())
        params = view_params([whole.keys[shots[place]]], [copy - 1], ViewPolicy())
        [expected] = centred(render(stored[None], params, size))
        assert torch.allclose(keys[copy, place], expected, atol=1e-4)
        assert not torch.allclose(keys[copy, place], keys[0, place], atol=1e-4)


def test_a_curve_over_unlabelled_images_of_a_new_domain(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"protocol": "adapt", "seeds": 1, "test_domains": "sketch", "keep": True} | base
    study = edgekd.study(
        "erm,pseudo-label,kd", adapt_images=[4, 8, 99], out=tmp_path / "s", **words
    )
    assert "left out: 99" in " ".join(capsys.readouterr().err.split())
    assert [table.title.partition(" unlabelled")[0] for table in study.tables] == ["4", "8"]
    for table in study.tables:
        rows = {row.name: row for row in table.rows}
        assert list(rows) == ["teacher zero-shot", "erm", "pseudo-label", "kd"]
        assert table.names["ood"] == "adapted"
    # Five trainings: the baseline reads no unlabelled image and is trained once.
    assert len(lines(tmp_path / "s")) == 5
    first, second = ({row.name: row for row in table.rows}["erm"] for table in study.tables)
    assert first.average == second.average
    four, eight = (
        load_run(tmp_path / "s" / "runs" / f"kd-sketch-{n}unlabelled-0").data()[1] for n in (4, 8)
    )
    assert len(four.unlabelled) == 4
    assert set(four.unlabelled.values()) < set(eight.unlabelled.values())
    assert four.entries["ood_test"] == eight.entries["ood_test"]
    assert len(four.ood_test) == 10
    assert not set(eight.unlabelled.values()) & set(eight.entries["ood_test"].values())
