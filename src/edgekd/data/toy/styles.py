"""Four drawing styles for posed shapes: photo, painting, cartoon, sketch.

A style renders parts, colours by role and a scene. It draws at twice the final size and reduces the result, which
smooths Pillow's hard edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from edgekd.data.toy.shapes import CANVAS, Part, Points, Role, box, turned

SIZE = CANVAS // 2
"""Side of a finished image in pixels."""

Colour = tuple[int, int, int]
Values = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Scene:
    """Background of an object: two colours, the position of the horizon, and the cells of the texture."""

    far: Colour
    near: Colour
    horizon: float
    """0 (top) to 1 (bottom); 0 gives a gradient without an edge."""
    stretch: tuple[int, int]
    """Cells of the texture along x and y: (4, 24) gives horizontal streaks."""


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    """Return a mixture of `one` and `other`, with `share` (0 to 1) of `other`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _grey(level: float) -> Colour:
    value = round(level)
    return value, value, value


def _image(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _paint(canvas: ImageDraw.ImageDraw, part: Part, colour: Colour | int) -> None:
    points = part.points.ravel().tolist()
    if part.width:
        canvas.line(points, fill=colour, width=max(2, round(part.width)), joint="curve")
    else:
        canvas.polygon(points, fill=colour)


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: int) -> Image.Image:
    """Return smooth grey noise: a grid of `cells` random values, enlarged to `size` pixels."""
    return Image.fromarray(rng.integers(0, 256, cells[::-1], dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def _backdrop(scene: Scene, size: int) -> Image.Image:
    """Return the scene without texture: a gradient, or two areas that meet at the horizon."""
    column = np.linspace(0, 1, size)[:, None]  # [H, 1]
    if scene.horizon:
        share = np.where(column < scene.horizon, column * 0.3, 0.75 + 0.25 * column)
    else:
        share = column
    rows = np.array(scene.far) * (1 - share) + np.array(scene.near) * share  # [H, 3]
    return Image.fromarray(rows.astype(np.uint8)[:, None, :]).resize(
        (size, size), Image.Resampling.NEAREST
    )


def _clutter(canvas: ImageDraw.ImageDraw, rng: Random, colours: list[Colour], count: int) -> None:
    """Draw background objects of none of the classes: blocks, pebbles, twigs."""
    for _ in range(count):
        x, y, radius = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(5, 20)
        colour = rng.choice(colours)
        kind = rng.random()
        if kind < 0.4:
            canvas.ellipse(
                (x - radius, y - radius * 0.6, x + radius, y + radius * 0.6), fill=colour
            )
        elif kind < 0.7:
            block = box("main", -radius, -radius * 0.5, radius, radius * 0.5).points
            corners = turned(block, rng.uniform(0, 180)) + np.array([x, y])
            canvas.polygon(corners.ravel().tolist(), fill=colour)
        else:
            canvas.line(
                (x, y, x + rng.uniform(-45, 45), y + rng.uniform(-45, 45)),
                fill=colour,
                width=rng.randint(2, 6),
            )


def _flat(parts: list[Part], colours: Mapping[Role, Colour], backdrop: Image.Image) -> Image.Image:
    canvas = ImageDraw.Draw(backdrop)
    for part in parts:
        _paint(canvas, part, colours[part.role])
    return backdrop


def _photo(
    parts: list[Part], colours: Mapping[Role, Colour], scene: Scene, rng: Random, seed: int
) -> Image.Image:
    grain = np.random.default_rng(seed)
    backdrop = _backdrop(scene, CANVAS)
    near = [_mix(scene.near, _grey(rng.uniform(0, 255)), rng.uniform(0.1, 0.6)) for _ in range(3)]
    _clutter(ImageDraw.Draw(backdrop), rng, near, rng.randint(0, 9))
    backdrop = backdrop.reduce(2)
    texture = np.asarray(_noise(grain, scene.stretch, SIZE), np.float32)
    texture = texture + 0.6 * np.asarray(
        _noise(grain, (3 * scene.stretch[0], 3 * scene.stretch[1]), SIZE), np.float32
    )
    behind: Values = np.asarray(
        backdrop.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 2.5))), np.float32
    )
    behind = behind * (
        0.75 + (texture / 255 - 0.8)[..., None] * rng.uniform(0.3, 0.8) + 0.25
    )  # [H, W, 3]

    mask_big = Image.new("L", (CANVAS, CANVAS))
    canvas = ImageDraw.Draw(mask_big)
    for part in parts:
        _paint(canvas, part, 255)
    mask = mask_big.reduce(2)
    solid = np.asarray(mask, np.float32)[..., None] / 255  # [H, W, 1]
    across, down = rng.choice((-1, 1)) * rng.randint(2, 4), rng.randint(2, 4)
    soft = np.asarray(mask.filter(ImageFilter.BoxBlur(3)), np.float32) / 255
    shadow = np.roll(soft, (down, across), axis=(0, 1))[..., None]
    behind = behind * (1 - rng.uniform(0.2, 0.55) * shadow)

    # Use the blurred silhouette as height, so that its slope towards the light gives shading.
    body: Values = np.asarray(
        _flat(parts, colours, Image.new("RGB", (CANVAS, CANVAS))).reduce(2), np.float32
    )
    slope = soft - np.roll(soft, (-down, -across), axis=(0, 1))
    surface = np.asarray(_noise(grain, (12, 12), SIZE), np.float32) / 255 - 0.5
    body = (
        body * (1 + rng.uniform(0.5, 1.1) * slope + 0.25 * surface)[..., None]
        + 50 * np.maximum(slope - 0.2, 0)[..., None]
    )

    light = np.linspace(-1, 1, SIZE, dtype=np.float32)
    lamp = (
        1
        + rng.uniform(-0.25, 0.25) * light[None, :, None]
        + rng.uniform(-0.25, 0.25) * light[:, None, None]
    )
    cast = np.array([rng.uniform(0.88, 1.12) for _ in range(3)], np.float32) * rng.uniform(
        0.75, 1.2
    )
    picture = (behind * (1 - solid) + body * solid) * lamp * cast
    image = _image(picture).filter(ImageFilter.BoxBlur(rng.uniform(0.0, 0.8)))
    speckle = grain.integers(-12, 13, (SIZE, SIZE, 3), dtype=np.int16)
    return _image(np.asarray(image, np.int16) + speckle)


def _painting(
    parts: list[Part], colours: Mapping[Role, Colour], scene: Scene, rng: Random, seed: int
) -> Image.Image:
    grain = np.random.default_rng(seed)
    pigment: Colour = rng.choice(
        ((150, 110, 60), (90, 100, 130), (120, 80, 80), (200, 190, 150), (70, 90, 70))
    )
    share = rng.uniform(0.12, 0.35)
    muted = {role: _mix(colour, pigment, share) for role, colour in colours.items()}
    scene = replace(
        scene, far=_mix(scene.far, pigment, share), near=_mix(scene.near, pigment, share)
    )
    backdrop = _backdrop(scene, CANVAS)
    _clutter(
        ImageDraw.Draw(backdrop),
        rng,
        [_mix(scene.near, pigment, 0.5), _mix(scene.far, scene.near, 0.5)],
        rng.randint(0, 5),
    )
    model = _flat(parts, muted, backdrop)

    canvas_image = model.filter(ImageFilter.BoxBlur(3))
    canvas = ImageDraw.Draw(canvas_image)
    sweep, coarse = rng.uniform(0, math.pi), rng.uniform(0.8, 1.3)
    # Broad strokes first, then fine ones; each has the colour of the flat image at its start.
    for count, length, width, shade in ((80, 18, 8, 26), (320, 6, 3, 16)):
        at = grain.integers(0, CANVAS, (count, 2))
        angle = sweep + 1.2 * np.sin(at[:, 0] / 34 + sweep) + grain.uniform(-0.4, 0.4, count)
        reach = np.stack([np.cos(angle), np.sin(angle)], axis=1) * length * coarse / 2
        taken = np.asarray(model)[at[:, 1], at[:, 0]].astype(np.int16) + grain.integers(
            -shade, shade + 1, (count, 1)
        )
        lines = np.concatenate([at - reach, at + reach], axis=1).tolist()
        for line, colour in zip(lines, np.clip(taken, 0, 255).tolist(), strict=True):
            canvas.line(line, fill=tuple(colour), width=round(width * coarse))
    weave = grain.integers(-10, 11, (SIZE, 1, 1)) + grain.integers(-10, 11, (1, SIZE, 1))
    return _image(np.asarray(canvas_image.reduce(2)).astype(np.int16) + weave)


def _cartoon(
    parts: list[Part], colours: Mapping[Role, Colour], scene: Scene, rng: Random, seed: int
) -> Image.Image:
    backdrop = _backdrop(scene if scene.horizon else replace(scene, near=scene.far), CANVAS)
    canvas = ImageDraw.Draw(backdrop)
    if rng.random() < 0.5:
        spot, radius = _mix(scene.far, (255, 255, 255), rng.uniform(0.2, 0.6)), rng.uniform(4, 12)
        for x in range(rng.randint(0, 24), CANVAS, 28):
            for y in range(rng.randint(0, 24), CANVAS, 28):
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=spot)
    _clutter(
        canvas,
        rng,
        [_mix(scene.near, (255, 255, 255), 0.4), _mix(scene.near, (0, 0, 0), 0.3)],
        rng.randint(0, 4),
    )
    ink, pen = _grey(rng.uniform(0, 45)), rng.randint(3, 6)
    for part in parts:
        if part.width:
            _paint(canvas, replace(part, width=part.width + 2 * pen * 0.8), ink)
        _paint(canvas, part, colours[part.role])
        if not part.width:
            closed = [*part.points.ravel().tolist(), *part.points[:2].ravel().tolist()]
            canvas.line(closed, fill=ink, width=pen, joint="curve")
    return backdrop.reduce(2)


def _wobbly(points: Points, rng: np.random.Generator, shake: float) -> list[float]:
    """Return the polyline with added points on every edge, each randomly displaced."""
    share = np.linspace(0, 1, 4, endpoint=False)[None, :, None]
    dense = (points[:-1, None] * (1 - share) + points[1:, None] * share).reshape(-1, 2)
    dense = np.concatenate([dense, points[-1:]])
    return list(
        (dense + rng.uniform(-shake, shake, dense.shape) + rng.uniform(-shake, shake, 2))
        .ravel()
        .tolist()
    )


def _sketch(
    parts: list[Part], colours: Mapping[Role, Colour], scene: Scene, rng: Random, seed: int
) -> Image.Image:
    grain = np.random.default_rng(seed)
    paper, lead = rng.uniform(215, 250), rng.uniform(20, 110)
    sheet = Image.new("L", (CANVAS, CANVAS), round(paper))
    canvas = ImageDraw.Draw(sheet)
    pen, shake, passes = rng.randint(2, 3), rng.uniform(0.5, 1.6), rng.choice((1, 2, 2, 3))
    for _ in range(rng.randint(0, 4)):
        stray = grain.uniform(0, CANVAS, (1, 2)) + np.array(
            [[0, 0], [rng.uniform(-52, 52), rng.uniform(-22, 22)]]
        )
        canvas.line(_wobbly(stray, grain, shake), fill=round(lead + 60), width=pen - 1)
    shaded, slant, gap = rng.random() < 0.7, rng.uniform(20, 70), rng.uniform(5, 9)
    for part in parts:
        if part.width:
            _paint(canvas, replace(part, width=part.width + 2 * pen), round(lead))
            _paint(canvas, part, round(paper))
            continue
        _paint(canvas, part, round(paper))
        tone = sum(colours[part.role]) / 3
        if shaded and tone < 190:
            _hatch(
                sheet,
                part,
                slant + rng.uniform(-10, 10),
                gap * (0.6 + tone / 190),
                round(lead + 35),
            )
        closed = np.concatenate([part.points, part.points[:1]])
        for _ in range(passes):
            canvas.line(
                _wobbly(closed, grain, shake),
                fill=round(lead + rng.uniform(0, 30)),
                width=pen,
                joint="curve",
            )
    fibre = grain.integers(-9, 10, (SIZE, SIZE), dtype=np.int16)
    smudge = np.asarray(_noise(grain, (4, 4), SIZE), np.int16) // 16 - 8
    grey = np.clip(np.asarray(sheet.reduce(2), np.int16) + fibre + smudge, 0, 255).astype(np.uint8)
    warmth = np.array([1.0, rng.uniform(0.97, 1.0), rng.uniform(0.9, 1.0)])
    return Image.fromarray((grey[..., None] * warmth).astype(np.uint8))


def _hatch(sheet: Image.Image, part: Part, slant: float, gap: float, grey: int) -> None:
    """Draw parallel pencil lines inside a polygon."""
    low, high = part.points.min(axis=0), part.points.max(axis=0)
    reach = float(np.linalg.norm(high - low)) / 2
    inside = Image.new("1", sheet.size)
    ImageDraw.Draw(inside).polygon(part.points.ravel().tolist(), fill=1)
    lines = Image.new("1", sheet.size)
    canvas = ImageDraw.Draw(lines)
    for offset in np.arange(-reach, reach, gap):
        line = turned(np.array([(-reach, offset), (reach, offset)]), slant) + (low + high) / 2
        canvas.line(line.ravel().tolist(), fill=1, width=2)
    sheet.paste(grey, mask=ImageChops.logical_and(inside, lines))


STYLES: Mapping[
    str, Callable[[list[Part], Mapping[Role, Colour], Scene, Random, int], Image.Image]
] = {
    "photo": _photo,
    "painting": _painting,
    "cartoon": _cartoon,
    "sketch": _sketch,
}
"""Domain → function from posed parts, colours by role and a scene to an RGB image of `SIZE` × `SIZE`."""
