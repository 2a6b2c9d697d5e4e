"""Ten kinds of object as polygons, each a little different every time.

A shape is a list of `Part` in a unit square (x right, y down, about -1 to 1); `pose` puts it somewhere on the canvas.
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
"""Side of the canvas that shapes are posed on, pixels: twice a finished drawing."""

Role = Literal["main", "second", "light", "dark"]
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One filled polygon, or an open stroke where `width` > 0. `points` is `[n, 2]`."""

    points: Points
    role: Role
    width: float = 0.0


def poly(*pairs: tuple[float, float]) -> Points:
    return np.array(pairs, dtype=np.float64)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return poly((left, top), (right, top), (right, bottom), (left, bottom))


def oval(
    x: float,
    y: float,
    rx: float,
    ry: float,
    *,
    turn: float = 0.0,
    arc: tuple[float, float] = (0, 360),
) -> Points:
    """Ellipse, or the part of it between two angles (degrees, 90 is down), turned by `turn` degrees."""
    angles = np.radians(np.linspace(arc[0], arc[1], 22))
    points = np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1)
    return turned(points, turn) + poly((x, y))


def turned(points: Points, degrees: float) -> Points:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotated: Points = points @ np.array([[cos, sin], [-sin, cos]])
    return rotated


def _butterfly(rng: Random) -> list[Part]:
    up, low, lift = rng.uniform(0.42, 0.58), rng.uniform(0.3, 0.42), rng.uniform(20, 50)
    parts: list[Part] = []
    for side in (-1, 1):
        parts.append(Part(oval(side * 0.5, -0.32, up, 0.36, turn=-side * lift), "main"))
        parts.append(Part(oval(side * 0.38, 0.36, low, 0.27, turn=side * 48), "second"))
        parts.append(Part(oval(side * 0.56, -0.38, 0.16, 0.13), "light"))
        parts.append(Part(poly((0, -0.4), (side * 0.12, -0.7), (side * 0.26, -0.86)), "dark", 0.05))
    return [*parts, Part(oval(0, 0, 0.09, rng.uniform(0.48, 0.62)), "dark")]


def _car(rng: Random) -> list[Part]:
    roof, back, front = rng.uniform(-0.62, -0.42), rng.uniform(-0.75, -0.55), rng.uniform(0.3, 0.6)
    body = poly(
        (-0.98, -0.02), (-0.9, -0.12), (0.85, -0.12), (1.0, 0.08), (1.0, 0.32), (-1.0, 0.32)
    )
    cabin = poly((back, -0.1), (back + 0.2, roof), (front - 0.25, roof), (front, -0.1))
    wheel, pane = rng.uniform(0.2, 0.27), roof + 0.09
    middle = (back + front) / 2
    parts = [Part(cabin, "main"), Part(body, "main")]
    parts.append(
        Part(
            poly(
                (back + 0.13, -0.12),
                (back + 0.25, pane),
                (middle - 0.03, pane),
                (middle - 0.03, -0.12),
            ),
            "light",
        )
    )
    parts.append(
        Part(
            poly(
                (middle + 0.04, -0.12),
                (middle + 0.04, pane),
                (front - 0.29, pane),
                (front - 0.11, -0.12),
            ),
            "light",
        )
    )
    for x in (-0.56, 0.56):
        parts += [
            Part(oval(x, 0.34, wheel, wheel), "dark"),
            Part(oval(x, 0.34, wheel * 0.45, wheel * 0.45), "second"),
        ]
    return parts


def _cup(rng: Random) -> list[Part]:
    top, foot, deep = rng.uniform(0.55, 0.72), rng.uniform(0.34, 0.56), rng.uniform(0.5, 0.75)
    parts = [Part(oval(top * 0.92, -0.05, 0.32, deep * 0.5, arc=(-100, 100)), "main", 0.13)]
    if rng.random() < 0.5:
        parts.append(Part(oval(0, deep, 0.95, 0.13), "second"))
    parts.append(Part(poly((-top, -0.5), (top, -0.5), (foot, deep), (-foot, deep)), "main"))
    if rng.random() < 0.4:
        parts.append(Part(box(-foot, 0.0, foot, 0.2), "second"))
    parts += [
        Part(oval(0, -0.5, top, 0.16), "light"),
        Part(oval(0, -0.48, top * 0.82, 0.1), "dark"),
    ]
    if rng.random() < 0.5:
        for x in (-0.2, 0.15):
            parts.append(
                Part(
                    poly((x, -0.62), (x + 0.09, -0.74), (x - 0.05, -0.86), (x + 0.06, -1.0)),
                    "light",
                    0.05,
                )
            )
    return parts


def _fish(rng: Random) -> list[Part]:
    deep, tail, forked = rng.uniform(0.32, 0.5), rng.uniform(0.3, 0.48), rng.uniform(0.0, 0.2)
    return [
        Part(poly((0.5, 0), (1.0, -tail), (1.0 - forked, 0), (1.0, tail)), "second"),
        Part(
            poly((-0.3, -deep * 0.8), (0.05, -deep - rng.uniform(0.12, 0.3)), (0.4, -deep * 0.5)),
            "second",
        ),
        Part(oval(-0.15, 0, 0.8, deep), "main"),
        Part(oval(-0.42, 0, 0.2, deep * 0.8, arc=(-70, 70)), "dark", 0.04),
        Part(poly((-0.1, 0.02), (0.25, -0.1), (0.25, 0.16)), "second"),
        Part(oval(-0.62, -0.1, 0.1, 0.1), "light"),
        Part(oval(-0.63, -0.1, 0.05, 0.05), "dark"),
    ]


def _house(rng: Random) -> list[Part]:
    wide, eaves, ridge = rng.uniform(0.6, 0.85), rng.uniform(-0.2, 0.05), rng.uniform(0.0, 0.4)
    parts: list[Part] = []
    if rng.random() < 0.6:
        parts.append(Part(box(wide * 0.4, -0.85, wide * 0.65, -0.2), "second"))
    parts.append(Part(box(-wide, eaves, wide, 0.85), "main"))
    over = wide + 0.14
    parts.append(
        Part(
            poly(
                (-over, eaves),
                (-ridge * wide - 0.02, -0.9),
                (ridge * wide + 0.02, -0.9),
                (over, eaves),
            ),
            "second",
        )
    )
    door = rng.uniform(-0.3, 0.2)
    parts.append(Part(box(door - 0.14, 0.32, door + 0.14, 0.85), "dark"))
    for x in (-wide * 0.65, wide * 0.65):
        if abs(x - door) > 0.3:
            parts.append(Part(box(x - 0.14, 0.18, x + 0.14, 0.46), "light"))
    return parts


def _key(rng: Random) -> list[Part]:
    bow, teeth = rng.uniform(0.26, 0.36), rng.choice((2, 3))
    outline = [(-0.4, 0.075), (-0.4, -0.075), (0.95, -0.075), (0.95, 0.075)]
    for number in range(teeth):
        right, down = 0.95 - 0.23 * number, rng.uniform(0.25, 0.42)
        outline += [(right, 0.075), (right, down), (right - 0.14, down), (right - 0.14, 0.075)]
    parts = [Part(poly(*outline), "main")]
    square = poly((-bow, 0), (0, -bow), (bow, 0), (0, bow), (-bow, 0)) + np.array([-0.65, 0])
    ring = square if rng.random() < 0.3 else oval(-0.65, 0, bow, bow)
    return [*parts, Part(ring, "main", rng.uniform(0.13, 0.19))]


def _mushroom(rng: Random) -> list[Part]:
    cap, rise, stalk = rng.uniform(0.65, 0.95), rng.uniform(0.55, 0.85), rng.uniform(0.16, 0.28)
    parts = [
        Part(
            poly((-stalk, -0.1), (stalk, -0.1), (stalk * 1.35, 0.9), (-stalk * 1.35, 0.9)), "second"
        )
    ]
    parts.append(Part(oval(0, 0.0, cap, rise, arc=(180, 360)), "main"))
    parts.append(Part(oval(0, 0.0, cap, 0.12), "second"))
    for x, y in ((-0.45, -0.35), (0.05, -0.62), (0.45, -0.28)):
        if rng.random() < 0.8:
            radius = rng.uniform(0.08, 0.14)
            parts.append(Part(oval(x * cap, y * rise, radius, radius), "light"))
    return parts


def _sailboat(rng: Random) -> list[Part]:
    mast, boom, jib = rng.uniform(-1.0, -0.8), rng.uniform(0.5, 0.75), rng.uniform(0.4, 0.65)
    parts = [
        Part(poly((0, mast), (0, 0.5)), "dark", 0.07),
        Part(poly((0.06, mast + 0.06), (boom + 0.06, 0.32), (0.06, 0.32)), "main"),
        Part(poly((-0.06, mast + 0.2), (-jib - 0.06, 0.32), (-0.06, 0.32)), "main"),
        Part(poly((-0.9, 0.45), (0.9, 0.45), (0.6, 0.85), (-0.65, 0.85)), "second"),
    ]
    if rng.random() < 0.5:
        parts.append(Part(poly((0, mast), (0.25, mast + 0.09), (0, mast + 0.18)), "second"))
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
    parts = [
        Part(poly((-trunk, 0.1), (trunk, 0.1), (trunk * 1.5, 0.95), (-trunk * 1.5, 0.95)), "second")
    ]
    if rng.random() < 0.5:
        wide = rng.uniform(0.5, 0.75)
        for level in range(3):
            half, bottom = wide * (1 - 0.26 * level), 0.5 - 0.42 * level
            parts.append(Part(poly((-half, bottom), (0, bottom - 0.65), (half, bottom)), "main"))
    else:
        for _ in range(rng.choice((4, 5, 6))):
            radius = rng.uniform(0.3, 0.42)
            parts.append(
                Part(
                    oval(rng.uniform(-0.42, 0.42), rng.uniform(-0.6, 0.02), radius, radius), "main"
                )
            )
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
"""Class → its shape, and how far (degrees, either way) it may be turned."""


def pose(cls: str, rng: Random) -> list[Part]:
    """A shape of the class, mirrored, stretched, turned, scaled and placed: parts in pixels of the big canvas."""
    shape, turn = SHAPES[cls]
    parts = shape(rng)
    scale = CANVAS * rng.uniform(0.34, 0.46)
    stretch = np.array([rng.choice((-1, 1)) * rng.uniform(0.85, 1.15), 1.0])
    angle, slant = rng.uniform(-turn, turn), rng.uniform(-0.12, 0.12)
    slack = CANVAS / 2 - 0.9 * scale
    centre = np.array(
        [CANVAS / 2 + rng.uniform(-slack, slack), CANVAS / 2 + rng.uniform(-slack, slack)]
    )
    shear = np.array([[1.0, 0.0], [slant, 1.0]])
    return [
        replace(
            part,
            points=turned((part.points * stretch) @ shear, angle) * scale + centre,
            width=part.width * scale,
        )
        for part in parts
    ]
