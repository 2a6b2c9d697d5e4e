"""Descriptions that a command gives are asked for once in a study: a language model answers otherwise every time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgekd.configs.train import TrainConfig
from edgekd.core.files import short_hash, write_json
from edgekd.distill.text_bank import descriptions_for, read_vocabulary, stored_descriptions
from edgekd.studies.plan import Plan


def from_file(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings with the file of the study in `folder` in place of a command."""
    spec = config.descriptions
    if spec is None or not spec.startswith("command:"):
        return config
    return config.model_copy(update={"descriptions": str(_answers(folder, spec))})


def ask_once(plan: Plan, folder: Path) -> Plan:
    """Ask every command about all classes, seen and unseen, and vocabularies; what is written down is not asked again.

    A file is read to see that it holds them all, before the first cell trains.

    Returns:
        The plan whose runs, unseen classes and teacher's row read these answers.

    Raises:
        EdgekdError: a command that fails, a file that lacks a class.
    """
    wanted: dict[str, list[str]] = {}
    for config in plan.configs.values():
        if config.descriptions is not None:
            more = read_vocabulary(config.vocabulary) if config.vocabulary else ()
            wanted.setdefault(config.descriptions, list(plan.images.classes)).extend(more)
    for spec, names in wanted.items():
        if not spec.startswith("command:"):
            descriptions_for(spec, names)
            continue
        path = _answers(folder, spec)
        kept = stored_descriptions(path, spec, tuple(dict.fromkeys(names)), may_run=True)
        write_json(path, {name: list(sentences) for name, sentences in kept.items()})
    return dataclasses.replace(
        plan, configs={name: from_file(config, folder) for name, config in plan.configs.items()}
    )


def _answers(folder: Path, spec: str) -> Path:
    return folder.absolute() / f"descriptions-{short_hash(spec)[:8]}.json"
