from __future__ import annotations

import importlib.resources
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import toy_images


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(importlib.resources.files("edgekd.data.toy_teacher")))


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    patch = pytest.MonkeyPatch()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading the toy teacher opened a connection")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    try:
        return open_clip.create_model_from_pretrained(
            f"local-dir:{folder}", return_transform=False
        ).eval()
    finally:
        patch.undo()


def test_files_are_small_enough_for_a_wheel(folder: Path) -> None:
    assert (
        sum(
            path.stat().st_size
            for path in folder.iterdir()
            if path.suffix in (".json", ".safetensors")
        )
        <= 6_000_000
    )


@pytest.mark.parametrize("template", ["a photo of a {}", "itap of a {}.", "{}"])
@torch.inference_mode()
def test_zero_shot_is_high_in_all_four_domains(
    folder: Path, model: torch.nn.Module, template: str
) -> None:
    settings = open_clip.get_model_preprocess_cfg(model)
    size = settings["size"][0] if isinstance(settings["size"], (tuple, list)) else settings["size"]
    preprocess = Preprocess(
        size=size,
        resize=settings["resize_mode"],
        interpolation=settings["interpolation"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )
    images = toy_images(seed=777, per_class=6)
    pixels = torch.from_numpy(
        np.stack([preprocess.pixels(images.read(i)) for i in range(len(images))])
    )
    scaled = (pixels.float() / 255 - torch.tensor(preprocess.mean)) / torch.tensor(
        preprocess.std
    )  # [N, H, W, 3]
    vectors = model.encode_image(scaled.permute(0, 3, 1, 2))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(
        [template.format(name) for name in images.classes]
    )
    guesses = (vectors @ normalize(model.encode_text(tokens), dim=-1).T).argmax(1).numpy()
    for domain, name in enumerate(images.domains):
        inside = images.domain_of == domain
        assert (guesses[inside] == images.labels[inside]).mean() >= 0.9, name
