"""Export a vision-language student as one ONNX file: uint8 picture and CLIP token ids → logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekd.core.errors import GateFailed
from edgekd.core.files import write_json
from edgekd.core.folders import VL_ARTIFACT, publishing
from edgekd.core.readers import sha256_file
from edgekd.export.onnx.write import save_checked, to_proto
from edgekd.export.parity import check, compare

VlPredict = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.float32]]


def export_vl_onnx(
    model: nn.Module,
    path: Path,
    *,
    size: int,
    text_shape: tuple[int, ...],
    metadata: dict[str, str],
) -> None:
    """Write `model(image, tokens)` to `path`.

    Inputs `image` uint8 `[batch, size, size, 3]` and `tokens` int64 `[batch, *text_shape]`, output `logits` float32.

    Args:
        text_shape: `(L,)`, for multiple choice `(K, L)`.
        metadata: the file's `metadata_props`, the only metadata in it.

    Raises:
        EdgekdError: an operator has no ONNX counterpart.

    """
    inputs = {
        "image": torch.zeros(2, size, size, 3, dtype=torch.uint8),
        "tokens": torch.zeros(2, *text_shape, dtype=torch.int64),
    }
    save_checked(to_proto(copy.deepcopy(model).cpu().eval(), inputs, "logits"), path, metadata)


def open_vl(path: Path) -> VlPredict:
    """Open the exported file in ONNX Runtime on the CPU, without torch or a teacher."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def predict(images: NDArray[np.uint8], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return session.run(["logits"], {"image": images, "tokens": tokens})[0]  # type: ignore[no-any-return]

    return predict


def export_vl_model(
    model: nn.Module,
    folder: Path,
    *,
    facts: dict[str, Any],
    reference: VlPredict,
    images: NDArray[np.uint8],
    tokens: NDArray[np.int64],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model.onnx` and `vl_artifact.json` into `folder`, which appears complete or not at all; return the record.

    `facts` are further facts of the record. `reference`, the torch student, and the file are compared on `images`,
    uint8 `[N, size, size, 3]`, and `tokens`, int64 `[N, …]`, whose shapes the file has; a file that differs is a
    `GateFailed`.
    """
    size, text_shape = images.shape[1], tokens.shape[1:]
    with publishing(folder, VL_ARTIFACT, overwrite=overwrite) as scratch:
        metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
        export_vl_onnx(
            model, scratch / "model.onnx", size=size, text_shape=text_shape, metadata=metadata
        )
        found = open_vl(scratch / "model.onnx")(images, tokens)
        parity = check(compare(reference(images, tokens), found), "fp32")
        if not parity["passed"]:
            raise GateFailed(
                f"The exported file does not match the student: {parity['reason']}.",
                "Please report this.",
            )
        record = {
            **facts,
            "inputs": {"image": ["batch", size, size, 3], "tokens": ["batch", *text_shape]},
            "files": {"model.onnx": sha256_file(scratch / "model.onnx")},
            "parity": parity,
        }
        write_json(scratch / "vl_artifact.json", record)
    return record
