"""Trained INT8: which file wins, what the artifact says, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_quantize import SIZE, Block, pictures
from torch import nn

import edgekd
from edgekd.cli import main
from edgekd.errors import EdgekdError
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.ort import DIALECT
from edgekd.export.qat import PATIENCE, Tuner, quantize_tuned
from edgekd.export.quantize import calibrate
from edgekd.export.replay import Replay
from edgekd.export.trt_rules import findings
from edgekd.preprocess import Preprocess

Train = Callable[[Replay, Callable[[int], bool]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Linear]:
    folder = tmp_path_factory.mktemp("qat")
    model = Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE)).eval()
    with torch.no_grad():  # the classes as likely as each other, so that damage changes minds
        model.head.bias -= model(torch.from_numpy(pictures(64, seed=9))).median(dim=0).values
    export_onnx(model, folder / "fp32.onnx", size=SIZE, metadata={})
    return folder, model.head


def tuner(head: nn.Linear, labels: np.ndarray, train: Train) -> Tuner:
    domains = np.arange(len(labels)) % 2
    return Tuner(pictures(len(labels), seed=2), labels, domains, train, lambda: head, {"steps": 9})


def test_score_is_the_mean_over_domains_then_the_loss() -> None:
    def nothing(network: Replay, go_on: Callable[[int], bool]) -> None: ...

    logits = np.array([[2.0, 0], [2, 0], [2, 0], [0, 2]], np.float32)
    labels, domains = np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1])
    asked = Tuner(
        np.zeros((4, 1, 1, 3), np.uint8), labels, domains, nothing, lambda: nn.Linear(1, 1), {}
    )
    accuracy, minus_loss = asked.score(logits)
    assert accuracy == 0.5  # 3 of 3 and 0 of 1
    assert minus_loss == pytest.approx(
        -(3 * np.log1p(np.exp(-2)) + 2 + np.log1p(np.exp(-2))) / 4, rel=1e-5
    )
    assert asked.score(2 * logits) < (accuracy, minus_loss)


def test_training_that_harms_leaves_the_untrained_file(made: tuple[Path, nn.Linear]) -> None:
    folder, head = made
    full = DIALECT.answers(folder / "fp32.onnx", pictures(32, seed=2))
    asked: list[int] = []

    def ruin(network: Replay, go_on: Callable[[int], bool]) -> None:
        for step in range(1, 10):
            with torch.no_grad():
                for weight in network.weights:
                    weight.add_(torch.randn_like(weight))
            asked.append(step)
            if not go_on(step):
                return

    out = folder / "ruined.onnx"
    said, answers = quantize_tuned(
        folder / "fp32.onnx",
        out,
        pictures(32),
        dialect=DIALECT,
        tuner=tuner(head, full.argmax(axis=1), ruin),
    )
    assert asked == list(range(1, PATIENCE + 1)), (
        "so many files in a row that are not better end it"
    )
    assert said["qat"]["chosen_step"] == 0
    assert said["qat"]["validation_after"] == said["qat"]["validation_before"]
    assert "trained" not in said["method"]
    plain = folder / "plain.onnx"
    DIALECT.write(calibrate(folder / "fp32.onnx", pictures(32)), plain)
    images = pictures(24, seed=8)
    assert np.array_equal(DIALECT.answers(out, images), DIALECT.answers(plain, images))
    assert np.abs(answers(images) - DIALECT.answers(out, images)).max() < 0.05 * np.ptp(full)
    assert {path.name for path in folder.iterdir()} == {"fp32.onnx", "ruined.onnx", "plain.onnx"}


def test_training_that_helps_is_kept_as_of_its_best_step(made: tuple[Path, nn.Linear]) -> None:
    folder, head = made
    pixels = pictures(32, seed=2)
    labels = np.arange(32) % 4  # not what the model says: there is something to learn
    learned = nn.Linear(16, 4)
    learned.load_state_dict(head.state_dict())

    def learn(network: Replay, go_on: Callable[[int], bool]) -> None:
        optimizer = torch.optim.Adam([*network.weights, *learned.parameters()], lr=1e-2)
        for step in range(1, 41):
            loss = nn.functional.cross_entropy(
                learned(network(torch.from_numpy(pixels))), torch.from_numpy(labels)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                go_on(step)
        with torch.no_grad():
            learned.weight.mul_(-1)
        go_on(99)

    out = folder / "learned.onnx"
    said, answers = quantize_tuned(
        folder / "fp32.onnx",
        out,
        pictures(32),
        dialect=DIALECT,
        tuner=tuner(learned, labels, learn),
    )
    assert said["qat"]["chosen_step"] in (20, 40)
    assert said["qat"]["validation_after"] > said["qat"]["validation_before"]
    file = DIALECT.answers(out, pixels)
    measured = np.mean([(file.argmax(axis=1) == labels)[part::2].mean() for part in (0, 1)])
    assert measured == pytest.approx(said["qat"]["validation_after"], abs=1e-5)
    assert (answers(pixels).argmax(axis=1) == file.argmax(axis=1)).mean() >= 0.95
    assert not (folder / "trial.onnx").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    edgekd.train("mobilenetv3_small_050", pretrained="scratch", smoke=True, size=32, out=folder)
    return folder


def test_run_is_trained_on_with_its_recipe_and_teacher(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (run / "student.safetensors").read_bytes()
    with pytest.raises(SystemExit) as left:
        main(
            # No agreement is asked of a student that has hardly learned anything.
            [
                "export",
                str(run),
                "--int8",
                "--qat",
                "--qat-steps",
                "3",
                "--calibration-images",
                "24",
                "--min-agreement",
                "0",
            ]
        )
    assert not left.value.code
    folder = run / "artifacts" / "onnxruntime-int8"
    quantization = json.loads((folder / "artifact.json").read_text())["quantization"]
    qat = quantization["qat"]
    assert qat["recipe"] == "vl2v-adip"
    assert set(qat["terms"]) == {"cos_img", "cos_text"}
    assert (qat["steps"], qat["stage"], qat["teacher"]) == (3, "distill", "toy")
    assert qat["validation_after"] >= qat["validation_before"]
    assert len(quantization["ids"]) == 24
    assert (run / "student.safetensors").read_bytes() == weights, "the run stays as it is"
    assert "same class as the FP32 student" in capsys.readouterr().out
    recorded = json.loads((folder / "artifact.json").read_text())["parity"]
    (link,) = edgekd.verify(folder)
    assert (
        link["top1_agreement"] == recorded["top1_agreement"]
    )  # against what the trained network said
    assert link["cosine"] == pytest.approx(recorded["cosine"], abs=1e-5)
    assert link["link"].startswith("trained network in torch")


def test_tensorrt_gets_a_trained_file_that_it_may_build(run: Path) -> None:
    asked = {
        "qat": True,
        "qat_steps": 3,
        "calibration_images": 24,
        "min_agreement": 0,
        "overwrite": True,
    }
    artifact = edgekd.export(run, target="tensorrt", precision="int8", **asked)[-1]
    assert artifact.folder is not None
    assert artifact.quantization is not None
    assert artifact.quantization["qat"]["steps"] == 3
    assert artifact.quantization["calibrator"] == "minmax", (
        "training learns what part of the range to cover"
    )
    assert (
        artifact.quantization["qat"]["validation_after"]
        >= artifact.quantization["qat"]["validation_before"]
    )
    assert artifact.details["checked"][0] == "edgekd's rules"
    model = onnx.load(artifact.folder / "model.onnx")
    assert findings(model) == []
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [stored[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros
    assert all(zero.dtype == np.int8 and zero == 0 for zero in zeros)
    assert sum(values.dtype == np.int8 and values.ndim > 1 for values in stored.values()) > 20
    (link,) = edgekd.verify(artifact.folder)
    assert link["top1_agreement"] == artifact.parity["top1_agreement"]
    assert link["link"].startswith("trained network in torch")


def test_another_teacher_is_refused(run: Path) -> None:
    path = run / "run.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"teacher_id": "0" * 16}))
    try:
        with pytest.raises(EdgekdError, match="not the teacher that this run learned from"):
            edgekd.export(run, precision="int8", qat=True, overwrite=True)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"qat": True}, "is for INT8 on onnxruntime and tensorrt"),
        (
            {"qat": True, "precision": "int8", "target": "openvino"},
            "is for INT8 on onnxruntime and tensorrt",
        ),
        ({"qat": True, "precision": "int8", "max_drop_id": 1.0}, "keeps layers in float"),
        (
            {"precision": "int8", "target": "coreml", "max_drop_id": 1.0},
            "on onnxruntime, openvino, tensorrt only",
        ),
        ({"precision": "int8", "qat_steps": 5}, "go with it"),
        ({"precision": "int8", "qat": True, "qat_steps": 0}, "at least 1"),
    ],
)
def test_what_does_not_go_together_is_said(wanted: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match=reason):
        edgekd.export(tmp_path / "none", **wanted)
