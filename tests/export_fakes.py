"""Small networks, images for them, and their export without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from edgekd.configs.export import ExportConfig
from edgekd.core.manifest import Artifact
from edgekd.core.preprocess import Preprocess
from edgekd.export.artifact import export_model
from edgekd.export.graph import Deployable
from edgekd.export.onnx.write import export_onnx
from edgekd.export.quantize.onnx_scheme import OnnxScheme
from edgekd.export.writer import Source

SIZE = 32
CLASSES = ("cat", "dog", "élan")
PREPROCESS = Preprocess(size=SIZE)


class Block(nn.Module):
    """Stem, depthwise, squeeze-and-excite, pointwise, residual: what a mobile network is made of."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.reduce = nn.Conv2d(width, 4, 1)
        self.expand = nn.Conv2d(4, width, 1)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        y = nn.functional.hardswish(self.depthwise(x))
        gate = self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu())
        return (x + self.pointwise(y * nn.functional.hardsigmoid(gate))).mean((2, 3))


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """Smooth random images: noise would make every image's features alike."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (255 * fine).byte().permute(0, 2, 3, 1).numpy()


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        None, {"image": images}
    )[0]


def block_model(width: int = 16) -> Deployable:
    """A `Block` with four classes, the same weights at every call."""
    torch.manual_seed(1)
    return Deployable(Block(width), nn.Linear(width, 4), Preprocess(size=SIZE)).eval()


def export_block(folder: Path, target: str, precision: str, **changes: Any) -> Artifact:
    """Export `block_model` for a target, calibrated on 24 images and checked on 64."""
    arguments: dict[str, Any] = {
        "classes": ("a", "b", "c", "d"),
        "calibration": pictures(24),
        "calibration_ids": [str(i) for i in range(24)],
    }
    model = changes.pop("model", None) or block_model()
    return export(model, folder, precision, target, **arguments | changes)


def export_parts(
    model: Deployable, folder: Path, *, fp32_path: Path | None = None, **given: Any
) -> Artifact:
    """`export_model` with any field of `Source` and `ExportConfig`."""
    fields = Source.__dataclass_fields__
    config = ExportConfig.load(**{k: v for k, v in given.items() if k not in fields})
    source = {k: tuple(v) if k == "classes" else v for k, v in given.items() if k in fields}
    return export_model(Source(model=model, **source), folder, config, fp32_path=fp32_path)


class Backbone(nn.Module):
    """One convolution and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3))


def build(seed: int = 0) -> Deployable:
    torch.manual_seed(seed)
    return Deployable(Backbone(), nn.Linear(8, len(CLASSES)), PREPROCESS)


def export(
    model: Deployable, folder: Path, precision: str, target: str = "onnxruntime", **changes: Any
) -> Artifact:
    """Export a model of three classes, calibrated on 32 images and checked on 64."""
    arguments: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "classes": CLASSES,
        "preprocess": PREPROCESS,
        "calibration": pictures(32),
        "calibration_ids": [f"image {index}" for index in range(32)],
        "parity_images": pictures(64, seed=1),
        "facts": {"student": "test"},
    }
    return export_parts(model, folder, **arguments | changes)


def write_onnx(body: nn.Module, features: int, path: Path) -> Path:
    """Write `body` with a linear layer of four classes as FP32 ONNX."""
    model = Deployable(body, nn.Linear(features, 4), PREPROCESS)
    export_onnx(model, path, size=SIZE, metadata={"k": "v"})
    return path


def int8_files(scheme: OnnxScheme, folder: Path) -> tuple[Path, Path, dict]:
    """Write `Block` as FP32 ONNX and as `scheme` quantizes it; return both files, and what was done."""
    fp32, int8 = write_onnx(Block(), 16, folder / "fp32.onnx"), folder / "int8.onnx"
    return fp32, int8, scheme.quantize(fp32, int8, pictures(64))
