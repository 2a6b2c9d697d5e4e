"""A small artifact that ends in an embedding, by ONNX Runtime; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekd.core.files import write_bytes
from edgekd.core.manifest import Artifact, TensorSpec
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import sha256_file
from edgekd.export.parity import compare
from edgekd.targets.bank import ClassBank

SIZE = 16
CLASSES = ("red", "green")


def red_and_green(text_mean: np.ndarray | None = None) -> ClassBank:
    vectors = np.eye(3, dtype=np.float32)[:2]
    facts = {
        "teacher": "toy",
        "teacher_id": "t",
        "templates": ["a {}"],
        "described": False,
        "added": [],
    }
    return ClassBank(CLASSES, vectors, 10.0, text_mean, facts)


def write_colours(folder: Path, bank: ClassBank | None = None) -> Path:
    """uint8 `[B, 16, 16, 3]` → the mean colour as a unit vector; `red` and `green` are the first two axes."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
            helper.make_node("LpNormalization", ["mean"], ["embedding"], axis=1, p=2),
        ],
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "model.onnx")
    write_bytes(folder / "bank.npz", (bank or red_and_green()).to_bytes())
    Artifact(
        name=folder.name,
        target="onnxruntime",
        format="onnx",
        precision="fp32",
        files={name: sha256_file(folder / name) for name in ("model.onnx", "bank.npz")},
        inputs=(
            TensorSpec(
                name="image", dtype="uint8", shape=("batch", SIZE, SIZE, 3), layout="NHWC RGB"
            ),
        ),
        outputs=(
            TensorSpec(
                name="embedding", dtype="float32", shape=("batch", 3), layout="ND, rows of length 1"
            ),
        ),
        classes=CLASSES,
        bank="bank.npz",
        preprocess=Preprocess(size=SIZE),
        parity=compare(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)) | {"passed": True},
        source={"run": "r"},
        versions={},
        created="2026-01-01T00:00:00+00:00",
    ).write(folder)
    return folder


def colour(rgb: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """uint8 `[16, 16, 3]` around a colour."""
    noise = np.random.default_rng(seed).integers(-20, 21, (SIZE, SIZE, 3))
    return np.clip(np.array(rgb) + noise, 0, 255).astype(np.uint8)
