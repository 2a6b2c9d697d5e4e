from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import TINY_TEACHER
from huggingface_hub import constants
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file

import edgekd
from edgekd.api import fetch
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.load_run import load_run
from edgekd.distill.classification.plan import settle
from edgekd.distill.classification.predict import teacher_predict
from edgekd.distill.inputs.views import plain
from edgekd.distill.models.class_token import only_class_token
from edgekd.distill.models.students import encoder_student, interpolate_with_teacher, make_student
from edgekd.distill.models.teachers import ClipTeacher, load_teacher
from edgekd.distill.train import train


def refusal(spec: str) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        load_teacher(spec)
    assert caught.value.hint
    return caught.value


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> ClipTeacher:
    return load_teacher(f"local-dir:{tiny_teacher}")


def picture(width: int, height: int) -> Image.Image:
    """Smooth, as photographs mostly are."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    return Image.fromarray((127.5 + 100 * waves).astype(np.uint8))


def reference(folder: Path) -> tuple[Any, Any, Any]:
    """The same folder through open_clip's own front door: model, transform, tokenizer."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def test_the_text_bank_is_open_clips_classifier(teacher: ClipTeacher, tiny_teacher: Path) -> None:
    model, transform, tokenizer = reference(tiny_teacher)
    classes = ["sea_lion", "dog", "cat"]
    templates = ["a photo of a {}.", "a sketch of the {}", "itap of a {}"]
    names = [name.replace("_", " ") for name in classes]
    formats = [lambda name, t=template: t.format(name) for template in templates]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, formats)  # [D, C]
    bank = teacher.text_bank(classes, templates)
    assert bank.classes == tuple(classes)
    assert torch.allclose(bank.vectors, expected.T, atol=1e-5)
    image = picture(32, 32)
    with torch.inference_mode():
        features = model.encode_image(transform(image)[None], normalize=True)
    logits = teacher_predict(teacher, bank)(np.array(image)[None])
    expected_logits = teacher.logit_scale * features @ expected
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-2, atol=2e-2)


def copied(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "copy"))


def change_config(folder: Path, part: str, **changes: Any) -> Path:
    """Change settings of an open_clip folder; `part` is the path to their table, with dots."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    table = config
    for name in part.split("."):
        table = table[name]
    table |= changes
    path.write_text(json.dumps(config))
    return folder


def test_the_id_follows_weights_and_preprocessing_and_not_the_place(
    teacher: ClipTeacher, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_teacher, tmp_path)
    assert load_teacher(f"local-dir:{folder}").id == teacher.id
    change_config(folder, "preprocess_cfg", mean=[0.5, 0.5, 0.5])
    other_mean = load_teacher(f"local-dir:{folder}").id
    state = load_file(folder / "open_clip_model.safetensors")
    state["logit_scale"] = state["logit_scale"] + 1e-3
    save_file(state, folder / "open_clip_model.safetensors")
    assert len({teacher.id, other_mean, load_teacher(f"local-dir:{folder}").id}) == 3


def saved(folder: Path, model: Any, settings: dict[str, Any]) -> Path:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def shaped(folder: Path, image_size: Any, **preprocess: Any) -> Path:
    """A random teacher whose ViT takes images of another shape than the tiny one's."""
    settings = copy.deepcopy(TINY_TEACHER)
    settings["model_cfg"]["vision_cfg"] |= {"image_size": image_size}
    settings["preprocess_cfg"] |= preprocess
    return saved(folder, open_clip.CLIP(**settings["model_cfg"]), settings)


def assert_as_open_clip(folder: Path, *sizes: tuple[int, int]) -> ClipTeacher:
    """Assert that edgekd's pixels are those of open_clip's own transform, and so are the embeddings."""
    teacher = load_teacher(f"local-dir:{folder}")
    model, transform, _ = reference(folder)
    mean, std = (np.array(v) for v in (teacher.preprocess.mean, teacher.preprocess.std))
    for image in (picture(*size) for size in sizes):
        pixels = teacher.preprocess.pixels(image)
        theirs = transform(image).permute(1, 2, 0).numpy() * std + mean
        assert np.array_equal(pixels, np.rint(theirs * 255))
        with torch.inference_mode():
            expected = model.encode_image(transform(image)[None])
        got = teacher.embed_images(plain(torch.from_numpy(pixels.copy())[None]))
        assert torch.allclose(got, expected, atol=1e-4)
    return teacher


@pytest.mark.parametrize(
    ("shape", "mode", "interpolation"),
    [
        (32, "shortest", "bilinear"),
        (32, "longest", "random"),
        (32, "squash", "bilinear"),
        ([32, 64], "shortest", "bicubic"),
        ([64, 32], "longest", "bicubic"),
        ([64, 32], "squash", "bicubic"),
    ],
)
def test_pixels_are_open_clips(tmp_path: Path, shape: Any, mode: str, interpolation: str) -> None:
    settings = {"resize_mode": mode, "interpolation": interpolation, "fill_color": 77}
    folder = shaped(tmp_path, shape, **settings)
    teacher = assert_as_open_clip(folder, (64, 48), (33, 101), (16, 16))
    views = torch.rand(2, 3, 48, 48)  # what augmented training images are
    assert teacher.embed_images(views).shape == (2, 12)
    if shape != 32:
        with pytest.raises(EdgekdError, match="square"):
            encoder_student(teacher)


@pytest.mark.parametrize(
    "changes",
    [
        {"resize_mode": "fit"},
        {"interpolation": "lanczos"},
        {"mean": [0.5]},
        {"mean": ["a", "b", "c"]},
        {"std": [0.2, 0.0, 0.2]},
        {"std": [0.2, float("nan"), 0.2]},
        {"resize_mode": "longest", "fill_color": 300},
    ],
    ids=str,
)
def test_odd_settings_are_refused(
    tiny_teacher: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = change_config(copied(tiny_teacher, tmp_path), "preprocess_cfg", **changes)
    refusal(f"local-dir:{folder}")


def timm_teacher(folder: Path, **vision: Any) -> Path:
    """A random teacher with timm's smallest ViT, for 160 px, as image encoder; SigLIP's architecture in small."""
    folder.mkdir()
    model_cfg: dict[str, Any] = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg",
                       "timm_proj": "none"} | vision,
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1,
                     "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }  # fmt: skip
    settings = {
        "model_cfg": model_cfg | {"custom_text": True},
        "preprocess_cfg": {"mean": 0.5, "std": 0.5},
    }
    return saved(folder, open_clip.CustomTextCLIP(**model_cfg), settings)


FIXED = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear"}  # takes no other size


def test_an_image_size_that_the_image_encoder_contradicts_is_refused(tmp_path: Path) -> None:
    assert_as_open_clip(timm_teacher(tmp_path / "right", image_size=224, **FIXED), (40, 30))
    error = refusal(f"local-dir:{timm_teacher(tmp_path / 'wrong', image_size=96, **FIXED)}")
    assert "image encoder" in error.message
    assert "96" in error.message


SIGLIP_TOKENIZER = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}


def siglip(folder: Path) -> Path:
    """SigLIP's architecture with random weights, and a tokenizer of eight words made on the spot."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra siglip")
    transformers = pytest.importorskip("transformers", reason="needs the extra siglip")
    timm_teacher(folder, timm_pool="map")
    cleaning = {"clean": "canonicalize"}
    change_config(folder, "model_cfg.text_cfg", **SIGLIP_TOKENIZER, tokenizer_kwargs=cleaning)
    words = ("<pad>", "</s>", "<unk>", "a", "photo", "of", "dog", "cat")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_siglip_reads_with_its_own_tokenizer(tmp_path: Path) -> None:
    folder = siglip(tmp_path / "siglip")
    teacher = assert_as_open_clip(folder, (50, 40))
    assert teacher.tokenizer(["A photo, of a dog!"])[0, :7].tolist() == [3, 4, 5, 3, 6, 1, 0]
    model, _, tokenizer = reference(folder)
    expected = open_clip.build_zero_shot_classifier(
        model, tokenizer, ["dog", "cat"], [lambda name: f"a photo of a {name}"]
    )
    bank = teacher.text_bank(["dog", "cat"], ["a photo of a {}"])
    assert torch.allclose(bank.vectors, expected.T, atol=1e-5)


def test_missing_transformers(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_teacher, tmp_path)
    change_config(folder, "model_cfg.text_cfg", **SIGLIP_TOKENIZER)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "transformers" else find(name),
    )
    assert "edgekd[siglip]" in refusal(f"local-dir:{folder}").hint


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder = siglip(tmp_path / "siglip")
    trap = tmp_path / "trap"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    evil = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    change_config(folder, "model_cfg.text_cfg.tokenizer_kwargs", trust_remote_code=True)
    # Some versions of transformers take a class of their own instead.
    with contextlib.suppress(EdgekdError):
        load_teacher(f"local-dir:{folder}")
    assert not trap.exists()


def pickled_code(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(folder / "trap"), "w")

    (folder / WEIGHTS).unlink()
    torch.save({"state_dict": Evil()}, folder / "open_clip_pytorch_model.bin")


def endless_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def other_weights(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = load_file(folder / WEIGHTS)
    state |= {name: change(state[name]) for name, change in changes.items()}
    save_file(state, folder / WEIGHTS)


WEIGHTS = "open_clip_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ""),
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS, 5000), ""),
    "config torn": (lambda folder: (folder / "open_clip_config.json").write_text("{"), ""),
    "other shape": (lambda folder: other_weights(folder, text_projection=lambda t: t[:3]), ""),
    "pickled code": (pickled_code, ""),
    "endless layers": (lambda folder: change_config(folder, "model_cfg.text_cfg", layers=10**9), ""),
    "endless file": (endless_file, ""),
    "NaN": (
        lambda folder: other_weights(folder, **{"visual.proj": lambda t: t * float("nan")}),
        "image encoder",
    ),
    "infinite": (
        lambda folder: other_weights(folder, text_projection=lambda t: t + float("inf")),
        "text encoder",
    ),
    "scale": (lambda folder: other_weights(folder, logit_scale=lambda t: t + 1000), "logit scale"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_damage(
    tiny_teacher: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    folder = copied(tiny_teacher, tmp_path)
    damage(folder)
    assert named in refusal(f"local-dir:{folder}").message
    assert not (folder / "trap").exists()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("ViT-B-23:openai", "ViT-B-32"), ("ViT-B-32:opena", "openai"), ("toi", "toy")],
)
def test_a_misspelt_teacher_is_answered_with_the_closest(typo: str, meant: str) -> None:
    assert f'"{meant}"' in refusal(typo).hint


def arrays(**changes: Any) -> dict[str, Any]:
    good = {
        "image_ids": np.array(["a/x.png", "b/y.png"]),
        "image_vectors": np.array([[1.0, 2, 3], [4, 5, 6]], dtype=np.float16),
        "class_names": np.array(["sea_lion", "dog"]),
        "text_vectors": np.array([[0.0, 0, 2], [3, 4, 0]]),
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def written(path: Path, **changes: Any) -> str:
    np.savez(path, **arrays(**changes))
    return f"embeddings:{path}"


def test_a_black_box_gives_what_is_in_its_file(tmp_path: Path) -> None:
    teacher = load_teacher(written(tmp_path / "e.npz", logit_scale=np.array(50.0)))
    assert (teacher.dim, teacher.logit_scale) == (3, 50.0)
    assert teacher.lookup(["b/y.png", "a/x.png"]).tolist() == [[4, 5, 6], [1, 2, 3]]
    bank = teacher.text_bank(["dog", "sea lion"], ["ignored {}"])
    assert torch.allclose(bank.vectors, torch.tensor([[0.6, 0.8, 0], [0, 0, 1.0]]))
    assert load_teacher(written(tmp_path / "f.npz", logit_scale=np.array(49.0))).id != teacher.id
    with pytest.raises(EdgekdError, match=r"c/z\.png"):
        teacher.lookup(["a/x.png", "c/z.png"])
    with pytest.raises(EdgekdError) as caught:
        teacher.text_bank(["dog", "sea_lyon"], [])
    assert '"sea lion"' in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"image_ids": None},
        {"image_ids": np.array(["a"])},
        {"class_names": np.array(["a", "b", "c"])},
        {"text_vectors": np.zeros((2, 4))},
        {"image_vectors": np.zeros((2, 3, 1))},
        {"image_vectors": np.array([[1.0, 2, np.nan], [4, 5, 6]])},
        {"image_ids": np.array(["a", None], dtype=object)},
        {"logit_scale": np.zeros(3)},
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "e.npz" in refusal(written(tmp_path / "e.npz", **changes)).message


def test_an_encoder_in_bfloat16_stays_close(teacher: ClipTeacher) -> None:
    half = teacher.in_bfloat16()
    views = torch.rand(4, 3, teacher.preprocess.size, teacher.preprocess.size)
    before = teacher.embed_images(views)
    found = half.embed_images(views)
    assert found.dtype == torch.float32
    assert not torch.equal(found, before)
    assert torch.cosine_similarity(found, before).min() > 0.99
    assert torch.equal(teacher.embed_images(views), before)  # its own weights are untouched
    assert torch.equal(half.embed_texts(["a cat"]), teacher.embed_texts(["a cat"]))
    assert half.cache_id != teacher.cache_id == teacher.id


@pytest.mark.parametrize(
    ("changes", "shortened"),
    [({}, True), ({"pool_type": "avg"}, False), ({"attentional_pool": True}, False)],
    ids=["class token", "mean", "attention"],
)
def test_an_encoder_of_class_tokens_alone(changes: dict[str, Any], shortened: bool) -> None:
    size = {"image_size": (48, 32), "patch_size": 16, "width": 24, "layers": 3, "heads": 2}
    options = {"mlp_ratio": 2.0, "output_dim": 8, "ls_init_value": 0.5, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VisionTransformer(**size, **options).eval()
        views = torch.randn(3, 3, 48, 32)
    short = copy.deepcopy(encoder)
    only_class_token(short)
    assert (repr(short) != repr(encoder)) == shortened
    with torch.inference_mode():
        assert torch.allclose(short(views), encoder(views), atol=1e-6)


def test_the_student_starts_as_the_teacher_and_wise_ft_lies_between(teacher: ClipTeacher) -> None:
    student = encoder_student(teacher).eval()
    views = torch.rand(2, 3, 32, 32)
    assert torch.allclose(student(views), teacher.embed_images(views), atol=1e-5)
    assert student.embeds
    assert student.preprocess == teacher.preprocess
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert encoder_student(teacher, classes=3)(views).shape == (2, 3)
    start = {name: value.clone() for name, value in student.backbone.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    interpolate_with_teacher(student, teacher, 0.25)
    for name, value in student.backbone.named_parameters():
        assert torch.allclose(value, start[name] + 0.25, atol=1e-6)


def test_a_self_distilled_run_reads_back_and_wise_ft_of_0_is_the_teacher(
    make_domain_folder: Callable[..., Path],
    tmp_path: Path,
    tiny_teacher: Path,
    teacher: ClipTeacher,
) -> None:
    settings = {
        "recipe": "vl2v-sd", "data": str(make_domain_folder(tmp_path / "data", count=10)),
        "teacher": f"local-dir:{tiny_teacher}", "accelerator": "cpu", "steps": 2, "batch_size": 4,
        "views": 1, "average": "wise-ft", "wise_ft": 0.0, "out": tmp_path / "run",
    }  # fmt: skip
    made = train(TrainConfig.model_validate(settings))
    assert (made.student, made.selection[:7]) == ("teacher", "WiSE-FT")
    loaded = load_run(tmp_path / "run")
    views = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(loaded.student(views), teacher.embed_images(views), atol=1e-5)


STUDENT = "mobilenetv3_small_050.lamb_in1k"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's cache with one student, and no network."""
    torch.manual_seed(0)
    folder = tmp_path / "hub" / f"models--timm--{STUDENT}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(timm.create_model(STUDENT).state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: False)


@pytest.mark.usefixtures("hub_cache")
def test_both_commands_name_teacher_and_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    make_domain_folder: Callable[..., Path],
) -> None:  # fmt: skip
    for module in ("students", "teachers"):
        monkeypatch.setattr(f"edgekd.distill.models.{module}.hub_reachable", lambda: False)
    given = {"data": str(make_domain_folder(tmp_path / "data")), "student": "mobilenetv3"}
    with pytest.raises(EdgekdError, match="network") as caught:
        edgekd.train(**given, teacher="ViT-B-32:openai", smoke=True, out=tmp_path / "run")
    for line in caught.value.hint.splitlines():
        assert "ViT-B-32:openai" in line
        assert "mobilenetv3" in line
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.usefixtures("hub_cache")
def test_what_is_there_already_stays_and_a_copy_that_differs_is_not_kept(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, own = f"local-dir:{tiny_teacher}", tmp_path / "weights" / f"{STUDENT}.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"fine-tuned for weeks")
    folder, _ = fetch(spec, STUDENT, to=own.parent)
    (folder / "notes.txt").write_text("mine")
    assert fetch(spec, STUDENT, to=own.parent) == [folder, own]
    assert own.read_bytes() == b"fine-tuned for weeks"
    assert (folder / "notes.txt").read_text() == "mine"
    own.unlink()

    def damaged(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr("edgekd.distill.models.fetch.write_tensors", damaged)
    with pytest.raises(EdgekdError, match=STUDENT):
        fetch(spec, STUDENT, to=own.parent)
    assert not own.exists()


@pytest.mark.usefixtures("hub_cache")
def test_fetched_weights(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"local-dir:{tiny_teacher}"
    folder, student = fetch(spec, STUDENT, to=tmp_path / "weights")
    assert load_teacher(f"local-dir:{folder}").id == load_teacher(spec).id
    online = make_student(STUDENT, pretrained="hub").state_dict()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    given: dict[str, Any] = {"student": STUDENT, "weights_dir": tmp_path / "weights"}
    assert settle(TrainConfig.load(**given)).student_weights is None  # the toy data need no hub
    weights = settle(TrainConfig.load(**given, pretrained="hub")).student_weights
    assert weights == student
    offline = make_student(STUDENT, pretrained="hub", weights=weights).state_dict()
    assert online.keys() == offline.keys()
    assert all(torch.equal(online[name], offline[name]) for name in online)
    with pytest.raises(EdgekdError) as caught:
        settle(TrainConfig.load(**given, teacher="ViT-L-14:openai"))
    assert "edgekd fetch" in caught.value.hint
