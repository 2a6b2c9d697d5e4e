from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import edgekd
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.loggers import Loggers, attach_to_run


@pytest.fixture(autouse=True)
def _main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the rank that Lightning keeps for a process; other tests take further ranks."""
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)


def test_local_loggers_write_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (0, 2):
        loggers = Loggers(("tensorboard", "csv"), tmp_path, start)
        for step in range(start + 1, start + 3):
            loggers.log({"train/loss": float(step)}, step)
        loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1), (2, 2), (3, 3), (4, 4),
    ]  # fmt: skip
    tables = sorted((tmp_path / "csv").rglob("metrics.csv"))
    rows = [row for table in tables for row in csv.DictReader(table.open())]
    assert [(row["step"], float(row["train/loss"])) for row in rows] == [
        ("1", 1), ("2", 2), ("3", 3), ("4", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EdgekdError) as caught:
        edgekd.train(logger=name, out=tmp_path / "run")
    assert f"edgekd[{name}]" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(EdgekdError) as caught:
        TrainConfig.load(logger="csv,tensorbord")
    assert "tensorboard" in caught.value.hint


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_services_get_the_numbers_and_refusals_are_errors(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that has the methods of Lightning's loggers."""
    seen: list[tuple[dict[str, float], int]] = []

    class Service:
        refuses = False
        run_id = "1"

        def __init__(self, *_: Any, **__: Any) -> None:
            self.seen = seen

        @property
        def experiment(self) -> SimpleNamespace:
            if self.refuses:
                raise RuntimeError("no login\nmore")
            return SimpleNamespace(id="1")

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            self.seen.append((values, step))

        def finalize(self, status: str) -> None:
            pass

    lightning, loggers = ModuleType("pytorch_lightning"), ModuleType("pytorch_lightning.loggers")
    setattr(loggers, kind, Service)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", loggers)
    made = Loggers((name,), tmp_path)
    made.log({"val/top1": 0.5}, 3)
    made.close()
    assert seen == [({"val/top1": 0.5}, 3)]
    Service.refuses = True
    with pytest.raises(EdgekdError, match="no login"):
        Loggers((name,), tmp_path)


def test_a_service_that_fails_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Service:
        experiment = None
        run_id = "1"

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            raise RuntimeError("the server has gone")

        def finalize(self, status: str) -> None:
            raise RuntimeError("the server has gone")

    lightning, services = ModuleType("pytorch_lightning"), ModuleType("pytorch_lightning.loggers")
    services.MLFlowLogger = Service
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", services)
    loggers = Loggers(("mlflow", "csv"), tmp_path)
    for step in (1, 2):
        loggers.log({"train/loss": 1.0}, step)
    loggers.close()
    assert capsys.readouterr().err.count("the server has gone") == 1
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    assert len(list(csv.DictReader(table.open()))) == 2


def test_mlflow_holds_numbers_and_files_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the service's own package: a run, its resumption, and a report attached later."""
    pytest.importorskip("mlflow")
    pytest.importorskip("pytorch_lightning")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    address = f"sqlite:///{run}/mlflow.db"
    (run / "weights.bin").write_bytes(b"weights")
    (run / "folder").mkdir()
    (run / "folder" / "page.html").write_text("page")
    for start in (0, 1):
        loggers = Loggers(("mlflow",), run, start)
        loggers.log({"train/loss": 2.0 - start}, start + 1)
        loggers.attach("run", "model", [run / "weights.bin"])
        loggers.close()
    attach_to_run(run, "benchmark", "report", [run / "folder"])
    client = MlflowClient(address)
    (experiment,) = [one for one in client.search_experiments() if one.name == "edgekd"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert [one.value for one in client.get_metric_history(found.info.run_id, "train/loss")] == [
        2,
        1,
    ]
    kept = [one.path for one in client.list_artifacts(found.info.run_id, "model")]
    assert kept == ["model/weights.bin"]
    pages = [one.path for one in client.list_artifacts(found.info.run_id, "report/folder")]
    assert pages == ["report/folder/page.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside the run's folder


def test_wandb_offline_holds_numbers_and_files_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("pytorch_lightning")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    logged: list[tuple[str, str, list[str]]] = []
    log = wandb.Run.log_artifact

    def noting(run: Any, artifact: Any) -> Any:
        logged.append((run.id, artifact.type, sorted(artifact.manifest.entries)))
        return log(run, artifact)

    monkeypatch.setattr(wandb.Run, "log_artifact", noting)
    for start in (0, 1):
        loggers = Loggers(("wandb",), tmp_path, start)
        loggers.log({"train/loss": 1.0}, start + 1)
        loggers.attach("a run", "model", [tmp_path / "weights.bin"])
        loggers.close()
        wandb.finish()
    assert [one[1:] for one in logged] == 2 * [("model", ["weights.bin"])]
    assert logged[0][0] == logged[1][0]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_a_service_that_is_not_there_any_more_only_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loggers.json").write_text('{"wandb": "1", "other": "2"}')
    monkeypatch.setitem(sys.modules, "wandb", None)
    attach_to_run(tmp_path, "benchmark", "report", [tmp_path / "loggers.json"])
    assert "benchmark" in capsys.readouterr().err
    attach_to_run(tmp_path / "elsewhere", "benchmark", "report", [])
    assert not capsys.readouterr().err
