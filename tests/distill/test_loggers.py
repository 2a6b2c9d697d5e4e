from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import edgekd
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.loggers import Loggers


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
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(row["step"], float(row["train/loss"])) for row in rows] == [
        ("1", 1), ("2", 2), ("3", 3), ("4", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "step,x\n1", "step,x\none,2\n", "\0\n", "a,b\n1,2\n"])
def test_a_damaged_table_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(text)
    loggers = Loggers(("csv",), tmp_path, resume_at=1)
    loggers.log({"train/loss": 0.5}, 2)
    loggers.close()
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    assert [(row["step"], row["train/loss"]) for row in rows][-1] == ("2", "0.5")


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

        def __init__(self, *_: Any, **__: Any) -> None:
            self.seen = seen

        @property
        def experiment(self) -> None:
            if self.refuses:
                raise RuntimeError("no login\nmore")

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
