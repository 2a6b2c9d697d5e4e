"""A model as a folder in the conventions of the Hugging Face Hub: timm, transformers.js and optimum read it.

| file | holds |
|---|---|
| `README.md` | the model card |
| `model.safetensors`, `config.json` | the student as timm builds it, with its classes |
| `onnx/model[_fp16|_quantized].onnx` | `pixel_values`, float32 `[B, 3, S, S]` → `logits`, float32 `[B, C]` |
| `preprocessor_config.json` | how pixels become `pixel_values` |
| `artifacts/NAME/` | the exported files as edgekd wrote them |
| `labels.txt` | the classes |
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx

from edgekd.benchmark.report.render import escape
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.files import render_template, write_json, write_text
from edgekd.core.manifest import LABELS_FILE, Artifact, Run, read_artifact, read_run
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import printable, read_object, read_text
from edgekd.evaluation.subjects import artifact_folders
from edgekd.export.onnx.graphs import rename_input, with_float_input
from edgekd.targets.registry import DEFAULT_TARGET

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill.classification.load_run import LoadedRun

_ONNX_FILES = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_quantized.onnx",
}
"""Precision → name in `onnx/`."""
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which `preprocessor_config.json` holds."""
_SAME = 1e-4
"""Largest difference of logits between timm's model and the student, as a share of their range."""


def write_run(folder: Path, run_folder: Path, repo: str) -> None:
    """Write a finished run into the empty `folder`, for the repository `repo`."""
    run = read_run(run_folder)
    artifacts = [read_artifact(path) for path in artifact_folders(run_folder)]
    _write_timm(folder, run_folder)
    _write_files(folder, run, artifacts)
    library = "timm" if (folder / "model.safetensors").exists() else ""
    cards = sorted(run_folder.glob("benchmark*/MODEL_CARD.md"), key=lambda p: p.stat().st_mtime)
    card = read_text(cards[-1], "model card", "Benchmark the run again.") if cards else ""
    if card and library:
        card = card.replace("---\n", f"---\nlibrary_name: {library}\n", 1)
    student, recipe, teacher = map(escape, (run.student, run.recipe, run.teacher))
    about = (
        f"A {student} image classifier for {len(run.classes)} classes, trained with the recipe {recipe} from the "
        f"teacher {teacher}. It has not been benchmarked."
    )
    _write_readme(folder, repo, library=library, about=about, card=card)


def write_artifact(folder: Path, artifact_folder: Path, repo: str) -> None:
    """Write one exported file into the empty `folder`, for the repository `repo`."""
    artifact = read_artifact(artifact_folder)
    _write_files(folder, artifact, [artifact])
    about = f"{len(artifact.classes)} classes; {artifact.target}, {artifact.precision}."
    library = "onnx" if (folder / "onnx").exists() else ""
    _write_readme(folder, repo, library=library, about=about, card="")


def processor(preprocess: Preprocess) -> dict[str, Any]:
    """Return `preprocessor_config.json` of transformers for the pixels of `preprocess`."""
    side = preprocess.size
    crop = preprocess.resize == "crop"
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor" if crop else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(side / preprocess.crop_pct)} if crop else square,
        "do_center_crop": crop,
        **({"crop_size": square} if crop else {}),
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `config.json` by which transformers names the classes."""
    return {
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def _write_files(folder: Path, model: Run | Artifact, artifacts: Sequence[Artifact]) -> None:
    """Write classes, preprocessing and the exported files; those of ONNX Runtime again by transformers.js' names."""
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", _labels(model.classes))
    write_json(folder / "preprocessor_config.json", processor(model.preprocess))
    write_text(folder / LABELS_FILE, "".join(f"{name}\n" for name in model.classes))
    for artifact in artifacts:
        assert artifact.folder is not None
        own = folder / "artifacts" / artifact.name
        for name in (*artifact.files, "artifact.json", LABELS_FILE):
            if (artifact.folder / name).is_file():
                (own / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.folder / name, own / name)
        name = _ONNX_FILES.get(artifact.precision, "")
        if artifact.target != DEFAULT_TARGET or artifact.bank is not None or not name:
            continue
        try:
            model = _with_pixel_values(artifact)
        except EdgekdError as error:
            warn(f"{artifact.name} is left out of onnx/: {error.message}")
            continue
        (folder / "onnx").mkdir(exist_ok=True)
        onnx.save(model, folder / "onnx" / name)


def _with_pixel_values(artifact: Artifact) -> onnx.ModelProto:
    """Return the model with one input, normalised float32 planes named `pixel_values`."""
    assert artifact.folder is not None
    model = onnx.load(artifact.folder / artifact.model_file)
    if artifact.input != "float":
        model = with_float_input(model)
    first = model.graph.input[0]
    rename_input(model.graph.node, first.name, "pixel_values")
    first.name = "pixel_values"
    onnx.checker.check_model(model)
    return model


def _write_timm(folder: Path, run_folder: Path) -> None:
    """Write `model.safetensors` and `config.json` of timm; nothing where timm does not build the student from them."""
    from timm.models import save_for_hf

    from edgekd.distill.classification.load_run import load_run

    loaded = load_run(run_folder)
    options = dict(loaded.config.student_options)
    try:
        model = cast(Any, _timm_model(loaded))
        if model.pretrained_cfg.get("fixed_input_size"):
            options["img_size"] = loaded.run.preprocess.size
        save_for_hf(model, str(folder), model_args=options, safe_serialization=True)
        _describe(folder / "config.json", loaded.run)
        _check_same(folder, loaded)
    except Exception as error:  # what timm raises depends on the architecture
        warn(
            f"timm cannot rebuild this student, so its weights are left out ({first_line(error)})."
        )
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)


def _timm_model(loaded: LoadedRun) -> nn.Module:
    """Return the backbone with the student's head, its scale included, as timm's own classifier."""
    from torch import nn

    from edgekd.export.run import deployable

    if loaded.student.neck is not None:
        raise ValueError("it has a hidden layer behind the backbone")
    whole = deployable(loaded)
    head = cast(nn.Linear, whole.head)
    model: Any = copy.deepcopy(whole.backbone)
    model.reset_classifier(head.out_features)
    model.get_classifier().load_state_dict(head.state_dict())
    return cast(nn.Module, model)


def _describe(path: Path, run: Run) -> None:
    """Add classes and preprocessing to timm's `config.json`, and what transformers reads of it."""
    settings, preprocess = read_object(path, "timm configuration"), run.preprocess
    pretrained = settings["pretrained_cfg"]
    pretrained |= preprocess.model_dump(
        mode="json", include={"mean", "std", "interpolation", "crop_pct"}
    )
    pretrained |= {
        "input_size": [3, preprocess.size, preprocess.size],
        "crop_mode": "squash" if preprocess.resize == "squash" else "center",
    }
    for name in ("test_input_size", "test_crop_pct", "pool_size", "label_names"):
        pretrained.pop(name, None)
    # timm records the number of classes here as well, and transformers refuses it twice.
    settings.get("model_args", {}).pop("num_classes", None)
    settings |= {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification"],
        "label_names": list(run.classes),
        **_labels(run.classes),
    }
    write_json(path, settings)


def _check_same(folder: Path, loaded: LoadedRun) -> None:
    """Check that timm's model gives the student's logits."""
    import timm
    import torch

    from edgekd.export.run import deployable

    size, preprocess = loaded.run.preprocess.size, loaded.run.preprocess
    seed = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=seed)
    mean, std = (torch.tensor(part)[:, None, None] for part in (preprocess.mean, preprocess.std))
    with torch.inference_mode():
        wanted = deployable(loaded)(pixels)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        found = model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    span = float(wanted.max() - wanted.min()) or 1.0
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= _SAME * span:
        raise ValueError("timm's model gives other logits")


def _write_readme(folder: Path, repo: str, **parts: str) -> None:
    """Write the model card, `card` or a short one, with a section on how each file of the repository is opened."""
    text = render_template(
        __package__,
        "hub_readme.jinja",
        **parts,
        repo=repo,
        title=printable(repo.rpartition("/")[2]),
        has_weights=(folder / "model.safetensors").exists(),
        has_onnx=(folder / "onnx").exists(),
        artifacts=sorted(path.name for path in (folder / "artifacts").glob("*")),
    )
    write_text(folder / "README.md", text)
