from __future__ import annotations

import importlib.metadata
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from edgekd.cli import app, doctor, main
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError, GateFailed, Stopped
from edgekd.distill.recipes import RECIPES
from edgekd.studies.store import Cell
from edgekd.studies.study import Failure, Study

HELP_RATIO = 2.5


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """`fails(code, "train", …)` runs the command in an empty folder and returns its error and its hint.

    The exception may only be SystemExit: anything else would be a traceback.
    """
    monkeypatch.chdir(tmp_path)

    def run(code: int, *arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        assert leaving.value.code == code
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        lines = stderr.splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        hints = [line.removeprefix("hint:  ") for line in lines if line.startswith("hint:  ")]
        assert len(errors) == len(hints) == 1, stderr
        assert errors[0].endswith(".")
        return errors[0], hints[0]

    return run


TRAIN, LONG = "train --smoke --out run", "a" * 300


def user_seconds(*arguments: str) -> float:
    """User CPU time of a Python process; user time and not wall time, so that a busy machine does not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_help_is_quick() -> None:
    """`edgekd --help` beside importing typer and rich alone, the best of three that take turns."""
    pairs = [
        (user_seconds("-m", "edgekd.cli", "--help"), user_seconds("-c", "import typer, rich"))
        for _ in range(3)
    ]
    own, bare = (min(times) for times in zip(*pairs, strict=True))
    assert own < HELP_RATIO * bare


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom edgekd.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit as leaving:\n"
        "    assert leaving.code == 0\n"
        "heavy = {'torch', 'timm', 'open_clip', 'numpy', 'onnx', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--student" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{TRAIN} --student mobilnetv3", ("mobilnetv3", 'Did you mean "mobilenetv3"?')),
        (f"{TRAIN} --recipe vl2v-adpi", ("vl2v-adpi", 'Did you mean "vl2v-adip"?')),
        (f"{TRAIN} --teacher ViT-B-32:openia", ("openia", 'Did you mean "openai"?')),
        (f"{TRAIN} --test-domain skech", ("skech", 'Did you mean "sketch"?')),
        (f"{TRAIN} --prompts imagnet7", ("imagnet7", 'Did you mean "imagenet7"?')),
        (f"{TRAIN} --set batchsize=8", ("batchsize", 'Did you mean "batch_size"?')),
        (f"{TRAIN} --recipe vl2v-adip --set stages.distil.share=1", ("distil", 'Did you mean "distill"?')),
        ("export --target onnxruntim", ("onnxruntim", 'Did you mean "onnxruntime"?')),
        ("list students mobilenetv3_larg_100", ('Did you mean "mobilenetv3_large_100"?',)),
        ("list teachers ViT-B-32:opnai", ('Did you mean "ViT-B-32:openai"?',)),
        (f"train --data {LONG}", ()),
        (f"train --out {LONG}", ()),
        (f"train --teacher local-dir:{LONG}", ()),
        (f"export {LONG}", ()),
        (f"verify {LONG}", ()),
        (f"report {LONG}", ()),
        ("train --data nowhere --teacher toy --out run", ("nowhere", "--data toy")),
        ("train --smoke --out mine", ("mine exists already and is not a run", "empty folder")),
        ("export runs/nothing", ("runs/nothing", "edgekd train")),
        ("benchmark runs/nothing", ("runs/nothing", "edgekd train")),
        ("export --int8 --fp16", ("More than one precision", "--int8", "--fp16")),
        ("train --config absent.toml", ("no configuration file",)),
        ("train --config torn.toml", ("not readable TOML",)),
        ("train --batch-size 1000000000 --out run", ("batch_size", "65536")),
        ("benchmark runs/nothing --batch-sizes 1,1000000000", ("1000000000", "65,536")),
        ("benchmark runs/nothing --thread-counts 100000", ("100000", "1,024")),
        ("predict runs/nothing a.png --threads 100000", ("threads", "1024")),
        ("export runs/nothing --target auto --budget ,", ('","',)),
        ("train --unlabelled=", ("is empty",)),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_a_hint(
    fails: Callable[..., tuple[str, str]], tmp_path: Path, words: str, said: tuple[str, ...]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "torn.toml").write_text("student =")
    told = " ".join(fails(2, *words.split()))
    assert all(part in told for part in said)
    assert not Path("run").exists()


def _raises(error: BaseException) -> Callable[..., Any]:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def test_what_fails_has_its_exit_code(
    fails: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:  # fmt: skip
    monkeypatch.setattr("edgekd.export.run.export_run", _raises(GateFailed("It differs.", "Look.")))
    assert fails(1, "export") == ("It differs.", "Look.")
    failed = Failure(Cell("erm", 0, "art"), "No luck.")
    study = Study(tmp_path, (), (failed,))
    monkeypatch.setattr("edgekd.studies.plan.make_plan", lambda _: None)
    monkeypatch.setattr("edgekd.studies.study.run_study", lambda *_, **__: study)
    message, _ = fails(2, "study", "--recipes", "erm")
    assert failed.cell.key in message
    assert "No luck." in message
    for stop, code, told in (
        (KeyboardInterrupt(), 130, "Stopped."),
        (Stopped(signal.SIGTERM, "It ended.", "Go on."), 143, "It ended.\nhint:  Go on.\n"),
    ):
        monkeypatch.setattr("edgekd.distill.train.train", _raises(stop))
        with pytest.raises(SystemExit) as leaving:
            main(["train"])
        assert leaving.value.code == code
        assert capsys.readouterr().err.startswith(told)
    monkeypatch.setattr("edgekd.evaluation.evaluate.zero_shot_rows", _raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a programming error keeps its traceback
        main(["evaluate"])


def test_train_hands_over_what_was_given_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[TrainConfig] = []

    def train(config: TrainConfig) -> Any:
        seen.append(config)
        raise typer.Exit

    monkeypatch.setattr("edgekd.distill.train.train", train)
    (tmp_path / "x.toml").write_text("lr = 0.5\nsteps = 9\n")
    words = ["--steps", "3", "--smoke", "--set", "ema=0", "--set", "swad.ratio=1"]
    # Idle threads sleep soon, unless the user has decided otherwise.
    monkeypatch.setenv("GOMP_SPINCOUNT", "unset")  # so that it is put back
    for given, count in (
        ({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7"),
    ):  # fmt: skip
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            main(["train", *words, "--config", str(tmp_path / "x.toml")])
        assert os.environ.get("GOMP_SPINCOUNT") == count
    wanted = {"steps": 3, "smoke": True, "ema": 0, "lr": 0.5, "swad": {"ratio": 1}}
    assert [config.model_dump(exclude_unset=True) for config in seen] == [wanted] * 3


def test_sigterm_unwinds_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    unwound = []

    def export(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            unwound.append(True)

    monkeypatch.setattr("edgekd.export.run.export_run", export)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as leaving:
            main(["export"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert leaving.value.code == 143
    assert unwound == [True]


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    def check(command: Any, words: list[str]) -> None:
        with pytest.raises(SystemExit) as leaving:
            main([*words, "--help"])
        assert leaving.value.code == 0
        assert "Usage: " in capsys.readouterr().out
        assert command.help
        assert all(getattr(parameter, "help", None) for parameter in command.params), words
        for name, inner in getattr(command, "commands", {}).items():
            check(inner, [*words, name])

    check(get_command(app), [])


def test_doctor_lists_what_is_installed(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: False)
    facts = {line[:18].strip(): line[18:] for line in doctor.examine()}
    for package in ("torch", "timm", "open_clip_torch", "onnxruntime"):
        assert facts[package] == importlib.metadata.version(package)
    assert "CPUExecutionProvider" in facts["providers"]
    assert facts["cache"] == str(own_cache)
    assert facts["hub"].startswith("not reachable")
    names = doctor.student_lines("tf_efficientnet_lite*")
    assert "tf_efficientnet_lite0" in names
    assert all(name.startswith("tf_efficientnet_lite") for name in names)
    assert "ViT-B-32:laion2b_s34b_b79k" in doctor.teacher_lines("ViT-B-32:*")
    with pytest.raises(EdgekdError, match="No teacher matches"):
        doctor.teacher_lines("ViT-Z-99:*")
    recipes = "\n".join(doctor.recipe_lines())
    assert all(recipe.summary in recipes for recipe in RECIPES.values())
