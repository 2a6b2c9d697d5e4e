"""The library's front door: the verbs exist, may be called, and say the same words as the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import edgekd
from edgekd import api
from edgekd.cli import app
from edgekd.configs.base import Config
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.configs.export import AddClassConfig, ExportConfig
from edgekd.configs.study import StudyConfig
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError

VERBS = ("train", "export", "benchmark", "evaluate", "study", "verify")


def flags(verb: str) -> dict[str, Any]:
    command: Any = get_command(app)
    return {parameter.name: parameter for parameter in command.commands[verb].params}


@pytest.mark.parametrize("verb", VERBS)
def test_verb_calls_the_function_of_its_name(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(
        api, verb, lambda *args, **options: calls.append((args, options)) or "result"
    )
    assert getattr(edgekd, verb)("runs/x", data="toy") == "result"
    assert calls == [(("runs/x",), {"data": "toy"})]


def test_verbs_stay_callable_whatever_was_imported_first() -> None:
    program = (
        "import edgekd.export.parity, edgekd.benchmark.evaluate.metrics\n"
        "from edgekd import benchmark, evaluate, export, train\n"
        "assert all(map(callable, (benchmark, evaluate, export, train)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_edgekd_is_light() -> None:
    program = (
        "import sys, edgekd, edgekd.benchmark, edgekd.export\n"
        "assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_dir_shows_the_verbs_and_nothing_else() -> None:
    program = "import edgekd, edgekd.export.parity, edgekd.api\nprint(*dir(edgekd))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    shown = set(done.stdout.split())
    assert shown == set(edgekd.__all__)
    assert {"train", "export", "benchmark", "load"} <= shown
    assert not shown & {"api", "core", "distill", "targets"}


@pytest.mark.parametrize(
    ("verb", "model", "first"),
    [
        ("train", TrainConfig, ["student"]),
        ("export", ExportConfig, ["run"]),
        ("benchmark", BenchmarkConfig, ["paths"]),
        ("study", StudyConfig, ["recipes", "student"]),
        ("add_class", AddClassConfig, ["artifact", "name"]),
    ],
)
def test_a_verb_shows_the_fields_of_its_configuration(
    verb: str, model: type[Config], first: list[str]
) -> None:
    parameters = inspect.signature(getattr(edgekd, verb)).parameters
    assert set(parameters) == set(model.model_fields)
    by_position = [
        name
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert by_position == first
    for name, parameter in parameters.items():
        field = model.model_fields[name]
        if not field.is_required() and name != "paths":
            assert parameter.default == field.get_default(call_default_factory=True)


def test_every_plain_option_of_a_verb_has_a_flag() -> None:
    fields = set(TrainConfig.model_fields)
    assert fields - set(flags("train")) == {"stages", "swad", "student_options"}  # tables
    assert set(flags("train")) <= fields


def test_help_states_the_real_defaults() -> None:
    for name, flag in flags("train").items():
        default = TrainConfig.model_fields[name].default
        assert flag.default is None, f"--{name} must not hide what --config says"
        if default is not None and not isinstance(default, bool | tuple):
            assert f"[default: {default}" in flag.help.replace("\\[", "["), name


def test_unknown_setting_is_an_error_and_not_a_type_error() -> None:
    with pytest.raises(EdgekdError, match=r'unknown setting "epoch".*Did you mean "epochs"'):
        edgekd.train("mobilenetv3", epoch=3)  # type: ignore[call-arg]


def test_paths_are_given_one_by_one_or_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, ...]] = []

    def compare(paths: list[Path], *_: Any, **__: Any) -> Path:
        seen.append(tuple(paths))
        return Path("page")

    monkeypatch.setattr("edgekd.benchmark.report.comparison.write_comparison", compare)
    edgekd.report("a", "b", Path("c"))
    edgekd.report(["a", "b"])
    edgekd.report("a", "b", ["c", "d"])
    edgekd.report(paths=["a"])
    assert [[str(path) for path in paths] for paths in seen] == [
        ["a", "b", "c"], ["a", "b"], ["a", "b", "c", "d"], ["a"]
    ]  # fmt: skip
    with pytest.raises(TypeError, match="positional"):
        edgekd.export("a", "b")  # type: ignore[call-arg]


def test_export_refuses_before_it_loads(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="onnxruntime takes no int8-weights"):
        edgekd.export(tmp_path, precision="int8-weights")
    with pytest.raises(EdgekdError, match=r"2 problems.*no calibrator.*largest drop") as caught:
        edgekd.export(tmp_path, max_drop_id=1, calibrator="mse", target="openvino")
    assert caught.value.exit_code == 2
