"""The joint student: shapes, what it may look at, and its ONNX file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.configs.vl import VlTrainConfig
from edgekd.distill.vl import tokens
from edgekd.distill.vl.run import build_student
from edgekd.distill.vl.student import VlStudent
from edgekd.export.vl import export_vl_onnx, open_vl

LENGTH = 7
TEXTS = ["red dog", "is there a red dog", "blue"]


def small_student(**changes: Any) -> VlStudent:
    torch.manual_seed(0)
    config = VlTrainConfig.load(
        **{
            "student": "test_resnet",
            "size": 64,
            "width": 16,
            "heads": 2,
            "control": "none",
            "task": "ve",
            **changes,
        }
    )
    rows = tokens.token_rows(tokens.tokenize(TEXTS, LENGTH))
    student, _, grid = build_student(config, rows, LENGTH, 3)
    assert config.blind or grid[0] * grid[1] == student.patches
    return student.eval()


def pictures(count: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize(("name", "patches"), [("test_resnet", 4), ("vit_tiny", 16)])
def test_patches_and_shapes(name: str, patches: int) -> None:
    student = small_student(student=name)
    joint = student.fuse(student.encode(pictures(3)), tokens.tokenize(TEXTS, LENGTH))
    assert joint.logits.shape == (3, 3)
    assert joint.cls.shape == (3, 16)
    assert joint.patches.shape == (3, patches, 16)
    assert joint.text.shape == (3, LENGTH, 16)


def test_padding_does_not_count() -> None:
    student = small_student()
    ids = tokens.tokenize(["red dog"], LENGTH)
    other = ids.clone()
    other[0, 5:] = tokens.tokenize(["blue"], LENGTH)[0, 1]
    with torch.inference_mode():
        assert torch.allclose(student(pictures(1), ids), student(pictures(1), other), atol=1e-6)
        other[0, 1] = other[0, 5]
        assert not torch.allclose(student(pictures(1), ids), student(pictures(1), other), atol=1e-4)


def test_the_picture_counts_but_not_for_a_blind_student() -> None:
    ids = tokens.tokenize(TEXTS[:1] * 2, LENGTH)
    with torch.inference_mode():
        seeing, blind = (
            small_student()(pictures(2), ids),
            small_student(control="question-only")(pictures(2), ids),
        )
    assert not torch.allclose(seeing[0], seeing[1], atol=1e-4)
    assert torch.equal(blind[0], blind[1])


def test_choice_scores_each_candidate_alone() -> None:
    student = small_student(task="choice")
    ids = tokens.tokenize(TEXTS, LENGTH)
    with torch.inference_mode():
        scores = student(pictures(1), ids[None])
        assert scores.shape == (1, 3)
        assert torch.allclose(
            student(pictures(1), ids[None, [2, 0, 1]]), scores[:, [2, 0, 1]], atol=1e-5
        )


@pytest.mark.parametrize("task", [pytest.param("ve", marks=pytest.mark.slow), "choice"])
def test_onnx_parity(task: str, tmp_path: Path) -> None:
    student = small_student(task=task)
    ids = tokens.tokenize(TEXTS, LENGTH)
    asked = (
        torch.stack([ids[list(p)] for p in itertools.permutations(range(3))])
        if task == "choice"
        else ids
    )
    export_vl_onnx(student, tmp_path / "m.onnx", size=64, text_shape=asked.shape[1:], metadata={})
    predict = open_vl(tmp_path / "m.onnx", threads=1)
    for count in (1, 3):  # the batch is dynamic
        with torch.inference_mode():
            expected = student(pictures(count), asked[:count]).numpy()
        np.testing.assert_allclose(
            predict(pictures(count).numpy(), asked[:count].numpy()), expected, atol=2e-4
        )


@pytest.mark.slow
def test_distillation_leaves_the_graph_alone(tmp_path: Path) -> None:
    """The file is the same graph with and without a teacher, so its latency is too."""
    import onnx

    graphs = []
    for control in ("none", "clip-td"):
        path = tmp_path / f"{control}.onnx"
        export_vl_onnx(
            small_student(control=control), path, size=64, text_shape=(LENGTH,), metadata={}
        )
        graph = onnx.load(path).graph
        graphs.append(
            (
                [(n.op_type, list(n.input), list(n.output)) for n in graph.node],
                [(t.name, list(t.dims), t.data_type) for t in graph.initializer],
            )
        )
    assert graphs[0] == graphs[1]
    names = {i.name: i.type.tensor_type.elem_type for i in onnx.load(path).graph.input}
    assert names == {"image": onnx.TensorProto.UINT8, "tokens": onnx.TensorProto.INT64}
