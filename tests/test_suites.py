"""Suites from folders: DomainBed layouts, class subsets, ImageNet's ids, cue conflicts, artifacts without their run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import CLASSES, Paint, fake_measurements, model, paint_images, subject
from PIL import Image

from edgekd.benchmark.accuracy import Suite
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.rescore import rescore
from edgekd.data import ImageSet, load_images
from edgekd.errors import EdgekdError
from edgekd.layouts import LAYOUTS, known_layout, unwrapped
from edgekd.split import make_split
from edgekd.suites import (
    clean_suite,
    corruption_suites,
    cue_conflict_suite,
    folder_suites,
    lone_suites,
    named_folders,
    split_suites,
    unknown_suites,
)
from edgekd.unlabelled import load_unlabelled
from edgekd.vocabulary import spoken_as

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
    [suite] = folder_suites("x", str(root), ANIMALS, trained_on=set(images.keys[:5]))
    assert suite.indices.tolist() == list(range(5, 12))
    assert suite.remarks == ("5 images left out, since the run trained or selected on them.",)
    with pytest.raises(EdgekdError, match="All images of"):
        folder_suites("x", str(root), ANIMALS, trained_on=set(images.keys))


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
    [suite] = unknown_suites("music", images, inside, ANIMALS, trained_on={images.keys[0]})
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
    assert {suite.name: suite.indices.tolist() for suite in lone_suites(images, source)} == own


def test_a_lone_artifact_on_other_images_calls_its_training_domains_seen() -> None:
    images = domains_of_paint()
    source = {
        "split_hash": "another",
        "split_seed": 3,
        "test_domain": "photo",
        "train_domains": ["art", "sketch"],
    }
    suites = lone_suites(images, source)
    assert [(suite.name, suite.kind) for suite in suites] == [
        ("seen:art", "seen"), ("ood:photo", "domain"), ("seen:sketch", "seen"),
    ]  # fmt: skip
    assert "training images may be among these" in suites[0].remarks[0]
    unsaid = lone_suites(images, {})
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
    report = run_benchmark([one], [suite], tmp_path / "out", quick=True)
    [row] = report.cue_conflicts
    assert (row.n, row.shape, row.texture, row.shape_bias) == (4, 0.5, 0.25, pytest.approx(2 / 3))
    assert rescore(tmp_path / "out").cue_conflicts == report.cue_conflicts
    paint(root, ["cat/cat7.png"])
    with pytest.raises(EdgekdError, match="does not follow the file names"):
        cue_conflict_suite("texture-shape", str(root), ANIMALS)


def test_corruption_cells_scores_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgekd.benchmark.corruptions as module

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
    report = run_benchmark(subjects, suites, tmp_path / "out", quick=True)
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
