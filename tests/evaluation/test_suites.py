"""Suites of folders, splits and lone artifacts: what they hold, how they are named, what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import SHORT, fake_measurements, model, paint_images, subject
from PIL import Image

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.sources.layouts import LAYOUTS, known_layout
from edgekd.data.split import make_split
from edgekd.data.unlabelled import load_unlabelled
from edgekd.evaluation.class_names import spoken_as
from edgekd.evaluation.gather import further_suites, parts_of
from edgekd.evaluation.suites import (
    SuiteBuilder,
    clean_suite,
    corruption_suites,
    lone_suites,
    named_folders,
)
from edgekd.evaluation.trained_on import Trained, all_trained, read_trained, suite_kind

ANIMALS = ("cat", "dog", "fish", "horse")
PETS = ("cat", "dog")
NUMBERS = tuple(str(number) for number in range(1000))


def paint(root: Path, names: Iterable[str]) -> Path:
    """A differently coloured picture at each path."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        Image.new("RGB", (12, 12), colour).save(path)
    return root


def tree(domains: Iterable[str], classes: Iterable[str], count: int = 2) -> list[str]:
    chosen = list(classes)
    return [f"{d}/{c}/{i}.png" for d in domains for c in chosen for i in range(count)]


def folder(
    name: str, root: Path, classes: tuple[str, ...] = ANIMALS, trained: Trained | None = None
) -> list[Suite]:
    return SuiteBuilder(classes, trained or Trained()).folder(name, str(root))


def words(classes: tuple[str, ...]) -> ImageSet:
    return replace(paint_images(len(classes)), classes=classes)


def domains_of_paint() -> ImageSet:
    domain_of = np.repeat(np.arange(3), 40)
    return replace(paint_images(120), domains=("art", "photo", "sketch"), domain_of=domain_of)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_domainbed_layouts_are_known_one_folder_deeper(layout: Any, tmp_path: Path) -> None:
    root = paint(tmp_path / "data" / "wrapped", tree(layout.domains, ("dog", "horse")))
    (root / "README.txt").write_text("as it comes")
    suites = folder("x", root.parent)
    # DomainBed numbers its environments by sorted folders.
    assert [suite.name for suite in suites] == [f"ood:x/{name}" for name in layout.domains]
    assert f"DomainBed's {layout.name}" in suites[0].remarks[0]
    assert [len(suite.indices) for suite in suites] == [4] * len(layout.domains)
    found = known_layout([name.lower().replace(" ", "_") for name in layout.domains])
    assert found is not None
    assert found.name == layout.name
    assert known_layout([*layout.domains[1:], "another"]) is None


def test_vlcs_as_its_other_archive_unpacks(tmp_path: Path) -> None:
    """CALTECH, LABELME, PASCAL and SUN with train, crossval, test and full below, and classes called 0 to 4."""
    domains, classes = ("CALTECH", "LABELME", "PASCAL", "SUN"), NUMBERS[:5]
    parts = ("train", "crossval", "test")
    root = tmp_path / "VLCS"
    paint(root, [f"{d}/{part}/{c}/{part}.png" for d in domains for part in parts for c in classes])
    known = ("bird", "car", "chair", "dog", "person")
    suites = folder("v", root, known)
    assert [suite.name for suite in suites] == [f"ood:v/{name}" for name in domains]
    assert [len(suite.indices) for suite in suites] == [15] * 4
    assert suites[0].images.classes == known
    paint(root, [f"{d}/full/{c}/{n}.png" for d in domains[:3] for c in classes for n in range(2)])
    # `full` holds the other parts
    assert [len(suite.indices) for suite in folder("v", root, known)] == [10, 10, 10, 15]


def test_a_subset_of_classes_and_its_clean_counterpart(tmp_path: Path) -> None:
    root = paint(tmp_path / "r", [f"{c}/{i}.png" for c in ("horse", "dog") for i in range(3)])
    [suite] = folder("r", root)
    assert (suite.name, suite.kind, suite.images.classes) == ("ood:r", "subset", ("dog", "horse"))
    assert "restricted to these 2 of the 4 classes" in suite.remarks[0]
    names = [f"{c}/{i}.png" for c in ANIMALS for i in range(2)]
    inside = load_images(paint(tmp_path / "id", names))
    clean = clean_suite(Suite("id", inside, np.arange(8)), suite.images.classes, suite.name)
    assert (clean.name, clean.images.classes) == ("clean:r", ("dog", "horse"))
    names = [clean.images.classes[label] for label in clean.labels]
    assert names == [inside.classes[inside.labels[i]] for i in clean.indices]
    assert names == ["dog"] * 2 + ["horse"] * 2


def test_how_a_domain_counts() -> None:
    domains = ({"art painting", "photo"}, {"sketch"}, {"quickdraw"})
    trained = Trained({}, *map(frozenset, domains))
    for names, overlap, kind in (
        ({"quickdraw"}, {}, "ood"),
        ({"x", "Art_Painting"}, {}, "seen"),
        ({"cartoon"}, {"train": 0.05}, "ood"),  # a few copies do not make a domain trained
        ({"cartoon"}, {"train": 0.08, "val": 0.04}, "seen"),
        ({"Sketch"}, {}, "adapted"),
        ({"cartoon"}, {"unlabelled": 0.5}, "adapted"),
        ({"sketch"}, {"train": 0.5}, "seen"),  # with labels goes before without
        (set(), {}, "ood"),
    ):
        assert suite_kind(names, overlap, trained) == kind, (names, overlap)


def test_what_a_run_saw_is_read_from_its_split(tmp_path: Path) -> None:
    images, path = domains_of_paint(), tmp_path / "split.json"
    split = make_split(images, test_domain="photo", seed=3)
    split.write(path)
    found = read_trained(path)
    assert (found.domains, found.left_out) == ({"art", "sketch"}, {"photo"})
    assert found.excluded(images.keys) == {"train": len(split.train), "val": len(split.val)}
    stored = json.loads(path.read_text())
    stored["roles"]["unlabelled"] = {"new.png": "f" * 32}
    stored["unlabelled_domains"] = ["Photo"]
    stored["roles"]["train"] |= {"clip_art/cat/1.png": "e" * 32}
    del stored["train_domains"]  # as in older runs
    path.write_text(json.dumps(stored))
    found = read_trained(path)
    assert (found.roles["f" * 32], found.unlabelled_domains) == ("unlabelled", {"photo"})
    assert "clip art" in found.domains
    both = all_trained([found, Trained({"f" * 32: "train"}, frozenset({"art"}))])
    assert both.roles["f" * 32] == "train"
    path.write_text(json.dumps(stored | {"roles": []}))
    with pytest.raises(EdgekdError, match="damaged"):
        read_trained(path)


def test_domains_that_trained_are_seen_and_the_others_unseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a run's data given once more: what trained goes, what is left is called by what it is."""
    root = paint(tmp_path / "d", tree(("art", "photo", "sketch"), PETS, 20))
    images = load_images(root)
    split = make_split(images, test_domain="sketch", seed=0)
    split.write(tmp_path / "split.json")
    trained = read_trained(tmp_path / "split.json")
    suites = {suite.name: suite for suite in folder("d", root, PETS, trained)}
    assert list(suites) == ["seen:d/art", "seen:d/photo", "ood:d/sketch"]
    left = np.concatenate([suites["seen:d/art"].indices, suites["seen:d/photo"].indices])
    assert sorted(left) == split.id_test.tolist()
    assert suites["ood:d/sketch"].indices.tolist() == split.ood_test.tolist()
    # The part that each image has in the run.
    run: Any = SimpleNamespace(folder=tmp_path, run=SimpleNamespace(classes=PETS))
    assert {name: indices.tolist() for name, indices in parts_of(run, images, None)} == {
        "train": split.train.tolist(), "val": split.val.tolist(), "test": split.id_test.tolist(),
        "unseen": split.ood_test.tolist(),
    }  # fmt: skip
    places = ("photo/cat", "photo/dog", "photo/cow", "quickdraw/cat", "quickdraw/dog")
    names = [f"{place}/n.jpg" for place in places]
    other = load_images(paint(tmp_path / "n", names))
    parts = {n: sorted(other.ids[i] for i in indices) for n, indices in parts_of(run, other, "n")}
    assert parts == {"test": names[:2], "unseen": names[2:]}
    # A new folder of one of them, whose images nobody has seen, goes by its name.
    names = [f"{c}/n{i}.jpg" for c in PETS for i in range(3)]
    [suite] = folder("x", paint(tmp_path / "new" / "Photo", names), PETS, trained)
    assert (suite.name, suite.excluded) == ("seen:x", {})
    # A domain of nothing but training images is left out, with a warning.
    art = [key for key, d in zip(images.keys, images.domain_of, strict=True) if d == 0]
    found = folder("d", root, PETS, Trained(dict.fromkeys(art, "train")))
    assert [one.name for one in found] == ["ood:d/photo", "ood:d/sketch"]
    assert "seen:d/art" in capsys.readouterr().err
    # Whatever it is called, a domain of which a tenth trained is one that trained.
    keys = load_images(root / "art").keys[:6]
    [suite] = folder("x", root / "art", PETS, Trained(dict.fromkeys(keys, "train")))
    assert (suite.name, suite.excluded) == ("seen:x", {"train": 6})
    with pytest.raises(EdgekdError, match="is left to measure"):
        folder("x", root, PETS, Trained(dict.fromkeys(images.keys, "train")))
    # Images of an unseen domain do not count twice.
    own = Suite("ood:sketch", images, suites["ood:d/sketch"].indices[:30])
    one = subject("torch", "torch", model(0), classes=PETS)
    ood = [("d", str(root)), ("e", str(root / "sketch"))]
    runs = {"r": Trained({}, frozenset({"art", "photo"}))}
    with pytest.raises(EdgekdError, match="40 are in another suite"):
        further_suites([one], runs, [own], ood=ood)
    *_, rest = further_suites([one], runs, [own], ood=ood[:1])
    assert (rest.name, rest.excluded, len(rest.indices)) == ("ood:d/sketch", {"tested": 30}, 10)
    # A style seen without labels is no unseen domain.
    seen = dict.fromkeys([images.keys[i] for i in split.ood_test[:3]], "unlabelled")
    builder = SuiteBuilder(PETS, Trained(seen, unlabelled_domains=frozenset({"sketch"})))
    [*_, suite] = builder.split(images, split)
    assert (suite.name, suite.kind) == ("adapted:sketch", "adapted")
    assert suite.excluded == {"unlabelled": 3}
    assert suite.indices.tolist() == split.ood_test[3:].tolist()


def test_a_hold_out_is_one_suite_of_its_own_kind(tmp_path: Path) -> None:
    root = paint(tmp_path / "hold", tree(("art", "photo"), PETS))
    roles, domains = {load_images(root).keys[0]: "val"}, frozenset({"art", "photo"})
    builder = SuiteBuilder(ANIMALS, Trained(roles, domains, left_out=frozenset({"sketch"})))
    suite = builder.hold_out("mine", str(root))
    assert (suite.name, suite.kind, len(suite.indices)) == ("test:mine", "test", 7)
    assert suite.excluded == {"val": 1}
    for path, names in (("Sketch", [f"{c}/0.png" for c in PETS]), ("o", tree(("sketch",), PETS))):
        with pytest.raises(
            EdgekdError, match=r'no labelled training images of the domain "[sS]ketch"'
        ) as caught:
            builder.hold_out("x", str(paint(tmp_path / path, names)))
        assert "--ood x=" in caught.value.hint
    split = paint(tmp_path / "split", tree(("train", "test"), PETS, 3))
    [suite] = folder("x", split)  # of a split folder only the test part counts
    assert {suite.images.ids[i].split("/")[0] for i in suite.indices} == {"test"}


def test_class_names_in_the_words_of_the_model() -> None:
    spoken = spoken_as(words(("Alarm_Clock", "pen")), ("alarm clock", "Pen", "cup"), "x")
    assert spoken.classes == ("alarm clock", "Pen")
    # timm's own table: tench is 0, goldfish 1, toilet paper 999.
    assert spoken_as(words(("n01443537", "n15075141")), NUMBERS, "x").classes == ("1", "999")
    found = spoken_as(words(("1", "0")), ("n01440764", "n01443537"), "x").classes
    assert found == ("n01443537", "n01440764")
    with pytest.raises(EdgekdError, match='have a class "dogs"') as caught:
        spoken_as(words(("dogs", "cat")), ANIMALS, "x")
    assert caught.value.hint == 'Did you mean "dog"?'
    with pytest.raises(EdgekdError, match="one class of the model"):
        spoken_as(words(("Dog", "dog_")), ("dog ", "cat"), "x")


def test_names_of_suites() -> None:
    assert named_folders(["v2=a=b"], "--ood") == [("v2", "a=b")]
    for given in ("data", "=data", "a b=data", "x="):
        with pytest.raises(EdgekdError, match="does not name a suite"):
            named_folders([given], "--ood")
    with pytest.raises(EdgekdError, match="given twice"):
        named_folders(["x=a", "x=b"], "--ood")
    with pytest.raises(EdgekdError, match="detection") as caught:
        folder("imagenet-o", Path("nowhere"))
    assert caught.value.hint.endswith("--unknown imagenet-o=nowhere")


def test_unknown_images_are_compared_with_the_id_images(tmp_path: Path) -> None:
    inside = Suite("id", words(ANIMALS), np.arange(4), run="r")
    images = load_unlabelled(paint(tmp_path / "o", ["piano/0.png", "photo/flute/0.png", "1.png"]))
    builder = SuiteBuilder(ANIMALS, Trained({images.keys[0]: "train"}))
    [suite] = builder.unknown("music", images, inside)
    assert (suite.name, suite.kind) == ("unknown:music", "unknown")
    assert (suite.base, suite.run, suite.images.classes) == ("id", "r", ANIMALS)
    assert (suite.indices.tolist(), suite.labels.tolist()) == ([1, 2], [-1, -1])
    assert suite.excluded == {"train": 1}
    # What the run tests on shows a known class as well.
    own = replace(inside, images=replace(inside.images, keys=(*images.keys, "another")))
    with pytest.raises(EdgekdError, match="All images of o are in the run's own data"):
        builder.unknown("music", images, own)
    # A folder called by a known class.
    for place, classes, message in (
        ("photo/Dog", ANIMALS, '"Dog" of others is named like a class of the model ("dog")'),
        ("n01443537", ("n01443537", "n01440764"), 'The folder "n01443537"'),
        ("n01443537", NUMBERS, 'a class of the model ("1")'),
    ):
        root = tmp_path / place[:3] / "others"
        images = load_unlabelled(paint(root, [f"{place}/0.png", "piano/0.png"]))
        inside = Suite("id", words(classes), np.arange(len(classes)))
        with pytest.raises(EdgekdError, match=re.escape(message)) as caught:
            SuiteBuilder(classes).unknown("others", images, inside)
        assert ("imagenet-o=DIR" in caught.value.hint) == place.startswith("n0")


def test_imagenet_o_restricts_both_sides_to_the_classes_of_its_folders(tmp_path: Path) -> None:
    inside = Suite("id", replace(words(NUMBERS), labels=np.arange(1000)), np.arange(1000))
    names = tree(["imagenet-o"], ("n15075141", "n01443537"))
    images = load_unlabelled(paint(tmp_path, names))
    clean, unknown = SuiteBuilder(NUMBERS).unknown("imagenet-o", images, inside)
    assert (clean.name, clean.kind) == ("clean:imagenet-o", "clean")
    assert clean.indices.tolist() == [1, 999]
    assert (unknown.base, len(unknown.indices)) == ("clean:imagenet-o", 4)
    assert unknown.images.classes == clean.images.classes == ("1", "999")
    # A model of other classes is not concerned by what others mistake them for.
    animals = Suite("id", words(ANIMALS), np.arange(4))
    [other] = SuiteBuilder(ANIMALS).unknown("imagenet-o", images, animals)
    assert (other.base, other.images.classes) == ("id", ANIMALS)


def test_a_lone_artifact_finds_the_split_of_its_run_again() -> None:
    images = domains_of_paint()
    split = make_split(images, test_domain="photo", seed=3)
    source = {
        "split_hash": split.hash, "split_seed": 3, "test_domain": "photo", "train_domains": ["art", "sketch"],
    }  # fmt: skip
    own = SuiteBuilder(images.classes).split(images, split)
    suites, trained = lone_suites(images, source)
    assert [suite.name for suite in suites] == ["id", "val", "ood:photo"]
    assert [suite.indices.tolist() for suite in suites] == [suite.indices.tolist() for suite in own]
    assert set(trained.roles.values()) == {"train", "val"}  # for suites of other folders
    # On other images the domains go by what the artifact says of its training.
    suites, said = lone_suites(images, source | {"split_hash": "another"})
    assert (said.domains, said.left_out) == ({"art", "sketch"}, {"photo"})
    assert [(suite.name, suite.kind) for suite in suites] == [
        ("seen:art", "seen"), ("ood:photo", "domain"), ("seen:sketch", "seen"),
    ]  # fmt: skip
    assert "not a test result" in suites[0].remarks[0]
    suites, _ = lone_suites(images, {})
    assert [suite.name for suite in suites] == ["ood:art", "ood:photo", "ood:sketch"]
    assert all("may include training images" in suite.remarks[0] for suite in suites)


def test_cue_conflicts_by_their_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "cat/cat1-dog2.png", "cat/cat2-cat1.png", "dog/dog10-cat3.png", "dog/dog3-fish1.png", "fish/fish1-dog3.png",
    ]  # fmt: skip
    root = paint(tmp_path / "cues", names)
    suite = SuiteBuilder(ANIMALS).cue_conflict("texture-shape", str(root))
    assert [suite.images.classes[t] for t in suite.texture] == ["dog", "cat", "fish", "dog"]
    assert [suite.images.classes[s] for s in suite.labels] == ["cat", "dog", "dog", "fish"]
    assert suite.remarks[0].startswith("1 images without conflict")

    # Predictions: shape twice, texture once, neither once.
    def predict(pixels: np.ndarray) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[[1, 1, 1, 0]]

    fake_measurements(monkeypatch, {})
    one = subject("torch", "torch", predict, classes=ANIMALS)
    report = run_benchmark([one], [suite], tmp_path / "out", speed=SHORT)
    [row] = report.cue_conflicts
    assert (row.n, row.shape, row.texture, row.shape_bias) == (4, 0.5, 0.25, pytest.approx(2 / 3))
    assert rescore(tmp_path / "out").cue_conflicts == report.cue_conflicts
    seen = Trained({suite.images.keys[suite.indices[0]]: "train"})
    fewer = SuiteBuilder(ANIMALS, seen).cue_conflict("texture-shape", str(root))
    assert (len(fewer.indices), fewer.excluded) == (3, {"train": 1})
    assert fewer.texture.tolist() == suite.texture[1:].tolist()
    for name in ("cat/cat7.png", "cat/dog1-cat2.png"):
        other = paint(tmp_path / name[4:8], [*names, name])
        with pytest.raises(EdgekdError, match="does not have the name"):
            SuiteBuilder(ANIMALS).cue_conflict("texture-shape", str(other))


def test_corruption_cells_scores_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgekd.data.corruptions as module

    def strike(pixels: np.ndarray, name: str, severity: int, key: str) -> np.ndarray:
        """Severity s ruins images 0 … s − 1 of ten; fog ruins nothing."""
        ruined = pixels.copy()
        if name != "fog" and int(key, 16) < severity:
            ruined[..., 0] = (ruined[..., 0] + 1) % 3
        return ruined

    monkeypatch.setattr(module, "corrupt", strike)
    fake_measurements(monkeypatch, {})
    inside = Suite("id", paint_images(10), np.arange(10))
    suites = [inside, *corruption_suites(inside, 10)]
    assert len(suites) == 76
    subjects = [
        subject("teacher", "teacher", model(2), identity="t"), subject("torch", "torch", model(0)),
    ]  # fmt: skip
    report = run_benchmark(subjects, suites, tmp_path / "out", speed=SHORT)
    teacher, torch = report.corruptions
    assert torch.top1["snow"] == (0.9, 0.8, 0.7, 0.6, 0.5)
    assert torch.top1["fog"] == (1.0,) * 5
    assert torch.robust_accuracy == pytest.approx((14 * 0.7 + 1) / 15)
    assert teacher.mce == pytest.approx(1.0)
    lines = (tmp_path / "out" / "corruptions.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 75
    assert "r,torch,snow,5,10,0.5" in lines
    assert rescore(tmp_path / "out").corruptions == report.corruptions
    # Fewer images are spread evenly.
    [first, *_] = corruption_suites(Suite("id", paint_images(120), np.arange(100)), 10)
    assert first.indices.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert "10 of the 100" in first.remarks[-1]
