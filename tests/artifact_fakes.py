"""Artifacts and runs made by hand, without torch: logits that are channel means, or an embedding that is the colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekd.core.files import write_bytes, write_json
from edgekd.core.manifest import Artifact, Run, TensorSpec, read_artifact
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import sha256_file
from edgekd.export.parity import compare
from edgekd.targets.bank import ClassBank

SIZE = 16
CLASSES = ("r", "g", "b")
COLOURS = ("red", "green")


def network(
    last: onnx.NodeProto, *constants: onnx.TensorProto, batch: int | str = "batch"
) -> onnx.ModelProto:
    """uint8 `[B, 16, 16, 3]` → the mean of each channel → `last`; a number fixes B."""
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        last,
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, SIZE, SIZE, 3])
    output = helper.make_tensor_value_info(last.output[0], TensorProto.FLOAT, [batch, 3])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    graph = helper.make_graph(nodes, "means", [image], [output], [axes, *constants])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def channel_means(gain: float = 1.0, batch: int | str = "batch") -> onnx.ModelProto:
    """The mean of each channel times `gain`, as "logits"."""
    factor = helper.make_tensor("gain", TensorProto.FLOAT, [1], [gain])
    return network(helper.make_node("Mul", ["mean", "gain"], ["logits"]), factor, batch=batch)


def _write(folder: Path, model: bytes, output: TensorSpec, **fields: Any) -> Path:
    """Write the model and its manifest beside the files that lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir(), reverse=True)}
    shape = (output.shape[0], SIZE, SIZE, 3)
    same = np.eye(3, dtype=np.float32)
    Artifact(
        name=folder.name,
        target="onnxruntime",
        format="onnx",
        precision="fp32",
        files=files,
        inputs=(TensorSpec(name="image", dtype="uint8", shape=shape, layout="NHWC RGB"),),
        outputs=(output,),
        parity=compare(same, same) | {"passed": True},
        source={"run": "r"},
        versions={},
        created="2026-01-01T00:00:00+00:00",
        **fields,
    ).write(folder)
    return folder


def write_artifact(
    folder: Path, content: bytes | None = None, *, gain: float = 1.0, batch: int | str = "batch"
) -> Path:
    """An artifact of `channel_means` with the classes `r`, `g` and `b`; `content` replaces its model file."""
    model = content if content is not None else channel_means(gain, batch).SerializeToString()
    output = TensorSpec(name="logits", dtype="float32", shape=(batch, 3), layout="NC")
    preprocess = Preprocess(size=SIZE, resize="crop", crop_pct=0.875)
    return _write(folder, model, output, classes=CLASSES, preprocess=preprocess)


BANK_FACTS = {
    "teacher": "toy",
    "teacher_id": "t",
    "templates": ["a {}"],
    "described": False,
    "added": [],
}


def red_and_green(text_mean: np.ndarray | None = None) -> ClassBank:
    vectors = np.eye(3, dtype=np.float32)[:2]
    return ClassBank(COLOURS, vectors, 10.0, text_mean, dict(BANK_FACTS))


def write_colours(folder: Path, bank: ClassBank | None = None) -> Path:
    """An artifact whose embedding is the mean colour as a unit vector; `red` and `green` are the first two axes."""
    folder.mkdir(parents=True)
    write_bytes(folder / "bank.npz", (bank or red_and_green()).to_bytes())
    last = helper.make_node("LpNormalization", ["mean"], ["embedding"], axis=1, p=2)
    layout = "ND, rows of length 1"
    output = TensorSpec(name="embedding", dtype="float32", shape=("batch", 3), layout=layout)
    model = network(last).SerializeToString()
    fields = {"classes": COLOURS, "bank": "bank.npz", "preprocess": Preprocess(size=SIZE)}
    return _write(folder, model, output, **fields)


def colour(rgb: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """uint8 `[16, 16, 3]` around a colour."""
    noise = np.random.default_rng(seed).integers(-20, 21, (SIZE, SIZE, 3))
    return np.clip(np.array(rgb) + noise, 0, 255).astype(np.uint8)


def write_run(folder: Path, **fields: Any) -> Path:
    """The record of a finished run, without its student."""
    settings = {
        "name": "r", "student": "s", "recipe": "erm", "data": "toy", "teacher": "toy", "teacher_id": "t",
        "classes": ("a", "b"), "preprocess": Preprocess(size=16), "split_hash": "h", "test_domain": None, "seed": 0,
        "steps": 1, "train_seconds": 1.0, "images_per_second": 1.0, "data_wait_percent": 0.0, "selection": "last",
        "student_sha256": "x", "versions": {}, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    data = Run.model_validate(settings).model_dump(mode="json") | fields
    write_json(folder / "run.json", data)
    return folder


def rehash(folder: Path, **details: Any) -> None:
    """Write the manifest anew after its files were altered: damage that no hash shows."""
    artifact = read_artifact(folder, check_hashes=False)
    files = {name: sha256_file(folder / name) for name in artifact.files}
    changes = {"files": files, "details": {**artifact.details, **details}}
    artifact.model_copy(update=changes).write(folder)
