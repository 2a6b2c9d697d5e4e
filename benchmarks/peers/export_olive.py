"""Quantize a float ONNX file with Olive's static INT8 quantization and its defaults.

python benchmarks/peers/export_olive.py FP32.onnx --pictures DIR --out DIR [--images 300]
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

import onnx
from olive.data.registry import Registry
from olive.workflows import run
from setting import MEAN, SIZE, STD
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms


class Named(Dataset[Any]):
    """Images in Olive's format: a mapping of inputs, and a label."""

    def __init__(self, folder: str, name: str, images: int) -> None:
        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize((SIZE, SIZE), interpolation=bicubic), transforms.ToTensor()]
        prepare = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
        pictures = datasets.ImageFolder(folder, prepare)
        self.name, stride = name, max(1, len(pictures) // images)
        self.pictures = Subset(pictures, range(0, stride * images, stride))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        image, label = self.pictures[index]
        return {self.name: image}, label


Registry.register_dataset("named")(Named)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    given = parser.parse_args()
    [entry] = onnx.load(given.model).graph.input
    params = {
        "folder": str(given.pictures / "train"), "name": entry.name, "images": given.images,
    }  # fmt: skip
    run({
        "input_model": {"type": "ONNXModel", "model_path": str(given.model)},
        "data_configs": [{"name": "train", "load_dataset_config": {"type": "named", "params": params}}],
        "passes": {"int8": {"type": "OnnxStaticQuantization", "data_config": "train"}},
        "output_dir": str(given.out), "cache_dir": str(given.out / "cache"),
    })  # fmt: skip
    shutil.rmtree(given.out / "cache")


if __name__ == "__main__":
    main()
