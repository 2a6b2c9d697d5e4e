from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.core.tensors import write_tensors
from edgekd.distill.students import (
    FRIENDLY,
    Student,
    fit_scale,
    make_student,
    timm_name,
)
from edgekd.distill.weights import load_weights

ASSETS = Path(os.environ.get("EDGEKD_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
NAME = "test_efficientnet"


pytestmark = pytest.mark.usefixtures("one_thread")


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


def features(model: torch.nn.Module, student: Student) -> torch.Tensor:
    with torch.inference_mode():
        return model((views() - student.mean) / student.std)  # type: ignore[no-any-return]


def test_friendly_names_are_timms() -> None:
    for friendly, name in FRIENDLY.items():
        assert timm.is_model(name), friendly
        assert timm_name(friendly) == name
    assert (
        timm_name("vit_base_patch16_224.augreg_in21k_ft_in1k")
        == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    )


@pytest.mark.parametrize(
    ("typo", "meant"), [("mobilnetv3", "mobilenetv3"), ("resnet18x", "resnet18")]
)
def test_a_misspelt_student_is_answered_with_the_closest(typo: str, meant: str) -> None:
    assert f'"{meant}"' in refusal(lambda: timm_name(typo)).hint


def test_a_linear_head_gives_logits_and_a_text_head_embeddings() -> None:
    linear = scratch()
    assert linear(views()).shape == (2, 3)
    text = make_student(NAME, pretrained="scratch", size=32, dim=12).eval()
    assert text(views()).shape == (2, 12)
    assert text.head is None
    assert linear.projector is None


def test_the_student_normalises_with_its_own_statistics() -> None:
    student = scratch()
    config = timm.get_pretrained_cfg(NAME)
    assert student.preprocess == Preprocess(
        size=32, interpolation=config.interpolation, mean=config.mean, std=config.std
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    with torch.inference_mode():
        assert student.head is not None
        expected = student.head(student.backbone((views() - mean) / std))
        assert torch.allclose(student(views()), expected)


def test_text_scores_have_the_cosine_heads_argmax() -> None:
    text = make_student(NAME, pretrained="scratch", size=32, dim=12).eval()
    bank = torch.nn.functional.normalize(
        torch.randn(9, 12, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    text.scale.fill_(3.0)
    many = views(count=16)
    with torch.inference_mode():
        embedding, scores = text(many), text.scores(many, bank)
    assert torch.allclose(scores, 3.0 * embedding @ bank.T, rtol=1e-4, atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(embedding[:, None], bank[None], dim=-1)
    assert torch.equal(scores.argmax(1), cosines.argmax(1))
    assert len(cosines.argmax(1).unique()) > 0


def save_torch(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def checkpoint(kind: str, state: dict[str, torch.Tensor]) -> object:
    """What training programs write: `state` under their names, with their settings beside it."""

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + key: value for key, value in state.items()}

    older = {key: torch.zeros_like(value) for key, value in state.items()}
    timms = {"epoch": 3, "arch": NAME, "version": 2, "args": argparse.Namespace(lr=0.1)}
    lightning = {"pytorch-lightning_version": "2.6", "hyper_parameters": {"lr": 0.1}}
    made: dict[str, object] = {
        "torch": state,
        "DataParallel": under("module."),
        "torch.compile": under("_orig_mod."),
        "compiled DataParallel": under("_orig_mod.module."),
        "timm": timms | {"state_dict": state, "metric": np.float64(77.1), "optimizer": {}},
        "timm averaged": timms | {"state_dict": older, "state_dict_ema": under("module.")},
        "Lightning": lightning
        | {"state_dict": under("model.") | {"loss.weight": torch.ones(3)}, "callbacks": {}},
        "Lightning compiled": lightning | {"state_dict": under("net._orig_mod.")},
        "DeiT": {"model": state, "args": argparse.Namespace(folder=PosixPath("runs"))},
        "an edgekd run": under("backbone.") | {"scale": torch.ones(())},
    }
    return made[kind]


KINDS = ("torch", "DataParallel", "torch.compile", "compiled DataParallel", "timm", "timm averaged",
         "Lightning", "Lightning compiled", "DeiT", "an edgekd run")  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", *KINDS])
def test_weights_from_a_file_give_the_files_features(
    kind: str, reference: torch.nn.Module, tmp_path: Path
) -> None:
    state = reference.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth.tar")
    if kind == "safetensors":
        save_file(state, path)
    else:
        save_torch(checkpoint(kind, state), path)
    student = scratch(weights=path)
    with torch.inference_mode():
        expected = reference.forward_head(  # type: ignore[operator]
            reference.forward_features((views() - student.mean) / student.std),  # type: ignore[operator]
            pre_logits=True,
        )
    assert torch.allclose(features(student.backbone, student), expected, atol=1e-6)


def without_classifier(name: str, **options: object) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A trained timm model less its classifier by timm's own `reset_classifier`, and the weights from before."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim < 2:  # biases and norms start as constants
            tensor.data.add_(0.02 * torch.rand(tensor.shape))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_classifier(0)  # type: ignore[operator]
    return model.eval(), state


def assert_loads(name: str, tmp_path: Path, kinds: Sequence[str]) -> None:
    model, state = without_classifier(name)
    side = model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    with torch.inference_mode():
        expected = model(views(side))
    for kind in kinds:
        path = save_torch(checkpoint(kind, state), tmp_path / "w.pth.tar")
        loaded = make_student(name, pretrained="scratch", weights=path, dim=4).backbone.eval()
        with torch.inference_mode():
            assert torch.allclose(loaded(views(side)), expected, atol=1e-4, rtol=1e-4), kind


@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s", "poolformerv2_s12"])
def test_heads_with_batchnorm_or_another_name_are_left_out(name: str, tmp_path: Path) -> None:
    assert_loads(name, tmp_path, ["Lightning"])


@pytest.mark.slow  # scripts/sweep_checkpoints.py does the same for about 50 models
@pytest.mark.parametrize(
    "name", ["caformer_s18", "mobileone_s0", "swiftformer_xs", "xcit_nano_12_p16_224"]
)
def test_families_take_every_kind_of_checkpoint(name: str, tmp_path: Path) -> None:
    assert_loads(name, tmp_path, KINDS)


def test_a_familys_original_names_are_translated_by_timm(tmp_path: Path) -> None:
    model, state = without_classifier("vit_tiny_patch16_224", img_size=32)
    foreign = {  # as DINO and others write a linear patch embedding
        key: value.flatten(1) if key == "patch_embed.proj.weight" else value
        for key, value in state.items()
    }
    path = save_torch({"teacher": 1, "model": foreign}, tmp_path / "w.pt")
    student = scratch("vit_tiny", size=32, weights=path)
    with torch.inference_mode():
        assert torch.allclose(student.backbone(views()), model(views()), atol=1e-5)


def test_two_sets_of_weights_that_fit_are_not_chosen_between(
    reference: torch.nn.Module, tmp_path: Path
) -> None:
    state = reference.state_dict()
    both = {f"{prefix}.{key}": value for prefix in ("model", "ema") for key, value in state.items()}
    save_file({key: value.clone() for key, value in both.items()}, tmp_path / "w.safetensors")
    error = refusal(lambda: scratch(weights=tmp_path / "w.safetensors"))
    assert '"ema."' in error.message
    assert '"model."' in error.message


def test_weights_of_another_architecture_are_refused(
    reference: torch.nn.Module, tmp_path: Path
) -> None:
    save_file(reference.state_dict(), tmp_path / "w.safetensors")
    error = refusal(lambda: scratch("test_resnet", weights=tmp_path / "w.safetensors"))
    assert "is not a test_resnet" in error.message


def test_a_missing_layer_and_another_width_are_refused(
    reference: torch.nn.Module, tmp_path: Path
) -> None:
    state = reference.state_dict()
    name = next(key for key in state if key.endswith("weight"))
    save_file(
        {key: value for key, value in state.items() if key != name}, tmp_path / "less.safetensors"
    )
    assert (
        "1 parameters missing"
        in refusal(lambda: scratch(weights=tmp_path / "less.safetensors")).message
    )
    save_file(state | {name: torch.zeros(1, 2)}, tmp_path / "wide.safetensors")
    assert (
        "1 of another shape"
        in refusal(lambda: scratch(weights=tmp_path / "wide.safetensors")).message
    )


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
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_refused(
    ending: str, damage: str, reference: torch.nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / f"w{ending}"
    if ending == ".pt":
        torch.save(reference.state_dict(), path)
    else:
        save_file(reference.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello, this is text"}[
            damage
        ]
    )
    assert "weights file" in refusal(lambda: load_weights(path)).message


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(2)], ids=repr
)
def test_tensors_without_names_are_no_weights(content: object, tmp_path: Path) -> None:
    assert (
        "state dict"
        in refusal(lambda: load_weights(save_torch(content, tmp_path / "w.pt"))).message
    )


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    assert "absent.pt" in refusal(lambda: load_weights(tmp_path / "absent.pt")).message
    refusal(lambda: load_weights(tmp_path))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("edgekd.core.hub", "edgekd.distill.students", "edgekd.distill.teachers"):
        monkeypatch.setattr(f"{module}.hub_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_hub")
def test_a_hub_out_of_reach_is_one_sentence_with_two_commands() -> None:
    error = refusal(lambda: make_student("mobilenetv3_small", pretrained="hub", size=32, classes=2))
    assert "cannot be reached" in error.message
    assert "edgekd fetch TEACHER mobilenetv3_small_100 --to weights" in error.hint
    assert "--weights-dir weights" in error.hint
    assert len(error.hint.splitlines()) == 2


def test_a_model_without_published_weights_is_not_blamed_on_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: True)
    monkeypatch.setattr("edgekd.distill.students.hub_reachable", lambda: True)
    assert not timm.get_pretrained_cfg("mobilenetv3_large_075").has_weights
    error = refusal(
        lambda: make_student("mobilenetv3_large_075", pretrained="hub", size=32, classes=2)
    )
    assert "cannot be reached" not in error.message


def test_an_unknown_tag_is_refused() -> None:
    assert "nonexistent" in refusal(lambda: scratch(f"{NAME}.nonexistent")).message


def test_a_vit_takes_weights_of_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    same = scratch("vit_tiny", size=64, weights=tmp_path / "w.safetensors")
    half = scratch("vit_tiny", size=32, weights=tmp_path / "w.safetensors")
    with torch.inference_mode():
        expected = source.forward_head(source.forward_features(views(64)), pre_logits=True)  # type: ignore[operator]
        assert torch.allclose(same.backbone(views(64)), expected, atol=1e-5)
        assert half(views(32)).shape == (2, 3)
    assert half.backbone.pos_embed.shape == (1, 5, 192)  # type: ignore[union-attr]
    assert torch.equal(half.backbone.cls_token, source.cls_token)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nonsense": 3}, "nonsense"),
        ({"in_chans": 1}, "in_chans"),
        ({"num_classes": 5}, "num_classes"),
        ({"checkpoint_path": "w.pt"}, "checkpoint_path"),
        ({"pretrained_cfg_overlay": {"file": "w.pt"}}, "pretrained_cfg_overlay"),
        ({"features_only": True}, "features_only"),
        ({"global_pool": ""}, "global_pool"),
        ({"act_layer": "no such layer"}, "act_layer"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], named: str) -> None:
    assert named in refusal(lambda: scratch(options=options)).message


@pytest.mark.parametrize(
    "options", [{"global_pool": ""}, {"features_only": True, "out_indices": (1,)}, {"depth": "x"}]
)
def test_a_vits_options_that_change_its_output_are_refused(options: dict[str, object]) -> None:
    refusal(lambda: scratch("test_vit", options=options))


def test_a_size_that_does_not_fit_is_refused() -> None:
    assert "40 px" in refusal(lambda: scratch("test_vit4", size=40)).message


def test_a_student_goes_round(tmp_path: Path) -> None:
    student = scratch()
    student.scale.fill_(2.5)
    write_tensors(tmp_path / "s.safetensors", student.state_dict())
    again = scratch()
    again.load_state_dict(load_file(tmp_path / "s.safetensors"))
    with torch.inference_mode():
        assert torch.equal(again.scores(views(), None), student.scores(views(), None))
        assert torch.allclose(student.scores(views(), None), 2.5 * student(views()))


def test_the_fitted_scale_is_the_best_of_a_fine_grid() -> None:
    make = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (200,), generator=make)
    scores = torch.randn(200, 5, generator=make)
    scores[torch.arange(200), labels] += 1.5
    scores *= 0.02
    grid = np.exp(np.linspace(np.log(1), np.log(1000), 4000))
    rows, y, smoothing = scores.double().numpy(), labels.numpy(), 1 / 202

    def loss(factor: float) -> float:
        z = rows * factor
        log_p = (
            z
            - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
            - z.max(1, keepdims=True)
        )
        target = np.full_like(z, smoothing / 5)
        target[np.arange(200), y] += 1 - smoothing
        return float(-(target * log_p).sum(1).mean())

    best = grid[np.argmin([loss(factor) for factor in grid])]
    assert fit_scale(scores, labels) == pytest.approx(best, rel=2e-3)


def test_the_fitted_scale_stays_finite_without_a_mistake_and_small_without_knowledge() -> None:
    labels = torch.arange(10) % 2
    right = torch.nn.functional.one_hot(labels).float()
    assert 1 < fit_scale(right, labels) < 50
    assert fit_scale(1 - right, labels) < 0.01


def test_the_given_imagenet_weights_load_and_know_imagenet() -> None:
    path = ASSETS / "students" / "tf_efficientnet_lite0.safetensors"
    if not path.exists():
        pytest.skip("the shared assets are not here")
    student = make_student(
        "efficientnet_lite0", pretrained="scratch", weights=path, size=64, dim=8
    ).eval()
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(load_file(path))
    with torch.inference_mode():
        inside = (views(64) - 0.5) / 0.5
        expected = whole.forward_head(whole.forward_features(inside), pre_logits=True)
        assert torch.allclose(
            student.backbone((views(64) - student.mean) / student.std), expected, atol=1e-5
        )


@pytest.mark.parametrize("projector", ["linear", "mlp", "mlp-gelu"])
@pytest.mark.parametrize("learned", [False, True])
def test_every_projector_and_head_fold_into_one_last_layer(projector: Any, learned: bool) -> None:
    from edgekd.export.graph import fold_head

    torch.manual_seed(0)
    classes = 5 if learned else None
    student = make_student(
        NAME, pretrained="scratch", size=32, dim=12, classes=classes, projector=projector
    ).eval()
    student.scale.fill_(3.0)
    assert student.embeds
    assert (student.neck is None) == (projector == "linear")
    bank = torch.randn(5, 12)
    views = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert student(views).shape == (2, 12)
        texts = student.head.weight if student.head is not None else bank
        last = fold_head(student.projector, texts, 3.0)
        folded = last(student.body((views - student.mean) / student.std))
        assert torch.allclose(student.scores(views, bank), folded, rtol=1e-4, atol=1e-4)
    if learned:
        assert student.head is not None
        assert student.head.bias is None
