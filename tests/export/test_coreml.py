"""The Core ML writer on a small student; the reference evaluator stands in for Core ML, which Linux does not have."""

from __future__ import annotations

import builtins
import copy
import json
import os
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import export_parts
from torch import nn

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable, torch_logits
from edgekd.export.mil.evaluate import logits_of
from edgekd.export.mil.program import Ref, decompress, read_program
from edgekd.export.onnx import quiet
from edgekd.targets.session import open_session

coremltools = pytest.importorskip("coremltools", reason="needs the extra coreml")

from edgekd.export.coreml import PACKAGE, capture, convert  # noqa: E402
from edgekd.export.mil.compress import palettize, quantize_weights  # noqa: E402

PREPROCESS = Preprocess(size=24, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
CLASSES = ("cat", "dog", "élan")
ASSETS = Path(os.environ.get("EDGEKD_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))


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
        "target": "coreml",
        "precision": precision,
        "classes": CLASSES,
        "preprocess": PREPROCESS,
        "calibration": pictures(40),
        "calibration_ids": [f"image {index}" for index in range(40)],
        "parity_images": pictures(64, seed=1),
        "facts": {"student": "test", "student_sha256": "abc"},
    }
    return export_parts(model or build(), folder, **arguments | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coreml")


@pytest.fixture(scope="module")
def fp16(root: Path) -> Artifact:
    return export(root / "artifacts" / "coreml-fp16", "fp16")


def test_artifact_lists_every_file_of_the_package(fp16: Artifact) -> None:
    folder = fp16.folder
    assert folder is not None
    assert read_artifact(folder) == fp16
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {*fp16.files, "artifact.json", "labels.txt"} == found
    assert fp16.model_file == f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
    (folder / fp16.model_file).touch()  # same bytes: still the artifact
    read_artifact(folder)


def test_the_same_model_is_the_same_file(fp16: Artifact, tmp_path: Path) -> None:
    """coremltools draws the order of maps and the identifiers of a package at random."""
    assert export(tmp_path / "coreml-fp16", "fp16").files == fp16.files


def test_verify_repeats_the_check_far_from_the_run(root: Path, tmp_path: Path) -> None:
    from PIL import Image

    from edgekd.artifacts.verify import verify_artifact
    from edgekd.data.image_set import load_images

    for number, pixels in enumerate(pictures(8, seed=7)):
        path = tmp_path / "photos" / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    images = load_images(str(tmp_path / "photos"))
    shown = np.stack([PREPROCESS.pixels(images.read(i)) for i in range(8)])
    export(tmp_path / "copied", "fp32", parity_images=shown, parity_keys=list(images.keys))
    (link,) = verify_artifact(tmp_path / "copied", str(tmp_path / "photos"))
    assert (link["n"], link["passed"], link["top1_agreement"]) == (8, True, 1)


def test_altered_weights_are_noticed(fp16: Artifact, tmp_path: Path) -> None:
    assert fp16.folder is not None
    shutil.copytree(fp16.folder, tmp_path / "copy")
    weights = tmp_path / "copy" / PACKAGE / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(EdgekdError, match="is not the file that was exported"):
        read_artifact(tmp_path / "copy")


def test_fp16_passes_and_says_who_computed_it(fp16: Artifact) -> None:
    assert fp16.parity["passed"] is True
    assert fp16.parity["top1_agreement"] >= 0.995
    if platform.system() != "Darwin":
        assert fp16.parity["run_by"].startswith("edgekd's reference evaluator")
        assert "Neural Engine" in fp16.details["not_verified"]
    links = fp16.details["links"]
    assert list(links) == ["torch → float32 program", "float32 → float16", "float16 → package"]
    assert links["torch → float32 program"]["max_error_relative"] < 1e-4
    assert 0 < links["float32 → float16"]["max_error_relative"] < 1e-2
    assert links["float16 → package"]["max_error_relative"] == 0
    assert fp16.details["fp16_hazards"] == []
    assert fp16.quantization is None


def test_what_an_app_sees(fp16: Artifact) -> None:
    assert fp16.folder is not None
    with quiet():
        spec = coremltools.models.utils.load_spec(str(fp16.folder / PACKAGE))
    assert spec.specificationVersion == 8  # iOS 17
    (image,) = spec.description.input
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == (
        "image",
        24,
        24,
    )
    assert [output.name for output in spec.description.output] == ["classLabel", "classLabel_probs"]
    assert spec.description.predictedFeatureName == "classLabel"
    inside = spec.description.metadata.userDefined
    assert json.loads(inside["classes"]) == list(CLASSES)
    assert json.loads(inside["preprocess"]) == PREPROCESS.model_dump(mode="json")
    assert json.loads(inside["provenance"])["student"] == "test"
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    (classify,) = (op for op in block.operations if op.type == "classify")
    labels = classify.inputs["classes"].arguments[0].value.immediateValue.list.values
    assert tuple(label.immediateValue.tensor.strings.values[0] for label in labels) == CLASSES


def test_probabilities_are_the_softmax_in_full_precision(fp16: Artifact) -> None:
    assert fp16.folder is not None
    program = read_program(fp16.folder / PACKAGE)
    (last,) = (op for op in program.ops if op.kind == "softmax")
    assert last.dtypes == ("fp32",)
    assert {
        dtype for op in program.ops if op.kind in ("conv", "linear", "mul") for dtype in op.dtypes
    } == {"fp16"}


def test_package_names_no_machine(fp16: Artifact) -> None:
    assert fp16.folder is not None
    for name in fp16.files:
        data = (fp16.folder / name).read_bytes()
        assert b"site-packages" not in data
        assert str(Path(__file__).parents[2]).encode() not in data


def test_fp32_computes_the_model(root: Path) -> None:
    artifact = export(root / "coreml-fp32", "fp32", calibration=None)
    assert artifact.parity["passed"] is True
    assert artifact.parity["max_error_relative"] < 1e-4
    images = pictures(5, seed=9)
    program = read_program(root / "coreml-fp32" / PACKAGE)
    np.testing.assert_allclose(logits_of(program, images), torch_logits(build(), images), atol=1e-4)


@pytest.fixture(scope="module", params=["iOS17", "iOS18"])
def half(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, convert(capture(build(), 24), 24, CLASSES, request.param, half=True)


@pytest.mark.parametrize("form", ["int8", "pal4", "pal6"])
def test_compressed_weights_are_expanded_as_the_specification_says(
    half: tuple[str, Any], form: str, tmp_path: Path
) -> None:
    """Our formulas against coremltools' own, on every weight of a saved package."""
    from coremltools.converters.mil.frontend.milproto.load import load

    deployment, model = half
    affine = {"iOS17": "constexpr_affine_dequantize", "iOS18": "constexpr_blockwise_shift_scale"}[
        deployment
    ]
    small, said = quantize_weights(model) if form == "int8" else palettize(model, int(form[-1]))
    assert ("int8" if form == "int8" else f"{form[-1]}-bit") in said["method"]
    package = tmp_path / "m.mlpackage"
    with quiet():
        small.save(str(package))
        spec = coremltools.models.utils.load_spec(str(package))
        program = load(
            spec,
            specification_version=spec.specificationVersion,
            file_weights_dir=str(package / "Data/com.apple.CoreML/weights"),
        )
    stored = [
        op for op in program.functions["main"].operations if op.op_type.startswith("constexpr_")
    ]
    assert {op.op_type for op in stored} == {affine if form == "int8" else "constexpr_lut_to_dense"}
    assert len(stored) == 2  # the two layers of more than 512 weights
    for op in stored:
        np.testing.assert_array_equal(decompress(op), op.materialized_val_inference())
    images = pictures(16, seed=5)
    error = np.abs(logits_of(read_program(package), images) - torch_logits(build(), images)).max()
    assert error < {"int8": 0.02, "pal6": 0.1, "pal4": 0.5}[form] * np.ptp(
        torch_logits(build(), images)
    )


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
    kinds = [op.kind for op in program.ops]
    assert kinds.count("quantize") >= 4
    assert artifact.quantization is not None
    assert artifact.quantization["calibration_images"] == 40
    assert artifact.quantization["ids"][1] == "image 1"
    assert len(artifact.quantization["float_layers"]) == 2  # squeeze and excite
    fed = {
        op.name: next(
            (
                p.kind
                for p in program.ops
                if isinstance(op.inputs["x"], Ref) and op.inputs["x"].name in p.outputs
            ),
            "",
        )
        for op in program.ops
        if op.kind == "conv"
    }
    assert sorted(fed.values()).count("dequantize") == 4
    assert artifact.parity["cosine"] > 0.95


def test_layers_that_half_precision_would_ruin_stay_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Activations reach about 10⁶ inside; the student itself gives ordinary logits."""
    model, images = build(gain=1e6), pictures(8, seed=3)
    exported = capture(model, 24)
    plain = convert(exported, 24, CLASSES, half=True)
    with quiet():
        plain.save(str(tmp_path / "plain.mlpackage"))
    expected = torch_logits(model, images)
    close = 0.05 * np.ptp(expected)
    # Infinity became NaN, which the hard-swish took for zero: finite, plausible, and the same for every image.
    assert not (
        np.abs(logits_of(read_program(tmp_path / "plain.mlpackage"), images) - expected) < close
    ).all()

    artifact = export(tmp_path / "coreml-fp16", "fp16", model)
    assert artifact.parity["passed"] is True
    overflows = [
        hazard for hazard in artifact.details["fp16_hazards"] if hazard["kind"] == "overflow"
    ]
    assert overflows
    assert {hazard["layer"] for hazard in overflows} <= set(artifact.details["float32_layers"])
    program = read_program(tmp_path / "coreml-fp16" / PACKAGE)
    np.testing.assert_allclose(logits_of(program, images), expected, atol=close)
    widths = {dtype for op in program.ops if op.kind == "conv" for dtype in op.dtypes}
    assert "fp16" in widths  # the rest is still in half precision
    said = capsys.readouterr().err
    assert "above half precision's 65504" in said
    assert "stay in float32" in said


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).topk(40).values


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            x.mean((2, 3)).repeat(1, 14)[:, :40]
            if x.sum() > 0
            else x.mean((2, 3)).repeat(1, 20)[:, :40]
        )


class Exotic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x.flatten(2)).repeat(1, 1, 14).flatten(1)[:, :40]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Sorting(), r"does not know the Core ML operation topk"),
        (Branching(), "cannot be captured for Core ML"),
        (Exotic(), "cannot convert the student"),
    ],
)
def test_students_that_cannot_be_exported(
    tmp_path: Path, backbone: nn.Module, message: str
) -> None:
    model = build()
    model.backbone = backbone
    with pytest.raises(EdgekdError, match=message):
        export(tmp_path / "a", "fp32", model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "FP16 needs calibration images"),
        ({"calibration": pictures(1)[:0]}, "range analysis for half precision needs images"),
        ({"deployment_target": "iOS12"}, "not made for iOS12"),
        ({"compute_capability": "8.6"}, "coreml has no option compute_capability"),
    ],
)
def test_impossible_wishes_leave_nothing_behind(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgekdError, match=message):
        export(tmp_path / "a", "fp16", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["convert", "optimize.coreml.linear_quantize_weights"])
def test_files_that_cannot_be_written_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[MIL FileWriter]: Unknown error occurred while writing data to the file."
        )

    holder, name = (
        (coremltools, where)
        if "." not in where
        else (coremltools.optimize.coreml, where.split(".")[-1])
    )
    monkeypatch.setattr(holder, name, full)  # its words where the temporary folder's disk is full
    with pytest.raises(EdgekdError, match="coremltools could not write its files") as caught:
        export(tmp_path / "a", "int8")
    assert "Is the disk full?" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make `import package` fail as where it is not installed."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_missing_coremltools_comes_with_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "coremltools")
    with pytest.raises(
        EdgekdError, match="needs coremltools, which is not installed here"
    ) as caught:
        export(tmp_path / "a", "fp32")
    assert caught.value.hint.startswith('Install it: pip install "edgekd[coreml]"')
    assert list(tmp_path.iterdir()) == []


def test_missing_scikit_learn_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sklearn")
    with pytest.raises(EdgekdError, match="Palettes need scikit-learn") as caught:
        palettize(None, 4)
    assert caught.value.hint == "Install it: pip install scikit-learn."


@pytest.mark.skipif(platform.system() == "Darwin", reason="macOS has Core ML")
def test_session_says_that_only_macos_has_core_ml(fp16: Artifact) -> None:
    assert fp16.folder is not None
    with pytest.raises(NotHere, match="needs Core ML, which only macOS has"):
        open_session(fp16.folder)


@pytest.mark.skipif(platform.system() == "Darwin", reason="macOS has Core ML")
def test_benchmark_leaves_it_out_aloud(
    fp16: Artifact,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edgekd.evaluation.subjects import subjects_of

    monkeypatch.setattr("edgekd.evaluation.subjects.count_torch", lambda *_: None)

    run = SimpleNamespace(name="run", student_sha256="abc", preprocess=PREPROCESS, classes=CLASSES)
    loaded: Any = SimpleNamespace(
        run=run, bank=None, vectors=None, student=nn.Identity(), folder=root
    )
    assert [subject.name for subject in subjects_of(loaded, ["coreml-fp16"])] == ["torch"]
    assert "coreml-fp16 is left out: coreml-fp16 needs Core ML" in capsys.readouterr().err


def test_session_orders_the_classes_and_takes_logarithms(
    fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What surrounds Core ML, with a stand-in for Core ML itself."""
    seen: list[tuple[int, int]] = []

    class Standin:
        def __init__(self, path: str, compute_units: Any) -> None:
            assert Path(path).name == PACKAGE

        def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
            seen.append(inputs["image"].size)
            return {
                "classLabel": "dog",
                "classLabel_probs": {"élan": 0.0, "cat": 0.25, "dog": 0.75},
            }

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", Standin)
    assert fp16.folder is not None
    logs = open_session(fp16.folder).run(pictures(2))
    assert seen == [(24, 24), (24, 24)]
    np.testing.assert_allclose(np.exp(logs), [[0.25, 0.75, 0]] * 2, atol=1e-7)
    assert np.isfinite(logs).all()
    with pytest.raises(EdgekdError, match="chooses its threads itself"):
        open_session(fp16.folder, threads=2)


@pytest.mark.skipif(platform.system() != "Darwin", reason="needs Core ML, which only macOS has")
def test_core_ml_agrees_with_the_reference_evaluator(fp16: Artifact) -> None:
    assert fp16.folder is not None
    images = pictures(16, seed=4)
    logs = open_session(fp16.folder).run(images)
    logits = logits_of(read_program(fp16.folder / PACKAGE), images)
    assert (logs.argmax(1) == logits.argmax(1)).mean() >= 0.9
    np.testing.assert_allclose(logs, torch.from_numpy(logits).log_softmax(1).numpy(), atol=0.05)


@pytest.mark.parametrize("name", ["missing.mlpackage", "broken.mlpackage"])
def test_unreadable_packages(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        EdgekdError, match=r"There is no Core ML package|cannot be read as a Core ML package"
    ):
        read_program(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_100",
        "mobilenetv3_large_100",
        "mobilenetv2_100",
        "mobilenetv4_conv_small",
        "efficientnet_b0",
        "tf_efficientnet_lite0",
        "deit_tiny_patch16_224",
        "fastvit_t8",
        "repvit_m1_0",
        "resnet18",
    ],
)
def test_evaluator_knows_every_student(tmp_path: Path, name: str) -> None:
    import timm

    torch.manual_seed(0)
    size = 64
    options = {"img_size": size} if "deit" in name else {}
    preprocess = Preprocess(size=size)
    backbone = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        width = backbone(torch.zeros(2, 3, size, size)).shape[1]
    model = Deployable(backbone, nn.Linear(width, 3), preprocess).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    package = convert(capture(copy.deepcopy(model), size), size, CLASSES, half=False)
    with quiet():
        package.save(str(tmp_path / "m.mlpackage"))
    expected = torch_logits(model, images)
    found = logits_of(read_program(tmp_path / "m.mlpackage"), images)
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1e-3, np.ptp(expected)), rtol=1e-3)
