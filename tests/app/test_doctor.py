"""`edgekd doctor` and `edgekd list`: every line says something true."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from edgekd.cli import doctor
from edgekd.core.errors import EdgekdError
from edgekd.version import __version__


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: False)
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    return {line[:18].strip(): line[18:] for line in doctor.examine()}


def test_versions_are_those_installed(facts: dict[str, str]) -> None:
    assert facts["edgekd"].startswith(f"{__version__}, Python 3.")
    for package in ("torch", "timm", "open_clip_torch", "onnxruntime"):
        assert facts[package] == importlib.metadata.version(package)


def test_absent_package(facts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert "no-such-package   not installed" in doctor.examine()


def test_machine(facts: dict[str, str], tmp_path: Path) -> None:
    assert f"of {os.cpu_count()} cores" in facts["processor"]
    assert "CPUExecutionProvider" in facts["providers"]
    assert facts["cache"] == str(tmp_path / "cache")
    assert facts["hub"].startswith("out of reach")
    assert facts["CUDA"]


def test_no_name_runs_into_its_value() -> None:
    assert max(map(len, doctor.PACKAGES)) < 18


def test_friendly_students() -> None:
    lines = doctor.student_lines(None)
    assert "mobilenetv3         mobilenetv3_large_100" in lines
    assert "search with" in lines[-1]


def test_students_by_pattern() -> None:
    names = doctor.student_lines("tf_efficientnet_lite*")
    assert "tf_efficientnet_lite0" in names
    assert all(name.startswith("tf_efficientnet_lite") for name in names)


def test_no_student_matches() -> None:
    with pytest.raises(EdgekdError, match=r'No student matches "\*efficientnet_lite9\*"') as caught:
        doctor.student_lines("*efficientnet_lite9*")
    assert "efficientnet_lite" in caught.value.hint


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


def test_targets() -> None:
    lines = doctor.target_lines()
    assert any(line.startswith("onnxruntime") and "fp32, fp16, int8" in line for line in lines)
