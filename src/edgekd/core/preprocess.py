"""Preprocessing of images for evaluation, calibration, parity and benchmark: uint8 → uint8.

Normalisation (mean, std) is not applied here. It is part of the student and of the exported graph, so that a device
passes plain uint8 RGB.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekd.core.files import short_hash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """Preprocessing of an RGB image for a model.

    `squash` resizes to `size` × `size` without keeping the aspect ratio (DomainBed's evaluation). `crop` resizes the
    short side to `size / crop_pct` and takes the centre, identical to torchvision's `Resize` and `CenterCrop`. `mean`
    and `std` are on the 0–1 scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=16, le=4096)
    resize: Literal["squash", "crop"] = "squash"
    crop_pct: float = Field(default=1.0, ge=0.25, le=1.0)
    interpolation: Interpolation = "bicubic"
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.size, self.size

    @property
    def hash(self) -> str:
        """Return a hash of all fields, 16 hex digits, printed under every table."""
        return short_hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return RGB image of any size → uint8 `[size, size, 3]`."""
        from edgekd.data.resize import resize_rgb

        return resize_rgb(
            image,
            size=self.size,
            resize=self.resize,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )

    def square(self, side: int) -> Preprocess:
        """Return the same for a model of `side` × `side` pixels."""
        return self.model_copy(update={"size": side})


class FramedPreprocess(Preprocess):
    """Preprocessing of teachers with an input that is not square, or `longest` (resize the long side and pad).

    `size` is the longer side of the input: views of training images are rendered as squares of that side. Pixels come
    from open_clip's own transform.
    """

    resize: Literal["squash", "crop", "longest"] = "squash"  # type: ignore[assignment]
    height: int = Field(ge=16, le=4096)
    width: int = Field(ge=16, le=4096)
    fill: int = Field(default=0, ge=0, le=255)
    """Grey level of the padding."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.height, self.width

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return RGB image of any size → uint8 `[height, width, 3]`."""
        for step in _open_clip_steps(self):
            image = step(image)
        import numpy as np

        return np.asarray(image, dtype=np.uint8)

    def square(self, side: int) -> Preprocess:
        """Return the same for a model of `side` × `side` pixels."""
        return self.model_copy(update={"size": side, "height": side, "width": side})


def open_clip_preprocess(settings: Mapping[str, Any]) -> Preprocess:
    """Return preprocessing with the same pixels as open_clip, from `open_clip.get_model_preprocess_cfg` settings.

    Raises:
        ValueError: open_clip does not support the settings.
    """
    sides = settings["size"]
    sides = tuple(sides) if isinstance(sides, (tuple, list)) else (sides,)
    height, width = sides * 2 if len(sides) == 1 else sides
    mode = settings.get("resize_mode") or "shortest"
    interpolation = settings.get("interpolation") or "bicubic"
    if mode not in ("shortest", "longest", "squash"):
        raise ValueError(f"unknown resize_mode {mode!r}")
    if interpolation not in ("bicubic", "bilinear", "random"):
        raise ValueError(f"unknown interpolation {interpolation!r}")
    shared = {
        "size": max(height, width),
        "resize": "crop" if mode == "shortest" else mode,
        # `random` is for training: open_clip evaluates such a model with bicubic
        "interpolation": "bilinear" if interpolation == "bilinear" else "bicubic",
        "mean": _per_channel(settings["mean"]),
        "std": _per_channel(settings["std"]),
    }
    try:
        if height == width and mode != "longest":
            return Preprocess.model_validate(shared)
        return FramedPreprocess.model_validate(
            shared | {"height": height, "width": width, "fill": settings.get("fill_color") or 0}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"preprocess_cfg, {first['loc'][0]}: {first['msg']}") from error


def _per_channel(value: Any) -> Any:
    return value if isinstance(value, (tuple, list)) else (value,) * 3


@functools.lru_cache(maxsize=16)
def _open_clip_steps(
    preprocess: FramedPreprocess,
) -> tuple[Callable[[Image.Image], Image.Image], ...]:
    """Return the part of open_clip's transform that works on images: everything before `ToTensor` and `Normalize`."""
    from open_clip import image_transform

    transform = image_transform(
        preprocess.shape,
        is_train=False,
        resize_mode="shortest" if preprocess.resize == "crop" else preprocess.resize,
        interpolation=preprocess.interpolation,
        fill_color=preprocess.fill,
    )
    return tuple(transform.transforms[:-2])
