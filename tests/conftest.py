"""What every test may use: a cache of its own, small image folders drawn on the spot, and a tiny open_clip teacher.

`pytest -n auto` runs the files side by side, each file in one process (`--dist loadfile` in pyproject.toml): what a
file makes once is made once, and what starts a server or a browser does not meet itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: workers that each use all cores wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: the cores this process may use, but no more than 4, as each holds up to 2 GB."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, usable or 1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests out of the user's cache; one cache per session, so that what is dear is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _brief_timing() -> Iterator[None]:
    """Let an export time its files for a tenth of a second instead of several: no test is about those figures."""
    from edgekd.targets.timing import speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "NOTE", speed.Protocol("note", 4, 0.01, 0.1, 20, 0.05, 2.0, 0.01, 1))
        yield


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    cache = tmp_path_factory.mktemp("own-cache") / "cache"
    monkeypatch.setenv("EDGEKD_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch for a module's tests, so that sums come in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_GRAPHS: dict[bytes, Any] = {}


@pytest.fixture(scope="module")
def graphs_once() -> Iterator[Callable[..., Any]]:
    """Export equal networks to ONNX once per session: torch takes a second for the smallest one.

    Yields:
        `to_proto` as it is, for a test of the exporter itself.
    """
    import torch
    from onnx import ModelProto

    from edgekd.export.onnx import write

    real = write.to_proto

    def identity(*parts: object) -> bytes | None:
        """Class, plain attributes and tensors of every module; None where a class is made inside a function."""
        digest = hashlib.sha256(repr(parts[1:]).encode())
        assert isinstance(parts[0], torch.nn.Module)
        for name, module in parts[0].named_modules():
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            if "<locals>" in kind:
                return None
            own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            digest.update(repr((name, kind, module.extra_repr(), own)).encode())
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                content = b"" if tensor is None else tensor.detach().contiguous().numpy().tobytes()
                digest.update(key.encode() + content)
        return digest.digest()

    def to_proto(
        model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], output: str
    ) -> ModelProto:
        shapes = [(name, tuple(example.shape), example.dtype) for name, example in inputs.items()]
        key = identity(model, shapes, output)
        if key is None:
            return real(model, inputs, output)
        if key not in _GRAPHS:
            _GRAPHS[key] = real(model, inputs, output)
        graph = ModelProto()
        graph.CopyFrom(_GRAPHS[key])
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "to_proto", to_proto)
        yield real


def draw_image(path: Path, *, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    """Write noise that depends on `seed`; the ending chooses the format, `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def make_image() -> Callable[..., Path]:
    """`make_image(path, seed=0, size=(width, height))` writes one image of noise."""
    return draw_image


@pytest.fixture
def make_domain_folder() -> Callable[..., Path]:
    """`make_domain_folder(root, domains=…, classes=…, count=…)` writes `domain/class/0000.png`, all contents different.

    With `domains=()` the layout is `class/0000.png`.
    """

    def make(
        root: Path,
        *,
        domains: Sequence[str] = ("art", "photo", "sketch"),
        classes: Sequence[str] = ("cat", "dog"),
        count: int = 10,
        size: tuple[int, int] = (40, 32),
    ) -> Path:
        seed = 0
        for domain in domains or (".",):
            for name in classes:
                for number in range(count):
                    draw_image(root / domain / name / f"{number:04d}.png", seed=seed, size=size)
                    seed += 1
        return root

    return make


TINY_TEACHER = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.2, 0.5, 0.8],
        "std": [0.6, 0.25, 0.1],
        "interpolation": "bicubic",
    },
}


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model folder: a one-layer ViT of 12 dimensions at 32 px with random weights, not square-resizing."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY_TEACHER["model_cfg"])  # type: ignore[arg-type]
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_TEACHER))
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A `kd` run of two steps with an FP32 and an INT8 file for ONNX Runtime; its images are in `data` beside it.

    No test may change it.
    """
    from study_data import draw_domains, tiny_settings

    import edgekd

    folder = tmp_path_factory.mktemp("tiny")
    settings = tiny_settings(draw_domains(folder / "data", count=12), tiny_teacher)
    options = {"student_options": {"drop_rate": 0.1}}
    edgekd.train(recipe="kd", out=folder / "run", **settings | options)
    edgekd.export(folder / "run", precision="int8", min_agreement=0.1)
    return folder / "run"
