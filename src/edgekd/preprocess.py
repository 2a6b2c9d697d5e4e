"""The one way pixels are prepared for evaluation, calibration, parity and benchmark: uint8 in, uint8 out.

Normalisation (mean, std) is not applied here: it lives inside the student and inside the exported graph, so that
a device hands over plain uint8 RGB.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from edgekd.files import short_hash
from edgekd.resize import resize_rgb

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Deviation = Annotated[float, Field(gt=0)]


class Preprocess(BaseModel):
    """How an RGB image becomes a model's input.

    `squash` resizes to `size` × `size` whatever the aspect ratio (DomainBed's evaluation); `crop` resizes the short
    side to `size / crop_pct` and takes the centre (ImageNet's). `mean` and `std` are on the 0–1 scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=16, le=1024)
    resize: Literal["squash", "crop"] = "squash"
    crop_pct: float = Field(default=1.0, gt=0.0, le=1.0)
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)

    @property
    def hash(self) -> str:
        """16 hex digits that change when any field does; printed under every table."""
        return short_hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB image of any size → uint8 `[size, size, 3]`."""
        return resize_rgb(
            image,
            size=self.size,
            resize=self.resize,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )
