"""Odd environments: little of everything, names that are not ASCII, a clock that goes back."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.configs.train import TrainConfig
from edgekd.distill.train import train

TINY_SHM = "mount -t tmpfs -o size=1m none /dev/shm"
SETTINGS = {"student": "test_efficientnet", "pretrained": "scratch", "teacher": "toy", "size": 32}
ENVIRONMENTS = {
    "names": {"LANG": "C", "LC_ALL": "C"},
    "little": {"COLUMNS": "20", "NO_COLOR": "1", "HOME": "/nowhere"},
}


@pytest.fixture
def pets(tmp_path: Path, make_image: Callable[..., Path]) -> Path:
    root = tmp_path / "straße" / "日本"
    for number, name in itertools.product(range(4), ("über", "犬")):
        make_image(root / name / f"ß{number}.png", seed=10 * number + len(name))
    return root


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f'edgekd() {{ "{sys.executable}" -m edgekd.cli "$@"; }}\nset -eo pipefail\n{script}'
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=os.environ | environment,
    )


def words(pets: Path, out: Path) -> str:
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    given = ["--steps=2", "--views=1", "--batch-size=4", "--set=accelerator=cpu", f"--out='{out}'"]
    return " ".join(["edgekd", "train", f"--data='{pets}'", *options, *given])


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_a_run_needs_little_and_takes_any_name(pets: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "straße" / "lauf ü"
    commands = f"{words(pets, out)} >&-"
    if kind == "names":
        commands += f"\nedgekd export '{out}' | head -1"
    else:
        commands = f"ulimit -n 64\n{commands}"
        if (
            subprocess.run(
                ["unshare", "-m", "bash", "-c", TINY_SHM], capture_output=True
            ).returncode
            == 0
        ):
            commands = f"{TINY_SHM}\n{commands}"
            commands = f"export -f edgekd\nunshare -m bash -e <<'THERE'\n{commands}\nTHERE"
    done = run(commands, **ENVIRONMENTS[kind])
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (out / "run.json").is_file()


def test_names_that_this_python_cannot_read_are_one_sentence(pets: Path, tmp_path: Path) -> None:
    strict = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(words(pets, tmp_path / "out"), **strict)
    assert done.returncode == 2
    assert "PYTHONUTF8=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_clock_that_goes_back_changes_nothing(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> bytes:
        out = tmp_path / name
        train(
            TrainConfig(
                **SETTINGS, data=pets, steps=2, views=1, batch_size=4, out=out, accelerator="cpu"
            )
        )
        return (out / "student.safetensors").read_bytes()

    before = trained("before")
    ticks = itertools.count(time.time(), -86_400.0)
    monkeypatch.setattr(time, "time", lambda: next(ticks))
    assert trained("back") == before
    assert np.isfinite(next(ticks))
