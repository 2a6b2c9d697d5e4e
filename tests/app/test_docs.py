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
import open_clip
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
from edgekd.core.preprocess import Preprocess
from edgekd.distill.losses import TERMS, Batch, objective
from edgekd.distill.models.students import TEACHER_ENCODER, make_student, timm_name
from edgekd.distill.models.teachers import EmbeddingsTeacher, load_teacher
from edgekd.distill.recipes import RECIPES, get_recipe
from edgekd.export.parity import MAX_RELATIVE_ERROR, MIN_AGREEMENT
from edgekd.targets.profiles import load_profile

ROOT = Path(__file__).parents[2]

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

TOOLS = {
    "python3.11", "python", "pip", "pytest", "ruff", "mypy", "pre-commit", "torchrun", "git", "cd", "run", "export",
    "mkdocs",
}  # fmt: skip


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
            config = TrainConfig.load(**parameters | {"config": None})
            get_recipe(config.recipe, config.stages)


def test_named_students_and_teachers_exist() -> None:
    pairs = set(open_clip.list_pretrained(as_str=True))
    commands = (c for block in blocks("console") for c in simple_commands(block.values[1]))
    parsed = [parse(arguments) for c in commands if (arguments := edgekd_arguments(c)) is not None]
    models = [parameters for verb, parameters in parsed if verb in ("train", "evaluate")]
    students, teachers = ({one.get(kind) for one in models} for kind in ("student", "teacher"))
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
            words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
            assert anchor in {heading.replace(" ", "-") for heading in words}


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
    ("page", "code"),
    [block for block in blocks("python") if block.values[0].name != "architecture.md"],
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
            signature = inspect.signature(getattr(importlib.import_module("edgekd.api"), verb))
            signature.bind(*node.args, **arguments)
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
    code = block_of("export.md", "crop_pct").replace("picture.jpg", "picture.png")
    prepare = code[code.index("image =") : code.index("session =")]
    pixels = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for resize in ("squash", "crop"):
        rule = Preprocess(size=32, resize=resize, crop_pct=0.875, interpolation="bicubic")
        names: dict[str, Any] = {"rule": rule.model_dump(), "size": 32}
        names["resampling"] = Image.Resampling.BICUBIC
        exec("from PIL import Image, ImageOps\n" + prepare, names)
        expected = rule.pixels(Image.open("picture.png").convert("RGB"))
        assert np.array_equal(np.asarray(names["image"]), expected)


def block_of(page: str, marker: str) -> str:
    """The one Python block of a page that holds `marker`."""
    pages = (block.values for block in blocks("python"))
    [code] = [code for path, code in pages if path.name == page and marker in code]
    return str(code)


def run_block(page: str, marker: str) -> None:
    exec(compile(block_of(page, marker), page, "exec"), {"__name__": "__main__"})


def test_documented_extensions_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_block("extend.md", "@register_model")
    student = make_student("pocket", pretrained="scratch", dim=8)
    assert student.preprocess.size == 64
    assert student(torch.rand(2, 3, 64, 64)).shape == (2, 8)
    monkeypatch.setitem(RECIPES, "text-first", None)  # so that it is gone afterwards
    run_block("extend.md", "RECIPES[")
    assert get_recipe("text-first").needs == {"embedding", "teacher", "bank", "labels"}
    monkeypatch.setitem(TERMS, "length", TERMS["ce"])
    run_block("extend.md", "TERMS[")
    own = {"length": {"weight": 0.1, "params": {"target": 2.0}}}
    recipe = get_recipe("vl2v-adip", {"distill": {"terms": own}})
    embedding = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    batch = Batch(labels=torch.zeros(2, dtype=torch.int64), embedding=embedding)
    loss, values = objective(batch, {"length": recipe.stages[1].terms["length"]})
    assert values["length"].item() == pytest.approx((3**2 + 1) / 2)
    assert loss.item() == pytest.approx(0.5)
    monkeypatch.chdir(tmp_path)
    run_block("teachers.md", "np.savez")
    teacher = load_teacher("embeddings:vendor.npz")
    assert isinstance(teacher, EmbeddingsTeacher)
    assert teacher.lookup(["photo/cat/1.jpg"]).shape == (1, 512)
    assert teacher.logit_scale == 100


def test_tables_of_the_pages_state_what_holds() -> None:
    def rows(page: str, pattern: str) -> list[Any]:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        return re.findall(rf"^\| {pattern}", text, re.MULTILINE)

    command: Any = get_command(app)
    flags = {parameter.name for parameter in command.commands["train"].params}
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    table = text[text.index("| setting | meaning |") :].split("\n\n")[0]
    without = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert without == TrainConfig.model_fields.keys() - flags
    heads = dict(rows("train.md", r"`([\w-]+)` \| [^|]+ \| [^|]+ \| (linear|text|learned)"))
    assert heads == {recipe.name: recipe.head for recipe in RECIPES.values()}
    limits = rows("export.md", r"(fp32|fp16|int8|int8-weights|pal6|pal4) \| ([\d.]+) % \| ([\d.]*)")
    assert {name: round(float(percent) / 100, 6) for name, percent, _ in limits} == MIN_AGREEMENT
    assert {name: float(error) for name, _, error in limits if error} == MAX_RELATIVE_ERROR


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
