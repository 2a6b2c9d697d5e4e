"""Reproducible augmentation: view k of an image depends only on the image's content hash, k and the policy.

So the same view can be rendered for the student and for the teacher at different times and on different machines, and
a cached teacher embedding belongs to exactly the pixels that the student sees. The policy is DomainBed's training
augmentation (EVALUATION E.1): random resized crop, flip, colour jitter, sometimes grey. Brightness, contrast,
saturation, hue and grey are affine in RGB, so the colours of a view are one 3×3 matrix and one offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from edgekd.core.files import short_hash
from edgekd.distill.inputs.restyle import RestylePolicy, restyle, restyle_params, view_generator

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601 luma
_YIQ = np.array([_GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=np.float64)
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class ViewPolicy:
    """Ranges of a random view, as fractions of the image's area, of 1.0 (colour) and of a full turn (hue)."""

    min_area: float = 0.7
    max_area: float = 1.0
    max_aspect: float = 4 / 3
    flip: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.3
    grey: float = 0.1

    @property
    def id(self) -> str:
        """Return 16 hex digits that identify the policy and its implementation."""
        return short_hash("views-1", repr(sorted(asdict(self).items())))


class ViewParams(NamedTuple):
    """Crops and colours of a batch of views, float32 on one device."""

    theta: Tensor
    """`[B, 2, 3]` output → input coordinates, for `affine_grid`."""
    colour: Tensor
    """`[B, 3, 3]` RGB matrix."""
    lift: Tensor
    """`[B]` factor of the view's mean grey that is added to every channel (for contrast)."""


def view_params(keys: Sequence[str], views: Sequence[int], policy: ViewPolicy) -> ViewParams:
    """Return the parameters of view `views[i]` of the image with content hash `keys[i]`."""
    theta = np.zeros((len(keys), 2, 3), dtype=np.float32)
    colour = np.zeros((len(keys), 3, 3), dtype=np.float32)
    lift = np.zeros(len(keys), dtype=np.float32)
    for row, (key, view) in enumerate(zip(keys, views, strict=True)):
        draw = view_generator(policy.id, key, view).random(10)
        theta[row] = _crop(draw[:4], policy, mirrored=draw[4] < policy.flip)
        colour[row], lift[row] = _colour(draw[5:9], policy, grey=draw[9] < policy.grey)
    return ViewParams(torch.from_numpy(theta), torch.from_numpy(colour), torch.from_numpy(lift))


def _crop(draw: np.ndarray, policy: ViewPolicy, *, mirrored: bool) -> np.ndarray:
    area = policy.min_area + (policy.max_area - policy.min_area) * draw[0]
    log_aspect = math.log(policy.max_aspect) * (2 * draw[1] - 1)
    width = min(1.0, math.sqrt(area * math.exp(log_aspect)))
    height = min(1.0, area / width)
    left, top = draw[2] * (1 - width), draw[3] * (1 - height)
    # affine_grid's coordinates run from -1 to 1 over the whole image.
    scale_x = -width if mirrored else width
    return np.array(
        [[scale_x, 0, 2 * left + width - 1], [0, height, 2 * top + height - 1]], dtype=np.float32
    )


def _colour(draw: np.ndarray, policy: ViewPolicy, *, grey: bool) -> tuple[np.ndarray, float]:
    brightness, contrast, saturation = (
        1 + amount * (2 * value - 1)
        for amount, value in zip(
            (policy.brightness, policy.contrast, policy.saturation), draw[:3], strict=True
        )
    )
    turn = 2 * math.pi * policy.hue * (2 * draw[3] - 1)
    rotation = np.array(
        [[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]]
    )
    to_grey = np.tile(_GREY, (3, 1))
    matrix = contrast * brightness * np.eye(3)
    matrix = (saturation * np.eye(3) + (1 - saturation) * to_grey) @ matrix
    matrix = (_RGB @ rotation @ _YIQ) @ matrix
    if grey:
        matrix = to_grey @ matrix
    # Saturation, hue and grey do not change greys, so the constant of the contrast passes through them unchanged.
    return matrix.astype(np.float32), float((1 - contrast) * brightness)


def render(pixels: Tensor, params: ViewParams, size: int) -> Tensor:
    """Cut and colour views: uint8 `[B, S, S, 3]`, a little larger than `size` → float32 `[B, 3, size, size]` in 0–1.

    The result is channels-last in memory.
    """
    params = ViewParams(*(part.to(pixels.device) for part in params))
    image = pixels.permute(0, 3, 1, 2).float()  # [B, 3, S, S], channels-last
    grid = affine_grid(params.theta, [len(image), 3, size, size], align_corners=False)
    view = (
        grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        / 255
    )
    grey = torch.from_numpy(_GREY).to(pixels.device)
    mean_grey = view.mean(dim=(2, 3)) @ grey  # [B]
    coloured = (
        torch.einsum("bij,bjhw->bihw", params.colour, view)
        + (params.lift * mean_grey)[:, None, None, None]
    )
    return coloured.clamp(0, 1).contiguous(memory_format=torch.channels_last)


def plain(pixels: Tensor) -> Tensor:
    """Return the un-augmented images: uint8 `[B, H, W, 3]` → float32 `[B, 3, H, W]` in 0–1, channels-last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Augmentation:
    """Views and their restyling, for the student and for the teacher."""

    policy: ViewPolicy = ViewPolicy()
    restyle: RestylePolicy | None = None

    @property
    def id(self) -> str:
        """Return the identity of the views, under which embeddings are cached."""
        return short_hash(self.policy.id, self.restyle.id) if self.restyle else self.policy.id

    def for_teacher(
        self, pixels: Tensor, keys: Sequence[str], views: Sequence[int], size: int
    ) -> Tensor:
        """Return the views for the teacher, float32 `[B, 3, size, size]` in 0–1.

        Args:
            pixels: uint8 `[B, S, S, 3]`. keys, views: content hash and view number of each image.
        """
        drawn = render(pixels, view_params(keys, views, self.policy), size)
        if self.restyle is None:
            return drawn
        return restyle(drawn, restyle_params(keys, views, self.restyle)[0].for_teacher())
