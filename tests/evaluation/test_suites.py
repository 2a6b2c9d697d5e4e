"""Suites from folders: DomainBed layouts, class subsets, ImageNet's ids, cue conflicts, artifacts without their run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import CLASSES, SHORT, Paint, fake_measurements, model, paint_images, subject
from PIL import Image

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.layouts import LAYOUTS, known_layout, unwrapped
from edgekd.data.split import make_split
from edgekd.data.unlabelled import load_unlabelled
from edgekd.evaluation.gather import Further, parts_of
from edgekd.evaluation.special_suites import (
    clean_suite,
    corruption_suites,
    cue_conflict_suite,
    unknown_suites,
)
from edgekd.evaluation.suites import (
    folder_suites,
    hold_out_suite,
    lone_suites,
    named_folders,
    split_suites,
)
from edgekd.evaluation.trained import Trained, all_trained, read_trained, suite_kind
from edgekd.evaluation.vocabulary import spoken_as

ANIMALS = ("cat", "dog", "fish", "horse")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path_factory.mktemp("cache")))


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


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_domainbed_layouts_are_known_and_said(layout, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root = paint(tmp_path / "data" / "wrapped", tree(layout.domains, ("dog", "horse")))
    (root / "README.txt").write_text("as it comes")
    suites = folder_suites("x", str(root.parent), ANIMALS)
    # DomainBed numbers its environments by sorted folders.
    assert [suite.name for suite in suites] == [f"ood:x/{name}" for name in layout.domains]
    assert f"DomainBed's {layout.name}" in suites[0].remarks[0]
    assert [len(suite.indices) for suite in suites] == [4] * len(layout.domains)


def test_layouts_forgive_spelling_but_not_another_domain() -> None:
    found = known_layout(["real_world", "art", "clipart", "product"])
    assert found is not None
    assert found.name == "OfficeHome"
    assert known_layout(["art_painting", "cartoon", "photo"]) is None


def test_vlcs_as_its_other_archive_unpacks(tmp_path: Path) -> None:
    """CALTECH, LABELME, PASCAL and SUN with train, crossval, test and full below, and classes called 0 to 4."""
    domains, classes = ("CALTECH", "LABELME", "PASCAL", "SUN"), [str(number) for number in range(5)]
    names = [
        f"{d}/{part}/{c}/{part}.png"
        for d in domains
        for part in ("train", "crossval", "test")
        for c in classes
    ]
    root = paint(tmp_path / "VLCS", names)
    known = ("bird", "car", "chair", "dog", "person")
    suites = folder_suites("v", str(root), known)
    assert [suite.name for suite in suites] == [f"ood:v/{name}" for name in domains]
    assert [len(suite.indices) for suite in suites] == [15] * 4
    assert suites[0].images.classes == known
    assert "DomainBed's VLCS" in suites[0].remarks[0]
    paint(root, [f"{d}/full/{c}/{n}.png" for d in domains[:3] for c in classes for n in range(2)])
    counts = {
        suite.name.rpartition("/")[2]: len(suite.indices)
        for suite in folder_suites("v", str(root), known)
    }
    assert counts == {
        "CALTECH": 10,
        "LABELME": 10,
        "PASCAL": 10,
        "SUN": 15,
    }  # full holds the other parts


def test_terra_incognita_as_domainbed_leaves_it(tmp_path: Path) -> None:
    """Four locations beside the file of annotations, classes as folders of small photographs."""
    root = paint(
        tmp_path / "terra_incognita",
        tree([f"location_{n}" for n in (38, 43, 46, 100)], ("dog", "horse")),
    )
    (root / "caltech_images_20210113.json").write_text("{}")
    suites = folder_suites("t", str(root), ANIMALS)
    assert [suite.name for suite in suites] == [f"ood:t/location_{n}" for n in (100, 38, 43, 46)]
    assert "TerraIncognita" in suites[0].remarks[0]


def test_other_folders_three_deep_are_refused_as_before(tmp_path: Path) -> None:
    root = paint(
        tmp_path, [f"{d}/train/{c}/0.png" for d in ("here", "there") for c in ("dog", "cat")]
    )
    with pytest.raises(EdgekdError, match="3 folders deep"):
        load_images(root)


def test_only_a_known_layout_is_looked_for_one_folder_deeper(tmp_path: Path) -> None:
    paint(tmp_path, tree(["things"], ["dog", "cat"]))
    assert unwrapped(str(tmp_path)) == str(tmp_path)
    assert unwrapped("toy") == "toy"


def test_a_subset_of_classes_and_its_clean_counterpart(tmp_path: Path) -> None:
    root = paint(tmp_path / "r", [f"{c}/{i}.png" for c in ("horse", "dog") for i in range(3)])
    [suite] = folder_suites("r", str(root), ANIMALS)
    assert (suite.name, suite.kind, suite.images.classes) == ("ood:r", "subset", ("dog", "horse"))
    assert "among these 2, out of the 4 known" in suite.remarks[0]
    inside = load_images(
        paint(tmp_path / "id", [f"{c}/{i}.png" for c in ANIMALS for i in range(2)])
    )
    clean = clean_suite(suite, Suite("id", inside, np.arange(8)))
    assert clean is not None
    assert (clean.name, clean.images.classes, len(clean.indices)) == (
        "clean:r",
        ("dog", "horse"),
        4,
    )
    names = [clean.images.classes[label] for label in clean.labels]
    assert names == [inside.classes[inside.labels[i]] for i in clean.indices]


def test_images_the_run_trained_on_are_left_out(tmp_path: Path) -> None:
    root = paint(tmp_path, [f"{c}/{i}.png" for c in ANIMALS for i in range(3)])
    images = load_images(root)
    roles = dict.fromkeys(images.keys[:4], "train") | {images.keys[4]: "val"}
    [suite] = folder_suites("x", str(root), ANIMALS, trained=Trained(roles))
    assert suite.indices.tolist() == list(range(5, 12))
    assert suite.excluded == {"train": 4, "val": 1}
    # 5 of 12: the domain trained, whatever it is called
    assert (suite.name, suite.kind) == ("seen:x", "seen")
    with pytest.raises(EdgekdError, match="is left to measure"):
        folder_suites("x", str(root), ANIMALS, trained=Trained(dict.fromkeys(images.keys, "train")))


FROM = Trained(
    {}, frozenset({"art painting", "photo"}), frozenset({"sketch"}), frozenset({"quickdraw"})
)


@pytest.mark.parametrize(
    ("names", "overlap", "kind"),
    [
        ({"cartoon"}, {}, "ood"),
        ({"quickdraw"}, {}, "ood"),
        ({"photo"}, {}, "seen"),
        ({"x", "Art_Painting"}, {}, "seen"),
        ({"cartoon"}, {"train": 0.05}, "ood"),  # a few copies do not make a domain trained
        ({"cartoon"}, {"train": 0.08, "val": 0.04}, "seen"),
        ({"Sketch"}, {}, "adapted"),
        ({"cartoon"}, {"unlabelled": 0.5}, "adapted"),
        ({"sketch"}, {"train": 0.5}, "seen"),  # with labels goes before without
        (set(), {}, "ood"),
    ],
)
def test_how_a_domain_counts(names: set[str], overlap: dict[str, float], kind: str) -> None:
    assert suite_kind(names, overlap, FROM) == kind


def test_what_a_run_saw_is_read_from_its_split(tmp_path: Path) -> None:
    images = domains_of_paint()
    split = make_split(images, test_domain="photo", seed=3)
    split.write(tmp_path / "split.json")
    found = read_trained(tmp_path / "split.json")
    assert (found.domains, found.left_out) == ({"art", "sketch"}, {"photo"})
    assert found.excluded(images.keys) == {"train": len(split.train), "val": len(split.val)}
    stored = json.loads((tmp_path / "split.json").read_text())
    stored["roles"]["unlabelled"] = {"new.png": "f" * 32}
    stored["unlabelled_domains"] = ["Photo"]
    del stored["train_domains"]  # as older runs: the ids say "all/…", which is no domain here
    (tmp_path / "split.json").write_text(json.dumps(stored))
    found = read_trained(tmp_path / "split.json")
    assert (found.roles["f" * 32], found.unlabelled_domains) == ("unlabelled", {"photo"})
    both = all_trained([found, Trained({"f" * 32: "train"}, frozenset({"art"}))])
    assert both.roles["f" * 32] == "train"
    stored["roles"] = []
    (tmp_path / "split.json").write_text(json.dumps(stored))
    with pytest.raises(EdgekdError, match="damaged"):
        read_trained(tmp_path / "split.json")


def test_a_style_seen_without_labels_is_no_unseen_domain() -> None:
    images = domains_of_paint()
    split = make_split(images, test_domain="photo", seed=3)
    shown = [images.keys[i] for i in split.ood_test[:3]]
    trained = Trained(dict.fromkeys(shown, "unlabelled"), unlabelled_domains=frozenset({"photo"}))
    [*_, suite] = split_suites(images, split, None, trained)
    assert (suite.name, suite.kind) == ("adapted:photo", "adapted")
    assert suite.indices.tolist() == split.ood_test[3:].tolist()
    assert suite.excluded == {"unlabelled": 3}


def test_domains_that_trained_are_seen_and_the_others_unseen(tmp_path: Path) -> None:
    """All of a run's data given once more: what trained goes, what is left is called by what it is."""
    root = paint(tmp_path / "d", tree(("art", "photo", "sketch"), ("cat", "dog"), 20))
    images = load_images(root)
    split = make_split(images, test_domain="sketch", seed=0)
    split.write(tmp_path / "split.json")
    trained = read_trained(tmp_path / "split.json")
    suites = {
        suite.name: suite
        for suite in folder_suites("d", str(root), ("cat", "dog"), trained=trained)
    }
    assert list(suites) == ["seen:d/art", "seen:d/photo", "ood:d/sketch"]
    left = np.concatenate([suites["seen:d/art"].indices, suites["seen:d/photo"].indices])
    assert sorted(left) == split.id_test.tolist()
    assert suites["ood:d/sketch"].indices.tolist() == split.ood_test.tolist()
    # A new folder of one of them, whose images nobody has seen, goes by its name.
    new = paint(
        tmp_path / "new" / "Photo", [f"{c}/n{i}.jpg" for c in ("cat", "dog") for i in range(3)]
    )
    [suite] = folder_suites("x", str(new), ("cat", "dog"), trained=trained)
    assert (suite.name, suite.excluded) == ("seen:x", {})


def test_images_of_an_unseen_domain_do_not_count_twice(tmp_path: Path) -> None:
    root = paint(tmp_path / "d", tree(("art", "sketch"), ("cat", "dog"), 3))
    images = load_images(root)
    own = Suite("ood:sketch", images, np.flatnonzero(images.domain_of == 1)[:4])
    trained = {"r": Trained({}, frozenset({"art"}))}
    further = Further([("d", str(root)), ("e", str(root / "sketch"))], [], [], None)
    one = subject("torch", "torch", model(0), classes=("cat", "dog"))
    with pytest.raises(EdgekdError, match="6 are in another suite"):
        further.suites([one], trained, [own])
    [seen, rest] = replace(further, ood=further.ood[:1]).suites([one], trained, [own])
    assert (seen.name, rest.name) == ("seen:d/art", "ood:d/sketch")
    assert rest.excluded == {"tested": 4}
    assert len(rest.indices) == 2


def test_a_domain_of_nothing_but_training_images_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = paint(tmp_path / "d", tree(("art", "photo"), ("cat", "dog")))
    images = load_images(root)
    gone = Trained(
        {key: "train" for key, d in zip(images.keys, images.domain_of, strict=True) if d == 0}
    )
    assert [one.name for one in folder_suites("d", str(root), ("cat", "dog"), trained=gone)] == [
        "ood:d/photo"
    ]
    assert "seen:d/art" in capsys.readouterr().err


def test_the_part_that_each_image_has_in_a_run(tmp_path: Path) -> None:
    root = paint(tmp_path / "d", tree(("art", "photo", "sketch"), ("cat", "dog"), 20))
    images = load_images(root)
    split = make_split(images, test_domain="sketch", seed=0)
    split.write(tmp_path / "split.json")
    run: Any = SimpleNamespace(folder=tmp_path, run=SimpleNamespace(classes=("cat", "dog")))
    own = {name: indices.tolist() for name, indices in parts_of(run, images, None)}
    assert own == {
        "train": split.train.tolist(), "val": split.val.tolist(), "test": split.id_test.tolist(),
        "unseen": split.ood_test.tolist(),
    }  # fmt: skip
    # New images of a domain that trained, of another domain, and of a class that did not train.
    names = [
        "photo/cat/n.jpg",
        "photo/dog/n.jpg",
        "quickdraw/cat/n.jpg",
        "quickdraw/dog/n.jpg",
        "photo/cow/n.jpg",
    ]
    paint(tmp_path / "n", names)
    other = load_images(tmp_path / "n")
    found = {name: [other.ids[i] for i in indices] for name, indices in parts_of(run, other, "n")}
    assert {name: sorted(ids) for name, ids in found.items()} == {
        "test": sorted(names[:2]), "unseen": sorted(names[2:]),
    }  # fmt: skip


def test_a_hold_out_is_one_suite_of_its_own_kind(tmp_path: Path) -> None:
    root = paint(tmp_path / "hold", tree(("art", "photo"), ("cat", "dog")))
    images = load_images(root)
    trained = Trained(
        {images.keys[0]: "val"}, frozenset({"art", "photo"}), left_out=frozenset({"sketch"})
    )
    suite = hold_out_suite("mine", str(root), ANIMALS, trained=trained)
    assert (suite.name, suite.kind, len(suite.indices)) == ("test:mine", "test", 7)
    assert suite.excluded == {"val": 1}
    assert "out of the 4 known" in suite.remarks[0]
    flat = paint(tmp_path / "Sketch", ["cat/0.png", "dog/1.png"])
    with pytest.raises(EdgekdError, match="did not train") as caught:
        hold_out_suite("x", str(flat), ANIMALS, trained=trained)
    assert "--ood x=" in caught.value.hint
    alone = paint(tmp_path / "other", tree(("sketch",), ("cat", "dog")))
    with pytest.raises(EdgekdError, match='The domain "sketch"'):
        hold_out_suite("x", str(alone), ANIMALS, trained=trained)


def test_of_a_split_folder_only_the_test_part_counts(tmp_path: Path) -> None:
    root = paint(tmp_path, tree(("train", "test"), ("dog", "cat"), 3))
    [suite] = folder_suites("x", str(root), ANIMALS)
    assert {suite.images.ids[i].split("/")[0] for i in suite.indices} == {"test"}


def words(classes: tuple[str, ...]) -> ImageSet:
    return replace(paint_images(len(classes)), classes=classes)


def test_vocabulary() -> None:
    assert spoken_as(words(("Alarm_Clock", "pen")), ("alarm clock", "Pen", "cup"), "x").classes == (
        "alarm clock",
        "Pen",
    )
    numbers = tuple(str(i) for i in range(1000))
    # timm's own table: tench is 0, goldfish 1, toilet paper 999.
    assert spoken_as(words(("n01443537", "n15075141")), numbers, "x").classes == ("1", "999")
    assert spoken_as(words(("1", "0")), ("n01440764", "n01443537"), "x").classes == (
        "n01443537",
        "n01440764",
    )
    with pytest.raises(EdgekdError, match='have a class "dogs"') as caught:
        spoken_as(words(("dogs", "cat")), ANIMALS, "x")
    assert caught.value.hint == 'Did you mean "dog"?'
    with pytest.raises(EdgekdError, match="one class of the model"):
        spoken_as(words(("Dog", "dog_")), ("dog ", "cat"), "x")


@pytest.mark.parametrize("given", ["data", "=data", "a b=data", "x="])
def test_suites_need_a_name(given: str) -> None:
    with pytest.raises(EdgekdError, match="does not name a suite"):
        named_folders([given], "--ood")


def test_names_of_suites() -> None:
    assert named_folders(["v2=a=b"], "--ood") == [("v2", "a=b")]
    with pytest.raises(EdgekdError, match="given twice"):
        named_folders(["x=a", "x=b"], "--ood")
    with pytest.raises(EdgekdError, match="detection") as caught:
        folder_suites("imagenet-o", "nowhere", ANIMALS)
    assert caught.value.hint.endswith("--unknown imagenet-o=nowhere")


def test_unknown_images_are_set_against_the_id_images(tmp_path: Path) -> None:
    inside = Suite("id", words(ANIMALS), np.arange(4), run="r")
    images = load_unlabelled(
        paint(tmp_path / "others", ["piano/0.png", "photo/flute/0.png", "1.png"])
    )
    [suite] = unknown_suites(
        "music", images, inside, ANIMALS, trained=Trained({images.keys[0]: "train"})
    )
    assert (suite.name, suite.kind, suite.base, suite.run) == (
        "unknown:music",
        "unknown",
        "id",
        "r",
    )
    assert (suite.images.classes, suite.indices.tolist(), suite.labels.tolist()) == (
        ANIMALS,
        [1, 2],
        [-1, -1],
    )
    assert suite.remarks[-1] == "1 images left out, since they are among the run's own."
    # What the run tests on shows a known class as well.
    own = replace(inside, images=replace(inside.images, keys=(*images.keys, "another")))
    with pytest.raises(EdgekdError, match="All images of others are images of the run's own data"):
        unknown_suites("music", images, own, ANIMALS)


@pytest.mark.parametrize(
    ("folder", "classes", "told"),
    [
        (
            "photo/Dog",
            ANIMALS,
            'The folder "Dog" of others is called by a class that the model knows ("dog")',
        ),
        (
            "horse/mine",
            ANIMALS,
            'The folder "horse" of others is called by a class that the model knows.',
        ),
        ("n01443537", ("n01443537", "n01440764"), 'The folder "n01443537"'),
        (
            "n01443537",
            tuple(str(number) for number in range(1000)),
            r'The folder "n01443537" .* knows \("1"\)',
        ),
    ],
)
def test_a_folder_called_by_a_known_class_is_refused(
    tmp_path: Path, folder: str, classes: tuple[str, ...], told: str
) -> None:
    images = load_unlabelled(paint(tmp_path / "others", [f"{folder}/0.png", "piano/0.png"]))
    inside = Suite("id", words(classes), np.arange(len(classes)))
    expected = told if "\\" in told else told.replace("(", "\\(").replace(")", "\\)")
    with pytest.raises(EdgekdError, match=expected) as caught:
        unknown_suites("others", images, inside, classes)
    assert "--ood NAME=DIR" in caught.value.hint
    assert ("imagenet-o=DIR" in caught.value.hint) == folder.startswith("n0")


def test_imagenet_o_calls_its_folders_by_what_its_images_are_mistaken_for(tmp_path: Path) -> None:
    """Both sides are then restricted to these classes, as in its authors' evaluation."""
    classes = tuple(str(number) for number in range(1000))
    inside = Suite("id", replace(words(classes), labels=np.arange(1000)), np.arange(1000))
    names = [
        f"imagenet-o/{wnid}/{number}.png"
        for wnid in ("n15075141", "n01443537")
        for number in range(2)
    ]
    images = load_unlabelled(paint(tmp_path, names))
    clean, unknown = unknown_suites("imagenet-o", images, inside, classes)
    assert (clean.name, clean.kind, clean.indices.tolist()) == (
        "clean:imagenet-o",
        "clean",
        [1, 999],
    )
    assert (unknown.name, unknown.base, len(unknown.indices)) == (
        "unknown:imagenet-o",
        "clean:imagenet-o",
        4,
    )
    assert unknown.images.classes == clean.images.classes == ("1", "999")
    # A model of other classes is not concerned by what others mistake them for.
    [other] = unknown_suites(
        "imagenet-o", images, Suite("id", words(ANIMALS), np.arange(4)), ANIMALS
    )
    assert (other.base, other.images.classes) == ("id", ANIMALS)


def domains_of_paint() -> ImageSet:
    images = paint_images(120)
    return replace(
        images, domains=("art", "photo", "sketch"), domain_of=np.repeat(np.arange(3), 40)
    )


def test_a_lone_artifact_finds_the_split_of_its_run_again() -> None:
    images = domains_of_paint()
    split = make_split(images, test_domain="photo", seed=3)
    source = {
        "split_hash": split.hash, "split_seed": 3, "test_domain": "photo", "train_domains": ["art", "sketch"],
    }  # fmt: skip
    own = {suite.name: suite.indices.tolist() for suite in split_suites(images, split, None)}
    assert list(own) == ["id", "val", "ood:photo"]
    assert {suite.name: suite.indices.tolist() for suite in lone_suites(images, source)[0]} == own
    # Its training images are known as well, for suites of other folders.
    assert set(lone_suites(images, source)[1].roles.values()) == {"train", "val"}


def test_a_lone_artifact_on_other_images_calls_its_training_domains_seen() -> None:
    images = domains_of_paint()
    source = {
        "split_hash": "another",
        "split_seed": 3,
        "test_domain": "photo",
        "train_domains": ["art", "sketch"],
    }
    suites, said = lone_suites(images, source)
    assert (said.domains, said.left_out) == ({"art", "sketch"}, {"photo"})
    assert [(suite.name, suite.kind) for suite in suites] == [
        ("seen:art", "seen"), ("ood:photo", "domain"), ("seen:sketch", "seen"),
    ]  # fmt: skip
    assert "training images may be among these" in suites[0].remarks[0]
    unsaid, _ = lone_suites(images, {})
    assert [suite.name for suite in unsaid] == ["ood:art", "ood:photo", "ood:sketch"]
    assert all("does not say" in suite.remarks[0] for suite in unsaid)


def test_cue_conflicts_by_their_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "cat/cat1-dog2.png",
        "cat/cat2-cat1.png",
        "dog/dog10-cat3.png",
        "dog/dog3-fish1.png",
        "fish/fish1-dog3.png",
    ]
    root = paint(tmp_path / "cues", names)
    suite = cue_conflict_suite("texture-shape", str(root), ANIMALS)
    assert suite.texture is not None
    assert [suite.images.classes[t] for t in suite.texture] == ["dog", "cat", "fish", "dog"]
    assert [suite.images.classes[s] for s in suite.labels] == ["cat", "dog", "dog", "fish"]
    assert suite.remarks[0].startswith("1 images without conflict")

    # Answers dog, dog, dog, horse-free: shape twice, texture once, neither once.
    def predict(pixels: np.ndarray) -> np.ndarray:
        answers = np.array(["dog", "dog", "dog", "cat"])
        return np.array(
            [[float(name == cls) for cls in ANIMALS] for name in answers], dtype=np.float32
        )

    fake_measurements(monkeypatch, {})
    one = subject("torch", "torch", predict, classes=ANIMALS)
    report = run_benchmark([one], [suite], tmp_path / "out", speed=SHORT)
    [row] = report.cue_conflicts
    assert (row.n, row.shape, row.texture, row.shape_bias) == (4, 0.5, 0.25, pytest.approx(2 / 3))
    assert rescore(tmp_path / "out").cue_conflicts == report.cue_conflicts
    shown = Trained({suite.images.keys[suite.indices[0]]: "train"})
    fewer = cue_conflict_suite("texture-shape", str(root), ANIMALS, trained=shown)
    assert (len(fewer.indices), fewer.excluded) == (3, {"train": 1})
    assert fewer.texture is not None
    assert len(fewer.texture) == 3
    paint(root, ["cat/cat7.png"])
    with pytest.raises(EdgekdError, match="does not follow the file names"):
        cue_conflict_suite("texture-shape", str(root), ANIMALS)


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
    images = paint_images(10)
    inside = Suite("id", images, np.arange(10))
    suites = [inside, *corruption_suites(inside, 10)]
    assert len(suites) == 76
    subjects = [
        subject("teacher", "teacher", model(2), identity="t"),
        subject("torch", "torch", model(0)),
    ]
    report = run_benchmark(subjects, suites, tmp_path / "out", speed=SHORT)
    teacher, torch = report.corruptions
    assert torch.top1["snow"] == (0.9, 0.8, 0.7, 0.6, 0.5)
    assert torch.top1["fog"] == (1.0,) * 5
    assert torch.robust_accuracy == pytest.approx((14 * 0.7 + 1) / 15)
    assert torch.mce_denominators == "the run's teacher, zero-shot, on the same images"
    assert teacher.mce == pytest.approx(1.0)
    lines = (tmp_path / "out" / "corruptions.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 75
    assert "r,torch,snow,5,10,0.5" in lines
    assert rescore(tmp_path / "out").corruptions == report.corruptions
    assert "corruption:" not in (tmp_path / "out" / "report.md").read_text()


def test_fewer_corrupted_images_are_spread_and_said() -> None:
    inside = Suite("id", paint_images(120), np.arange(100))
    [first, *_] = corruption_suites(inside, 10)
    assert first.indices.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert "10 of the 100" in first.remarks[-1]
    assert isinstance(inside.images.reader, Paint)
    assert inside.images.classes == CLASSES
