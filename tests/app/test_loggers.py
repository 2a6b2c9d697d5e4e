"""What the verbs hand to a run's loggers, from training to the report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from device_fakes import BRIEF, be_brief
from study_data import tiny_settings

import edgekd
from edgekd.targets.timing import stopwatch

Attached = dict[str, dict[str, set[str]]]
"""Service → kind → names of the files that it got."""


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Attached:
    """Install stand-ins for W&B, MLflow and their loggers; what they receive stands in the result."""
    received: Attached = {"wandb": {}, "mlflow": {}}

    def record(service: str, kind: str, names: set[str]) -> None:
        received[service].setdefault(kind, set()).update(names)

    def files_of(folder: str, place: str) -> set[str]:
        return {f"{place}/{file.name}" for file in Path(folder).iterdir()}

    def logger(service: str, **methods: Any) -> Any:
        def settings(values: dict[str, Any]) -> None:
            record(service, "settings", {f"recipe={values['recipe']}"})

        def make(*_: object, **__: Any) -> MagicMock:
            return MagicMock(
                run_id="7", experiment=MagicMock(id="7", **methods), log_hyperparams=settings
            )

        return make

    def to_wandb(artifact: Any, *_: Any, **__: Any) -> None:
        record("wandb", artifact.type, artifact.names)

    def to_mlflow(_: str, path: str, kind: str) -> None:
        assert Path(path).is_file()
        record("mlflow", kind, {Path(path).name})

    def folder_to_mlflow(_: str, folder: str, place: str) -> None:
        kind, name = place.split("/", 1)
        record("mlflow", kind, files_of(folder, name))

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.type, self.names = type, set[str]()

        def add_file(self, path: str, name: str) -> None:
            assert Path(path).is_file()
            self.names.add(name)

        def add_dir(self, path: str, name: str) -> None:
            self.names |= files_of(path, name)

    loggers = SimpleNamespace(
        WandbLogger=logger("wandb", log_artifact=to_wandb),
        MLFlowLogger=logger("mlflow", log_artifact=to_mlflow, log_artifacts=folder_to_mlflow),
    )
    for name, module in (
        ("wandb", SimpleNamespace(Artifact=Artifact)),
        ("mlflow", SimpleNamespace()),
        ("pytorch_lightning", SimpleNamespace(loggers=loggers)),
        ("pytorch_lightning.loggers", loggers),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return received


@pytest.mark.slow
def test_every_verb_attaches_its_files(
    attached: Attached,
    make_domain_folder: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_brief(monkeypatch)
    monkeypatch.setattr(stopwatch, "END_TO_END_QUICK", BRIEF)
    data = make_domain_folder(tmp_path / "data", count=12)
    run = tmp_path / "run"
    edgekd.train(**tiny_settings(data, tiny_teacher), recipe="erm", logger="wandb,mlflow", out=run)
    [artifact] = edgekd.export(run)
    edgekd.benchmark(run, quick=True)
    expected = {
        "settings": {"recipe=erm"},
        "model": {"student.safetensors", "run.json", "config.json"},
        "artifact": {f"{artifact.name}/{file.name}" for file in artifact.folder.iterdir()},
        "report": {"report.html", "report.json", "MODEL_CARD.md"},
    }
    assert attached == {"wandb": expected, "mlflow": expected}
