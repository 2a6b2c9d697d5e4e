"""The 15 corruptions of ImageNet-C at severities 1–5, computed on the fly.

Functions and parameters follow Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", and its published code. Only `frost` differs: its six photographs may not be
distributed, so it uses a generated texture with the same brightness and contrast.

Every function takes float64 RGB `[H, W, 3]` in 0–1 and a generator, and returns an array of the same shape without
clipping. The strengths are for 224 × 224 pixels. Results are deterministic: the generator is seeded by the image's
content, the corruption and the severity.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal

Pixels = NDArray[np.float64]
SIZE = 224
SEVERITIES = (1, 2, 3, 4, 5)
REMARKS = (
    "the 15 corruptions of ImageNet-C (Hendrycks & Dietterich 2019), computed on the test images after each model's "
    "preprocessing at 224 × 224 pixels, then resized to its input without a crop and without storing them as JPEG.",
    "frost uses a generated texture in place of ImageNet-C's photographs.",
)


def corrupt(pixels: NDArray[np.uint8], name: str, severity: int, key: str) -> NDArray[np.uint8]:
    """Return the corrupted image of uint8 RGB `[224, 224, 3]`.

    Args:
        name: one of `NAMES`.
        severity: 1–5.
        key: the image's content hash. Equal arguments give equal images.
    """
    seed = int.from_bytes(hashlib.sha256(f"{key}:{name}:{severity}".encode()).digest()[:16], "big")
    rng = np.random.Generator(np.random.Philox(key=seed))
    changed = CORRUPTIONS[name](pixels / 255.0, severity - 1, rng)
    # The published functions round down.
    return (np.clip(changed, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[level], size=x.shape)


def shot_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    photons = (60, 25, 12, 5, 3)[level]
    return np.asarray(rng.poisson(x * photons) / photons)


def impulse_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    hit = rng.random(x.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(hit, rng.integers(0, 2, x.shape), x)


def defocus_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    radius, smoothing = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    kernel = disk(radius, smoothing)
    edge = len(kernel) // 2
    padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0)), mode="reflect")
    return np.asarray(signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)))


def disk(radius: int, smoothing: float) -> NDArray[np.float64]:
    """Return a disk kernel with sum 1 and an edge smoothed by a small Gaussian, at least 17 × 17 pixels."""
    half, width = max(8, radius), 3 if radius <= 8 else 5
    grid = np.arange(-half, half + 1)
    flat = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).astype(np.float64)
    taps = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * smoothing**2))
    taps /= taps.sum()
    smooth = ndimage.correlate(flat / flat.sum(), np.outer(taps, taps), mode="mirror")
    return np.asarray(smooth)


def glass_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    height, width = x.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    here = (rows[:, None] * width + columns[None, :]).ravel()
    source = list(range(height * width))
    for _ in range(rounds):
        across, down = rng.integers(-reach, reach, size=(2, len(here)))
        # As in the published loop: meant to swap two pixels, it writes through views and only copies the neighbour.
        for place, other in zip(
            here.tolist(), (here + down * width + across).tolist(), strict=True
        ):
            source[place] = source[other]
    blurred = np.floor(_gaussian(x, sigma) * 255) / 255
    return _gaussian(blurred.reshape(-1, 3)[source].reshape(x.shape), sigma)


def _gaussian(x: Pixels, sigma: float) -> Pixels:
    return np.asarray(ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4.0))


def motion_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return smear(x, radius, sigma, rng.uniform(-45, 45))


def smear(x: NDArray[np.float64], radius: int, sigma: float, degrees: float) -> NDArray[np.float64]:
    """Apply ImageMagick's motion blur: half a Gaussian along a line, in whole pixels, with repeated edges."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angle = np.deg2rad(degrees)
    down = np.ceil(steps * np.sin(angle) - 0.5).astype(int)
    across = np.ceil(steps * np.cos(angle) - 0.5).astype(int)
    height, width = x.shape[:2]
    before, after = (
        (-min(down.min(), 0), -min(across.min(), 0)),
        (max(down.max(), 0), max(across.max(), 0)),
    )
    padded = np.pad(x, [*zip(before, after, strict=True), *[(0, 0)] * (x.ndim - 2)], mode="edge")
    found = np.zeros_like(x)
    for weight, dy, dx in zip(weights, down + before[0], across + before[1], strict=True):
        found += weight * padded[dy : dy + height, dx : dx + width]
    return found


def zoom_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    stop, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    factors = np.arange(1, stop, step)
    return np.asarray((x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1))


def zoomed(x: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Return the centre of `x`, enlarged bilinearly (aligned corners) and cropped to the size of `x`."""
    side = x.shape[0]
    kept = int(np.ceil(side / factor))
    first = (side - kept) // 2
    large = round(kept * factor)
    place = (np.arange(side) + (large - side) // 2) * (kept - 1) / (large - 1)
    low = np.minimum(place.astype(int), kept - 2)
    part = place - low
    middle = x[first : first + kept, first : first + kept]
    shape = (side,) + (1,) * (x.ndim - 1)
    rows = middle[low] * (1 - part).reshape(shape) + middle[low + 1] * part.reshape(shape)
    shape = (1, side) + (1,) * (x.ndim - 2)
    return np.asarray(
        rows[:, low] * (1 - part).reshape(shape) + rows[:, low + 1] * part.reshape(shape)
    )


def snow(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    mean, spread, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = zoomed(rng.normal(mean, spread, x.shape[:2]), zoom)
    flakes = np.floor(np.clip(np.where(flakes < threshold, 0, flakes), 0, 1) * 255) / 255
    flakes = np.round(smear(flakes, radius, sigma, rng.uniform(-135, -45)) * 255) / 255
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    whitened = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return np.asarray(whitened + (flakes + np.rot90(flakes, 2))[..., None])


def frost(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    keep, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return np.asarray(keep * x + ice * ice_crystals(x.shape[0], rng))


def ice_crystals(side: int, rng: np.random.Generator) -> Pixels:
    """Return an ice texture, 0–1 `[side, side, 3]`, with the mean and contrast of ImageNet-C's photographs."""
    patches = plasma(1.7, rng)[:side, :side]
    needles = np.zeros((side, side))
    for degrees in rng.uniform(0, 180, size=4):
        grain = rng.normal(size=(side, side))
        needles = np.maximum(needles, smear(grain, 12, 6.0, float(degrees)))
    needles = (needles - needles.min()) / (needles.max() - needles.min())
    ice = (
        0.5 * (patches - patches.mean()) / patches.std()
        + (needles - needles.mean()) / needles.std()
    )
    ice = ice / ice.std()
    return np.asarray(np.clip(_ICE_MEAN + ice[..., None] * _ICE_SPREAD, 0, 1))


_ICE_MEAN, _ICE_SPREAD = np.array([0.57, 0.65, 0.70]), 0.11
"""Mean and standard deviation of the five photographs that the published function uses."""


def fog(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    amount, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    brightest = x.max()
    misty = x + amount * plasma(decay, rng)[: x.shape[0], : x.shape[1], None]
    return np.asarray(misty * brightest / (brightest + amount))


def plasma(decay: float, rng: np.random.Generator, side: int = 256) -> NDArray[np.float64]:
    """Return a cloud by the diamond-square algorithm on a torus, 0–1 `[side, side]`.

    Each round halves the step and sets the centres of squares, then of diamonds, to the mean of their four corners plus
    noise. The noise range is the square of a parameter that starts at 100 and is divided by `decay` in each round.
    """
    field = np.zeros((side, side))
    step, wobble = side, 100.0

    def jolted(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape))

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        field[half::step, half::step] = jolted(pairs + np.roll(pairs, -1, axis=1))
        middles = field[half::step, half::step]
        beside = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        field[::step, half::step] = jolted(beside)
        above = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        field[half::step, ::step] = jolted(above)
        step, wobble = half, wobble / decay
    field -= field.min()
    return np.asarray(field / field.max())


def brightness(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    # Raise V in HSV: hue and saturation, and so the ratios of the channels, do not change.
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.asarray(np.where(value > 0, x * raised / np.maximum(value, 1e-12), raised))


def contrast(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    means = x.mean(axis=(0, 1), keepdims=True)
    return np.asarray((x - means) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + means)


def elastic_transform(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    # The published function uses 244 instead of 224.
    strength, smoothness, shear = (
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    )[level]
    height, width = x.shape[:2]
    centre, arm = np.array([height // 2, width // 2], dtype=np.float64), min(height, width) // 3
    corners = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y) each
    moved = corners + rng.uniform(-shear, shear, size=(3, 2))
    # The affine map of the moved corners is applied backwards, from target to source.
    backwards = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [3, 2]
    across, down = np.meshgrid(
        np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)
    )
    source = (
        np.stack([across, down, np.ones_like(across)], axis=-1) @ backwards
    )  # [H, W, 2], (x, y)
    sheared = _sampled(x, source[..., 1], source[..., 0], "mirror")

    def drift() -> NDArray[np.float64]:
        noise = rng.uniform(-1, 1, size=(height, width))
        return np.asarray(
            ndimage.gaussian_filter(noise, smoothness, mode="reflect", truncate=3.0) * strength
        )

    dx, dy = drift(), drift()
    return _sampled(sheared, down + dy, across + dx, "reflect")


def _sampled(
    x: Pixels, rows: NDArray[np.float64], columns: NDArray[np.float64], mode: str
) -> Pixels:
    planes = [
        ndimage.map_coordinates(x[..., c], (rows, columns), order=1, mode=mode) for c in range(3)
    ]
    return np.stack(planes, axis=-1)


def pixelate(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    image = _image(x)
    small = int(x.shape[0] * (0.6, 0.5, 0.4, 0.3, 0.25)[level])
    coarse = image.resize((small, small), Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.BOX)) / 255.0


def jpeg_compression(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    stored = io.BytesIO()
    _image(x).save(stored, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(Image.open(stored)) / 255.0


def _image(x: Pixels) -> Image.Image:
    return Image.fromarray(np.round(x * 255).astype(np.uint8))


CORRUPTIONS: Mapping[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
NAMES = tuple(CORRUPTIONS)
