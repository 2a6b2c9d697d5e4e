"""A small vision-language data set drawn on the spot, and settings that train on it in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
DOMAINS = {"bright": 1.0, "dark": 0.5}


def draw_colours(root: Path, count: int = 12) -> Path:
    """`domain/colour/0000.png`: plain colours with noise, so that the picture alone decides."""
    rng = np.random.default_rng(0)
    for domain, light in DOMAINS.items():
        for name, colour in COLOURS.items():
            (root / domain / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(light * np.array(colour) + rng.normal(0, 12, (24, 24, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / domain / name / f"{number:04d}.png"
                )
    return root


SMALL: dict[str, Any] = {
    "student": "test_resnet",
    "size": 32,
    "width": 16,
    "heads": 2,
    "layers": 2,
    "batch_size": 8,
    "steps": 3,
}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_colours(tmp_path_factory.mktemp("colours") / "colours")


@pytest.fixture
def small(colours: Path) -> Callable[..., dict[str, Any]]:
    """`small(**changes)` gives settings for a three-step run."""
    return lambda **changes: {
        **SMALL,
        "task": "ve",
        "data": str(colours),
        "teacher": "toy",
        "control": "none",
        **changes,
    }
