from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_utilities.core.rank_zero import rank_zero_only
from study_data import json_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import edgekd
from edgekd.configs.train import TrainConfig
from edgekd.core.console import is_main_process, set_rank
from edgekd.core.errors import EdgekdError
from edgekd.distill import progress as module
from edgekd.distill.launch import find_launch, make_fabric, step_threads
from edgekd.distill.loggers import Loggers, attach_to_run, own_loggers
from edgekd.distill.progress import Progress, evaluation_steps


def lines(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def record(progress: Progress, step: int, waited_s: float = 0.0) -> None:
    loss = torch.tensor(float(step))
    progress.step(step, "train", loss, {"ce": loss / 2}, 0.1, 8, waited_s)


def shown(out: Path, steps: int, log_every: int, done: int = 0) -> Progress:
    fabric = Fabric(accelerator="cpu", devices=1)
    return Progress(TrainConfig(out=out, log_every=log_every), fabric, steps, done)


def test_every_nth_step_and_the_last_are_written(tmp_path: Path) -> None:
    with shown(tmp_path, 8, 3) as progress:
        for step in range(8):
            record(progress, step)
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 8]
    first = {"stage": "train", "loss": 2.0, "terms": {"ce": 1.0}, "lr": 0.1}
    assert lines(tmp_path)[0].items() >= first.items()


def test_resuming_keeps_what_the_checkpoint_covers(tmp_path: Path) -> None:
    with shown(tmp_path, 6, 1) as progress:
        for step in range(5):
            record(progress, step)
        progress.evaluated(4, 0.5)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 1, "terms": {"ce": 0.1}')
    with shown(tmp_path, 6, 1, done=4) as progress:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4]
        record(progress, 4)
    assert lines(tmp_path)[-1]["step"] == 5


def test_a_pause_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    with shown(tmp_path, 3, 10) as progress:
        for step in range(3):
            clock[0] += 2
            record(progress, step, waited_s=0.5)
            with progress.paused():
                clock[0] += 30
        assert progress.seconds == 6
        assert progress.images_per_second == 16 / 4  # the last two steps
        assert progress.data_wait_percent == 25


@pytest.mark.parametrize(
    ("span", "every", "expected"),
    [
        (range(20), None, (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)),
        (range(100, 125), None, (103, 105, 108, 110, 113, 115, 118, 120, 123, 125)),
        (range(5, 8), None, (6, 7, 8)),  # fewer steps than evaluations
        (range(3, 10), 4, (4, 8, 10)),  # of the run's steps, not the stage's
        (range(3), 50, (3,)),
    ],
)
def test_evaluation_steps(span: range, every: int | None, expected: tuple[int, ...]) -> None:
    assert evaluation_steps(span, every) == expected


@pytest.fixture(autouse=True)
def _main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the rank that Lightning keeps for a process; other tests take further ranks."""
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)


def csv_rows(folder: Path) -> list[tuple[str, str]]:
    rows = csv.DictReader((folder / "csv" / "metrics.csv").open())
    return [(row["step"], row["train/loss"]) for row in rows]


def test_local_loggers_write_every_number(tmp_path: Path) -> None:
    for start in (0, 2):
        loggers = Loggers(("tensorboard", "csv"), tmp_path, start)
        for step in range(start + 1, start + 3):
            loggers.log({"train/loss": float(step)}, step)
        loggers.close()
    # Files of one second may be read in another order, and TensorBoard takes that for a restart.
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    found = sorted((event.step, event.value) for event in events.Scalars("train/loss"))
    assert found == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert csv_rows(tmp_path) == [("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "4.0")]


@pytest.mark.parametrize("text", ["", "step,x\none,2\n", "\0\n", "a,b\n1,2\n"])
def test_a_damaged_table_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(text)
    loggers = Loggers(("csv",), tmp_path, resume_at=1)
    loggers.log({"train/loss": 0.5}, 2)
    loggers.close()
    assert csv_rows(tmp_path)[-1] == ("2", "0.5")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EdgekdError) as caught:
        edgekd.train(logger=name, out=tmp_path / "run")
    assert f"edgekd[{name}]" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_services_get_the_numbers_and_their_failures_do_not_end_a_run(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[tuple[dict[str, float], int]] = []

    class Service:
        """Stands for the logger of Lightning."""

        fails_at: str | None = None
        run_id = "1"
        experiment = SimpleNamespace(id="1")

        def __init__(self, *_: Any, **__: Any) -> None:
            if self.fails_at == "login":
                raise RuntimeError("no login\nmore")

        def finalize(self, status: str) -> None:
            pass

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            if self.fails_at == "metrics":
                raise RuntimeError("the server has gone")
            seen.append((values, step))

    services = ModuleType("pytorch_lightning.loggers")
    setattr(services, kind, Service)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", services)
    loggers = Loggers((name, "csv"), tmp_path)
    loggers.log({"train/loss": 0.5}, 3)
    assert seen == [({"train/loss": 0.5}, 3)]
    Service.fails_at = "metrics"
    for step in (4, 5):
        loggers.log({"train/loss": 0.5}, step)
    loggers.close()
    assert capsys.readouterr().err.count("the server has gone") == 1
    assert len(csv_rows(tmp_path)) == 3
    Service.fails_at = "login"
    with pytest.raises(EdgekdError, match="no login"):
        Loggers((name,), tmp_path)


LEFT_OVER = {
    "rank": {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"},
    "empty": {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": "", "MASTER_PORT": "", "NODE_RANK": ""},
    "slurm": {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "7",
              "SLURM_JOB_NAME": "train", "SLURM_NODEID": "1", "SLURM_NNODES": "2"},
    "mpi": {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "2", "PMI_SIZE": "4"},
    "lsf": {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/none", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "4"},
    "half a torchrun": {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4"},
    "an impossible torchrun": {"TORCHELASTIC_RUN_ID": "none", "RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0",
                               "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"},
    "lightning": {"LT_DEVICES": "4", "LT_STRATEGY": "ddp", "LT_NUM_NODES": "2", "GROUP_RANK": "1"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_process_afterwards() -> object:
    yield
    set_rank(0)


@pytest.mark.parametrize("variables", LEFT_OVER.values(), ids=LEFT_OVER)
def test_variables_left_over(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch = find_launch()
    assert launch is None
    fabric = make_fabric(TrainConfig(accelerator="cpu"), launch)
    fabric.launch()
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (1, 0, True)
    assert is_main_process()
    assert {name: os.environ[name] for name in variables} == variables, "the user's stay"


def test_torchrun_is_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    launch = find_launch()
    assert (launch.rank, launch.world, launch.local_world) == (3, 4, 2)
    assert not is_main_process()
    fabric = make_fabric(TrainConfig(accelerator="cpu"), launch)
    assert (fabric.world_size, fabric.global_rank) == (4, 3)


def test_a_rank_alone_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for name, value in (LEFT_OVER["rank"] | LEFT_OVER["slurm"]).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EdgekdError):
        edgekd.train(smoke=True, out=tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_mlflow_holds_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [one.value for one in history] == [2, 1]
    kept = [one.path for one in client.list_artifacts(found.info.run_id, "model")]
    assert kept == ["model/weights.bin"]
    pages = [one.path for one in client.list_artifacts(found.info.run_id, "report/folder")]
    assert pages == ["report/folder/page.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside the run's folder


def test_wandb_offline_holds_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_attaching_to_a_run_from_elsewhere_or_without_its_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ModuleType("pytorch_lightning.loggers")
    fake.WandbLogger = lambda **_: pytest.fail("uploaded")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", fake)
    (tmp_path / "loggers.json").write_text('{"wandb": "1"}')
    attach_to_run(tmp_path, "benchmark", "report", [])
    assert own_loggers(("csv", "wandb"), tmp_path) == ("csv",)
    ids = {"wandb": "1", "other": "2", "folder": tmp_path.stat().st_ino}
    (tmp_path / "loggers.json").write_text(json.dumps(ids))
    assert own_loggers(("csv", "wandb"), tmp_path) == ("csv", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    capsys.readouterr()
    attach_to_run(tmp_path, "benchmark", "report", [tmp_path / "loggers.json"])
    assert "benchmark" in capsys.readouterr().err
    attach_to_run(tmp_path / "elsewhere", "benchmark", "report", [])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "chosen", "threads"), [(48, None, 1), (224, None, 3), (48, "3", 3)]
)
def test_threads(
    side: int, chosen: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with step_threads(make_fabric(TrainConfig(accelerator="cpu")), 32 * side**2):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
