"""The output of `edgekd doctor` and `edgekd list`."""

from __future__ import annotations

import fnmatch
import platform

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.files import cache_root
from edgekd.core.version import __version__

PACKAGES = (
    "torch", "torchvision", "timm", "open_clip_torch", "onnx", "onnxruntime", "nncf", "openvino", "tensorrt",
    "tensorrt-rtx-cu13", "coremltools", "executorch", "litert-torch", "ai-edge-litert",
)  # fmt: skip
_SETTINGS = {
    "compute_capability": "compute capability {}",
    "deployment_target": "{}",
    "threads": "{} threads",
    "input": "input {}",
}
"""Setting of a profile → its format in a line."""


def examine() -> list[str]:
    """Return versions, processor, accelerators, folders and hub, one line each."""
    import onnxruntime
    import torch

    from edgekd.core.hub import hub_reachable
    from edgekd.core.machine import describe, version_of
    from edgekd.targets.trt.machine import describe as tensorrt_builder

    machine = describe()
    features = ", ".join(machine["features"]) or "none that speed up INT8"
    facts = {
        "edgekd": f"{__version__}, Python {platform.python_version()} on {platform.platform()}",
        "processor": f"{machine['cpu']} ({machine['usable_cores']} of {machine['cores']} cores usable; {features})",
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
        **{package: version_of(package) or "not installed" for package in PACKAGES},
        "providers": ", ".join(onnxruntime.get_available_providers()),
        "TensorRT": tensorrt_builder(),
        "cache": str(cache_root()),
        "hub": "reachable"
        if hub_reachable()
        else "not reachable: use local weights and local-dir: teachers",
    }
    return [f"{name:<18}{fact}" for name, fact in facts.items()]


def student_lines(pattern: str | None) -> list[str]:
    """Return the short names, or the timm names that match the pattern."""
    import timm

    from edgekd.distill.models.students import FRIENDLY, TEACHER_ENCODER

    if pattern is None:
        lines = [f"{friendly:<20}{name}" for friendly, name in FRIENDLY.items()]
        lines.append(f"{TEACHER_ENCODER:<20}the teacher's own image encoder (vl2v-sd)")
        return [
            *lines,
            "",
            'Any timm name works too; search with: edgekd list students "*pattern*"',
        ]
    names: list[str] = timm.list_models(pattern)
    return names or _nothing("student", pattern, timm.list_models())


def teacher_lines(pattern: str | None) -> list[str]:
    """Return the kinds of teacher specs, or open_clip's name:tag pairs that match the pattern."""
    import open_clip

    names = open_clip.list_pretrained(as_str=True)
    if pattern is None:
        return [
            "toy                       shipped with edgekd; works offline",
            "NAME:TAG                  open_clip's own, for example ViT-B-32:laion2b_s34b_b79k",
            "hf-hub:ORG/MODEL          any open_clip model on the hub",
            "local-dir:FOLDER          open_clip_config.json and weights in a folder",
            "embeddings:FILE.npz precomputed image and text embeddings",
            "",
            f'open_clip has {len(names)} NAME:TAG pairs; search with: edgekd list teachers "*B-32*"',
        ]
    return [name for name in names if fnmatch.fnmatch(name, pattern)] or _nothing(
        "teacher", pattern, names
    )


def recipe_lines() -> list[str]:
    """Return every recipe with its summary, source, stages, terms and weights."""
    from edgekd.distill.recipes import DEFAULT_RECIPE, RECIPES

    lines = []
    for recipe in RECIPES.values():
        default = " (default)" if recipe.name == DEFAULT_RECIPE else ""
        lines.append(f"{recipe.name}{default}: {recipe.summary} [{recipe.source}]")
        for stage in recipe.stages:
            terms = " + ".join(f"{spec.weight:g}·{term}" for term, spec in stage.terms.items())
            lines.append(
                f"    {stage.name}: {terms}; trains {', '.join(stage.trains)}; {100 * stage.share:g} % of the steps"
            )
    return lines


def target_lines() -> list[str]:
    """Return every target with its precisions, and the device profiles with their cautions."""
    from edgekd.targets.profiles import load_profile, profile_names
    from edgekd.targets.registry import TARGETS

    width = max(len(", ".join(target.precisions)) for target in TARGETS.values()) + 2
    lines = [
        f"{target.name:<14}{', '.join(target.precisions):<{width}}{target.summary}"
        for target in TARGETS.values()
    ]
    lines += [
        "",
        "Device profiles (edgekd export or benchmark --profile NAME|FILE.toml). The input is RGB uint8 NHWC unless",
        "stated otherwise. Each claim has its source; unchecked ones are marked:",
    ]
    for name in profile_names():
        profile = load_profile(name)
        facts = [profile.runtime, " ".join(profile.precisions)]
        facts += [
            form.format(value)
            for field, form in _SETTINGS.items()
            if (value := getattr(profile, field)) is not None
        ]
        lines.append(f"{name:<18}{'; '.join(facts)}")
        because: dict[str, list[str]] = {}
        for field, source in profile.because.items():
            because.setdefault(source, []).append(field.replace("_", " "))
        lines += [
            f"    {' and '.join(fields)}: {profile.sources[name].named}"
            for name, fields in because.items()
        ]
        lines += [
            f"    {caution.text} [{profile.sources[caution.source].named}]"
            for caution in profile.cautions
        ]
    return lines


def _nothing(what: str, pattern: str, names: list[str]) -> list[str]:
    raise EdgekdError(f'No {what} matches "{pattern}".', did_you_mean(pattern.strip("*"), names))
