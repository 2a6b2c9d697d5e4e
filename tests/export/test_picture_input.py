"""Files that resize: pictures of any size get the logits of edgekd's own resizing with Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_fakes import CLASSES, Backbone, build, export
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable, torch_logits
from edgekd.export.onnx.graphs import with_resize
from edgekd.targets.session import open_session

pytestmark = pytest.mark.usefixtures("graphs_once")

SIZES = ((31, 97), (97, 31), (33, 200), (250, 34), (7, 5), (640, 480), (101, 49), (37, 37))
"""Height and width, none the student's own; odd ones and those that Pillow 13 resizes vertically first among them."""


def photo(height: int, width: int) -> np.ndarray:
    """Smooth shapes with grain, uint8 `[height, width, 3]`."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height)), dtype=np.int64)
    return np.clip(smooth + rng.integers(-30, 31, smooth.shape), 0, 255).astype(np.uint8)


PHOTOS = tuple(photo(*size) for size in SIZES)


def resized(preprocess: Preprocess, picture: np.ndarray) -> np.ndarray:
    """The pixels that the graph in front of a model makes of a picture."""
    side = ["batch", preprocess.size, preprocess.size, 3]
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, side) for name in ("image", "o")]
    identity = helper.make_node("Identity", ["image"], ["o"])
    graph = helper.make_graph([identity], "g", ends[:1], ends[1:])
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = with_resize(plain, preprocess)
    onnx.checker.check_model(model, full_check=True)
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers)
    return session.run(None, {"image": picture[None]})[0][0]


@pytest.mark.parametrize(
    ("interpolation", "most", "share"), [("bicubic", 1, 0.005), ("bilinear", 2, 0.15)]
)
@pytest.mark.parametrize(("resize", "crop_pct"), [("squash", 1.0), ("crop", 0.875), ("crop", 0.9)])
def test_the_graph_resizes(
    resize: Any, crop_pct: float, interpolation: Any, most: int, share: float
) -> None:
    rule = Preprocess(size=32, resize=resize, crop_pct=crop_pct, interpolation=interpolation)
    for picture in PHOTOS:
        expected = rule.pixels(Image.fromarray(picture)).astype(int)
        difference = np.abs(resized(rule, picture) - expected)
        assert difference.max() <= most
        assert (difference > 0).mean() <= share


def picture_file(folder: Path, precision: str, preprocess: Preprocess) -> Artifact:
    torch.manual_seed(0)
    model = Deployable(Backbone(), nn.Linear(8, len(CLASSES)), preprocess)
    given: dict[str, Any] = {"input": "picture", "pictures": lambda: PHOTOS}
    return export(model, folder, precision, preprocess=preprocess, **given)


@pytest.mark.parametrize(
    ("precision", "rule"), [("int8", {}), ("fp32", {"resize": "crop", "crop_pct": 0.8})]
)
def test_a_file_takes_pictures(tmp_path: Path, precision: str, rule: dict[str, Any]) -> None:
    preprocess, folder = Preprocess(size=32, **rule), tmp_path / "a"
    artifact = picture_file(folder, precision, preprocess)
    assert artifact.input == "picture"
    assert artifact.name == f"onnxruntime-{precision}-picture-input"
    assert artifact.inputs[0].shape == ("batch", "height", "width", 3)
    assert read_artifact(folder).parity["resize"]["n"] == len(SIZES)
    session = open_session(folder, threads=1)
    prepared = np.stack([preprocess.pixels(Image.fromarray(picture)) for picture in PHOTOS])
    from_prepared = session.run(prepared)
    from_pictures = np.concatenate([session.run(picture[None]) for picture in PHOTOS])
    # 1 of 255 in few pixels.
    np.testing.assert_allclose(from_pictures, from_prepared, atol=0.01 * np.ptp(from_prepared))
    with pytest.raises(EdgekdError, match="takes uint8"):
        session.run(PHOTOS[0].astype(np.float32)[None])  # type: ignore[arg-type]
    if precision == "fp32":  # prepared pixels pass unchanged
        torch.manual_seed(0)
        model = Deployable(Backbone(), nn.Linear(8, len(CLASSES)), preprocess)
        np.testing.assert_allclose(from_prepared, torch_logits(model, prepared), atol=1e-5)


def test_a_file_that_resizes_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgekdError, match="nearest"):
        picture_file(tmp_path / "a", "fp32", Preprocess(size=32, interpolation="nearest"))
    with pytest.raises(EdgekdError, match="picture"):
        export(build(), tmp_path / "a", "fp32", target="openvino", input="picture")

    def upside_down(self: Preprocess, image: Image.Image) -> np.ndarray:
        return 255 - np.asarray(image.resize((32, 32)), dtype=np.uint8)

    monkeypatch.setattr(Preprocess, "pixels", upside_down)
    with pytest.raises(GateFailed, match="pictures"):
        picture_file(tmp_path / "a", "fp32", Preprocess(size=32))
    assert (tmp_path / "a.failed" / "artifact.json").is_file()
