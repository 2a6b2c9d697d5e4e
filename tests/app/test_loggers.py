"""What the verbs hand to a run's loggers, from training to the report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from study_data import tiny_settings

import edgekd
from edgekd.targets.timing import stopwatch

Attached = dict[str, dict[str, set[str]]]
"""Service → kind → names of the files that it got."""


class Artifact:
    """Stands for `wandb.Artifact`."""

    def __init__(self, name: str, type: str) -> None:
        self.type, self.names = type, set[str]()

    def add_file(self, path: str, name: str) -> None:
        assert Path(path).is_file()
        self.names.add(name)

    def add_dir(self, path: str, name: str) -> None:
        self.names |= {f"{name}/{file.name}" for file in Path(path).iterdir()}


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Attached:
    """Install stand-ins for W&B, MLflow and their loggers; what they receive stands in the result."""
    received: Attached = {"wandb": {}, "mlflow": {}}

    def record(service: str, kind: str, names: set[str]) -> None:
        received[service].setdefault(kind, set()).update(names)

    def log_files(_: str, folder: str, place: str) -> None:
        kind, name = place.split("/", 1)
        record("mlflow", kind, {f"{name}/{file.name}" for file in Path(folder).iterdir()})

    class Logger:
        run_id, service = "7", ""

        def __init__(self, *_: object, id: str | None = None, run_id: str | None = None, **__: Any):
            assert (id or run_id) in (None, "7")

        @property
        def experiment(self) -> SimpleNamespace:
            return SimpleNamespace(
                id="7",
                log_artifact=self.log_artifact,
                log_artifacts=log_files,
            )

        def log_artifact(self, *given: Any) -> None:
            raise NotImplementedError

        def log_hyperparams(self, values: dict[str, Any]) -> None:
            record(self.service, "settings", {f"recipe={values['recipe']}"})

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            pass

        def finalize(self, status: str) -> None:
            pass

    class WandbLogger(Logger):
        service = "wandb"

        def log_artifact(self, *given: Any) -> None:
            record("wandb", given[0].type, given[0].names)

    class MLFlowLogger(Logger):
        service = "mlflow"

        def log_artifact(self, *given: Any) -> None:
            assert Path(given[1]).is_file()
            record("mlflow", given[2], {Path(given[1]).name})

    wandb, loggers = ModuleType("wandb"), ModuleType("pytorch_lightning.loggers")
    vars(wandb)["Artifact"] = Artifact
    vars(loggers).update(WandbLogger=WandbLogger, MLFlowLogger=MLFlowLogger)
    for module in (wandb, ModuleType("mlflow"), ModuleType("pytorch_lightning"), loggers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return received


@pytest.mark.slow
def test_every_verb_attaches_its_files(
    attached: Attached,
    make_domain_folder: Callable[..., Path],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("QUICK", "END_TO_END_QUICK"):
        brief = replace(getattr(stopwatch, name), warmup_s=0.0, runs=8, seconds=0.1, limit_s=0.2)
        monkeypatch.setattr(stopwatch, name, brief)
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
