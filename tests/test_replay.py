"""The INT8 file's network in torch: the same numbers as the file, gradients, and the way back into a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_quantize import SIZE, Block, pictures
from torch import nn

from edgekd.errors import EdgekdError
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.ort import DIALECT
from edgekd.export.qat import with_corrected_biases
from edgekd.export.quantize import Calibrated, calibrate
from edgekd.export.replay import MIN_FACTOR, Replay, _Rounded
from edgekd.export.trt import DIALECT as TENSORRT
from edgekd.preprocess import Preprocess

DIALECTS = {"onnxruntime": DIALECT, "tensorrt": TENSORRT}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Deployable, Calibrated]:
    folder = tmp_path_factory.mktemp("replay")
    model = Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE))
    export_onnx(model, folder / "fp32.onnx", size=SIZE, metadata={"k": "v"})
    return folder, model, calibrate(folder / "fp32.onnx", pictures(48))


@pytest.mark.parametrize("name", DIALECTS)
def test_replay_computes_what_the_file_computes(name: str, made: tuple[Path, Deployable, Calibrated]) -> None:
    folder, _, calibrated = made
    dialect, path, images = DIALECTS[name], folder / f"{name}.onnx", pictures(96, seed=5)
    dialect.write(calibrated, path)
    start = with_corrected_biases(calibrated, dialect.grid).model
    network = Replay(start, onnx.load(path), dialect.grid)
    with torch.no_grad():
        ours = network.rounded(Replay.head_of(start))(network(torch.from_numpy(images))).numpy()
    file, full = dialect.answers(path, images), dialect.answers(folder / "fp32.onnx", images)
    assert np.abs(full - file).mean() > 0, "nothing was quantized"
    # What is left: sums in another order that round the other way, and for TensorRT the halves between the roundings.
    bound = {"onnxruntime": 0.35, "tensorrt": 0.5}[name]
    assert np.abs(ours - file).mean() < bound * np.abs(full - file).mean()
    assert (ours.argmax(axis=1) == file.argmax(axis=1)).mean() >= 0.97


@pytest.mark.parametrize("name", DIALECTS)
def test_what_was_trained_is_what_the_next_file_holds(name: str, made: tuple[Path, Deployable, Calibrated]) -> None:
    folder, _, calibrated = made
    dialect, path, images = DIALECTS[name], folder / f"{name}.onnx", pictures(64, seed=6)
    dialect.write(calibrated, path)
    calibrated = with_corrected_biases(calibrated, dialect.grid)
    network = Replay(calibrated.model, onnx.load(path), dialect.grid)
    before = dialect.answers(path, images)
    optimizer = torch.optim.Adam([{"params": network.weights, "lr": 3e-3}, {"params": network.factors, "lr": 2e-2}])
    for _ in range(4):
        loss = network(torch.from_numpy(images)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head = nn.Linear(16, 4)
    tuned = dataclasses.replace(
        calibrated, model=network.tuned(calibrated.model, head), ranges=network.tuned_ranges(calibrated.ranges)
    )
    dialect.write(tuned, path)
    with torch.no_grad():
        ours = network.rounded(head)(network(torch.from_numpy(images))).numpy()
    file = dialect.answers(path, images)
    moved = np.abs(file - before).mean()
    assert np.abs(ours - file).mean() < 0.1 * moved
    assert min(factor.item() for factor in network.factors) < 0.99, "no range was learned"
    assert all(MIN_FACTOR <= factor.item() <= 1 for factor in network.factors)
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props} == {"k": "v"}
    assert any(  # the float model that was calibrated stays as it was
        not np.array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
        for a, b in zip(tuned.model.graph.initializer, calibrated.model.graph.initializer, strict=True)
    )


def test_every_weighted_layer_learns(made: tuple[Path, Deployable, Calibrated]) -> None:
    folder, model, calibrated = made
    DIALECT.write(calibrated, folder / "all.onnx")
    network = Replay(calibrated.model, onnx.load(folder / "all.onnx"), DIALECT.grid)
    network(torch.from_numpy(pictures(16))).square().sum().backward()
    assert len(network.weights) == len(list(model.backbone.parameters()))
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.weights)
    assert all(factor.grad is not None for factor in network.factors)


def test_gradients_of_rounding_by_hand() -> None:
    # Scale 0.5, zero point 2, 0 to 10: representable are -1 to 4 in halves.
    x = torch.tensor([-3.0, 0.6, 1.0, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    out = _Rounded.apply(x, scale, 2, 0, 10)
    assert out.tolist() == [-1.0, 0.5, 1.0, 4.0]
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    # -2 below, 8 above, round(1.2) - 1.2 = -0.2 and 0 inside.
    assert scale.grad.item() == pytest.approx(-2 + 8 - 0.2)


def test_unknown_operation_is_named(made: tuple[Path, Deployable, Calibrated]) -> None:
    folder, _, calibrated = made
    DIALECT.write(calibrated, folder / "odd.onnx")
    odd = onnx.load(folder / "odd.onnx")
    next(node for node in odd.graph.node if node.op_type == "HardSwish").op_type = "Mish"
    with pytest.raises(EdgekdError, match="Mish"):
        Replay(calibrated.model, odd, DIALECT.grid)
