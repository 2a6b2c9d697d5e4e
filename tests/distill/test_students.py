from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Callable
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, normalize, one_hot

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.classification.predict import (
    knn_scores,
    linear_probe,
    predict_all,
    retrieval_scores,
    source_loss,
    student_predict,
    student_vectors,
)
from edgekd.distill.inputs.batches import pixel_batches
from edgekd.distill.models.students import Student, fit_scale, make_student
from edgekd.distill.models.weights import load_weights
from edgekd.distill.text_bank import TextBank
from edgekd.export.graph import fold_head

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "test_efficientnet"


def scratch(name: str = NAME, size: int = 32, **options: object) -> Student:
    return make_student(name, pretrained="scratch", size=size, classes=3, **options).eval()  # type: ignore[arg-type]


def refusal(make: Callable[[], object]) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        make()
    assert caught.value.hint
    return caught.value


def views(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """A timm model with its classifier, as somebody would have trained it."""
    torch.manual_seed(3)
    return timm.create_model(NAME, num_classes=7).eval()


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("mobilnetv3", 32, '"mobilenetv3"'),
        ("resnet18x", 32, '"resnet18"'),
        (f"{NAME}.nonexistent", 32, "nonexistent"),
        ("test_vit4", 40, "40 px"),
    ],
)
def test_students_that_do_not_exist_are_refused(name: str, size: int, said: str) -> None:
    error = refusal(lambda: scratch(name, size=size))
    assert said in error.message + error.hint


State = dict[str, torch.Tensor]


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


TIMMS = {"epoch": 3, "arch": NAME, "version": 2, "args": argparse.Namespace(lr=0.1)}
CHECKPOINTS: dict[str, Callable[[State], object]] = {
    "torch": lambda state: state,
    "compiled DataParallel": lambda state: under("_orig_mod.module.", state),
    "timm": lambda state: TIMMS | {"state_dict": state, "metric": np.float64(77.1), "optimizer": {}},
    "timm averaged": lambda state: TIMMS | {
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "state_dict_ema": under("module.", state),
    },
    "Lightning": lambda state: {
        "pytorch-lightning_version": "2.6", "hyper_parameters": {"lr": 0.1}, "callbacks": {},
        "state_dict": under("model.", state) | {"loss.weight": torch.ones(3)},
    },
    "DeiT": lambda state: {"model": state, "args": argparse.Namespace(folder=PosixPath("runs"))},
    "an edgekd run": lambda state: under("backbone.", state) | {"scale": torch.ones(())},
}  # fmt: skip
"""What training programs write: weights under their names, with their settings beside them."""


@pytest.mark.parametrize("kind", ["safetensors", *CHECKPOINTS])
def test_weights_from_a_file(kind: str, reference: Any, tmp_path: Path) -> None:
    state, path = reference.state_dict(), tmp_path / "w.pth.tar"
    if kind == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    else:
        torch.save(CHECKPOINTS[kind](state), path)
    student = scratch(weights=path)
    with torch.inference_mode():
        features = reference.forward_features((views() - student.mean) / student.std)
        expected = reference.forward_head(features, pre_logits=True)
        found = student.backbone((views() - student.mean) / student.std)
    assert torch.allclose(found, expected, atol=1e-6)


def without_classifier(name: str, **options: object) -> tuple[torch.nn.Module, State]:
    """A trained timm model less its classifier by timm's own `reset_classifier`, and the weights from before."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim < 2:  # biases and norms start as constants
            tensor.data.add_(0.02 * torch.rand(tensor.shape))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_classifier(0)  # type: ignore[operator]
    return model.eval(), state


@pytest.mark.parametrize("name", ["levit_128s", "poolformerv2_s12"])
def test_heads_with_batchnorm_or_another_name_are_left_out(name: str, tmp_path: Path) -> None:
    """scripts/sweep_checkpoints.py does the same for about 50 models and every kind of file."""
    model, state = without_classifier(name)
    path, side = tmp_path / "w.pth.tar", model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    torch.save(CHECKPOINTS["Lightning"](state), path)
    loaded = make_student(name, pretrained="scratch", weights=path, dim=4).backbone.eval()
    with torch.inference_mode():
        found, expected = loaded(views(side)), model(views(side))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_a_familys_original_names_are_translated_by_timm(tmp_path: Path) -> None:
    model, state = without_classifier("vit_tiny_patch16_224", img_size=32)
    patches = "patch_embed.proj.weight"  # DINO writes a linear patch embedding
    torch.save(
        {"teacher": 1, "model": state | {patches: state[patches].flatten(1)}}, tmp_path / "w"
    )
    student = scratch("vit_tiny", size=32, weights=tmp_path / "w")
    with torch.inference_mode():
        assert torch.allclose(student.backbone(views()), model(views()), atol=1e-5)


def test_weights_that_do_not_fit_are_refused(reference: torch.nn.Module, tmp_path: Path) -> None:
    state, path = reference.state_dict(), tmp_path / "w.safetensors"
    name = next(key for key in state if key.endswith("weight"))

    def refused(student: str, weights: dict[str, torch.Tensor]) -> str:
        save_file({key: value.clone() for key, value in weights.items()}, path)
        return refusal(lambda: scratch(student, weights=path)).message

    both = {f"{prefix}.{key}": value for prefix in ("model", "ema") for key, value in state.items()}
    assert '"ema."' in refused(NAME, both)
    assert "is not a test_resnet" in refused("test_resnet", state)
    less = {key: value for key, value in state.items() if key != name}
    assert "1 parameters missing" in refused(NAME, less)
    assert "1 of another shape" in refused(NAME, state | {name: torch.zeros(1, 2)})


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch", "pickle 2", "pickle 4"])
def test_pickled_code_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = tmp_path / "w.pt"
    if kind == "torch":
        torch.save({"weight": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Evil(trap)}, protocol=int(kind[-1])))
    error = refusal(lambda: load_weights(path))
    assert "pickled code" in error.message
    assert not trap.exists()


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"text", None, [1, 2], {1: torch.zeros(1)}], ids=str)
def test_damage(ending: str, content: Any, reference: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"w{ending}"
    if content is None:
        (save_file if ending == ".safetensors" else torch.save)(reference.state_dict(), path)
        content = path.read_bytes()[:9000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refusal(lambda: load_weights(path))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("core.hub", "distill.models.students", "distill.models.teachers"):
        monkeypatch.setattr(f"edgekd.{module}.hub_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_hub")
def test_a_hub_out_of_reach_is_an_error_with_two_commands() -> None:
    error = refusal(lambda: make_student("mobilenetv3_small", pretrained="hub", size=32, classes=2))
    assert "edgekd fetch TEACHER mobilenetv3_small_100 --to weights" in error.hint
    assert "--weights-dir weights" in error.hint


def test_a_vit_takes_weights_of_another_size(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    half: Any = scratch("vit_tiny", size=32, weights=tmp_path / "w.safetensors")
    with torch.inference_mode():
        assert half(views(32)).shape == (2, 3)
    assert half.backbone.pos_embed.shape == (1, 5, 192)
    assert torch.equal(half.backbone.cls_token, source.cls_token)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (NAME, {"nonsense": 3}),
        (NAME, {"in_chans": 1}),
        (NAME, {"num_classes": 5}),
        (NAME, {"checkpoint_path": "w.pt"}),
        (NAME, {"pretrained_cfg_overlay": {"file": "w.pt"}}),
        (NAME, {"features_only": True}),
        (NAME, {"act_layer": "no such layer"}),
        ("test_vit", {"global_pool": ""}),
        ("test_vit", {"features_only": True, "out_indices": (1,)}),
        ("test_vit", {"depth": "x"}),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, object]) -> None:
    refusal(lambda: scratch(name, options=options))


def test_the_fitted_scale_is_the_best_of_a_fine_grid() -> None:
    make = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (200,), generator=make)
    scores = torch.randn(200, 5, generator=make)
    scores[torch.arange(200), labels] += 1.5
    scores *= 0.02

    def loss(factor: float) -> float:  # with labels smoothed by 1 / (images + 2)
        rows = scores.double() * factor
        return cross_entropy(rows, labels, label_smoothing=1 / 202).item()

    best = min(np.exp(np.linspace(np.log(1), np.log(1000), 4000)), key=loss)
    assert fit_scale(scores, labels) == pytest.approx(best, rel=2e-3)
    right = one_hot(torch.arange(10) % 2).float()
    assert 1 < fit_scale(right, torch.arange(10) % 2) < 50
    assert fit_scale(1 - right, torch.arange(10) % 2) < 0.01


@pytest.mark.parametrize("projector", ["linear", "mlp", "mlp-gelu"])
@pytest.mark.parametrize("classes", [None, 5])
def test_projector_and_head_fold_into_one_layer(projector: Any, classes: int | None) -> None:
    parts: dict[str, Any] = {"dim": 12, "classes": classes, "projector": projector}
    student: Any = make_student(NAME, pretrained="scratch", size=32, **parts).eval()
    student.scale.fill_(3.0)
    bank = normalize(torch.randn(5, 12), dim=-1)
    config = timm.get_pretrained_cfg(NAME)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    with torch.inference_mode():
        texts = bank if classes is None else student.head.weight
        scores = fold_head(student.projector, texts, 3.0)(student.body((views() - mean) / std))
        assert torch.allclose(student.scores(views(), bank), scores, rtol=1e-4, atol=1e-4)
        cosines = torch.cosine_similarity(student(views())[:, None], texts[None], dim=-1)
    assert torch.equal(scores.argmax(1), cosines.argmax(1)) or classes


Make = Callable[..., Path]


@pytest.fixture
def drawn_images(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> ImageSet:
    return load_images(str(make_domain_folder(tmp_path / "data", count=3)))


def test_batches_and_scores_come_in_order(drawn_images: ImageSet) -> None:
    indices = np.array([5, 0, 17, 3, 3, 9, 1])
    preprocess = Preprocess(size=20, resize="crop", crop_pct=0.8)
    parts = list(pixel_batches(drawn_images, indices, preprocess, 4))
    assert [len(part) for part in parts] == [4, 3]
    assert parts[0].dtype == np.uint8
    for row, index in zip(np.concatenate(parts), indices, strict=True):
        assert np.array_equal(row, preprocess.pixels(drawn_images.read(int(index))))
    student = make_student(NAME, pretrained="scratch", size=32, dim=6).train()
    bank = normalize(torch.randn(4, 6), dim=-1)
    predict = student_predict(student, bank)
    scores = predict_all(predict, drawn_images, np.arange(18), student.preprocess)
    assert (scores.shape, scores.dtype) == ((18, 4), np.float32)
    pixels = [student.preprocess.pixels(drawn_images.read(index)) for index in (7, 16)]
    with torch.inference_mode():
        view = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
        expected = student.eval()(view) @ bank.T
    np.testing.assert_allclose(scores[[7, 16]], expected.numpy(), rtol=1e-4, atol=1e-6)


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

JUDGED: Any = SimpleNamespace(
    read=lambda i, **_: Image.fromarray(PIXELS[i]),
    labels=np.array([0, 1, 1, 2]),
    domain_of=np.array([0, 0, 0, 1]),
)


def mean_loss(rows: torch.Tensor) -> float:
    each = cross_entropy(rows, torch.tensor([0, 1, 1, 2]), reduction="none")
    return float((each[:3].mean() + each[3]) / 2)


@pytest.mark.parametrize("head", ["text", "linear", "learned"])
def test_the_loss_counts_every_domain_alike_and_a_text_head_as_its_teachers(head: str) -> None:
    dim, classes = (None if head == "linear" else 6), (None if head == "text" else 3)
    student: Any = make_student(NAME, pretrained="scratch", size=32, dim=dim, classes=classes)
    vectors = normalize(torch.randn(3, 6), dim=-1)
    bank = TextBank(("a", "b", "c"), ("{}",), vectors, "t", 20.0)
    found = source_loss(student.train(), bank if dim else None, JUDGED, np.arange(4))
    assert student.training
    with torch.inference_mode():
        rows = student.eval()(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255)
        if head == "text":
            rows = 20 * (rows / rows.norm(dim=-1, keepdim=True)) @ vectors.T
        elif head == "learned":
            rows = rows @ student.head.weight.T
    assert found == pytest.approx(mean_loss(rows), rel=1e-4)


def test_neighbours_vote_by_their_nearness() -> None:
    train = torch.tensor([[1.0, 0], [0, 2.0], [1.0, 1.0]])
    scores = knn_scores(train, torch.tensor([0, 1, 2]), torch.tensor([[3.0, 0]]), 3, k=2)
    near, far = math.exp(1 / 0.07), math.exp(math.sqrt(0.5) / 0.07)
    expected = torch.tensor([near, 0, far]) / (near + far)
    assert torch.allclose(scores[0], expected, rtol=1e-4)
    every = knn_scores(train, torch.tensor([0, 0, 1]), train, 2, k=50)
    assert torch.allclose(every.sum(dim=1), torch.ones(3))


def test_the_linear_probe_is_at_the_optimum_of_its_loss() -> None:
    make = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=make)
    train = 5 + torch.randn(60, 4, generator=make) + 2 * one_hot(labels, 4).float()
    layer = linear_probe(train, labels, 3, decay=0.1)
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    weight = (layer.weight * std).detach().requires_grad_()
    bias = (layer.bias + layer.weight @ mean).detach().requires_grad_()
    scores = (train - mean) / std @ weight.T + bias
    (cross_entropy(scores, labels) + 0.05 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-3
    assert not layer.weight.requires_grad


def test_vectors_are_the_backbones_and_the_students() -> None:
    student = make_student(NAME, pretrained="scratch", size=32, dim=6, projector="mlp").eval()
    features, outputs = student_vectors(student, JUDGED, np.arange(3))
    pixels = torch.from_numpy(PIXELS[:3]).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        assert torch.allclose(outputs, student(pixels), atol=1e-5)
        expected = student.backbone((pixels - student.mean) / student.std)
    assert torch.allclose(features, expected, atol=1e-5)


def test_scores_by_hand() -> None:
    """Two classes, three cached images; lengths do not count.

    The query (3, 4)/5 has the cosines 0.6 and 0.8 with the texts, and 0.6, 0.8, 1 with the cached images.
    """
    query = torch.tensor([[6.0, 8.0]])
    texts = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.3, 0.4]])
    labels = torch.tensor([0, 1, 0])
    found = retrieval_scores(query, keys, labels, 2, texts, alpha=0.5, beta=2.0)
    by_hand = [0.6 + 0.5 * (math.exp(-0.8) + 1), 0.8 + 0.5 * math.exp(-0.4)]
    assert torch.allclose(found, torch.tensor([by_hand]), atol=1e-6)
