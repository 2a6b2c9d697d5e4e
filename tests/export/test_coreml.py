from __future__ import annotations

import copy
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from export_fakes import CLASSES, export_parts
from timm.layers import Conv2dSame
from torch import nn

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.preprocess import Preprocess
from edgekd.export.coreml import PACKAGE, capture, convert
from edgekd.export.graph import Deployable, torch_logits
from edgekd.export.mil.compress import palettize, quantize_weights
from edgekd.export.mil.evaluate import evaluate, logits_of
from edgekd.export.mil.ops import OPS
from edgekd.export.mil.program import MilProgram, Op, Ref, read_program
from edgekd.export.mil.ranges import layers_to_keep, measure_ranges
from edgekd.export.onnx.write import quiet
from edgekd.targets.session import open_session

coremltools = pytest.importorskip("coremltools", reason="needs the extra coreml")

PREPROCESS = Preprocess(size=24, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))


class Backbone(nn.Module):
    """Depthwise, residual, squeeze and excite, hard-swish: what a MobileNetV3 is made of; `gain` makes trouble."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 40, 3, padding=1)
        self.wide = nn.Conv2d(40, 40, 1)
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.stem(x))
        y = self.depthwise(x).relu()
        y = y * nn.functional.hardsigmoid(
            self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu())
        )
        x = nn.functional.hardswish((x + y) * self.gain)
        return nn.functional.hardswish(self.wide(self.last(x / self.gain).relu())).mean((2, 3))


def build(gain: float = 1.0) -> Deployable:
    torch.manual_seed(0)
    return Deployable(Backbone(gain), nn.Linear(40, len(CLASSES)), PREPROCESS).eval()


def pictures(n: int, seed: int = 0) -> np.ndarray:
    coarse = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=(24, 24), mode="bilinear")
    return (255 * fine).byte().permute(0, 2, 3, 1).numpy()


def export(
    folder: Path, precision: str, model: Deployable | None = None, **changes: Any
) -> Artifact:
    arguments: dict[str, Any] = {
        "target": "coreml", "precision": precision, "classes": CLASSES, "preprocess": PREPROCESS,
        "calibration": pictures(40), "calibration_ids": [f"image {index}" for index in range(40)],
        "parity_images": pictures(64, seed=1), "facts": {"student": "test", "student_sha256": "abc"},
    }  # fmt: skip
    return export_parts(model or build(), folder, **arguments | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coreml")


@pytest.fixture(scope="module")
def fp16(root: Path) -> Artifact:
    return export(root / "artifacts" / "coreml-fp16", "fp16")


def test_artifact_lists_every_file_of_the_package_and_its_parity(fp16: Artifact) -> None:
    folder = fp16.folder
    assert folder is not None
    assert read_artifact(folder) == fp16
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {*fp16.files, "artifact.json", "labels.txt"} == found
    assert fp16.model_file == f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
    (folder / fp16.model_file).touch()  # same bytes: still the artifact
    read_artifact(folder)
    assert fp16.parity["passed"] is True
    if platform.system() != "Darwin":
        assert fp16.parity["run_by"].startswith("edgekd's reference evaluator")
        assert "Neural Engine" in fp16.details["not_verified"]
        with pytest.raises(NotHere):
            open_session(folder)
    first, rounded, saved = (link["max_error_relative"] for link in fp16.details["links"].values())
    assert first < 1e-4
    assert 0 < rounded < 1e-2
    assert saved == 0
    assert (fp16.details["fp16_hazards"], fp16.quantization) == ([], None)


def test_the_same_model_is_the_same_file(fp16: Artifact, tmp_path: Path) -> None:
    """coremltools draws the order of maps and the identifiers of a package at random."""
    assert export(tmp_path / "coreml-fp16", "fp16").files == fp16.files


def test_what_an_app_sees(fp16: Artifact) -> None:
    assert fp16.folder is not None
    with quiet():
        spec = coremltools.models.utils.load_spec(str(fp16.folder / PACKAGE))
    assert spec.specificationVersion == 8  # iOS 17
    (image,) = spec.description.input
    side = (image.type.imageType.width, image.type.imageType.height)
    assert (image.name, *side) == ("image", 24, 24)
    assert [output.name for output in spec.description.output] == ["classLabel", "classLabel_probs"]
    inside = spec.description.metadata.userDefined
    assert json.loads(inside["classes"]) == list(CLASSES)
    assert json.loads(inside["preprocess"]) == PREPROCESS.model_dump(mode="json")
    assert json.loads(inside["provenance"])["student"] == "test"
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    (classify,) = (op for op in block.operations if op.type == "classify")
    labels = classify.inputs["classes"].arguments[0].value.immediateValue.list.values
    assert tuple(label.immediateValue.tensor.strings.values[0] for label in labels) == CLASSES
    program = read_program(fp16.folder / PACKAGE)
    types = {op.kind: op.dtypes for op in program.ops if op.kind in ("softmax", "conv", "linear")}
    assert types == {"softmax": ("fp32",), "conv": ("fp16",), "linear": ("fp16",)}
    for name in fp16.files:
        assert str(Path(__file__).parents[2]).encode() not in (fp16.folder / name).read_bytes()


@pytest.fixture(scope="module", params=["iOS17", "iOS18"])
def half(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, convert(capture(build(), 24), 24, CLASSES, request.param, half=True)


@pytest.mark.parametrize(("form", "tolerance"), [("int8", 0.02), ("pal6", 0.1), ("pal4", 0.5)])
def test_compressed_weights_are_expanded(
    half: tuple[str, Any], form: str, tolerance: float, tmp_path: Path
) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    deployment, model = half
    affine = {"iOS17": "constexpr_affine_dequantize", "iOS18": "constexpr_blockwise_shift_scale"}
    kind = affine[deployment] if form == "int8" else "constexpr_lut_to_dense"
    small, _ = quantize_weights(model) if form == "int8" else palettize(model, int(form[-1]))
    package = tmp_path / "m.mlpackage"
    weights = str(package / "Data/com.apple.CoreML/weights")
    with quiet():
        small.save(str(package))
        spec = coremltools.models.utils.load_spec(str(package))
        version = spec.specificationVersion
        program = load(spec, specification_version=version, file_weights_dir=weights)
    operations = program.functions["main"].operations
    stored = [op for op in operations if op.op_type.startswith("constexpr_")]
    assert [op.op_type for op in stored] == [kind] * 2  # the two layers of more than 512 weights
    images = pictures(16, seed=5)
    expected = torch_logits(build(), images)
    error = np.abs(logits_of(read_program(package), images) - expected).max()
    assert error < tolerance * np.ptp(expected)


def test_int8_weights_need_no_calibration_record(root: Path) -> None:
    artifact = export(root / "coreml-int8-weights", "int8-weights", deployment_target="iOS18")
    assert artifact.parity["passed"] is True
    assert artifact.quantization is not None
    assert "ids" not in artifact.quantization
    assert artifact.details["minimum_deployment_target"] == "iOS18"
    assert artifact.details["links"]["float16 → package"]["max_error_relative"] > 0


def test_int8_activations_are_quantized_and_calibrated(root: Path) -> None:
    artifact = export(root / "coreml-int8", "int8")
    program = read_program(root / "coreml-int8" / PACKAGE)
    writer = {name: op.kind for op in program.ops for name in op.outputs}
    read = [getattr(op.inputs["x"], "name", "") for op in program.ops if op.kind == "conv"]
    assert [writer.get(name) for name in read].count("dequantize") == 4
    assert artifact.quantization is not None
    assert artifact.quantization["calibration_images"] == 40
    assert artifact.quantization["ids"][1] == "image 1"
    assert len(artifact.quantization["float_layers"]) == 2  # squeeze and excite
    assert artifact.parity["cosine"] > 0.95


def test_int8_leaves_layers_in_float_whose_steps_half_precision_cannot_hold(tmp_path: Path) -> None:
    model = build(gain=1e-6)
    artifact = export(tmp_path / "coreml-int8", "int8", model)
    assert artifact.quantization is not None
    assert len(artifact.quantization["float_layers"]) > 2  # more than squeeze and excite
    assert artifact.parity["passed"] is True


def test_layers_stay_in_float32_if_need_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Activations reach about 10⁶ inside; the student itself gives ordinary logits."""
    model, images = build(gain=1e6), pictures(8, seed=3)
    expected = torch_logits(model, images)
    close = 0.05 * np.ptp(expected)
    with quiet():
        convert(capture(model, 24), 24, CLASSES, half=True).save(str(tmp_path / "plain.mlpackage"))
    # Infinity became NaN, which the hard-swish took for zero: finite, plausible, and the same for every image.
    plain = logits_of(read_program(tmp_path / "plain.mlpackage"), images)
    assert not (np.abs(plain - expected) < close).all()
    artifact = export(tmp_path / "coreml-fp16", "fp16", model)
    assert artifact.parity["passed"] is True
    hazards = artifact.details["fp16_hazards"]
    overflows = {hazard["layer"] for hazard in hazards if hazard["kind"] == "overflow"}
    assert overflows
    assert overflows <= set(artifact.details["float32_layers"])
    program = read_program(tmp_path / "coreml-fp16" / PACKAGE)
    np.testing.assert_allclose(logits_of(program, images), expected, atol=close)
    widths = {dtype for op in program.ops if op.kind == "conv" for dtype in op.dtypes}
    assert "fp16" in widths  # the rest is still in half precision
    assert "stay in float32" in capsys.readouterr().err


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).topk(40).values


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3)).repeat(1, 14)[:, :40]
        return means if x.sum() > 0 else -means


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        (Sorting(), {}, "topk"),
        (Branching(), {}, "cannot be captured for Core ML"),
        (None, {"calibration": None}, "needs calibration images"),
        (None, {"deployment_target": "iOS12"}, "iOS12"),
        (None, {"compute_capability": "8.6"}, "no option compute_capability"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(
    tmp_path: Path, backbone: nn.Module | None, changes: dict[str, Any], message: str
) -> None:
    model = build()
    model.backbone = backbone or model.backbone
    with pytest.raises(EdgekdError, match=message):
        export(tmp_path / "a", "fp16" if changes else "fp32", model, **changes)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:  # coremltools' words where the temporary folder is full
        raise RuntimeError(
            "[MIL FileWriter]: Unknown error occurred while writing data to the file."
        )

    compression = coremltools.optimize.coreml
    for holder, name in ((coremltools, "convert"), (compression, "linear_quantize_weights")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, full)
            with pytest.raises(EdgekdError, match="could not write its files"):
                export(tmp_path / "a", "int8-weights")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(EdgekdError) as caught:
        export(tmp_path / "a", "fp32")
    assert "edgekd[coreml]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "broken.mlpackage").mkdir()
    for package in ("missing.mlpackage", "broken.mlpackage"):
        with pytest.raises(EdgekdError):
            read_program(tmp_path / package)


def test_session_gives_log_probabilities(fp16: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds Core ML, with a stand-in for Core ML itself."""
    seen: list[tuple[int, int]] = []

    class Standin:
        def __init__(self, path: str, compute_units: Any) -> None:
            assert Path(path).name == PACKAGE

        def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
            seen.append(inputs["image"].size)
            odds = {"élan": 0.0, "cat": 0.25, "dog": 0.75}
            return {"classLabel": "dog", "classLabel_probs": odds}

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", Standin)
    assert fp16.folder is not None
    logs = open_session(fp16.folder).run(pictures(2))
    assert seen == [(24, 24), (24, 24)]
    np.testing.assert_allclose(np.exp(logs), [[0.25, 0.75, 0]] * 2, atol=1e-7)
    assert np.isfinite(logs).all()
    with pytest.raises(EdgekdError, match="chooses its threads itself"):
        open_session(fp16.folder, threads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_small_100", "mobilenetv4_conv_small", "ghostnet_100", "tf_efficientnet_lite0",
     "deit_tiny_patch16_224", "fastvit_t8", "repvit_m1_0", "resnet18"],
)  # fmt: skip
def test_evaluator_computes_every_student(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    size = 64
    backbone: Any = timm.create_model(
        name, num_classes=0, **({"img_size": size} if "deit" in name else {})
    )
    with torch.no_grad():
        width = backbone.eval()(torch.zeros(2, 3, size, size)).shape[1]
    model = Deployable(backbone, nn.Linear(width, 3), Preprocess(size=size)).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    with quiet():
        package = convert(capture(copy.deepcopy(model), size), size, CLASSES, half=False)
        package.save(str(tmp_path / "m.mlpackage"))
    expected = torch_logits(model, images)
    found = logits_of(read_program(tmp_path / "m.mlpackage"), images)
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1e-3, np.ptp(expected)), rtol=1e-3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ZOOM = {"scale_factor_height": 1, "scale_factor_width": 2.0}
TO_INT8 = {"scale": 0.5, "zero_point": 3, "output_dtype": "int8"}
TO_UINT8 = {"scale": 0.5, "zero_point": 0, "output_dtype": "uint8"}


@pytest.mark.parametrize(
    ("kind", "x", "given", "expected"),
    [
        ("sigmoid_hard", [-9.0, 0, 1.5, 9], {"alpha": 1 / 6, "beta": 0.5}, [0, 0.5, 0.75, 1]),
        ("thresholded_relu", [-4.0, -3, -1, 2], {"alpha": -3.0}, [0, -3, -1, 2]),
        ("clip", [-1.0, 3, 7], {"alpha": 0.0, "beta": 6.0}, [0, 3, 6]),
        ("silu", [0.0, 1.0], {}, [0, 0.7310586]),
        ("gelu", [1.0], {}, [0.8413447]),
        ("gelu", [1.0], {"mode": "TANH_APPROXIMATION"}, [0.841192]),
        ("gelu", [1.0], {"mode": "SIGMOID_APPROXIMATION"}, [0.8457958]),
        ("softmax", [0.0, 1.0986123], {"axis": 0}, [0.25, 0.75]),
        ("real_div", [6.0], {"y": 4.0}, [1.5]),
        ("maximum", [-1.0, 2.0], {"y": 0.5}, [0.5, 2.0]),
        ("tile", [1.0, 2.0], {"reps": [2]}, [1.0, 2.0, 1.0, 2.0]),
        ("upsample_nearest_neighbor", [[[[1.0, 2.0]]]], ZOOM, [[[[1.0, 1.0, 2.0, 2.0]]]]),
        ("cast", [1.7, -1.7], {"dtype": "int32"}, [1, -1]),
        # round half to even, then clamp to what int8 holds
        ("quantize", [0.5, 1.5, 99, -99], TO_INT8, [4, 6, 127, -128]),
        ("quantize", [0.25, -1.0], TO_UINT8, [0, 0]),
        ("dequantize", [4.0, 127], {"scale": 0.5, "zero_point": 3}, [0.5, 62]),
    ],
)
def test_values(kind: str, x: list[Any], given: dict[str, Any], expected: list[Any]) -> None:
    name = "input" if "quantize" in kind else "x"
    result: Any = OPS[kind](**{name: torch.tensor(x)}, **given)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_operations_are_torchs() -> None:
    ops, close = dict[str, Any](OPS), torch.testing.assert_close
    # Uneven padding comes in MIL's order.
    x, weight = rand(1, 2, 5, 6), rand(3, 2, 3, 3, seed=1)
    pad = np.array([0, 1, 2, 3])  # top bottom left right
    found = ops["conv"](x=x, weight=weight, pad_type="custom", pad=pad)
    close(found, F.conv2d(F.pad(x, (2, 3, 0, 1)), weight))
    found = ops["pad"](x=x, pad=np.array([0] * 4 + [*pad]), mode="constant", constant_val=7.0)
    close(found, F.pad(x, (2, 3, 0, 1), value=7.0))
    x, sizes = -rand(1, 2, 6, 6).abs(), {"kernel_sizes": np.full(2, 3), "strides": np.full(2, 2)}
    given: dict[str, Any] = {"x": x, **sizes, "pad_type": "custom", "pad": np.ones(4, int)}
    close(ops["max_pool"](**given), F.max_pool2d(x, 3, 2, 1))
    close(ops["avg_pool"](**given), F.avg_pool2d(x, 3, 2, 1))
    found = ops["avg_pool"](**given, exclude_padding_from_average=True)
    close(found, F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
    x, gamma, beta = rand(2, 3, 8), rand(8, seed=1), rand(8, seed=2)
    found = ops["layer_norm"](x=x, axes=np.array([-1]), gamma=gamma, beta=beta, epsilon=1e-3)
    close(found, F.layer_norm(x, (8,), gamma, beta, 1e-3))
    image, mean, variance = rand(2, 3, 4, 4), rand(3, seed=3), rand(3, seed=4).abs()
    statistics = {"mean": mean, "variance": variance, "gamma": gamma[:3], "beta": beta[:3]}
    expected = F.batch_norm(image, mean, variance, gamma[:3], beta[:3], eps=1e-3)
    close(ops["batch_norm"](x=image, epsilon=1e-3, **statistics), expected)
    q, k, v = (rand(1, 2, 5, 4, seed=seed) for seed in range(3))
    found = ops["scaled_dot_product_attention"](query=q, key=k, value=v)
    close(found, F.scaled_dot_product_attention(q, k, v))
    close(ops["matmul"](x=q, y=k, transpose_y=True), q @ k.mT)
    close(ops["matmul"](x=q, y=k, transpose_x=True), q.mT @ k)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [(8, 3, 2, 1), (7, 5, 2, 1), (9, 3, 1, 2)]
)
def test_same_padding_is_timms(size: int, kernel: int, stride: int, dilation: int) -> None:
    layer = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2)
    x, strides, dilations = rand(1, 4, size, size), np.full(2, stride), np.full(2, dilation)
    weights = {"weight": layer.weight, "bias": layer.bias, "groups": 2}
    found = OPS["conv"](x=x, strides=strides, dilations=dilations, pad_type="same", **weights)
    torch.testing.assert_close(found, layer(x))


def test_shapes() -> None:
    x, ops = torch.arange(24.0).reshape(2, 3, 4), dict[str, Any](OPS)
    assert ops["reshape"](x=x, shape=np.array([0, -1])).shape == (2, 12)
    assert ops["expand_dims"](x=x, axes=np.array([0, -1])).shape == (1, 2, 3, 4, 1)
    assert ops["squeeze"](x=x[None], axes=np.array([0])).shape == (2, 3, 4)
    parts = ops["split"](x=x[0], split_sizes=np.array([1, 2]), axis=0)
    assert [len(part) for part in parts] == [1, 2]
    assert len(ops["split"](x=x, num_splits=2, axis=2)) == 2
    masks = {
        "end_mask": np.array([False, False, True]),
        "squeeze_mask": np.array([True, False, False]),
    }
    found = ops["slice_by_index"](x=x, begin=np.array([1, 0, 1]), end=np.array([0, 2, 0]), **masks)
    torch.testing.assert_close(found, x[1, :2, 1:])


IMAGES = np.random.default_rng(0).integers(1, 256, (11, 4, 4, 3), dtype=np.uint8)


def op(kind: str, name: str, dtype: str = "fp32", **inputs: Any) -> Op:
    return Op(kind, name, inputs, (name,), (dtype,), ((1, 3),))


def chain(up: float, down: float, dtype: str = "fp32") -> MilProgram:
    """mean over the image, times `up`, relu, times `down`, softmax."""
    probabilities, wide = {"probabilities": Ref("odds")}, {"x": Ref("down"), "dtype": "fp32"}
    ops = (
        op("reduce_mean", "mean", dtype, x=Ref("image"), axes=np.array([2, 3]), keep_dims=False),
        op("mul", "up", dtype, x=Ref("mean"), y=np.float32(up).reshape(())),
        op("relu", "relu", dtype, x=Ref("up")),
        op("mul", "down", dtype, x=Ref("relu"), y=np.float32(down).reshape(())),
        Op("cast", "wide", wide, ("wide",), ("fp32",), ((1, 3),)),
        op("softmax", "odds", "fp32", x=Ref("wide"), axis=1),
        Op("classify", "label", probabilities, ("label", "probs"), ("?", "?"), ((), ())),
    )
    return MilProgram("image", (1, 3, 4, 4), ops, ("label", "probs"))


def means() -> np.ndarray:
    return IMAGES.reshape(len(IMAGES), 16, 3).astype(np.float64).mean(1)


def test_declared_half_precision_rounds_each_result_and_overflows() -> None:
    half = means().astype(np.float32).astype(np.float16)
    expected = (half * np.float16(2)).astype(np.float16) * np.float16(0.25)
    found = logits_of(chain(2, 0.25, "fp16"), IMAGES)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    full = logits_of(chain(2, 0.25, "fp16"), IMAGES, "float32")
    np.testing.assert_allclose(full, means() / 2, rtol=1e-6)
    assert np.isinf(logits_of(chain(2000, 0.001, "fp16"), IMAGES)).all()
    assert np.isfinite(logits_of(chain(2000, 0.001), IMAGES)).all()


def test_overflow_is_named_and_kept_with_its_readers() -> None:
    program = chain(2000, 0.001)
    ranges = measure_ranges(program, IMAGES)
    assert [(h.layer, h.kind) for h in ranges.hazards] == [("up", "overflow"), ("relu", "overflow")]
    assert ranges.hazards[0].largest == pytest.approx(2000 * means().max(), rel=1e-5)
    assert layers_to_keep(program, ranges.hazards) == {"up", "relu", "down"}
    np.testing.assert_allclose(ranges.logits, 2 * means(), rtol=1e-5)
    assert ranges.highs["image"] == 255
    assert ranges.lows["down"] == pytest.approx(2 * means().min(), rel=1e-5)
    for ordinary in (chain(2, 0.25), chain(0, 1)):
        assert measure_ranges(ordinary, IMAGES).hazards == ()
    # Underflow is measured by what rounding loses.
    hazards = measure_ranges(chain(1e-8, 1e8), IMAGES).hazards
    assert [(h.layer, h.kind) for h in hazards] == [("up", "underflow"), ("relu", "underflow")]
    assert hazards[0].rounding == pytest.approx(1)
    with pytest.raises(EdgekdError, match=r"layer up .* not finite"):
        measure_ranges(chain(float("inf"), 1), IMAGES)


@pytest.mark.parametrize(
    ("kind", "inputs", "named"),
    [
        ("topk", {}, "topk"),
        ("relu", {"slope": 1}, "slope"),
        ("concat", {"values": (Ref("image"),) * 2, "axis": 1, "interleave": True}, "interleaved"),
    ],
)
def test_unknown_operations_are_named(kind: str, inputs: dict[str, Any], named: str) -> None:
    layer = op(kind, "best", **({} if "values" in inputs else {"x": Ref("image")}), **inputs)
    program = MilProgram("image", (1, 3, 4, 4), (layer,), ("best",))
    with pytest.raises(EdgekdError, match=named):
        evaluate(program, IMAGES, ["best"])
