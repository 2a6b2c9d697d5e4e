"""A backbone that does not train sees a picture once: its map is computed before the first step and kept on disk."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.errors import EdgekdError
from edgekd.distill.teacher import weights_hash
from edgekd.distill.vl.examples import Reader
from edgekd.distill.vl.kept import kept
from edgekd.distill.vl.student import VlStudent

_CHUNK = 64
_MAX_BYTES = 8 * 2**30


def frozen_maps(student: VlStudent, reader: Reader, pictures: NDArray[np.int64]) -> Tensor:
    """What the backbone sees in `pictures`, float32 `[n, P, c]`.

    Raises:
        EdgekdError: too many pictures to hold their maps in memory.
    """
    if student.backbone is None or student.project is None:
        return torch.zeros(len(pictures), 0, 0)
    n_bytes = 4 * len(pictures) * student.patches * student.project.in_features
    if n_bytes > _MAX_BYTES:
        raise EdgekdError(
            f"The frozen backbone's maps of {len(pictures):,} pictures would take {n_bytes / 2**30:.0f} GiB.",
            "Train on a --fraction of them, at a smaller --size, or without --freeze-backbone.",
        )
    facts = (
        weights_hash(student.backbone),
        reader.preprocess.hash,
        *(reader.data.images.keys[int(i)] for i in pictures),
    )
    return kept("map-1", facts, lambda: {"map": _look(student, reader, pictures)})["map"]


@torch.inference_mode()
def _look(student: VlStudent, reader: Reader, pictures: NDArray[np.int64]) -> Tensor:
    student.eval()
    parts = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
    return torch.cat([student.look(reader.pixels(part)) for part in parts])
