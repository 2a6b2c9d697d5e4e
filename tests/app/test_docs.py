from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_fakes import write_artifact
from PIL import Image
from typer.main import get_command

import edgekd
from edgekd.benchmark.gates import parse_gates
from edgekd.cli import app
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.configs.train import TrainConfig
from edgekd.distill.losses import TERMS, Batch, objective
from edgekd.distill.recipes import RECIPES, get_recipe
from edgekd.targets.profiles import load_profile

ROOT = Path(__file__).parents[2]

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

TOOLS = {
    "python3.11", "python", "pip", "pytest", "ruff", "mypy", "pre-commit", "torchrun", "git", "cd", "run", "export",
    "mkdocs",
}  # fmt: skip

ARCHITECTURE = ROOT / "docs" / "architecture.md"


def blocks(language: str) -> list[Any]:
    """All fenced blocks of a language as `(page, code)`, with readable ids."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL), 1
        ):
            found.append(pytest.param(page, code, id=f"{page.stem}-{number}"))
    return found


def simple_commands(block: str) -> Iterator[list[str]]:
    """The words of every command after a `$ `: continuation lines joined, loops unrolled once, variables filled in."""
    for line in block.replace("\\\n", " ").splitlines():
        if not line.startswith("$ "):
            continue
        script = line[2:]
        for name, values in re.findall(r"\bfor (\w+) in ([^;]+);", script):
            script = re.sub(rf"\$\{{{name}\}}|\${name}\b", values.split()[0], script)
        script = re.sub(r"\s2> \S+", "", script)
        for part in re.split(r"&&|\|\||;|\||&", script):
            words = shlex.split(part, comments=True)
            while words and (
                words[0] in ("do", "then", "time", "{") or re.fullmatch(r"\w+=.*", words[0])
            ):
                words.pop(0)
            if words and words[0] not in ("for", "done", "wait", "}"):
                yield words


def edgekd_arguments(words: list[str]) -> list[str] | None:
    """What follows `edgekd` (or `-m edgekd.cli`), None for another program."""
    if Path(words[0]).name == "edgekd":
        return words[1:]
    if "edgekd.cli" in words:
        return words[words.index("edgekd.cli") + 1 :]
    return None


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse with the real command line, without running anything."""
    command: Any = get_command(app)
    words, path = list(arguments), []
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        path.append(words.pop(0))
        command = command.commands[path[-1]]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return " ".join(path), command.make_context(" ".join(path), words).params
        except Exception as error:
            if getattr(error, "exit_code", 1) == 0:  # --help and --version leave this way
                return " ".join(path), {}
            raise


def settings_of(parameters: dict[str, Any]) -> TrainConfig:
    given = {name: value for name, value in parameters.items() if name != "config"}
    return TrainConfig.load(**given)


@pytest.mark.parametrize(("page", "block"), blocks("console"))
def test_commands_parse(page: Path, block: str) -> None:
    commands = list(simple_commands(block))
    assert commands, "a console block without a line that begins with $"
    for words in commands:
        arguments = edgekd_arguments(words)
        if arguments is None:
            assert Path(words[0]).name in TOOLS, words
            continue
        verb, parameters = parse(arguments)
        if verb == "train" and parameters:
            config = settings_of(parameters)
            get_recipe(config.recipe, config.stages)


def test_named_students_and_teachers_exist() -> None:
    import open_clip

    from edgekd.distill.models.students import TEACHER_ENCODER, timm_name

    pairs = set(open_clip.list_pretrained(as_str=True))
    students, teachers = set(), set()
    for parameter in blocks("console"):
        for words in simple_commands(parameter.values[1]):
            arguments = edgekd_arguments(words)
            verb, parameters = parse(arguments) if arguments is not None else ("", {})
            if verb in ("train", "evaluate"):
                students.add(parameters.get("student"))
                teachers.add(parameters.get("teacher"))
    assert len(students) > 3
    for student in students - {None, TEACHER_ENCODER}:
        timm_name(student)
    for teacher in teachers - {None, "toy"}:
        kind, _, rest = teacher.partition(":")
        assert rest
        assert kind in ("local-dir", "hf-hub", "embeddings") or teacher in pairs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }


@pytest.mark.parametrize(("page", "block"), [*blocks("toml"), *blocks("yaml")])
def test_configurations_hold(page: Path, block: str, tmp_path: Path) -> None:
    file = tmp_path / ("run.toml" if "=" in block else "run.yaml")
    file.write_text(block, encoding="utf-8")
    if "[because]" in block:
        assert load_profile(file).cautions
        return
    config = TrainConfig.load(config=file)
    if "[gates]" in block:
        assert parse_gates(BenchmarkConfig.load(config=file).gates)
        return
    assert config != TrainConfig()
    get_recipe(config.recipe, config.stages)


@pytest.mark.parametrize(
    ("page", "code"), [block for block in blocks("python") if block.values[0] != ARCHITECTURE]
)
def test_python_uses_names_that_exist(page: Path, code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgekd"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("edgekd."):
            verb = ast.unparse(node.func).removeprefix("edgekd.")
            assert verb in edgekd.__all__
            arguments = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(getattr(importlib.import_module("edgekd.api"), verb)).bind(
                *node.args, **arguments
            )
            if verb == "train":
                assert set(arguments) <= set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("page", "resize"),
    [("README.md", "squash"), ("docs/export.md", "squash"), ("docs/export.md", "crop")],
)
def test_exported_file_is_used_as_documented(
    page: str, resize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A wide image, green with blue edges: squashed it is mostly blue, its centre is green."""
    chosen = [block.values for block in blocks("python") if block.values[0] == ROOT / page]
    code = next(text for _, text in chosen if "InferenceSession" in text)
    assert "edgekd" not in code
    folder = write_artifact(tmp_path / "onnxruntime-int8")
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["preprocess"] |= {"resize": resize, "interpolation": "bilinear"}
    (folder / "artifact.json").write_text(json.dumps(manifest))
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :, 2] = 255
    pixels[:, 38:82] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("picture.jpg", "picture.png"), page, "exec"), {})
    winner = capsys.readouterr().out.split()[0].rstrip(":")
    assert winner == ("b" if resize == "squash" else "g")


def test_documented_resizing_is_edgekds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels the page prepares by hand are those of `Preprocess.pixels`."""
    from edgekd.core.preprocess import Preprocess

    code = next(
        b.values[1]
        for b in blocks("python")
        if b.values[0].name == "export.md" and "crop_pct" in b.values[1]
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)).save(
        tmp_path / "picture.png"
    )
    monkeypatch.chdir(tmp_path)
    for resize in ("squash", "crop"):
        rule = Preprocess(size=32, resize=resize, crop_pct=0.875, interpolation="bicubic")
        prepare = code[code.index("image =") : code.index("session =")].replace(
            "picture.jpg", "picture.png"
        )
        names: dict[str, Any] = {
            "rule": rule.model_dump(),
            "size": 32,
            "resampling": Image.Resampling.BICUBIC,
        }
        exec("from PIL import Image, ImageOps\n" + prepare, names)
        expected = rule.pixels(Image.open("picture.png").convert("RGB"))
        assert np.array_equal(np.asarray(names["image"]), expected)


def _run_blocks(page: str, marker: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    chosen = [
        b.values[1] for b in blocks("python") if b.values[0].name == page and marker in b.values[1]
    ]
    assert len(chosen) == 1
    exec(compile(chosen[0], page, "exec"), names)
    return names


def test_documented_student_is_one() -> None:
    from edgekd.distill.models.students import make_student

    _run_blocks("extend.md", "@register_model")
    student = make_student("pocket", pretrained="scratch", dim=8)
    assert student.preprocess.size == 64
    assert student(torch.rand(2, 3, 64, 64)).shape == (2, 8)


def test_documented_recipe_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "text-first", None)  # so that it is gone afterwards
    _run_blocks("extend.md", "RECIPES[")
    recipe = get_recipe("text-first")
    assert recipe.needs == {"embedding", "teacher", "bank", "labels"}


def test_documented_term_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "length", TERMS["ce"])
    _run_blocks("extend.md", "TERMS[")
    recipe = get_recipe(
        "vl2v-adip", {"distill": {"terms": {"length": {"weight": 0.1, "params": {"target": 2.0}}}}}
    )
    terms = {"length": recipe.stages[1].terms["length"]}
    batch = Batch(
        labels=torch.zeros(2, dtype=torch.int64), embedding=torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    )
    loss, values = objective(batch, terms)
    assert values["length"].item() == pytest.approx((3**2 + 1) / 2)
    assert loss.item() == pytest.approx(0.5)


def test_documented_embeddings_file_is_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.distill.models.teachers import EmbeddingsTeacher, load_teacher

    monkeypatch.chdir(tmp_path)
    _run_blocks("teachers.md", "np.savez")
    teacher = load_teacher("embeddings:vendor.npz")
    assert isinstance(teacher, EmbeddingsTeacher)
    assert teacher.lookup(["photo/cat/1.jpg"]).shape == (1, 512)
    assert teacher.logit_scale == 100


def test_settings_without_a_flag_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    table = page[page.index("| setting | meaning |") :].split("\n\n")[0]
    command: Any = get_command(app)
    flags = {parameter.name for parameter in command.commands["train"].params}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == (
        TrainConfig.model_fields.keys() - flags
    )


def test_recipe_table_names_every_recipe() -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \| (linear|text|learned)", page, re.MULTILINE)
    )
    assert rows == {recipe.name: recipe.head for recipe in RECIPES.values()}


def test_thresholds_agree_with_the_check() -> None:
    from edgekd.export.parity import MAX_RELATIVE_ERROR, MIN_AGREEMENT

    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (fp32|fp16|int8|int8-weights|pal6|pal4) \| ([\d.]+) % \| ([\d.]*)", page, re.MULTILINE
    )
    assert {name: round(float(percent) / 100, 6) for name, percent, _ in rows} == MIN_AGREEMENT
    assert {name: float(error) for name, _, error in rows if error} == MAX_RELATIVE_ERROR


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='needs pip install "edgekd[docs]"')
    pytest.importorskip("mkdocstrings", reason='needs pip install "edgekd[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="edgekd.api.{verb}"' in page for verb in ("train", "export", "benchmark"))


def test_the_notebook_holds_the_cells_of_its_script_with_their_results() -> None:
    cells = runpy.run_path(str(ROOT / "scripts" / "make_docs_examples.py"))["CELLS"]
    path = ROOT / "docs" / "tour.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert ["".join(cell["source"]) for cell in notebook["cells"]] == list(cells)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [[one["output_type"] for one in cell["outputs"]] for cell in code]
    assert all(kinds == ["execute_result"] for kinds in shown), shown
    assert path.stat().st_size < 600_000
