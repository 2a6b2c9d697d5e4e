"""The INT8 file's network in torch: the same numbers as the file, gradients, and the way back into a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
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
from edgekd.export.replay_ops import OPS
from edgekd.export.trt import DIALECT as TENSORRT
from edgekd.export.trt_rules import findings
from edgekd.preprocess import Preprocess

DIALECTS = {"onnxruntime": DIALECT, "tensorrt": TENSORRT}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Deployable, Calibrated]:
    folder = tmp_path_factory.mktemp("replay")
    model = Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE))
    export_onnx(model, folder / "fp32.onnx", size=SIZE, metadata={"k": "v"})
    return folder, model, calibrate(folder / "fp32.onnx", pictures(48))


@pytest.mark.parametrize("name", DIALECTS)
def test_replay_computes_what_the_file_computes(
    name: str, made: tuple[Path, Deployable, Calibrated]
) -> None:
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
    bound = {"onnxruntime": 0.1, "tensorrt": 0.5}[name]
    assert np.abs(ours - file).mean() < bound * np.abs(full - file).mean()
    assert (ours.argmax(axis=1) == file.argmax(axis=1)).mean() >= 0.97


@pytest.mark.parametrize("name", DIALECTS)
def test_what_was_trained_is_what_the_next_file_holds(
    name: str, made: tuple[Path, Deployable, Calibrated]
) -> None:
    folder, _, calibrated = made
    dialect, path, images = DIALECTS[name], folder / f"{name}.onnx", pictures(64, seed=6)
    dialect.write(calibrated, path)
    calibrated = with_corrected_biases(calibrated, dialect.grid)
    network = Replay(calibrated.model, onnx.load(path), dialect.grid)
    before = dialect.answers(path, images)
    optimizer = torch.optim.Adam(
        [{"params": network.weights, "lr": 3e-3}, {"params": network.factors, "lr": 2e-2}]
    )
    for _ in range(4):
        loss = network(torch.from_numpy(images)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head = nn.Linear(16, 4)
    tuned = dataclasses.replace(
        calibrated,
        model=network.tuned(calibrated.model, head),
        ranges=network.tuned_ranges(calibrated.ranges),
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
        for a, b in zip(
            tuned.model.graph.initializer, calibrated.model.graph.initializer, strict=True
        )
    )


def test_every_weighted_layer_learns(made: tuple[Path, Deployable, Calibrated]) -> None:
    folder, model, calibrated = made
    DIALECT.write(calibrated, folder / "all.onnx")
    network = Replay(calibrated.model, onnx.load(folder / "all.onnx"), DIALECT.grid)
    network(torch.from_numpy(pictures(16))).square().sum().backward()
    assert len(network.weights) == len(list(model.backbone.parameters()))
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.weights
    )
    assert all(factor.grad is not None for factor in network.factors)


STUDENTS = {"test_efficientnet": {}, "test_vit": {"depth": 2, "img_size": SIZE, "patch_size": 8}}
"""timm's miniatures: SiLU with squeeze-and-excite, and a transformer with a class token."""


def textured(n: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures with grain: of smooth ones alone, a deep random network sees little but its own rounding."""
    grain = np.random.default_rng(seed).integers(0, 128, (n, SIZE // 2, SIZE // 2, 3))
    return (pictures(n, seed) // 2 + grain.repeat(2, axis=1).repeat(2, axis=2)).astype(np.uint8)


@pytest.fixture(scope="module", params=STUDENTS)
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = timm.create_model(request.param, num_classes=0, **STUDENTS[request.param])
        for parameter in body.parameters():
            if (
                parameter.ndim == 1
            ):  # as initialised they are 0 and 1, and many of them one constant in the file
                parameter.data += 0.1 * torch.randn_like(parameter)
        model = Deployable(body, nn.Linear(body.num_features, 4), Preprocess(size=SIZE))
        for _ in range(20):
            model.train()(torch.from_numpy(textured(32)))  # BatchNorm's statistics
    folder = tmp_path_factory.mktemp(request.param)
    export_onnx(model, folder / "fp32.onnx", size=SIZE, metadata={})
    return folder, body


@pytest.mark.parametrize("name", DIALECTS)
def test_transformers_and_squeeze_excite_are_replayed_and_trained(
    name: str, student: tuple[Path, nn.Module]
) -> None:
    (folder, body), dialect, images = student, DIALECTS[name], textured(64, seed=5)
    path = folder / f"{name}.onnx"
    calibrated = dialect.calibrate(folder / "fp32.onnx", textured(48), "minmax")
    dialect.write(calibrated, path)
    calibrated = with_corrected_biases(calibrated, dialect.grid)
    network, head = (
        Replay(calibrated.model, onnx.load(path), dialect.grid),
        Replay.head_of(calibrated.model),
    )
    said = network.rounded(head)(network(torch.from_numpy(images)))
    file, full = dialect.answers(path, images), dialect.answers(folder / "fp32.onnx", images)
    # INT8 costs both the same, up to sums that round the other way; half precision has many more of those.
    costs = [(logits - full).ravel() for logits in (said.detach().numpy(), file)]
    assert np.corrcoef(costs)[0, 1] > {"onnxruntime": 0.97, "tensorrt": 0.25}[name]
    said.square().sum().backward()
    learned = sum(
        weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in network.weights
    )
    normalised = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    tokens = [name for name, _ in body.named_parameters() if name in ("cls_token", "pos_embed")]
    # Of BatchNorm's two only the bias is left; the class token and the places stay as they are.
    assert (
        learned
        == len(network.weights)
        == len(list(body.parameters())) - len(normalised) - len(tokens)
    )
    with torch.no_grad():
        for weight in network.weights:
            weight += 0.1 * weight.std().nan_to_num() * torch.randn(weight.shape)
    tuned = dataclasses.replace(
        calibrated,
        model=network.tuned(calibrated.model, head),
        ranges=network.tuned_ranges(calibrated.ranges),
    )
    dialect.write(tuned, path)
    with torch.no_grad():
        said = network.rounded(head)(network(torch.from_numpy(images))).numpy()
    moved = np.abs(dialect.answers(path, images) - file).mean()
    assert np.abs(said - dialect.answers(path, images)).mean() < 0.3 * moved
    if name == "tensorrt":
        assert findings(onnx.load(path)) == []


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


def test_forms_that_are_not_known_are_sentences_too() -> None:
    x, one = torch.zeros(1, 1, 4, 4), torch.tensor([1])
    with pytest.raises(
        EdgekdError, match="does not know a Conv that is not two-dimensional or pads by itself"
    ):
        OPS["Conv"]([x, torch.zeros(1, 1, 3, 3)], {"auto_pad": b"SAME_UPPER"})
    with pytest.raises(EdgekdError, match="does not know a MaxPool that is dilated"):
        OPS["MaxPool"]([x], {"kernel_shape": [2, 2], "dilations": [2, 2]})
    with pytest.raises(EdgekdError, match="does not know a Slice that runs backwards"):
        OPS["Slice"]([x, one, one, one, -one], {})
