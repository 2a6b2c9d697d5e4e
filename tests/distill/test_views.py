from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    rgb_to_grayscale,
)

from edgekd.distill.views import ViewParams, ViewPolicy, plain, render, view_params

IDENTITY = ViewPolicy(
    min_area=1.0,
    max_area=1.0,
    max_aspect=1.0,
    flip=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grey=0.0,
)
KEYS = ["a" * 32, "b" * 32, "c" * 32]


def only(**changes: float) -> ViewPolicy:
    return ViewPolicy(**{**IDENTITY.__dict__, **changes})


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


@pytest.mark.parametrize(
    "other",
    [(KEYS[1], 0, ViewPolicy()), (KEYS[0], 1, ViewPolicy()), (KEYS[0], 0, ViewPolicy(grey=0.2))],
    ids=["another image", "another number", "another policy"],
)
def test_other_views_differ(other: tuple[str, int, ViewPolicy]) -> None:
    pixels = smooth(38)
    first = render(pixels, view_params(KEYS[:1], [0], ViewPolicy()), 32)
    second = render(pixels, view_params([other[0]], [other[1]], other[2]), 32)
    assert (first - second).abs().max() > 0.02


def test_the_policy_id_changes_with_every_number() -> None:
    changed = [
        ViewPolicy(**{**ViewPolicy().__dict__, name: 0.71}).id for name in ViewPolicy().__dict__
    ]
    assert len({ViewPolicy().id, *changed}) == len(changed) + 1


def test_the_identity_policy_renders_the_plain_image() -> None:
    pixels = torch.randint(
        0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    view = render(pixels, view_params(KEYS, [0, 5, 9], IDENTITY), 32)
    assert view.shape == (3, 3, 32, 32)
    assert view.dtype == torch.float32
    assert torch.allclose(view, plain(pixels), atol=1e-5)
    assert plain(pixels)[2, 1, 3, 4] == pixels[2, 3, 4, 1] / 255


def test_the_identity_policy_at_another_size_is_a_bilinear_resize() -> None:
    pixels = smooth(64, low=0, high=255)
    view = render(pixels, view_params(KEYS[:1], [0], IDENTITY), 32)
    # Halving with bilinear sampling is the mean of each 2×2 block.
    expected = plain(pixels).reshape(1, 3, 32, 2, 32, 2).mean(dim=(3, 5))
    assert torch.allclose(view, expected, atol=1e-5)


def test_a_flip_mirrors_left_and_right() -> None:
    pixels = torch.randint(
        0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    view = render(pixels, view_params(KEYS[:1], [0], only(flip=1.0)), 32)
    assert torch.allclose(view, plain(pixels).flip(3), atol=1e-5)


def test_a_crop_shows_what_pillow_cuts_from_the_same_box() -> None:
    side = 240
    line = np.linspace(0, 3 * np.pi, side)
    waves = 127 + 100 * np.sin(line)[:, None] * np.cos(line)[None, :]
    picture = np.stack([waves, waves.T, np.add.outer(line, line) * 12], axis=-1).astype(np.uint8)
    params = view_params(KEYS[:1], [7], only(min_area=0.7, max_area=0.7, max_aspect=4 / 3))
    (sx, _, cx), (_, sy, cy) = params.theta[0].tolist()
    assert 0.7 * 0.999 < sx * sy < 0.7 * 1.001
    assert 3 / 4 <= sx / sy <= 4 / 3
    box = tuple(
        (centre + sign * half + 1) / 2 * side
        for sign in (-1, 1)
        for centre, half in ((cx, sx), (cy, sy))
    )
    assert min(box) >= -1e-3
    assert max(box) <= side + 1e-3
    box = tuple(min(max(edge, 0.0), float(side)) for edge in box)
    expected = (
        np.asarray(Image.fromarray(picture).resize((120, 120), Image.Resampling.BILINEAR, box=box))
        / 255
    )
    view = render(torch.from_numpy(picture)[None], params, 120)[0].permute(1, 2, 0).numpy()
    assert np.abs(view - expected).mean() < 0.01
    assert (
        np.abs(view - np.asarray(Image.fromarray(picture).resize((120, 120))) / 255).mean() > 0.03
    )


def test_all_crops_keep_the_promised_area_and_stay_inside() -> None:
    theta = view_params(["d" * 32] * 500, range(500), ViewPolicy()).theta.numpy()
    half_x, half_y = np.abs(theta[:, 0, 0]), theta[:, 1, 1]
    assert (half_x * half_y).min() > 0.69
    assert (half_x * half_y).max() <= 1.0
    assert (np.abs(theta[:, 0, 2]) + half_x).max() < 1 + 1e-5
    assert (np.abs(theta[:, 1, 2]) + half_y).max() < 1 + 1e-5
    assert 0.4 < (theta[:, 0, 0] < 0).mean() < 0.6


def test_brightness_is_torchvisions() -> None:
    params, image, view = drawn("a", only(brightness=0.2))
    factor = float(params.colour[0, 0, 0])
    assert 0.8 <= factor <= 1.2
    assert abs(factor - 1) > 0.01
    assert torch.allclose(view, adjust_brightness(image, factor), atol=2e-3)


def test_contrast_is_torchvisions() -> None:
    params, image, view = drawn("b", only(contrast=0.3))
    factor = float(params.colour[0, 0, 0])
    assert abs(factor - 1) > 0.01
    assert torch.allclose(view, adjust_contrast(image, factor), atol=2e-3)


def test_contrast_follows_brightness_as_in_torchvision() -> None:
    params, image, view = drawn("e", only(contrast=0.3, brightness=0.2))
    lift, product = float(params.lift[0]), float(params.colour[0, 0, 0])  # (1 - c)·b and c·b
    brightness = lift + product
    expected = adjust_contrast(adjust_brightness(image, brightness), product / brightness)
    assert abs(brightness - 1) > 0.01
    assert torch.allclose(view, expected, atol=2e-3)


def test_saturation_is_torchvisions() -> None:
    params, image, view = drawn("c", only(saturation=0.3))
    factor = float(
        params.colour[0, 0, 0] - params.colour[0, 1, 0]
    )  # s + (1-s)·0.299 less (1-s)·0.299
    assert abs(factor - 1) > 0.01
    assert torch.allclose(view, adjust_saturation(image, factor), atol=2e-3)


def test_grey_is_torchvisions() -> None:
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
    green_side = turned[:, 1] > turned[:, 2]
    yellow = adjust_hue(plain(red)[:1, :, :1, :1], 0.1)[0, :, 0, 0]
    assert yellow[1] > yellow[2]
    assert 8 < int(green_side.sum()) < 32


def test_contrast_passes_unchanged_through_saturation_hue_and_grey() -> None:
    grey = (
        torch.tensor([[60, 60, 60], [180, 180, 180]], dtype=torch.uint8)
        .repeat_interleave(32, 0)
        .reshape(1, 8, 8, 3)
    )
    full = view_params(["9" * 32], [0], only(contrast=0.3, saturation=0.3, hue=0.3, grey=1.0))
    bare = view_params(["9" * 32], [0], only(contrast=0.3, saturation=0.3, hue=0.3))
    assert torch.allclose(render(grey, full, 8).std(), render(grey, bare, 8).std(), rtol=0.3)
    mean = plain(grey).mean()
    # Contrast pivots on the mean grey, and the other three keep greys: the mean stays.
    assert torch.allclose(render(grey, bare, 8).mean(), mean, atol=1e-4)


def test_values_stay_between_0_and_1() -> None:
    noise = torch.randint(
        0, 256, (64, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    view = render(noise, view_params(["7" * 32] * 64, range(64), ViewPolicy()), 16)
    assert view.min() == 0
    assert view.max() == 1


def test_student_and_teacher_see_the_same_crop() -> None:
    big, small = smooth(173, low=0, high=255), smooth(77, low=0, high=255)
    params = view_params(KEYS[:1], [4], ViewPolicy())
    teacher = render(big, params, 144)
    student = render(small, params, 64)
    shrunk = torch.nn.functional.interpolate(teacher, size=64, mode="area")
    assert (shrunk - student).abs().mean() < 0.01
    other = render(small, view_params(KEYS[:1], [5], ViewPolicy()), 64)
    assert (shrunk - other).abs().mean() > 0.03
