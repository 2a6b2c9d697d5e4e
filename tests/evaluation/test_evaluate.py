from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import edgekd
from edgekd.cli import main
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.load import load_run


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    from PIL import Image

    root = tmp_path_factory.mktemp("compare")
    for seed, domain in enumerate(("photo", "sketch")):
        for name, tint in (("cat", (90, 0, 0)), ("dog", (0, 0, 90))):
            (root / "data" / domain / name).mkdir(parents=True)
            for number in range(12):
                noise = (
                    np.random.default_rng(1000 * seed + 100 * tint[0] + number).integers(
                        0, 160, (32, 32, 3)
                    )
                    + tint
                )
                path = root / "data" / domain / name / f"{number}.png"
                Image.fromarray(noise.astype(np.uint8)).save(path)
    return {
        "student": "test_efficientnet",
        "pretrained": "scratch",
        "data": str(root / "data"),
        "teacher": f"local-dir:{tiny_teacher}",
        "size": 32,
        "batch_size": 4,
        "steps": 2,
        "views": 1,
        "accelerator": "cpu",
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "lgd"
    edgekd.train(recipe="lgd", out=folder, **settings)
    edgekd.export(folder)
    return folder


def test_agreement_is_measured_before_and_after_export(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = edgekd.evaluate(run, agreement=True)
    assert [(row["subject"], row["domain"]) for row in rows] == [
        ("student", "photo"),
        ("onnxruntime-fp32", "photo"),
        ("student", "sketch"),
        ("onnxruntime-fp32", "sketch"),
    ]
    for torch_row, file_row in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert torch_row["n"] == file_row["n"]
        assert torch_row["top1_agreement"] == file_row["top1_agreement"]
        assert torch_row["m_vlalign"] == pytest.approx(file_row["m_vlalign"], abs=0.1)
        assert 0 <= torch_row["m_rel"] <= torch_row["recall"] <= 1
        assert 0 < torch_row["angle"] < 180
        assert file_row["m_rel"] is None  # a file gives logits, not embeddings
    main_output(["evaluate", str(run), "--agreement"])
    shown = capsys.readouterr().out
    assert "M_neigh@10 %" in shown
    assert "onnxruntime-fp32" in shown


def test_a_file_that_embeds_is_compared_as_the_student_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgekd.core.errors import NotHere
    from edgekd.targets import session

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    edgekd.export(copy, head="embedding")
    edgekd.add_class(
        copy / "artifacts" / "onnxruntime-fp32-embedding", "aardvark"
    )  # is nobody's answer here
    open_it = session.open_session

    def but_one(folder: Path, **words: Any) -> Any:
        if folder.name == "onnxruntime-fp32":
            raise NotHere("It runs on another machine.", "Go there.")
        return open_it(folder, **words)

    monkeypatch.setattr("edgekd.evaluation.evaluate.open_session", but_one)
    rows = edgekd.evaluate(copy, agreement=True)
    assert "onnxruntime-fp32 is left out: It runs on another machine." in capsys.readouterr().err
    assert [row["subject"] for row in rows] == ["student", "onnxruntime-fp32-embedding"] * 2
    for before, after in ((rows[0], rows[1]), (rows[2], rows[3])):
        for name in ("top1_agreement", "m_rel", "recall", "m_neigh"):
            assert before[name] == pytest.approx(after[name], abs=0.02)
        assert before["angle"] == pytest.approx(after["angle"], abs=0.01)
        assert before["distance"] == pytest.approx(after["distance"], abs=1e-3)
        assert 0 < before["distance"] < 4
        assert before["m_vlalign"] == pytest.approx(after["m_vlalign"], abs=0.1)


def main_output(words: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 0


def test_features_are_probed_on_the_runs_own_split(run: Path) -> None:
    rows = edgekd.evaluate(run, probe=True)
    loaded = load_run(run)
    _, split = loaded.data()
    assert {row["subject"] for row in rows} == {"linear", "knn"}
    assert sum(
        row["n"] for row in rows if row["subject"] == "knn" and row["domain"] == "sketch"
    ) == len(split.ood_test)
    assert all(0 <= row["top1"] <= 1 for row in rows)


def test_an_embedding_student_classifies_new_classes(
    run: Path, make_domain_folder: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    other = make_domain_folder(tmp_path / "other", domains=(), classes=("horse", "house"), count=3)
    rows = edgekd.evaluate(run, data=str(other))
    assert {row["subject"] for row in rows} == {"teacher", "student"}
    kd = tmp_path / "kd"
    edgekd.train(recipe="kd", out=kd, **settings)
    with pytest.raises(EdgekdError, match='has a class "horse" that the student was not made for'):
        edgekd.evaluate(kd, data=str(other))


def test_new_classes_get_the_run_s_own_prompts(
    make_domain_folder: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgekd.distill.teachers import ClipTeacher

    told = {"cat": "It purrs.", "dog": "It barks.", "horse": "It neighs.", "house": "It stands."}
    (tmp_path / "d.json").write_text(json.dumps(told))
    out = tmp_path / "run"
    edgekd.train(
        recipe="vlm-ood",
        out=out,
        descriptions=str(tmp_path / "d.json"),
        prompts="imagenet7",
        **settings,
    )
    other = make_domain_folder(tmp_path / "other", domains=(), classes=("horse", "house"), count=3)
    asked: list[Any] = []
    real = ClipTeacher.text_bank

    def heard(
        self: ClipTeacher, classes: Any, templates: Any, descriptions: Any = None, **words: Any
    ) -> Any:
        asked.append((tuple(classes), len(templates), descriptions))
        return real(self, classes, templates, descriptions, **words)

    monkeypatch.setattr(ClipTeacher, "text_bank", heard)
    edgekd.evaluate(out, data=str(other))
    assert asked == [(("horse", "house"), 7, {"horse": ("It neighs.",), "house": ("It stands.",)})]
    edgekd.evaluate(out, data=str(other), prompts="photo")
    assert asked[1] == (("horse", "house"), 1, None)
    (tmp_path / "mine.txt").write_text("horse: Fast.\nhouse: Slow.\n")
    edgekd.evaluate(out, data=str(other), descriptions=str(tmp_path / "mine.txt"))
    assert asked[2] == (("horse", "house"), 7, {"horse": ("Fast.",), "house": ("Slow.",)})


def test_labels_alone_have_no_teacher_to_agree_with(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    edgekd.train(recipe="erm", out=tmp_path / "erm", **settings)
    with pytest.raises(EdgekdError, match="no teacher to agree with"):
        edgekd.evaluate(tmp_path / "erm", agreement=True)
    rows = edgekd.evaluate(tmp_path / "erm", agreement=True, teacher=settings["teacher"])
    assert rows[0]["angle"] is None


def backbone_weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "student.safetensors")
    return {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }


def test_the_backbone_feeds_a_detector(run: Path) -> None:
    from collections import OrderedDict

    from torch import Tensor, nn
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model(
                "test_efficientnet", features_only=True, out_indices=(2, 3, 4)
            )
            # The classification end of the backbone has no place in a feature extractor; nothing else may be missing.
            missing, unused = self.body.load_state_dict(backbone_weights(run), strict=False)
            assert not missing
            assert all(name.startswith(("conv_head.", "bn2.")) for name in unused)
            self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), 16)
            self.out_channels = 16

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return dict(
                self.pyramid(
                    OrderedDict((str(n), level) for n, level in enumerate(self.body(images)))
                )
            )

    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,)), aspect_ratios=((1.0,),) * 3)
    detector = FasterRCNN(
        Levels(), num_classes=3, min_size=96, max_size=96, rpn_anchor_generator=anchors
    )
    boxes = torch.tensor([[10.0, 10, 60, 70], [30, 20, 90, 90]])
    losses = detector([torch.rand(3, 96, 96)], [{"boxes": boxes, "labels": torch.tensor([1, 2])}])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    gradients = [p.grad for p in detector.backbone.body.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)
    found = detector.eval()([torch.rand(3, 96, 96)])
    assert set(found[0]) == {"boxes", "labels", "scores"}
