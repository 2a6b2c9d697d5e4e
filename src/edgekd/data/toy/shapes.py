"""Random polygon shapes of the ten toy classes.

A shape is a list of `Part` in coordinates of about -1 to 1 (x right, y down). `pose` places it on the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CANVAS = 144
"""Side of the canvas in pixels, twice that of the finished image."""
Role = Literal["main", "second", "light", "dark"]
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """A filled polygon, or an open stroke if `width` > 0. `points` is `[n, 2]`."""

    points: Points
    role: Role
    width: float = 0.0


def turned(points: Points, degrees: float) -> Points:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotated: Points = points @ np.array([[cos, sin], [-sin, cos]])
    return rotated


def polygon(role: Role, *pairs: tuple[float, float], width: float = 0.0) -> Part:
    return Part(np.array(pairs, dtype=np.float64), role, width)


def box(role: Role, left: float, top: float, right: float, bottom: float) -> Part:
    return polygon(role, (left, top), (right, top), (right, bottom), (left, bottom))


def oval(
    role: Role,
    x: float,
    y: float,
    rx: float,
    ry: float,
    *,
    turn: float = 0.0,
    arc: tuple[float, float] = (0, 360),
    width: float = 0.0,
) -> Part:
    """Return an ellipse, or its part between two angles (degrees, 90 is down), rotated by `turn` degrees."""
    angles = np.radians(np.linspace(arc[0], arc[1], 22))
    points = np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1)
    return Part(turned(points, turn) + np.array([(x, y)]), role, width)


def _butterfly(rng: Random) -> list[Part]:
    up, low, lift = rng.uniform(0.42, 0.58), rng.uniform(0.3, 0.42), rng.uniform(20, 50)
    parts: list[Part] = []
    for side in (-1, 1):
        parts += [
            oval("main", side * 0.5, -0.32, up, 0.36, turn=-side * lift),
            oval("second", side * 0.38, 0.36, low, 0.27, turn=side * 48),
            oval("light", side * 0.56, -0.38, 0.16, 0.13),
            polygon("dark", (0, -0.4), (side * 0.12, -0.7), (side * 0.26, -0.86), width=0.05),
        ]
    return [*parts, oval("dark", 0, 0, 0.09, rng.uniform(0.48, 0.62))]


def _car(rng: Random) -> list[Part]:
    roof, back, front = rng.uniform(-0.62, -0.42), rng.uniform(-0.75, -0.55), rng.uniform(0.3, 0.6)
    wheel, pane = rng.uniform(0.2, 0.27), roof + 0.09
    left, right = (back + front) / 2 - 0.03, (back + front) / 2 + 0.04
    parts = [
        polygon("main", (back, -0.1), (back + 0.2, roof), (front - 0.25, roof), (front, -0.1)),
        polygon(
            "main",
            *((-0.98, -0.02), (-0.9, -0.12), (0.85, -0.12), (1.0, 0.08), (1.0, 0.32), (-1.0, 0.32)),
        ),
        polygon("light", (back + 0.13, -0.12), (back + 0.25, pane), (left, pane), (left, -0.12)),
        polygon(
            "light", (right, -0.12), (right, pane), (front - 0.29, pane), (front - 0.11, -0.12)
        ),
    ]
    for x in (-0.56, 0.56):
        parts += [
            oval("dark", x, 0.34, wheel, wheel),
            oval("second", x, 0.34, wheel * 0.45, wheel * 0.45),
        ]
    return parts


def _cup(rng: Random) -> list[Part]:
    top, foot, deep = rng.uniform(0.55, 0.72), rng.uniform(0.34, 0.56), rng.uniform(0.5, 0.75)
    parts = [oval("main", top * 0.92, -0.05, 0.32, deep * 0.5, arc=(-100, 100), width=0.13)]
    if rng.random() < 0.5:
        parts.append(oval("second", 0, deep, 0.95, 0.13))
    parts.append(polygon("main", (-top, -0.5), (top, -0.5), (foot, deep), (-foot, deep)))
    if rng.random() < 0.4:
        parts.append(box("second", -foot, 0.0, foot, 0.2))
    parts += [oval("light", 0, -0.5, top, 0.16), oval("dark", 0, -0.48, top * 0.82, 0.1)]
    if rng.random() < 0.5:
        for x in (-0.2, 0.15):
            steam = ((x, -0.62), (x + 0.09, -0.74), (x - 0.05, -0.86), (x + 0.06, -1.0))
            parts.append(polygon("light", *steam, width=0.05))
    return parts


def _fish(rng: Random) -> list[Part]:
    deep, tail, forked = rng.uniform(0.32, 0.5), rng.uniform(0.3, 0.48), rng.uniform(0.0, 0.2)
    fin = -deep - rng.uniform(0.12, 0.3)
    return [
        polygon("second", (0.5, 0), (1.0, -tail), (1.0 - forked, 0), (1.0, tail)),
        polygon("second", (-0.3, -deep * 0.8), (0.05, fin), (0.4, -deep * 0.5)),
        oval("main", -0.15, 0, 0.8, deep),
        oval("dark", -0.42, 0, 0.2, deep * 0.8, arc=(-70, 70), width=0.04),
        polygon("second", (-0.1, 0.02), (0.25, -0.1), (0.25, 0.16)),
        oval("light", -0.62, -0.1, 0.1, 0.1),
        oval("dark", -0.63, -0.1, 0.05, 0.05),
    ]


def _house(rng: Random) -> list[Part]:
    wide, eaves, ridge = rng.uniform(0.6, 0.85), rng.uniform(-0.2, 0.05), rng.uniform(0.0, 0.4)
    parts: list[Part] = []
    if rng.random() < 0.6:
        parts.append(box("second", wide * 0.4, -0.85, wide * 0.65, -0.2))
    over, top = wide + 0.14, ridge * wide + 0.02
    parts.append(box("main", -wide, eaves, wide, 0.85))
    parts.append(polygon("second", (-over, eaves), (-top, -0.9), (top, -0.9), (over, eaves)))
    door = rng.uniform(-0.3, 0.2)
    parts.append(box("dark", door - 0.14, 0.32, door + 0.14, 0.85))
    for x in (-wide * 0.65, wide * 0.65):
        if abs(x - door) > 0.3:
            parts.append(box("light", x - 0.14, 0.18, x + 0.14, 0.46))
    return parts


def _key(rng: Random) -> list[Part]:
    bow, teeth = rng.uniform(0.26, 0.36), rng.choice((2, 3))
    outline = [(-0.4, 0.075), (-0.4, -0.075), (0.95, -0.075), (0.95, 0.075)]
    for number in range(teeth):
        right, down = 0.95 - 0.23 * number, rng.uniform(0.25, 0.42)
        outline += [(right, 0.075), (right, down), (right - 0.14, down), (right - 0.14, 0.075)]
    square = np.array([(-bow, 0), (0, -bow), (bow, 0), (0, bow), (-bow, 0)]) + np.array([-0.65, 0])
    ring = square if rng.random() < 0.3 else oval("main", -0.65, 0, bow, bow).points
    return [polygon("main", *outline), Part(ring, "main", rng.uniform(0.13, 0.19))]


def _mushroom(rng: Random) -> list[Part]:
    cap, rise, stalk = rng.uniform(0.65, 0.95), rng.uniform(0.55, 0.85), rng.uniform(0.16, 0.28)
    foot = stalk * 1.35
    parts = [
        polygon("second", (-stalk, -0.1), (stalk, -0.1), (foot, 0.9), (-foot, 0.9)),
        oval("main", 0, 0.0, cap, rise, arc=(180, 360)),
        oval("second", 0, 0.0, cap, 0.12),
    ]
    for x, y in ((-0.45, -0.35), (0.05, -0.62), (0.45, -0.28)):
        if rng.random() < 0.8:
            radius = rng.uniform(0.08, 0.14)
            parts.append(oval("light", x * cap, y * rise, radius, radius))
    return parts


def _sailboat(rng: Random) -> list[Part]:
    mast, boom, jib = rng.uniform(-1.0, -0.8), rng.uniform(0.5, 0.75), rng.uniform(0.4, 0.65)
    parts = [
        polygon("dark", (0, mast), (0, 0.5), width=0.07),
        polygon("main", (0.06, mast + 0.06), (boom + 0.06, 0.32), (0.06, 0.32)),
        polygon("main", (-0.06, mast + 0.2), (-jib - 0.06, 0.32), (-0.06, 0.32)),
        polygon("second", (-0.9, 0.45), (0.9, 0.45), (0.6, 0.85), (-0.65, 0.85)),
    ]
    if rng.random() < 0.5:
        parts.append(polygon("second", (0, mast), (0.25, mast + 0.09), (0, mast + 0.18)))
    return parts


def _star(rng: Random) -> list[Part]:
    points, inner = rng.choice((5, 5, 5, 6)), rng.uniform(0.36, 0.52)
    angles = np.pi * np.arange(2 * points) / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 0.95, 0.95 * inner)
    outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    parts = [Part(outline, "main")]
    if rng.random() < 0.5:
        parts.append(Part(outline * rng.uniform(0.45, 0.65), "second"))
    return parts


def _tree(rng: Random) -> list[Part]:
    trunk = rng.uniform(0.09, 0.16)
    foot = trunk * 1.5
    parts = [polygon("second", (-trunk, 0.1), (trunk, 0.1), (foot, 0.95), (-foot, 0.95))]
    if rng.random() < 0.5:
        wide = rng.uniform(0.5, 0.75)
        for level in range(3):
            half, bottom = wide * (1 - 0.26 * level), 0.5 - 0.42 * level
            parts.append(polygon("main", (-half, bottom), (0, bottom - 0.65), (half, bottom)))
    else:
        for _ in range(rng.choice((4, 5, 6))):
            radius = rng.uniform(0.3, 0.42)
            x, y = rng.uniform(-0.42, 0.42), rng.uniform(-0.6, 0.02)
            parts.append(oval("main", x, y, radius, radius))
    return parts


SHAPES: Mapping[str, tuple[Callable[[Random], list[Part]], float]] = {
    "butterfly": (_butterfly, 30),
    "car": (_car, 10),
    "cup": (_cup, 12),
    "fish": (_fish, 25),
    "house": (_house, 8),
    "key": (_key, 45),
    "mushroom": (_mushroom, 15),
    "sailboat": (_sailboat, 12),
    "star": (_star, 36),
    "tree": (_tree, 8),
}
"""Class → shape, and maximum rotation in degrees in both directions."""


def pose(cls: str, rng: Random) -> list[Part]:
    """Return a shape of the class with random mirroring, stretching, rotation, scale and place, in canvas pixels."""
    shape, turn = SHAPES[cls]
    parts = shape(rng)
    scale = CANVAS * rng.uniform(0.34, 0.46)
    stretch = np.array([rng.choice((-1, 1)) * rng.uniform(0.85, 1.15), 1.0])
    angle, slant = rng.uniform(-turn, turn), rng.uniform(-0.12, 0.12)
    slack = CANVAS / 2 - 0.9 * scale
    centre = CANVAS / 2 + np.array([rng.uniform(-slack, slack), rng.uniform(-slack, slack)])
    shear = np.array([[1.0, 0.0], [slant, 1.0]])

    def placed(points: Points) -> Points:
        return turned((points * stretch) @ shear, angle) * scale + centre

    return [replace(one, points=placed(one.points), width=one.width * scale) for one in parts]
