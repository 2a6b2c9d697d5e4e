"""The built-in toy data: ten classes of objects, each drawn as photo, painting, cartoon and sketch.

In the student's images, a class mostly has its usual colours and background (green trees, fish under water), as in a
collected data set. In the toy teacher's images (`world=True`), colours and background do not depend on the class. All
images are determined by the seed.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.files import cache_folder, stored_array
from edgekd.data.toy.shapes import SHAPES, Role, pose
from edgekd.data.toy.styles import SIZE, STYLES, Colour, Scene

VERSION = "toy-1"
"""Part of every key; increase it with any change to the drawings."""
CLASSES = tuple(SHAPES)
DOMAINS = tuple(STYLES)
PER_CLASS = 80
"""Default number of images per class and domain."""
HABIT = 0.9
"""Probabilities that a student's image has a usual colour, and a usual background, of its class."""

COLOURS: Mapping[str, Colour] = {
    "red": (205, 45, 40),
    "orange": (235, 135, 35),
    "yellow": (240, 205, 60),
    "green": (60, 145, 60),
    "blue": (50, 95, 190),
    "purple": (125, 65, 160),
    "pink": (235, 150, 180),
    "brown": (125, 80, 45),
    "white": (235, 230, 220),
    "grey": (125, 125, 130),
}
SCENES: Mapping[str, Scene] = {
    "the sky": Scene((100, 160, 230), (200, 225, 245), 0.0, (4, 6)),
    "a meadow": Scene((150, 195, 235), (95, 160, 60), 0.55, (14, 14)),
    "the forest": Scene((60, 90, 50), (85, 65, 40), 0.7, (10, 7)),
    "the sea": Scene((190, 215, 235), (40, 90, 150), 0.5, (3, 22)),
    "deep water": Scene((50, 140, 180), (15, 50, 100), 0.0, (5, 12)),
    "a road": Scene((175, 180, 190), (90, 90, 95), 0.5, (20, 20)),
    "a table": Scene((185, 140, 90), (140, 95, 55), 0.0, (3, 26)),
    "a cloth": Scene((150, 50, 60), (105, 30, 50), 0.0, (24, 24)),
    "the night": Scene((15, 20, 50), (45, 45, 90), 0.0, (6, 6)),
    "sand": Scene((225, 205, 160), (200, 170, 115), 0.0, (26, 20)),
}


@dataclass(frozen=True)
class Habit:
    """Usual colours and backgrounds of a class: names in `COLOURS` and `SCENES`."""

    main: tuple[str, ...]
    second: tuple[str, ...]
    scenes: tuple[str, ...]


HABITS: Mapping[str, Habit] = {
    "butterfly": Habit(("orange", "purple"), ("yellow", "pink"), ("a meadow", "the sky")),
    "car": Habit(("red", "blue"), ("grey",), ("a road",)),
    "cup": Habit(("white", "blue"), ("red", "white"), ("a table",)),
    "fish": Habit(("orange", "grey"), ("yellow", "red"), ("deep water",)),
    "house": Habit(("white", "yellow"), ("red", "brown"), ("a meadow", "a road")),
    "key": Habit(("yellow", "grey"), ("yellow",), ("a cloth", "a table")),
    "mushroom": Habit(("red", "brown"), ("white",), ("the forest",)),
    "sailboat": Habit(("white",), ("brown", "red"), ("the sea",)),
    "star": Habit(("yellow", "white"), ("orange",), ("the night",)),
    "tree": Habit(("green",), ("brown",), ("a meadow", "the sky")),
}


@dataclass(frozen=True)
class Look:
    """Attributes of an image besides class and domain: names of the colours of two parts and of the scene."""

    main: str
    second: str
    scene: str


def look(cls: str, seed: int, *, world: bool = False) -> Look:
    """Return the colours and the scene of an image. With `world`, they do not depend on the class."""
    rng, habit = Random(seed), HABITS[cls]

    def choose(usual: tuple[str, ...], every: Mapping[str, object]) -> str:
        return rng.choice(usual if not world and rng.random() < HABIT else tuple(every))

    return Look(
        choose(habit.main, COLOURS), choose(habit.second, COLOURS), choose(habit.scenes, SCENES)
    )


def draw(cls: str, domain: str, seed: int, *, world: bool = False) -> Image.Image:
    """Return an RGB image of 72 × 72 pixels. Equal arguments give equal images on every machine.

    With `world` (the teacher's images), colours and background do not depend on the class.
    """
    shown, rng = look(cls, seed, world=world), Random(seed + 1)
    place = SCENES[shown.scene]
    horizon = place.horizon and min(0.9, max(0.1, place.horizon + rng.uniform(-0.15, 0.15)))
    scene = Scene(_jitter(place.far, rng), _jitter(place.near, rng), horizon, place.stretch)
    colours: dict[Role, Colour] = {
        "main": _jitter(COLOURS[shown.main], rng),
        "second": _jitter(COLOURS[shown.second], rng),
        "light": _jitter((225, 225, 225), rng),
        "dark": _jitter((45, 40, 45), rng),
    }
    return STYLES[domain](pose(cls, rng), colours, scene, rng, seed)


def _jitter(colour: Colour, rng: Random) -> Colour:
    gain = rng.uniform(0.8, 1.15)
    red, green, blue = (
        min(255, max(0, round(value * gain + rng.uniform(-18, 18)))) for value in colour
    )
    return red, green, blue


def image_key(seed: int, domain: str, cls: str, number: int, *, world: bool = False) -> str:
    """Return the key of an image, 32 hex digits that seed its drawing; equal keys give equal images."""
    text = "\0".join((VERSION, "world" if world else "suite", str(seed), domain, cls, str(number)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def image_seed(key: str) -> int:
    """Return the seed for `draw` of the image with this key."""
    return int(key[:15], 16)


@dataclass(frozen=True)
class ToyReader:
    """Read image `i` of a suite, ordered by domain and class, from the cache. Picklable and thread-safe.

    The first read draws all images, which takes about 10 s for the 3,200 of `load_images("toy")`.
    """

    seed: int
    per_class: int
    world: bool

    def __len__(self) -> int:
        return len(DOMAINS) * len(CLASSES) * self.per_class

    def place(self, i: int) -> tuple[int, int, int]:
        """Return the index of the domain, the index of the class, and the number of the image within both."""
        if not 0 <= operator.index(i) < len(self):
            raise IndexError(i)
        rest, number = divmod(int(i), self.per_class)
        domain, cls = divmod(rest, len(CLASSES))
        return domain, cls, number

    def key(self, i: int) -> str:
        domain, cls, number = self.place(i)
        return image_key(self.seed, DOMAINS[domain], CLASSES[cls], number, world=self.world)

    def draw(self, i: int) -> Image.Image:
        domain, cls, _ = self.place(i)
        return draw(CLASSES[cls], DOMAINS[domain], image_seed(self.key(i)), world=self.world)

    def __call__(self, i: int, draft: int | None = None) -> Image.Image:
        self.place(i)  # checks the bounds
        name = f"{VERSION}-{self.seed}-{self.per_class}{'-world' if self.world else ''}.npy"
        with _OPENING:
            drawings = _drawings(cache_folder("toy") / name, self)
        return Image.fromarray(drawings[operator.index(i)])


_OPENING = threading.Lock()


@functools.lru_cache(maxsize=4)
def _drawings(path: Path, reader: ToyReader) -> NDArray[np.uint8]:
    """Return uint8 `[N, 72, 72, 3]`, mapped from disk. Only one thread draws, since more are not faster."""
    shape = (len(reader), SIZE, SIZE, 3)
    numbers = range(len(reader))
    return stored_array(
        path, "toy images", shape, lambda: map(np.asarray, map(reader.draw, numbers))
    )
