from __future__ import annotations

import pickle
import socket
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from edgekd.core.errors import EdgekdError
from edgekd.data import toy
from edgekd.data.image_set import toy_images
from edgekd.distill.classification.predict import teacher_predict
from edgekd.distill.models.students import make_student, toy_weights
from edgekd.distill.models.teachers import load_teacher


@pytest.mark.parametrize(
    ("cls", "domain", "expected"),
    [
        ("house", "photo", (133.9, 144.6, 119.9)),
        ("fish", "painting", (84.0, 97.2, 94.8)),
        ("house", "cartoon", (151.8, 156.5, 142.5)),
        ("fish", "sketch", (205.3, 203.3, 192.8)),
    ],
)
def test_drawings_stay(cls: str, domain: str, expected: tuple[float, float, float]) -> None:
    # A new VERSION may change these; an unchanged one may not. The tolerance covers other PIL releases.
    drawn = np.asarray(toy.draw(cls, domain, 7), np.float64).mean(axis=(0, 1))
    assert list(drawn) == pytest.approx(expected, abs=4.0)


def test_habits_hold_in_the_suite_and_not_in_the_world() -> None:
    def green_share(world: bool) -> float:
        return sum(toy.look("tree", seed, world=world).main == "green" for seed in range(500)) / 500

    # By habit, and 1 in 10 colours otherwise.
    assert green_share(world=False) == pytest.approx(toy.HABIT + (1 - toy.HABIT) / 10, abs=0.06)
    assert green_share(world=True) == pytest.approx(1 / 10, abs=0.06)


def test_suite_is_balanced_named_and_distinct() -> None:
    images = toy_images(per_class=3)
    assert len(images) == 4 * 10 * 3
    groups = zip(images.domain_of.tolist(), images.labels.tolist(), strict=True)
    assert set(Counter(groups).values()) == {3}
    again = pickle.loads(pickle.dumps(images))
    for i in (0, 47, len(images) - 1):
        domain, cls, _ = images.ids[i].split("/")
        assert images.domains[images.domain_of[i]] == domain
        assert images.classes[images.labels[i]] == cls
        assert np.array_equal(np.asarray(again.read(i)), np.asarray(images.read(i)))
    with pytest.raises(IndexError):
        images.read(-1)
    others = [toy_images(seed=1, per_class=3), toy_images(per_class=3, world=True)]
    assert len({key for suite in (images, *others) for key in suite.keys}) == 3 * len(images)


def test_weights_are_shipped_for_mobilenetv3_only() -> None:
    path = toy_weights("mobilenetv3")
    assert path.stat().st_size < 9_000_000
    assert toy_weights("mobilenetv3_small") is None
    with pytest.raises(EdgekdError, match="No toy weights are shipped for resnet18"):
        make_student("resnet18", pretrained="toy", classes=10)


@torch.inference_mode()
def test_shipped_features_tell_kinds_apart() -> None:
    """Nearest class mean on photos of fresh seeds, no training: chance is 10 %."""
    student = make_student("mobilenetv3", pretrained="toy", size=48, classes=10).eval()

    def features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = toy_images(seed=seed, per_class=5)
        photos = np.flatnonzero(images.domain_of == images.domains.index("photo"))
        pixels = np.stack([student.preprocess.pixels(images.read(int(i))) for i in photos])
        views = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        found = student.backbone((views - student.mean) / student.std)
        return normalize(found, dim=-1), torch.from_numpy(images.labels[photos])

    train, labels = features(901)
    means = torch.stack([train[labels == kind].mean(0) for kind in range(10)])
    test, expected = features(902)
    assert ((test @ means.T).argmax(1) == expected).float().mean() > 0.5


@torch.inference_mode()
def test_the_shipped_teacher_is_good_in_all_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading the toy teacher opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    teacher: Any = load_teacher("toy")
    images = toy_images(seed=777, per_class=3)
    pixels = np.stack([teacher.preprocess.pixels(images.read(i)) for i in range(len(images))])
    for template in ("a photo of a {}", "itap of a {}."):
        bank = teacher.text_bank(images.classes, [template])
        right = teacher_predict(teacher, bank)(pixels).argmax(axis=1) == images.labels
        for domain, name in enumerate(images.domains):
            assert right[images.domain_of == domain].mean() >= 0.9, name
