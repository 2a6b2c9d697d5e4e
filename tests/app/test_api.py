from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import edgekd
from edgekd.cli import app
from edgekd.cli.commands import command
from edgekd.configs.base import Config, Counts, OptionalPath, Words, check, option
from edgekd.configs.export import AddClassConfig, ExportConfig
from edgekd.configs.study import StudyConfig
from edgekd.configs.train import TrainConfig
from edgekd.configs.verbs import verb
from edgekd.core.errors import EdgekdError

IMPORTS = """
import sys, edgekd, edgekd.benchmark, edgekd.export
assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)
import edgekd.export.parity, edgekd.benchmark.evaluate.metrics, edgekd.api
from edgekd import benchmark, evaluate, export, train
assert all(map(callable, (benchmark, evaluate, export, train)))
assert set(dir(edgekd)) == set(edgekd.__all__) >= {'train', 'export', 'benchmark', 'load'}
assert not {'api', 'core', 'distill', 'targets'} & set(dir(edgekd))
"""


def test_what_an_import_of_the_package_gives() -> None:
    words = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_flags_are_the_fields_and_help_states_the_real_defaults() -> None:
    fields = TrainConfig.model_fields
    command: Any = get_command(app)
    flags = {parameter.name: parameter for parameter in command.commands["train"].params}
    assert set(fields) - set(flags) == {"stages", "swad", "student_options"}  # tables
    assert set(inspect.signature(edgekd.train).parameters) == set(fields) >= set(flags)
    for name, flag in flags.items():
        default = fields[name].default
        assert flag.default is None, f"--{name} must not hide what --config says"
        if default is not None and not isinstance(default, bool | tuple):
            assert f"[default: {default}" in flag.help.replace("\\[", "["), name


def test_paths_are_given_one_by_one_or_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(paths: list[Path], *_: Any, **__: Any) -> Path:
        return Path("".join(map(str, paths)))

    monkeypatch.setattr("edgekd.benchmark.report.comparison.write_comparison", compare)
    assert edgekd.report("a", "b", Path("c")) == Path("abc")
    assert edgekd.report("a", "b", ["c", "d"]) == Path("abcd")
    assert edgekd.report(["a", "b"]) == edgekd.report(paths=["a", "b"]) == Path("ab")
    with pytest.raises(TypeError, match="positional"):
        edgekd.export("a", "b")  # type: ignore[call-arg]


def refusal(**given: Any) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        TrainConfig.load(**given)
    assert caught.value.hint
    return caught.value


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_later_sources_win_and_settings_reach_into_tables(tmp_path: Path) -> None:
    text = 'student = "resnet18"\nlr = 0.1\nseed = 3\nbatch_size = 8\n[stages.distill]\nlr = 2.0\n'
    settings = ["seed=5", "data=some/folder", "stages.distill.terms.cos_img.weight=0.7"]
    given = {"lr": 0.2, "seed": 4, "size": None, "settings": settings}
    config = TrainConfig.load(config=toml(tmp_path, text), **given)
    assert (config.student, config.batch_size) == ("resnet18", 8)
    assert (config.lr, config.seed) == (0.2, 5)
    assert config.data == "some/folder"  # a word needs no quotes
    assert config.stages == {"distill": {"lr": 2.0, "terms": {"cos_img": {"weight": 0.7}}}}


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    settings = ["recipie=erm", "precision=float"]
    message = refusal(lr=-1.0, devices=0, steps=1, epochs=1, settings=settings).message
    assert "Both steps and epochs" in message
    assert all(word in message for word in ("lr", "devices", '"recipe"', "precision"))
    # A misspelt setting hides no contradiction, but a wrong one causes none.
    message = refusal(shots=-1, unseen_classes="a,b", test_domain="art", lrr=1).message
    assert all(part in message for part in ("shots", '"lrr"', "Both the domain art and 2 classes"))
    assert "--shots" not in refusal(shots=2, unseen_classes=3).message
    with pytest.raises(EdgekdError, match=r'unknown setting "epoch".*Did you mean "epochs"'):
        edgekd.train("mobilenetv3", epoch=3)  # type: ignore[call-arg]
    assert "50 problems" in refusal(
        config=toml(tmp_path, "\n".join(f"nonsense_{n} = 1" for n in range(50)))
    ).message  # fmt: skip


def test_what_is_no_setting_is_refused(tmp_path: Path) -> None:
    for setting in ("seed", "=3", " =3", "seed.a=3"):
        refusal(seed=1, settings=[setting])
    for name in ("config", "settings"):
        assert name in refusal(config=toml(tmp_path, f'{name} = "other.toml"')).message
        assert name in refusal(settings=f"{name}=x").message
    # Empty text is no value: as a path it would be the current folder.
    for name in ("data", "out", "unlabelled", "test_domain", "student_weights"):
        file = toml(tmp_path, f'{name} = ""')
        for given in ({name: ""}, {"settings": f"{name}="}, {"config": file}):
            assert refusal(**given).message == f"{name} is empty."
    assert refusal(unlabelled=["a", ""]).message == "unlabelled is empty."


def test_a_configuration_can_be_written_and_read_back() -> None:
    stages: dict[str, Any] = {"align": {"lr": 2.0}}
    given = {"student_weights": "a/b.pt", "out": Path("runs/x"), "unseen_classes": "dog, horse"}
    config = TrainConfig.load(**given, stages=stages, settings=["stages.align.lr=1.0"])
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert stages == {"align": {"lr": 2.0}}
    assert config.unseen_classes == ("dog", "horse")
    assert TrainConfig.load(unseen_classes=["cat, tabby"]).unseen_classes == ("cat, tabby",)


def test_yaml_says_what_toml_says(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  student: resnet18\n  stages:\n    distill: {lr: 2.0}\n  steps: 5\n")
    file = toml(tmp_path, '[train]\nstudent = "resnet18"\nsteps = 5\nstages.distill.lr = 2.0\n')
    assert TrainConfig.load(config=path) == TrainConfig.load(config=file)
    for content in ("a: [", "a: !!python/object:os.system x", "- 1", "[" * 1200):
        path.write_text(content)
        assert "run.yaml" in refusal(config=path).message


def test_a_study_takes_the_settings_of_a_run(tmp_path: Path) -> None:
    file = toml(tmp_path, "[train]\nlr = 0.1\nsteps = 4\n[study]\nseeds = 2\n")
    study = StudyConfig.load(recipes="erm,kd", config=file, settings=["stages.distill.lr=3.0"])
    assert (study.recipes, study.seeds) == (("erm", "kd"), 2)
    config = study.train_config(["lr=0.5"])
    assert (config.lr, config.steps, config.stages) == (0.5, 4, {"distill": {"lr": 3.0}})
    assert config.model_fields_set == {"lr", "steps", "stages"}


def test_a_class_has_one_source(tmp_path: Path) -> None:
    given = {"images": [tmp_path], "text_vector": tmp_path / "v.npy", "teacher": "toy"}
    for pair in itertools.combinations(given, 2):
        with pytest.raises(EdgekdError):
            AddClassConfig.load(artifact=tmp_path, name="bird", **{one: given[one] for one in pair})


class PaintOptions(Config):
    """A heading of its own."""

    colours: Words = option(default=("red",))
    """Colours, with commas."""
    layers: Counts = option(default=())
    """Layers of each."""


class ScratchConfig(PaintOptions):
    """A verb that no room has."""

    wall: OptionalPath = option(default=None, kw_only=False)
    """What is painted."""
    gloss: float | None = option(default=None, ge=0, le=1)
    """Share of light thrown back. Default: the paint's."""
    dry: bool = True
    """Wait."""

    @check
    def _gloss(self) -> None:
        if self.gloss and len(self.colours) > 1:
            raise EdgekdError("Only one colour can shine.", "Name one.")


@verb(ScratchConfig)
def paint(config: ScratchConfig) -> ScratchConfig:
    """Paint a wall."""
    return config


def test_an_option_is_declared_once(tmp_path: Path) -> None:
    """The class above is all there is to `gloss`; flag, file, setting, call, help and refusals follow."""
    app, painted = typer.Typer(), []

    @command(app, f"{__name__}:paint")
    def scratch(result: ScratchConfig, _: Any) -> None:
        """Paint."""
        painted.append(result)

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, words, env={"COLUMNS": "120"})

    run("--config", str(toml(tmp_path, "[scratch]\ngloss = 0.5\n")))
    run("--gloss", "0.5")
    run("--set", "gloss=0.5")
    painted.append(paint(gloss=0.5))
    assert [config.gloss for config in painted] == [0.5] * 4
    run("here", "--colours", "red,blue", "--colours", "green", "--layers", "1,2", "--no-dry")
    assert painted[-1] == ScratchConfig(
        wall=Path("here"), colours=("red", "blue", "green"), layers=(1, 2), dry=False
    )
    assert paint("there").wall == Path("there")
    help_ = run("--help").output
    for part in ("Paint", "[default: the paint's]", "[default: red]", "--no-dry", "--gloss"):
        assert part in help_
    assert isinstance(run("--gloss", "2").exception, EdgekdError)
    assert "gloss" in str(run("--gloss", "2").exception)
    assert 'Did you mean "gloss"' in str(run("--set", "glos=1").exception)
    assert "Only one colour" in str(run("--gloss", "1", "--colours", "red,blue").exception)


@pytest.mark.parametrize(
    "setting", ["edgekd:descriptions=command:x", 'edgekd:descriptions = "\\u0063ommand:x"']
)
def test_a_study_runs_no_program_that_a_file_names(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f"[study]\nrecipe_settings = [{json.dumps(setting)}]\n[train]\nsteps = 2\n")
    with pytest.raises(EdgekdError, match="command line"):
        StudyConfig.load(config=file)
    assert StudyConfig.load(recipe_settings=[setting]).recipe_settings == (setting,)


def test_the_earlier_name_of_a_precision_is_taken_with_a_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ExportConfig.load(target="coreml", precision="w8a8")
    assert config.precision == "int8"
    assert "w8a8 is now called int8" in " ".join(capsys.readouterr().err.split())
