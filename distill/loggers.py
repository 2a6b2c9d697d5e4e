"""Loggers of a run besides `metrics.jsonl`: Lightning's loggers by name. W&B and MLflow also receive files."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.configs.train import LOGGERS
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, first_line, optional
from edgekd.core.files import write_json
from edgekd.core.readers import read_object, read_text

_CLASSES = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}
"""Loggers that need PyTorch Lightning and the package of the service."""
_IDS = "loggers.json"
"""File in the run folder: service → its run ID, for resumed runs and later files, and the inode number of the folder,
which detects copies."""


class Loggers:
    """Several loggers as one; local files go to `out`, the run's folder.

    `resume_at` are steps done before; what TensorBoard has of later ones is hidden. A missing package, and a service
    that refuses, are an `EdgekdError`.
    """

    def __init__(self, names: Sequence[str], out: Path, resume_at: int = 0) -> None:
        known = _ids(out, warns=False) if resume_at else {}
        self._loggers = {name: _logger(name, out, resume_at, known.get(name)) for name in names}
        ids = {
            name: logger.experiment.id if name == "wandb" else logger.run_id
            for name, logger in self._loggers.items()
            if name in _CLASSES
        }
        for name in ids.keys() - known.keys():
            if (settings := out / "config.json").is_file():
                self._loggers[name].log_hyperparams(read_object(settings, "settings of the run"))
        if ids and ids != known:
            write_json(out / _IDS, ids | {"folder": out.stat().st_ino})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of one step by name, such as `train/loss`."""
        self._each(lambda _, logger: logger.log_metrics(dict(values), step))

    def attach(self, title: str, kind: str, paths: Sequence[Path]) -> None:
        """Attach files and folders to the run: a W&B artifact of type `kind`, or the folder `kind` in MLflow."""
        self._each(lambda name, logger: _attach(name, logger, title, kind, paths))

    def close(self) -> None:
        """Flush and close all loggers."""
        self._each(lambda _, logger: logger.finalize("success"))

    def _each(self, call: Callable[[str, Any], object]) -> None:
        """Call every logger. A logger that fails is dropped, so that training continues without it."""
        for name, logger in list(self._loggers.items()):
            try:
                call(name, logger)
            except Exception as error:  # services raise their own errors
                del self._loggers[name]
                warn(
                    f"the logger {name} failed and is not used from here on ({first_line(error)})."
                )


def attach_to_run(run: Path, title: str, kind: str, paths: Sequence[Path]) -> None:
    """Attach files to the W&B and MLflow runs of a finished training, if any; warn on failure."""
    try:
        if ids := _ids(run):
            loggers = Loggers(tuple(ids), run, resume_at=1)
            loggers.attach(title, kind, paths)
            loggers.close()
    except EdgekdError as error:
        warn(f"{title} could not be attached to the run's loggers: {error.message}")


def own_loggers(names: Sequence[str], run: Path) -> tuple[str, ...]:
    """Return the loggers that a resumed run continues: only services that this folder has used before."""
    known = _ids(run, warns=False)
    foreign = [name for name in names if name in _CLASSES and name not in known]
    if foreign:
        warn(f"{run} is resumed without {', '.join(foreign)}, which this folder has not used yet.")
    return tuple(name for name in names if name not in foreign)


def _ids(run: Path, *, warns: bool = True) -> dict[str, str]:
    """Return service → run ID; empty for a copied run, whose services may belong to somebody else."""
    path = run / _IDS
    found = read_object(path, "identities of a run") if path.is_file() else {}
    ids = {name: str(value) for name, value in found.items() if name in _CLASSES}
    if ids and found.get("folder") != run.stat().st_ino:
        if warns:
            warn(f"{run} is a copy, so nothing is sent to {', '.join(ids)}.")
        return {}
    return ids


def _attach(service: str, logger: Any, title: str, kind: str, paths: Sequence[Path]) -> None:
    if service == "wandb":
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", title), type=kind)
        for path in paths:
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), name=path.name)
        logger.experiment.log_artifact(artifact)
    elif service == "mlflow":
        for path in paths:
            if path.is_dir():
                logger.experiment.log_artifacts(logger.run_id, str(path), f"{kind}/{path.name}")
            else:
                logger.experiment.log_artifact(logger.run_id, str(path), kind)


def check_loggers(names: Sequence[str]) -> None:
    """Raise an `EdgekdError` that names the extra if the packages of one of these loggers are missing."""
    for name in names:
        if name in _CLASSES:
            _class(name)


def _logger(name: str, out: Path, resume_at: int, known: str | None) -> Any:
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    assert name in LOGGERS
    if name == "tensorboard":
        return TensorBoardLogger(out, "tensorboard", version="", purge_step=resume_at + 1)
    if name == "csv":
        path = out / "csv" / "metrics.csv"
        rows = _logged(path) if resume_at else []
        path.unlink(missing_ok=True)  # Lightning starts a new file
        table = CSVLogger(out, "csv", version="", flush_logs_every_n_steps=1)
        for step, values in rows:
            if step <= resume_at:
                table.log_metrics(values, step)
        return table
    kind = _class(name)
    logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if name == "wandb":
            logger = kind(name=out.name, project="edgekd", save_dir=str(out), id=known)
        else:
            here = out.absolute()
            place = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")}
            if not place["tracking_uri"]:
                files = (here / "mlruns").as_uri()
                place = {"tracking_uri": f"sqlite:///{here}/mlflow.db", "artifact_location": files}
            logger = kind("edgekd", run_name=out.name, run_id=known, **place)
        _ = logger.experiment  # connects
    except Exception as error:  # services raise their own errors
        raise EdgekdError(
            f"The logger {name} cannot start ({first_line(error)}).",
            "Check its address and login, or log offline: WANDB_MODE=offline, MLFLOW_TRACKING_URI=sqlite:///FILE.db.",
        ) from error
    return logger


def _logged(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the steps and values of an earlier metrics.csv; empty if it is damaged or missing."""
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(read_text(path, "log of the run").splitlines()))
        steps = [int(row.pop("step")) for row in rows]
        values: list[dict[str, Any]] = [
            {name: float(text) for name, text in row.items() if text} for row in rows
        ]
    except (EdgekdError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        warn(f"{path} is damaged and is started again.")
        return []
    return list(zip(steps, values, strict=True))


def _class(name: str) -> Any:
    optional(name, name, f"The logger {name}")
    loggers = optional("pytorch_lightning.loggers", name, f"The logger {name}")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return getattr(loggers, _CLASSES[name])
