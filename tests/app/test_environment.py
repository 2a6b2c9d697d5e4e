from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_fakes import draw_nothing
from device_fakes import be_brief
from PIL import Image
from study_data import draw_domains, tiny_settings

import edgekd
from edgekd.benchmark.results.storage import read_report
from edgekd.configs.train import TrainConfig
from edgekd.core.console import shell_word
from edgekd.core.errors import EdgekdError
from edgekd.core.tensors import read_tensors
from edgekd.distill.train import train

TINY_SHM = "mount -t tmpfs -o size=1m none /dev/shm"

SETTINGS = {"student": "test_efficientnet", "pretrained": "scratch", "teacher": "toy", "size": 32}

LITTLE = {"LANG": "C", "LC_ALL": "C", "COLUMNS": "20", "NO_COLOR": "1", "HOME": "/nowhere"}


@pytest.fixture
def pets(tmp_path: Path, make_image: Callable[..., Path]) -> Path:
    root = tmp_path / "straße" / "日本"
    for number, name in itertools.product(range(4), ("über", "犬")):
        make_image(root / name / f"ß{number}.png", seed=10 * number + len(name))
    return root


def settings(data: Path, out: Path) -> TrainConfig:
    more = {"steps": 2, "views": 1, "batch_size": 4, "accelerator": "cpu"}
    return TrainConfig.load(**SETTINGS, **more, data=data, out=out)


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which warnings of edgekd are errors."""
    script = f'edgekd() {{ "{sys.executable}" -W error -m edgekd.cli "$@"; }}\nset -eo pipefail\n{script}'
    given = {"capture_output": True, "encoding": "utf-8", "env": os.environ | environment}
    return subprocess.run(["bash", "-c", script], check=False, **given)  # type: ignore[call-overload,no-any-return]


def words(pets: Path, out: Path) -> str:
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    given = ["--steps=2", "--views=1", "--batch-size=4", "--set=accelerator=cpu", f"--out='{out}'"]
    return " ".join(["edgekd", "train", f"--data='{pets}'", *options, *given])


@pytest.mark.slow
def test_a_run_needs_little_and_takes_any_name(pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "straße" / "lauf ü"
    commands = f"ulimit -n 64\n{words(pets, out)} >&-"
    small = subprocess.run(["unshare", "-m", "bash", "-c", TINY_SHM], capture_output=True)
    if small.returncode == 0:
        commands = f"{TINY_SHM}\n{commands}"
        commands = f"export -f edgekd\nunshare -m bash -e <<'THERE'\n{commands}\nTHERE"
    done = run(f"{commands}\nedgekd export '{out}' | head -1", **LITTLE)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "Warning" not in done.stderr
    assert (out / "run.json").is_file()
    # Names that this Python cannot read are one sentence.
    strict = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(words(pets, tmp_path / "out"), **strict)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "PYTHONUTF8=1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_images_without_anything_in_them_train(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name, height in (("cat", 32), ("dog", 33)):
        (root / name).mkdir(parents=True)
        for side in range(32, 36):
            Image.new("RGB", (side, height)).save(root / name / f"{side}.png")
    out = tmp_path / "out"
    train(settings(root, out))
    tensors, _ = read_tensors(out / "student.safetensors", "student")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("name", ["--x", "a b", "-", "$(id)"])
def test_a_name_of_a_run_is_one_word_and_no_option(name: str) -> None:
    [word] = shlex.split(shell_word(Path(name)))
    assert Path(word) == Path(name)
    assert not word.startswith("-")


ANOTHER = """
import os, sys
import numpy as np
from PIL import Image
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images
from edgekd.distill.inputs.cache import EmbeddingCache
Image.init()
os.umask(int(sys.argv[3], 8))
os.setuid(int(sys.argv[2]))  # this Python may lie where the other user may not look
print(len(load_images(sys.argv[1])))
try:
    EmbeddingCache("t", "p", 4).add(["1" * 32], [0], np.ones((1, 4), dtype=np.float32))
except EdgekdError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_two_users_on_one_cache(make_domain_folder: Callable[..., Path]) -> None:
    """What the first one may keep to herself (umask 077) is no traceback for the second."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        shared = Path(place)
        shared.chmod(0o777)
        data = make_domain_folder(shared / "data", count=2)
        environment = os.environ | {"EDGEKD_CACHE": str(shared / "cache"), "HOME": "/nowhere"}
        said = []
        for user, umask in (("0", "077"), ("65534", "022")):
            done = subprocess.run(
                [sys.executable, "-c", ANOTHER, str(data), user, umask],
                capture_output=True, text=True, check=False, env=environment,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said.append(done.stdout.splitlines())
    assert said[0] == said[1][:1]
    assert "cache" in said[1][1]


@pytest.mark.slow
def test_a_trained_run_is_measured_by_the_agent(
    tmp_path: Path, tiny_teacher: Path, make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The whole way once: train, export, and measure, briefly, through the device agent on this machine."""
    be_brief(monkeypatch)
    draw_nothing(monkeypatch)
    data = draw_domains(tmp_path / "data", count=12)
    settings: dict[str, Any] = tiny_settings(data, tiny_teacher) | {"test_domain": "sketch"}
    edgekd.train(**settings, recipe="vl2v-adip", out=tmp_path / "run")
    edgekd.export(tmp_path / "run")
    words = tmp_path / "words.txt"
    words.write_text("a drawing of a {}\nhorse\n")
    for number in range(3):
        make_image(tmp_path / "others" / "noise" / f"{number}.png", seed=number, size=(32, 32))
    strangers = [f"noise={tmp_path / 'others'}"]
    report = edgekd.benchmark(
        tmp_path / "run", quick=True, device=["local"], vocabulary=[f"new={words}"], unknown=strangers,
        out=tmp_path / "report",
    )  # fmt: skip
    assert read_report(tmp_path / "report") == report
    [artifact] = [row for row in report.latency if "@" in row.subject]
    assert artifact.subject.startswith("onnxruntime-fp32@")
    assert artifact.complete
    assert artifact.peak_rss_mb is not None
    [placement] = report.placements
    assert list(placement.nodes or ()) == ["CPUExecutionProvider"]
    facts = report.environment["devices"][0]["artifacts"][f"{artifact.run}/{artifact.subject}"]
    assert facts == {"agreement_here": 1.0, "same_pixels": 1.0}
    told = {row.subject: row for row in report.unknowns}
    assert set(told) == {"teacher", "torch", artifact.subject}
    assert (told[artifact.subject].n, told[artifact.subject].device) == (3, artifact.device)
    with pytest.raises(EdgekdError, match="no in-domain test images to compare unknown ones with"):
        edgekd.benchmark(tmp_path / "run", data=str(data / "photo"), unknown=strangers)
    top1 = {row.subject: row.top1 for row in report.vocabularies if row.suite == "vocab:new"}
    assert (top1["torch"] is None, top1[artifact.subject]) == (False, None)
