"""Restyled views: change the style of half of the views and keep their content.

The kinds are mixed amplitudes with another image (Fourier; FACT, Xu et al., CVPR 2021), random convolutions (RandConv,
Xu et al., ICLR 2021), line drawings (extended difference of Gaussians, Winnemöller et al. 2012), cartoons (Kuwahara
filter, posterised, with contours) and solarisation. The teacher embeds the same restyled view (consistent targets, as
in MobileCLIP, Vasu et al., CVPR 2024). For a Fourier mixture, whose partner is drawn from the global batch, the teacher
embeds the unmixed view. The result does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad
from torchvision.transforms.v2.functional import gaussian_blur, rgb_to_grayscale

from edgekd.core.files import short_hash

KINDS = ("fourier", "convolution", "lines", "paint", "solarise")
_KERNEL = 7
_WINDOW = 2 / 64
"""Side of the windows for flattening, as a fraction of the view's side."""
_BLURS = (0.5 / 64, 0.8 / 64, 1.3 / 64, 2.1 / 64)
"""Standard deviations as fractions of the view's side; a line drawing subtracts two neighbouring blurs."""
_PENS = (0.35 / 64, 0.6 / 64, 1 / 64)
"""Pen widths of cartoons: standard deviations of the blur before edge detection, as fractions of the view's side."""
_FAINTEST = 0.02
"""Minimum change of colour over two pixels for a contour."""


def view_generator(policy_id: str, key: str, view: int) -> np.random.Generator:
    """Return the generator of view `view` of the image with content hash `key`."""
    digest = hashlib.sha256(f"{policy_id}/{key}/{view}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True)
class RestylePolicy:
    """Fraction of restyled views, and the weights of the kinds in the order of `KINDS`."""

    share: float = 0.5
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)

    @property
    def id(self) -> str:
        """Return 16 hex digits that identify the policy and its implementation."""
        return short_hash("restyle-4", repr(sorted(asdict(self).items())))


class Restyle(NamedTuple):
    """Parameters for restyling a batch of views."""

    kinds: NDArray[np.int64]
    """`[B]`, index in `KINDS`, −1 for an unchanged view."""
    draws: Tensor
    """Float `[B, 6]` in 0–1: random parameters of each view."""
    kernels: Tensor
    """Float `[n, 3, 3, 7, 7]` of the `n` random convolutions, in order."""
    partners: Tensor
    """uint8 `[m, S, S, 3]`: other images for the `m` Fourier mixtures, in order."""

    def for_teacher(self) -> Restyle:
        """Return the restyling without the kinds that depend on other images."""
        kinds = np.where(self.kinds == KINDS.index("fourier"), -1, self.kinds)
        return self._replace(kinds=kinds)

    def rows(self, kind: str) -> Tensor:
        """Return the rows of the views of one kind, int64."""
        return torch.from_numpy(np.flatnonzero(self.kinds == KINDS.index(kind)))


def restyle_params(
    keys: Sequence[str], views: Sequence[int], policy: RestylePolicy
) -> tuple[Restyle, NDArray[np.float64]]:
    """Draw the restyling of view `views[i]` of the image with content hash `keys[i]`.

    Returns:
        The restyling without partners, and a number in 0–1 per Fourier mixture that selects its partner.
    """
    edges = policy.share * np.cumsum(policy.weights) / sum(policy.weights)
    kinds = np.full(len(keys), -1, dtype=np.int64)
    draws = np.zeros((len(keys), 6), dtype=np.float32)
    kernels, partners = [], []
    for row, (key, view) in enumerate(zip(keys, views, strict=True)):
        rng = view_generator(policy.id, key, view)
        kind, partner, *own = rng.random(8)
        draws[row] = own
        if kind >= policy.share:
            continue
        kinds[row] = int(np.searchsorted(edges, kind, side="right"))
        if KINDS[kinds[row]] == "fourier":
            partners.append(partner)
        elif KINDS[kinds[row]] == "convolution":
            kernels.append(_kernel(rng, own[0]))
    shape = (0, 3, 3, _KERNEL, _KERNEL)
    return (
        Restyle(
            kinds,
            torch.from_numpy(draws),
            torch.from_numpy(np.stack(kernels) if kernels else np.zeros(shape, np.float32)),
            torch.zeros(0, dtype=torch.uint8),
        ),
        np.array(partners),
    )


def _kernel(rng: np.random.Generator, draw: float) -> NDArray[np.float32]:
    """Return a random kernel of side 1, 3, 5 or 7, zero-padded to float `[3, 3, 7, 7]`."""
    half = int(4 * draw)
    side = 2 * half + 1
    whole = np.zeros((3, 3, _KERNEL, _KERNEL), dtype=np.float32)
    inner = slice(_KERNEL // 2 - half, _KERNEL // 2 + half + 1)
    whole[:, :, inner, inner] = rng.standard_normal((3, 3, side, side)) / np.sqrt(3 * side**2)
    return whole


def restyle(views: Tensor, how: Restyle) -> Tensor:
    """Redraw the views whose kind is not −1, float `[B, 3, S, S]` in 0–1, in place; return them."""
    draws = how.draws.to(views.device)
    for kind in KINDS:
        rows = how.rows(kind).to(views.device)
        if not len(rows):
            continue
        own, numbers = views[rows], draws[rows][:, :, None, None, None]  # [b, 6, 1, 1, 1]
        if kind == "fourier":
            partners = how.partners.to(views.device).permute(0, 3, 1, 2).float() / 255
            redrawn = _fourier(own, partners, numbers[:, 0])
        elif kind == "convolution":
            redrawn = _convolution(own, how.kernels.to(views.device), numbers)
        elif kind == "lines":
            redrawn = _lines(own, draws[rows])
        elif kind == "paint":
            redrawn = _paint(own, draws[rows])
        else:
            threshold = 0.2 + 0.6 * numbers[:, 0]
            redrawn = torch.where(own >= threshold, 1 - own, own)
        views[rows] = redrawn.clamp(0, 1).to(views.dtype)
    return views


def _fourier(own: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Mix in `share` `[b, 1, 1, 1]` of the partners' amplitudes `[b, 3, S', S']`; the phase stays."""
    side = own.shape[-1]
    first = (partners.shape[-1] - side) // 2
    other = partners[..., first : first + side, first : first + side]
    spectrum, amplitude = (
        torch.fft.rfft2(own.contiguous()),
        torch.fft.rfft2(other.contiguous()).abs(),
    )
    mixed = torch.polar(torch.lerp(spectrum.abs(), amplitude, share), spectrum.angle())
    redrawn: Tensor = torch.fft.irfft2(mixed, s=own.shape[-2:])
    return redrawn


def _convolution(own: Tensor, kernels: Tensor, numbers: Tensor) -> Tensor:
    """Convolve each view with its kernel `[3, 3, 7, 7]`, keep the mean and contrast, and mix half of them back."""
    count, side = len(own), own.shape[-1]
    padded = pad(own.reshape(1, 3 * count, side, side), [_KERNEL // 2] * 4, mode="reflect")
    out = conv2d(padded, kernels.flatten(0, 1), groups=count).reshape(own.shape)
    mean, std = out.mean(dim=(1, 2, 3), keepdim=True), out.std(dim=(1, 2, 3), keepdim=True)
    want, spread = own.mean(dim=(1, 2, 3), keepdim=True), own.std(dim=(1, 2, 3), keepdim=True)
    out = (out - mean) / (std + 1e-6) * (spread + 0.1) + want
    share = torch.where(numbers[:, 1] < 0.5, 0.0, numbers[:, 2])
    return torch.lerp(out, own, share)


def _lines(own: Tensor, draws: Tensor) -> Tensor:
    """Draw dark lines on bright paper, at one of three widths; a fifth of the views keep their colours.

    A quarter of the views are flattened first, which keeps outlines and removes texture.
    """
    rows = torch.arange(len(own), device=own.device)
    numbers = draws[:, :, None, None, None]  # [b, 6, 1, 1, 1]
    smooth, flat = own.clone(), draws[:, 1] < 0.25
    if flat.any():
        smooth[flat] = _flattened(own[flat])
    grey = rgb_to_grayscale(smooth)  # [b, 1, S, S]
    sigmas = [part * own.shape[-1] for part in _BLURS]
    reach = 2 * math.ceil(2 * sigmas[-1]) + 1
    # Rows, then columns: torchvision would convolve with the square kernel.
    across = [gaussian_blur(grey, [reach, 1], [s, s]) for s in sigmas]
    blurred = torch.stack(
        [gaussian_blur(part, [1, reach], [s, s]) for part, s in zip(across, sigmas, strict=True)]
    )
    width = (draws[:, 0] * (len(_BLURS) - 1)).long().clamp(max=len(_BLURS) - 2)
    edges = blurred[width + 1, rows] - blurred[width, rows]  # positive where darker than around
    faintest = 0.01 + 0.02 * numbers[:, 5]
    ink = torch.tanh((edges - faintest).clamp(min=0) * (20 + 180 * numbers[:, 2]))
    paper = torch.where(numbers[:, 3] < 0.2, own, (0.85 + 0.15 * numbers[:, 5]).expand_as(own))
    return paper * (1 - (0.6 + 0.4 * numbers[:, 4]) * ink)


def _paint(own: Tensor, draws: Tensor) -> Tensor:
    """Paint cartoons: flat patches of stronger colours, half of them posterised, three quarters with contours."""
    numbers = draws[:, :, None, None, None]  # [b, 6, 1, 1, 1]
    flat = _flattened(own)
    grey = flat.mean(1, keepdim=True)
    flat = torch.lerp(grey, flat, 1 + 0.8 * numbers[:, 1]).clamp(0, 1)
    steps = 4 + (5 * numbers[:, 2]).floor()
    flat = torch.where(numbers[:, 0] < 0.5, (flat * steps).round() / steps, flat)
    strength = torch.where(numbers[:, 4] < 0.75, 0.5 + 0.5 * numbers[:, 3], 0.0)
    return flat * (1 - strength * _contours(flat, draws[:, 3], draws[:, 5]))


def _contours(own: Tensor, pen: Tensor, blank: Tensor) -> Tensor:
    """Return ink in 0–1 at the strongest edges, on 8 to 20 % of each view, float `[b, 1, S, S]`.

    The threshold is a quantile of the view's own gradients, so that it adapts to the contrast.

    Args:
        pen: float `[b]` in 0–1, selects one of the widths. blank: float `[b]` in 0–1, larger values give less ink.
    """
    side = own.shape[-1]
    gradient = own.new_empty(len(own), 1, side, side)
    width = (pen * len(_PENS)).long().clamp(max=len(_PENS) - 1)
    for number, part in enumerate(_PENS):
        rows = width == number
        if rows.any():
            gradient[rows] = _gradient(own[rows], part * side)
    pixels = gradient.flatten(1).sort(dim=1).values  # [b, S²]
    share = torch.stack([0.8 + 0.12 * blank, 0.92 + 0.048 * blank], dim=1)
    places = (share * pixels.shape[1]).long().clamp(max=pixels.shape[1] - 1)
    low, high = pixels.gather(1, places)[:, :, None, None, None].unbind(1)
    low = low.clamp(min=_FAINTEST)
    return ((gradient - low) / (high - low).clamp(min=_FAINTEST)).clamp(0, 1)


def _flattened(own: Tensor) -> Tensor:
    """Give each pixel the mean of the window with the lowest variance among the four around it (Kuwahara 1976)."""
    side = own.shape[-1]
    reach = max(1, round(_WINDOW * side / 2))
    window = 2 * reach + 1
    padded = pad(own.contiguous(), [2 * reach] * 4, mode="reflect")  # pooling is faster so
    mean = avg_pool2d(padded, window, stride=1)
    variance = (avg_pool2d(padded.square(), window, stride=1) - mean.square()).sum(1, keepdim=True)
    corners = [
        (slice(y, y + side), slice(x, x + side)) for y in (0, 2 * reach) for x in (0, 2 * reach)
    ]
    means = torch.stack([mean[..., y, x] for y, x in corners])  # [4, b, 3, S, S]
    calmest = torch.stack([variance[..., y, x] for y, x in corners]).argmin(0, keepdim=True)
    return means.gather(0, calmest.expand(1, *own.shape))[0]


def _gradient(own: Tensor, sigma: float) -> Tensor:
    """Return the largest gradient over the channels of the blurred views, float `[b, 1, S, S]`."""
    reach = 2 * math.ceil(2 * sigma) + 1
    # Rows, then columns: torchvision would convolve with the square kernel.
    across = gaussian_blur(own, [reach, 1], [sigma, sigma])
    smooth = gaussian_blur(across, [1, reach], [sigma, sigma])
    smooth = pad(smooth, [1] * 4, mode="replicate")
    horizontal = smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2]
    vertical = smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1]
    return (horizontal.square() + vertical.square()).amax(1, keepdim=True).sqrt()
