"""Teachers: open_clip models, precomputed embeddings, and the toy teacher in the package.

A spec names a teacher: `toy`, `ViT-B-32:laion2b_s34b_b79k` (open_clip's name:tag), `hf-hub:ORG/MODEL`,
`local-dir:FOLDER`, or `embeddings:FILE.npz`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from edgekd.core.errors import EdgekdError, did_you_mean, first_line
from edgekd.core.files import short_hash
from edgekd.core.hub import NoNetwork, hub_reachable, prefer_local_cache
from edgekd.core.machine import describe
from edgekd.core.manifest import shown_value
from edgekd.core.preprocess import Preprocess, open_clip_preprocess
from edgekd.core.readers import read_arrays, sha256_file
from edgekd.core.tensors import tensors_hash
from edgekd.distill.models.class_token import only_class_token
from edgekd.distill.text_bank import TextBank, ensemble, prompts_of, readable, warn_of_long_prompts


@dataclass(frozen=True)
class ClipTeacher:
    """A frozen open_clip model. It normalises with its own statistics, never with the student's."""

    spec: str
    id: str
    """16 hex digits over its weights and preprocessing."""
    preprocess: Preprocess
    logit_scale: float
    dim: int
    model: nn.Module
    tokenizer: Any
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the image encoder; texts are always embedded in float32."""

    @property
    def cache_id(self) -> str:
        """Return the identity of the image embeddings: weights, preprocessing, and precision."""
        return self.id if self.precision == "fp32" else f"{self.id}-{self.precision}"

    def in_bfloat16(self) -> ClipTeacher:
        """Return the same teacher with an image encoder whose weights are converted to bfloat16 once.

        It computes no patch tokens (see `only_class_token`), so it can only be used for embeddings.
        """
        model = copy.copy(self.model)
        encoder = copy.deepcopy(self.model.get_submodule("visual")).to(torch.bfloat16)
        only_class_token(encoder)
        model._modules = {**self.model._modules, "visual": encoder}
        return replace(self, model=model, precision="bf16")

    @torch.inference_mode()
    def embed_images(self, views: Tensor) -> Tensor:
        """Float `[B, 3, H, W]` in 0–1 (resized to the teacher's input) → float32 `[B, D]`, not normalised."""
        shape = self.preprocess.shape
        if tuple(views.shape[-2:]) != shape:
            views = interpolate(views, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(v, device=views.device)[:, None, None]
            for v in (self.preprocess.mean, self.preprocess.std)
        )
        pixels = torch.sub(views, mean).div_(std)
        if self.precision == "bf16":
            pixels = pixels.bfloat16()
        features: Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return features.float()

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts → float32 `[N, D]`, not normalised. The tokenizer truncates longer prompts."""
        device = next(self.model.parameters()).device
        chunks = [list(prompts[start : start + 256]) for start in range(0, len(prompts), 256)]
        encode: Any = self.model.encode_text
        return torch.cat([encode(self.tokenizer(c).to(device)).float().cpu() for c in chunks])

    def text_bank(
        self,
        classes: Sequence[str],
        templates: Sequence[str],
        descriptions: Mapping[str, Sequence[str]] | None = None,
        *,
        warns: bool = True,
    ) -> TextBank:
        """Return one unit vector per class, averaged over the templates and the class's descriptions, if any.

        Args:
            descriptions: class → sentences; other classes are ignored.
            warns: whether to warn of truncated prompts.
        """
        prompts = [
            prompts_of(name, templates, (descriptions or {}).get(name, ())) for name in classes
        ]
        if warns:
            warn_of_long_prompts(self.tokenizer, classes, prompts)
        vectors = self.embed_texts([prompt for own in prompts for prompt in own])
        parts = torch.split_with_sizes(vectors, [len(own) for own in prompts])
        bank = torch.cat([ensemble(part[:, None]) for part in parts])  # [C, D]
        return TextBank(
            tuple(classes),
            tuple(templates),
            bank,
            self.id,
            self.logit_scale,
            described=bool(descriptions),
        )


@dataclass(frozen=True)
class EmbeddingsTeacher:
    """Precomputed embeddings: one vector per image, and one text vector per class.

    The file is an `.npz` with `image_ids` (str `[N]`, paths inside the data folder),
    `image_vectors` (float `[N, D]`), `class_names` (str `[C]`), `text_vectors` (float `[C, D]`) and optionally
    `logit_scale`. With one embedding per image, every augmented view has its image's embedding as target.
    """

    spec: str
    id: str
    logit_scale: float
    dim: int
    vectors: Mapping[str, np.ndarray]
    texts: Mapping[str, np.ndarray]

    def lookup(self, ids: Sequence[str]) -> Tensor:
        """Return the embeddings of the named images, float32 `[len(ids), D]`."""
        missing = [name for name in ids if name not in self.vectors]
        if missing:
            raise EdgekdError(
                f"{self.spec} has no embedding for {len(missing):,} of {len(ids):,} images, for example {missing[0]}.",
                f"List them: edgekd list missing {self.spec} --data DIR --unlabelled DIR. Its image_ids are the paths "
                "inside those folders, with forward slashes.",
            )
        return torch.from_numpy(np.stack([self.vectors[name] for name in ids]).astype(np.float32))

    def embeddings(self, ids: Sequence[str], indices: np.ndarray, _: np.ndarray) -> np.ndarray:
        """Return the embeddings of images, whatever their view, float32 `[b, D]`; `ids` are of all images."""
        return self.lookup([ids[i] for i in indices]).numpy()

    def text_bank(
        self,
        classes: Sequence[str],
        templates: Sequence[str],
        descriptions: Mapping[str, Sequence[str]] | None = None,
        *,
        warns: bool = True,
    ) -> TextBank:
        """Return the file's text vectors for `classes`; `templates` do not apply and are recorded as `precomputed`."""
        if descriptions is not None:
            raise EdgekdError(
                "Precomputed text vectors cannot include descriptions.",
                "Include them in the file's text vectors, or use a teacher model.",
            )
        names = {readable(name): vector for name, vector in self.texts.items()}
        missing = [name for name in classes if readable(name) not in names]
        if missing:
            raise EdgekdError(
                f'{self.spec} has no text vector for the class "{missing[0]}" ({len(missing)} missing).',
                did_you_mean(readable(missing[0]), names),
            )
        rows = np.stack([names[readable(name)] for name in classes]).astype(np.float32)
        vectors = normalize(torch.from_numpy(rows), dim=-1)
        return TextBank(tuple(classes), ("precomputed",), vectors, self.id, self.logit_scale)


Teacher = ClipTeacher | EmbeddingsTeacher


def load_teacher(spec: str) -> Teacher:
    """Load the teacher of a spec, on the CPU, in evaluation mode.

    An unknown name, missing or unreadable files, and no network for a hub name are an `EdgekdError`.
    """
    kind, colon, rest = spec.partition(":")
    if spec == "toy":
        folder = importlib.resources.files("edgekd.data.toy.teacher")
        with importlib.resources.as_file(folder) as path:
            return _open_clip_teacher(spec, f"local-dir:{path}", None)
    if kind == "embeddings" and colon:
        return _embeddings_teacher(spec, Path(rest))
    if kind == "local-dir" and colon:
        folder_path = Path(rest).expanduser()
        if not (folder_path / "open_clip_config.json").is_file():
            raise EdgekdError(
                f"{folder_path} is not an open_clip model folder: it has no open_clip_config.json.",
                "Give the folder that holds open_clip_config.json and the weights.",
            )
        if odd := [one for one in folder_path.iterdir() if not one.is_file() and not one.is_dir()]:
            raise EdgekdError(f"{odd[0]} is not a regular file.", "Remove it from the folder.")
        return _open_clip_teacher(spec, f"local-dir:{folder_path}", None)
    if kind == "hf-hub" and colon:
        prefer_local_cache()
        return _open_clip_teacher(spec, spec, None)
    return _named_teacher(spec)


def _named_teacher(spec: str) -> ClipTeacher:
    import open_clip

    name, _, tag = spec.partition(":")
    if name not in open_clip.list_models():
        raise EdgekdError(
            f'There is no teacher "{spec}".',
            did_you_mean(name, [*open_clip.list_models(), "toy"]) + " See: edgekd list teachers.",
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag == "random":
        return _open_clip_teacher(spec, name, None)
    is_file = bool(tag) and Path(tag).is_file()
    if tag not in tags and not is_file:
        raise EdgekdError(
            f'The teacher {name} has no weights "{tag}".'
            if tag
            else f"The teacher {name} needs a weights tag.",
            f"Write {name}:TAG. " + did_you_mean(tag, tags),
        )
    if not is_file:
        prefer_local_cache()
    return _open_clip_teacher(spec, name, tag)


def _open_clip_teacher(spec: str, name: str, tag: str | None) -> ClipTeacher:
    import open_clip

    try:
        config = open_clip.get_model_config(name) or {}
        _refuse_sizes(spec, config)
        options = _tokenizer_options(spec, config)
        if tag is None and ":" not in name:
            # `NAME:random`, for speed tests: the same random weights every time
            torch.manual_seed(0)
            model = open_clip.create_model(name)
        else:
            with _errors_raised_alone():
                model = open_clip.create_model_from_pretrained(
                    name, pretrained=tag, return_transform=False
                )
        tokenizer = open_clip.get_tokenizer(name, **options)
        preprocess = open_clip_preprocess(open_clip.get_model_preprocess_cfg(model))
        logit_scale = float(model.logit_scale.detach().exp())
    except EdgekdError:
        raise
    except Exception as error:  # open_clip, timm and transformers raise their own errors
        if not name.startswith("local-dir:") and not hub_reachable():
            raise NoNetwork(f"The teacher {spec}", teacher=spec) from error
        raise EdgekdError(
            f"The teacher {spec} could not be loaded ({first_line(error)}).",
            "Check the folder's config, weights and tokenizer files.",
        ) from error
    model.eval().requires_grad_(False)
    dim = _probe_dim(spec, model, tokenizer, preprocess)
    if not math.isfinite(logit_scale):
        raise EdgekdError(
            f"The logit scale of {spec} is not a finite number.", "Check the teacher's weights."
        )
    return ClipTeacher(
        spec=spec,
        id=short_hash("clip-1", tensors_hash(model.state_dict()), preprocess.hash),
        preprocess=preprocess,
        logit_scale=logit_scale,
        dim=dim,
        model=model.to(memory_format=torch.channels_last),
        tokenizer=tokenizer,
    )


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


@contextlib.contextmanager
def _errors_raised_alone() -> Iterator[None]:
    """Drop errors of the root logger, since open_clip also logs the errors that it raises."""
    logging.getLogger().addFilter(_below_error)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(_below_error)


def _tokenizer_options(spec: str, config: Mapping[str, Any]) -> dict[str, bool]:
    """Return arguments of `open_clip.get_tokenizer`; refuse a tokenizer whose package is not installed."""
    texts = config.get("text_cfg", {})
    if not texts.get("hf_tokenizer_name") and not texts.get("hf_model_name"):
        return {}
    if importlib.util.find_spec("transformers") is None:
        raise EdgekdError(
            f"The tokenizer of {spec} needs the package transformers, which is not installed.",
            'Install it: pip install "edgekd[siglip]".',
        )
    # A config may request code in its folder.
    return {"trust_remote_code": False} if texts.get("hf_tokenizer_name") else {}


def _refuse_sizes(spec: str, config: Mapping[str, Any]) -> None:
    """Refuse sizes above those of any published model, which would exhaust the memory."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_sizes(spec, value)
        most = 1000 if key == "layers" else 10**7
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise EdgekdError(
                    f"The config of {spec} gives {shown_value(key)} as {shown_value(number)}.",
                    "Get the teacher from its own source again.",
                )


@torch.inference_mode()
def _probe_dim(spec: str, model: Any, tokenizer: Any, preprocess: Preprocess) -> int:
    """Run both encoders once and return the dimension of their shared space."""
    height, width = preprocess.shape
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    image = f"image encoder of {spec} on an image of {width} × {height} px"
    probes: dict[str, Callable[[], Any]] = {
        image: lambda: model.encode_image(noise),
        f"text encoder of {spec} on a prompt": lambda: model.encode_text(tokenizer(["a"])),
    }
    dims = []
    for what, probe in probes.items():
        try:
            found = probe()
        except Exception as error:  # architectures raise anything
            raise EdgekdError(
                f"The {what} fails ({first_line(error)}).",
                "The model's config, weights and tokenizer do not match; take them from one source.",
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or not found.isfinite().all():
            raise EdgekdError(
                f"The {what} does not give one vector of finite numbers.",
                "Check the teacher's weights.",
            )
        dims.append(found.shape[1])
    if dims[0] != dims[1]:
        raise EdgekdError(
            f"The encoders of {spec} give {dims[0]} dimensions for an image and {dims[1]} for a text.",
            "Choose a teacher whose images and texts share one space.",
        )
    return int(dims[0])


def has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices in hardware."""
    return bool({"avx512_bf16", "amx_bf16"} & set(describe()["features"]))


def _embeddings_teacher(spec: str, path: Path) -> EmbeddingsTeacher:
    if not path.is_file():
        raise EdgekdError(f"There is no embeddings file {path}.", "Write embeddings:FILE.npz.")
    hint = "It must be an .npz of plain arrays: image_ids, image_vectors, class_names and text_vectors."
    arrays = read_arrays(path, "embeddings file", hint)
    try:
        images, vectors = arrays["image_ids"], arrays["image_vectors"]
        classes, texts = arrays["class_names"], arrays["text_vectors"]
    except KeyError as error:
        raise EdgekdError(f"{path} is not an embeddings file: it lacks {error}.", hint) from error
    scale = np.asarray(arrays.get("logit_scale", 100.0))
    numbers = all(array.dtype.kind in "fiu" for array in (vectors, texts, scale))
    names = all(array.dtype.kind == "U" and array.ndim == 1 for array in (images, classes))
    if (
        not (numbers and names and scale.size == 1 and vectors.ndim == texts.ndim == 2)
        or vectors.shape[1] != texts.shape[1]
        or (len(images), len(classes)) != (len(vectors), len(texts))
    ):
        raise EdgekdError(
            f"The arrays in {path} do not match: images {vectors.shape} for ids {images.shape}, "
            f"texts {texts.shape} for names {classes.shape}.",
            "image_vectors is [N, D] for N image_ids, text_vectors [C, D] for C class_names, logit_scale one number.",
        )
    if not all(np.isfinite(array).all() for array in (vectors, texts, scale)):
        raise EdgekdError(
            f"{path} holds values that are not finite.", "Compute the embeddings again."
        )
    return EmbeddingsTeacher(
        spec=spec,
        id=short_hash("embeddings-1", sha256_file(path)),
        logit_scale=float(scale.item()),
        dim=int(vectors.shape[1]),
        vectors=dict(zip(map(str, images), vectors, strict=True)),
        texts=dict(zip(map(str, classes), texts, strict=True)),
    )
