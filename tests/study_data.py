"""Images and settings for runs and studies that take about a second, what they wrote, and cells made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgekd.distill.progress import Progress
from edgekd.studies.store import Cell, Done, Outcome


def draw_domains(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    """`domain/class/00.png` in three domains, a tint per class."""
    for d, domain in enumerate(("art", "photo", "sketch")):
        for c, name in enumerate(classes):
            (root / domain / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng(10_000 * d + 100 * c + number)
                pixels = rng.integers(0, 160, (32, 40, 3)).astype(np.uint8)
                pixels[..., c % 3] += 40 + 20 * (c // 3)
                Image.fromarray(pixels).save(root / domain / name / f"{number:02d}.png")
    return root


def tiny_settings(data: Path, teacher: Path) -> dict[str, Any]:
    """Settings of a run that takes about a second."""
    return {
        "student": "test_efficientnet",
        "pretrained": "scratch",
        "data": str(data),
        "teacher": f"local-dir:{teacher}",
        "size": 32,
        "batch_size": 8,
        "steps": 2,
        "views": 1,
        "accelerator": "cpu",
    }


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs hold the very same student."""
    left, right = (load_file(run / "student.safetensors") for run in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def answers(folder: Path, key: str) -> dict[str, np.ndarray]:
    """What a study keeps of a cell."""
    with np.load(folder / "cells" / f"{key}.npz") as file:
        return dict(file)


def after_step(step: int, patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` once a training has recorded `step` steps."""
    record = Progress.step

    def acting(self: Any, at: int, *rest: Any) -> None:
        record(self, at, *rest)
        if at + 1 == step:
            act()

    patch.setattr(Progress, "step", acting)


def raised(error: type[BaseException]) -> Callable[..., None]:
    def act(*_: Any) -> None:
        raise error

    return act


def done(cell: Cell, seconds: float = 10.0, **answers: str) -> Done:
    """A finished cell; each answer is a string of 1 (right) and 0, the labels 0 in its first half and 1 in its second.

    >>> done(Cell("erm", 0, "art"), ood="1100").outcomes["ood"].accuracy(macro=False)
    50.0
    """
    outcomes = {}
    for name, text in answers.items():
        correct = np.array([sign == "1" for sign in text])
        outcomes[name] = Outcome(correct, (np.arange(len(text)) >= len(text) / 2).astype(np.int64))
    facts = {"split": "0" * 16, "selection": "last EMA 0.99", "steps": 2, "size": 32}
    facts["seconds"] = seconds
    return Done(cell, outcomes, facts)
