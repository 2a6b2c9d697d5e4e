from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    rgb_to_grayscale,
)

from edgekd.distill.inputs.restyle import KINDS, Restyle, RestylePolicy, restyle, restyle_params
from edgekd.distill.inputs.views import ViewParams, ViewPolicy, plain, render, view_params

IDENTITY = ViewPolicy(
    min_area=1.0, max_area=1.0, max_aspect=1.0,
    flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grey=0.0,
)  # fmt: skip

KEYS = ["a" * 32, "b" * 32, "c" * 32]


def only(**changes: float) -> ViewPolicy:
    return replace(IDENTITY, **changes)


def smooth(side: int, *, low: int = 90, high: int = 160) -> torch.Tensor:
    """A smooth picture, uint8 `[1, side, side, 3]`, whose colours stay clear of 0 and 255 under small changes."""
    line = np.linspace(0, 1, side)
    red, green = np.meshgrid(line, line)
    picture = low + (high - low) * np.stack([red, green, (red + 1 - green) / 2], axis=-1)
    return torch.from_numpy(picture.round().astype(np.uint8))[None]


def drawn(name: str, policy: ViewPolicy) -> tuple[ViewParams, torch.Tensor, torch.Tensor]:
    """Parameters of one view of `policy`, the plain view and the coloured one, float `[3, 32, 32]`."""
    pixels = smooth(32)
    params = view_params([name * 32], [3], policy)
    return params, plain(pixels)[0], render(pixels, params, 32)[0]


def test_a_view_is_a_pure_function_of_key_number_and_policy() -> None:
    policy = ViewPolicy()
    together = view_params(KEYS, [0, 1, 2], policy)
    backwards = view_params(KEYS[::-1], [2, 1, 0], policy)
    for part, reverse in zip(together, backwards, strict=True):
        assert torch.equal(part, reverse.flip(0))
    alone = view_params(KEYS[1:2], [1], ViewPolicy())
    assert all(torch.equal(part[1:2], one) for part, one in zip(together, alone, strict=True))
    changed = [replace(policy, **{name: 0.71}).id for name in vars(policy)]
    assert len({policy.id, *changed}) == len(changed) + 1


def test_the_identity_policy_renders_the_plain_image_and_a_flip_its_mirror() -> None:
    make = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=make)
    view = render(pixels, view_params(KEYS, [0, 5, 9], IDENTITY), 32)
    assert view.shape == (3, 3, 32, 32)
    assert view.dtype == torch.float32
    assert torch.allclose(view, plain(pixels), atol=1e-5)
    assert plain(pixels)[2, 1, 3, 4] == pixels[2, 3, 4, 1] / 255
    mirrored = render(pixels, view_params(KEYS, [0, 1, 2], only(flip=1.0)), 32)
    assert torch.allclose(mirrored, plain(pixels).flip(3), atol=1e-5)


def test_a_crop_shows_what_pillow_cuts_from_the_same_box() -> None:
    side = 240
    line = np.linspace(0, 3 * np.pi, side)
    waves = 127 + 100 * np.sin(line)[:, None] * np.cos(line)[None, :]
    picture = np.stack([waves, waves.T, np.add.outer(line, line) * 12], axis=-1).astype(np.uint8)
    params = view_params(KEYS[:1], [7], only(min_area=0.7, max_area=0.7, max_aspect=4 / 3))
    (sx, _, cx), (_, sy, cy) = params.theta[0].tolist()
    assert sx * sy == pytest.approx(0.7, rel=1e-3)
    assert 3 / 4 <= sx / sy <= 4 / 3
    box = tuple((edge + 1) / 2 * side for edge in (cx - sx, cy - sy, cx + sx, cy + sy))
    assert min(box) >= -1e-3
    assert max(box) <= side + 1e-3
    inside = tuple(min(max(edge, 0.0), float(side)) for edge in box)
    cut = Image.fromarray(picture).resize((120, 120), Image.Resampling.BILINEAR, box=inside)
    view = render(torch.from_numpy(picture)[None], params, 120)[0].permute(1, 2, 0).numpy()
    assert np.abs(view - np.asarray(cut) / 255).mean() < 0.01


@pytest.mark.parametrize(
    ("kind", "adjust"),
    [
        ("brightness", adjust_brightness),
        ("contrast", adjust_contrast),
        ("saturation", adjust_saturation),
    ],
)
def test_colours(kind: str, adjust: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    params, image, view = drawn("c", only(**{kind: 0.3}))
    matrix = params.colour[0]
    # Saturation s mixes: s + (1 - s)·0.299 on the diagonal, (1 - s)·0.299 beside it.
    factor = float(matrix[0, 0] - matrix[1, 0] if kind == "saturation" else matrix[0, 0])
    assert 0.01 < abs(factor - 1) < 0.31
    assert torch.allclose(view, adjust(image, factor), atol=2e-3)
    _, image, view = drawn("a", only(grey=1.0))
    assert torch.allclose(view, rgb_to_grayscale(image, num_output_channels=3), atol=2e-3)


def test_hue_turns_colours_and_leaves_greys_alone() -> None:
    # Turning by a third in YIQ is not HSV's turn, but both take saturated red towards the same neighbour.
    params = view_params(["f" * 32] * 40, range(40), only(hue=0.3))
    grey = torch.full((40, 8, 8, 3), 120, dtype=torch.uint8)
    assert torch.allclose(render(grey, params, 8), plain(grey), atol=1e-4)
    red = torch.tensor([180, 90, 90], dtype=torch.uint8).expand(40, 8, 8, 3)
    turned = render(red, params, 8)[:, :, 0, 0]  # [40, 3]
    luma = turned @ torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(luma, torch.full_like(luma, (0.299 * 180 + 0.701 * 90) / 255), atol=1e-3)
    # In the plane of I and Q the colours turn by up to 0.3 of a full turn to either side.
    chroma = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    before, after = (torch.complex(*(rgb @ chroma.T).T) for rgb in (plain(red)[:, :, 0, 0], turned))
    turns = (after / before).angle() / (2 * math.pi)
    assert turns.min() < -0.2 < 0.2 < turns.max()
    assert turns.abs().max() < 0.301


def test_student_and_teacher_see_the_same_crop() -> None:
    big, small = smooth(173, low=0, high=255), smooth(77, low=0, high=255)
    params = view_params(KEYS[:1], [4], ViewPolicy())
    teacher = render(big, params, 144)
    student = render(small, params, 64)
    shrunk = torch.nn.functional.interpolate(teacher, size=64, mode="area")
    assert (shrunk - student).abs().mean() < 0.01
    other = render(small, view_params(KEYS[:1], [5], ViewPolicy()), 64)
    assert (shrunk - other).abs().mean() > 0.03


MANY_KEYS = tuple(f"{number:032x}" for number in range(64))


def of_kind(kind: str, *draws: float) -> Restyle:
    """One image restyled in one way; the draws not given are 0, and 1 for the last two."""
    numbers = torch.tensor([[*draws, *[0.0, 0.0, 0.0, 0.0, 1.0, 1.0][len(draws) :]]])
    kernels = torch.zeros(int(kind == "convolution"), 3, 3, 7, 7)
    empty = torch.zeros(0, dtype=torch.uint8)
    return Restyle(np.array([KINDS.index(kind)]), numbers, kernels, empty)


def noise(count: int, side: int = 24) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_about_half_of_the_views_are_restyled_in_all_ways() -> None:
    keys = [f"{number:032x}" for number in range(2000)]
    how, partners = restyle_params(keys, [0] * len(keys), RestylePolicy())
    counts = np.bincount(how.kinds + 1, minlength=len(KINDS) + 1)
    assert abs(counts[0] / len(keys) - 0.5) < 0.04
    assert counts[1:].min() > 150
    assert len(partners) == counts[1 + KINDS.index("fourier")]
    assert len(how.kernels) == counts[1 + KINDS.index("convolution")]


def test_a_restyled_view_is_a_function_of_content_visit_and_policy() -> None:
    views, partner = noise(len(MANY_KEYS)), torch.zeros(1, 28, 28, 3, dtype=torch.uint8)

    def drawn(visit: int, policy: RestylePolicy, rows: slice = slice(None)) -> Tensor:
        how, places = restyle_params(MANY_KEYS[rows], [visit] * len(MANY_KEYS[rows]), policy)
        how = how._replace(partners=partner.expand(len(places), -1, -1, -1))
        return restyle(views[rows].clone(), how)

    one = drawn(3, RestylePolicy())
    assert torch.equal(one, drawn(3, RestylePolicy()))
    assert torch.allclose(one[5:40], drawn(3, RestylePolicy(), slice(5, 40)), atol=1e-5)
    for other in (drawn(4, RestylePolicy()), drawn(3, RestylePolicy(weights=(1, 1, 2, 1, 1)))):
        assert not torch.allclose(one, other)
    assert ((one >= 0) & (one <= 1)).all()
    assert torch.equal(drawn(3, RestylePolicy(share=0.0)), views)


def test_a_fourier_mixture_keeps_the_phase_and_takes_the_other_amplitude() -> None:
    own = noise(1, 16)
    partner = (255 * noise(2, 20)[1:]).permute(0, 2, 3, 1).byte()
    nothing, everything = (of_kind("fourier", x)._replace(partners=partner) for x in (0.0, 1.0))
    assert torch.allclose(restyle(own.clone(), nothing), own, atol=1e-5)
    whole = restyle(own.clone() * 0.1 + 0.45, everything)
    mean = (partner[0, 2:18, 2:18].float() / 255).mean(dim=(0, 1))  # the amplitude at frequency 0
    assert torch.allclose(whole.mean(dim=(2, 3))[0], mean, atol=0.05)


def test_convolutions_keep_mean_and_layout_and_solarisation_turns_what_is_bright() -> None:
    own = torch.full((1, 3, 16, 16), 0.3)
    own[..., 8:] = 0.6
    kernels = torch.zeros(1, 3, 3, 7, 7)
    kernels[0, :, :, 3, 3] = torch.eye(3) * -2  # inverts
    drawn = restyle(own.clone(), of_kind("convolution")._replace(kernels=kernels))
    assert drawn.mean() == pytest.approx(0.45, abs=1e-4)
    assert (drawn[..., :8] > drawn[..., 8:].max()).all()
    own = torch.tensor([0.1, 0.49, 0.5, 0.9]).expand(1, 3, 4, 4).contiguous()
    drawn = restyle(own, of_kind("solarise", 0.5))
    assert torch.allclose(drawn[0, 0, 0], torch.tensor([0.1, 0.49, 0.5, 0.1]))


def test_lines_stand_where_the_picture_changes() -> None:
    own = torch.full((1, 3, 64, 64), 0.8)
    own[:, :, 24:40, 24:40] = 0.2
    drawn = restyle(own.clone(), of_kind("lines", 0.9, 0.9, 0.5, 0.9))
    assert (drawn[..., :12, :12] > 0.99).all()  # paper
    assert (drawn[..., 30:34, 30:34] > 0.9).all()  # nor is the inside filled
    assert drawn[0, 0, 32, 25] < 0.3
    coloured = restyle(own.clone(), of_kind("lines", 0.9, 0.9, 0.5, 0.1))
    assert torch.allclose(coloured[..., :12, :12], own[..., :12, :12], atol=0.01)


def paint(posterised: float, contours: float) -> Restyle:
    return of_kind("paint", posterised, 0.0, 0.0, 0.9, contours, 0.9)


def test_paint_drops_texture_and_keeps_edges() -> None:
    own = noise(1, 64) * 0.1 + 0.2
    own[..., 32:] += 0.6
    flat = restyle(own.clone(), paint(posterised=0.9, contours=0.9))
    assert flat[..., :28].std() < own[..., :28].std() / 2
    assert (flat[..., 36:].mean() - flat[..., :28].mean()) > 0.5
    few = restyle(own.clone(), paint(posterised=0.1, contours=0.9))  # 5 levels
    assert set(few.unique().tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    inked = restyle(own.clone(), paint(posterised=0.9, contours=0.1))
    assert inked[..., 32].mean() < flat[..., 32].mean() - 0.2
    assert torch.allclose(inked[..., 40:], flat[..., 40:])


def test_the_teacher_sees_the_same_view_but_for_what_depends_on_the_batch() -> None:
    how, places = restyle_params(MANY_KEYS, [0] * len(MANY_KEYS), RestylePolicy())
    how = how._replace(partners=torch.zeros(len(places), 28, 28, 3, dtype=torch.uint8))
    views = noise(len(MANY_KEYS))
    students, teachers = restyle(views.clone(), how), restyle(views.clone(), how.for_teacher())
    mixed = torch.from_numpy(how.kinds == KINDS.index("fourier"))
    assert torch.equal(students[~mixed], teachers[~mixed])
    assert torch.equal(teachers[mixed], views[mixed])
    assert not torch.equal(students[mixed], views[mixed])
