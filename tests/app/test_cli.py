from __future__ import annotations

import importlib.metadata
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from edgekd.cli import app, doctor, main
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError, GateFailed, Stopped
from edgekd.core.version import __version__
from edgekd.studies.store import Cell
from edgekd.studies.study import Failure, Study

HELP_RATIO = 2.5


def commands(
    command: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it, groups included."""
    command = get_command(app) if command is None else command
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands())


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


SCREEN = 40
"""Lines of a terminal that one group of options may take, at 100 columns."""


def user_seconds(*arguments: str) -> float:
    """User CPU time of a Python process; user time and not wall time, so that a busy machine does not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_help_is_quick() -> None:
    """`edgekd --help` beside importing typer and rich alone, the best of five that take turns."""
    pairs = [
        (user_seconds("-m", "edgekd.cli", "--help"), user_seconds("-c", "import typer, rich"))
        for _ in range(5)
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


@pytest.mark.parametrize("group", [(), ("list",), ("classes",), ("data",), ("vl",)], ids=" ".join)
def test_the_list_of_commands_cuts_no_sentence(
    group: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*group, "--help"])
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "Usage: " in shown
    assert all(group.count("\n") <= SCREEN for group in shown.split("╭─"))
    assert COMMANDS[words].help
    assert all(getattr(parameter, "help", None) for parameter in COMMANDS[words].params)


@pytest.mark.parametrize(
    ("words", "wrong", "suggestion"),
    [
        ("train --student mobilnetv3", "mobilnetv3", "mobilenetv3"),
        ("train --recipe vl2v-adpi", "vl2v-adpi", "vl2v-adip"),
        ("train --teacher ViT-B-32:openia", "openia", "openai"),
        ("train --test-domain skech", "skech", "sketch"),
        ("train --prompts imagnet7", "imagnet7", "imagenet7"),
        ("train --set batchsize=8", "batchsize", "batch_size"),
        ("train --recipe vl2v-adip --set stages.distil.share=1", "distil", "distill"),
        ("export --target onnxruntim", "onnxruntim", "onnxruntime"),
        ("list students mobilenetv3_larg_100", "mobilenetv3_larg_100", "mobilenetv3_large_100"),
        ("list teachers ViT-B-32:opnai", "ViT-B-32:opnai", "ViT-B-32:openai"),
    ],
)
def test_typos_get_a_suggestion(
    fails: Callable[..., tuple[str, str]], words: str, wrong: str, suggestion: str
) -> None:
    extra = ["--smoke", "--out", "run"] if words.startswith("train") else []
    error, hint = fails(2, *words.split(), *extra)
    assert wrong in error
    assert f'Did you mean "{suggestion}"?' in f"{error} {hint}"
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
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
    ],
)
def test_mistakes_are_one_sentence_and_a_hint(
    fails: Callable[..., tuple[str, str]], tmp_path: Path, words: str, said: tuple[str, ...]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "torn.toml").write_text("student =")
    told = " ".join(fails(2, *words.split()))
    assert all(part in told for part in said)
    assert not Path("run").exists()


def test_all_problems_of_a_configuration_in_one_message(
    fails: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text('[train]\nbn = "forzen"\nsead = 1\n')
    error, _ = fails(2, "train", "--config", "run.toml", "--batch-size", "0")
    for part in ("bn", "sead", "batch_size"):
        assert part in error


def _raises(error: BaseException) -> Callable[..., Any]:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def test_failed_gate_is_exit_code_1(
    fails: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.export.run.export_run", _raises(GateFailed("It differs.", "Look.")))
    assert fails(1, "export") == ("It differs.", "Look.")


def test_a_failed_cell_of_a_study_is_an_error(
    fails: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = Failure(Cell("erm", 0, "art"), "No luck.")
    monkeypatch.setattr("edgekd.studies.plan.make_plan", lambda _: None)
    monkeypatch.setattr(
        "edgekd.studies.study.run_study", lambda *_, **__: Study(tmp_path, (), (failed,))
    )
    message, _ = fails(2, "study", "--recipes", "erm")
    assert failed.cell.key in message
    assert "No luck." in message


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped.\nhint:  A training run goes on with --resume"),
        (Stopped(signal.SIGTERM, "It ended.", "Go on."), 143, "It ended.\nhint:  Go on.\n"),
    ],
)
def test_a_signal_has_the_exit_code_of_the_shell(
    stop: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("edgekd.distill.train.train", _raises(stop))
    with pytest.raises(SystemExit) as leaving:
        main(["train"])
    assert leaving.value.code == code
    assert capsys.readouterr().err.startswith(said)


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


def test_idle_threads_sleep_soon_unless_the_user_has_said_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgekd.distill.train.train", _raises(EdgekdError("It is so.")))
    for given, count in (
        ({}, "1000"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("GOMP_SPINCOUNT", "unset")
            patch.delenv("GOMP_SPINCOUNT")
            patch.delenv("OMP_WAIT_POLICY", raising=False)
            for name, value in given.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit):
                main(["train"])
            assert os.environ.get("GOMP_SPINCOUNT") == count


def test_programming_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.evaluation.evaluate.zero_shot_rows", _raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
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
    with pytest.raises(SystemExit):
        main(["train", *words, "--config", str(tmp_path / "x.toml")])
    [config] = seen
    assert config.model_dump(exclude_unset=True) == {
        "steps": 3, "smoke": True, "ema": 0, "lr": 0.5, "swad": {"ratio": 1}
    }  # fmt: skip


@pytest.mark.parametrize(
    "words", ["train --data", "train --out", "train --teacher", "export", "verify", "report"]
)
def test_a_path_that_the_system_refuses_is_one_sentence(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = str(tmp_path / ("a" * 300))
    with pytest.raises(SystemExit) as leaving:
        main([*words.split(), f"local-dir:{long}" if "--teacher" in words else long])
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "hint:" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--unlabelled", ""),
        ("train", "--unlabelled="),
        ("train", "--out", ""),
        ("export", ""),
    ],
)
def test_an_empty_word_is_not_the_current_folder(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*words])
    assert leaving.value.code == 2
    assert "is empty" in capsys.readouterr().err


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    monkeypatch.setattr("edgekd.core.hub.hub_reachable", lambda: False)
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    return {line[:18].strip(): line[18:] for line in doctor.examine()}


def test_doctor_lists_what_is_installed(facts: dict[str, str], tmp_path: Path) -> None:
    assert facts["edgekd"].startswith(f"{__version__}, Python 3.")
    for package in ("torch", "timm", "open_clip_torch", "onnxruntime"):
        assert facts[package] == importlib.metadata.version(package)
    assert f"of {os.cpu_count()} cores" in facts["processor"]
    assert "CPUExecutionProvider" in facts["providers"]
    assert facts["cache"] == str(tmp_path / "cache")
    assert facts["hub"].startswith("not reachable")
    names = doctor.student_lines("tf_efficientnet_lite*")
    assert "tf_efficientnet_lite0" in names
    assert all(name.startswith("tf_efficientnet_lite") for name in names)
    assert "ViT-B-32:laion2b_s34b_b79k" in doctor.teacher_lines("ViT-B-32:*")
    with pytest.raises(EdgekdError, match="No teacher matches"):
        doctor.teacher_lines("ViT-Z-99:*")


def test_recipes_name_their_terms() -> None:
    from edgekd.distill.recipes import RECIPES

    text = "\n".join(doctor.recipe_lines())
    for recipe in RECIPES.values():
        assert recipe.summary in text
        for stage in recipe.stages:
            for term, spec in stage.terms.items():
                assert f"{spec.weight:g}·{term}" in text
    assert text.count("(default)") == 1
