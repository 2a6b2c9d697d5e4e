"""Where a run's numbers go besides `metrics.jsonl`: Lightning's loggers by name."""

from __future__ import annotations

import csv
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.configs.train import LOGGERS
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.readers import read_text

_CLASSES = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}
"""Loggers that Fabric does not have; PyTorch Lightning and the service's own package bring them."""


class Loggers:
    """Several loggers as one.

    Args:
        out: the run's folder; local files go there.
        resume_at: steps done before; what TensorBoard has of later ones is hidden.

    Raises:
        EdgekdError: a package is missing, or a service refuses.
    """

    def __init__(self, names: Sequence[str], out: Path, resume_at: int = 0) -> None:
        self._loggers = {name: _logger(name, out, resume_at) for name in names}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers of one step under their names, such as `train/loss`."""
        self._each(lambda logger: logger.log_metrics(dict(values), step))

    def close(self) -> None:
        """Write what is pending."""
        self._each(lambda logger: logger.finalize("success"))

    def _each(self, call: Callable[[Any], object]) -> None:
        """Call every logger; one that fails is left out from then on, so that training goes on without it."""
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:  # every service has errors of its own
                del self._loggers[name]
                warn(
                    f"the logger {name} failed and is left out from here on ({first_line(error)})."
                )


def check_loggers(names: Sequence[str]) -> None:
    """Check that the packages of these loggers are installed.

    Raises:
        EdgekdError: one is missing; the hint names its extra.
    """
    for name in names:
        if name in _CLASSES:
            _class(name)


def _logger(name: str, out: Path, resume_at: int) -> Any:
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    assert name in LOGGERS
    if name == "tensorboard":
        return TensorBoardLogger(out, "tensorboard", version="", purge_step=resume_at + 1)
    if name == "csv":
        path = out / "csv" / "metrics.csv"
        rows = _logged(path) if resume_at else []
        path.unlink(missing_ok=True)  # Lightning begins a new file
        table = CSVLogger(out, "csv", version="", flush_logs_every_n_steps=1)
        for step, values in rows:
            if step <= resume_at:
                table.log_metrics(values, step)
        return table
    kind = _class(name)
    logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if name == "wandb":
            logger = kind(name=out.name, project="edgekd", save_dir=str(out))
        else:
            uri = os.environ.get("MLFLOW_TRACKING_URI") or (out / "mlruns").absolute().as_uri()
            logger = kind("edgekd", run_name=out.name, tracking_uri=uri)
        _ = logger.experiment  # connects
    except Exception as error:  # every service has errors of its own
        raise EdgekdError(
            f"The logger {name} cannot start ({first_line(error)}).",
            "Check its address and login, or log offline: WANDB_MODE=offline, MLFLOW_TRACKING_URI=file:DIR.",
        ) from error
    return logger


def _logged(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return steps and numbers of an earlier metrics.csv; none of a file that is damaged or not there."""
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(read_text(path, "log of the run").splitlines()))
        steps = [int(row.pop("step")) for row in rows]
        values: list[dict[str, Any]] = [
            {name: float(text) for name, text in row.items() if text} for row in rows
        ]
    except (EdgekdError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        warn(f"{path} is damaged and begins anew.")
        return []
    return list(zip(steps, values, strict=True))


def _class(name: str) -> Any:
    try:
        importlib.import_module(name)
        return getattr(importlib.import_module("pytorch_lightning.loggers"), _CLASSES[name])
    except ImportError as error:
        raise EdgekdError(
            f"The logger {name} needs packages that are not installed here.",
            f'Install them: pip install "edgekd[{name}]".',
        ) from error
