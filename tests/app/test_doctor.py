"""`edgekd doctor` and `edgekd list`: every line says something true."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from edgekd.cli import doctor
from edgekd.core.errors import EdgekdError
from edgekd.core.version import __version__


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: False)
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    return {line[:18].strip(): line[18:] for line in doctor.examine()}


def test_versions_are_those_installed(facts: dict[str, str]) -> None:
    assert facts["edgekd"].startswith(f"{__version__}, Python 3.")
    for package in ("torch", "timm", "open_clip_torch", "onnxruntime"):
        assert facts[package] == importlib.metadata.version(package)


def test_machine(facts: dict[str, str], tmp_path: Path) -> None:
    assert f"of {os.cpu_count()} cores" in facts["processor"]
    assert "CPUExecutionProvider" in facts["providers"]
    assert facts["cache"] == str(tmp_path / "cache")
    assert facts["hub"].startswith("out of reach")
    assert facts["CUDA"]


def test_students_by_pattern() -> None:
    names = doctor.student_lines("tf_efficientnet_lite*")
    assert "tf_efficientnet_lite0" in names
    assert all(name.startswith("tf_efficientnet_lite") for name in names)


def test_teachers() -> None:
    kinds = "\n".join(doctor.teacher_lines(None))
    for kind in ("toy", "NAME:TAG", "hf-hub:", "local-dir:", "embeddings:"):
        assert kind in kinds
    assert "ViT-B-32:laion2b_s34b_b79k" in doctor.teacher_lines("ViT-B-32:*")
    with pytest.raises(EdgekdError, match="No teacher matches"):
        doctor.teacher_lines("ViT-Z-99:*")


def test_recipes_name_their_terms() -> None:
    from edgekd.distill.recipes import RECIPES

    text = "\n".join(doctor.recipe_lines())
    for recipe in RECIPES.values():
        assert recipe.summary in text
        for stage in recipe.stages:
            for term, spec in stage.terms.items():
                assert f"{spec.weight:g}·{term}" in text
    assert text.count("(default)") == 1
