from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

EXTRAS = runpy.run_path(str(ROOT / "scripts" / "refresh_constraints.py"))["EXTRAS"]

ROOMS = ("distill", "export", "benchmark", "targets")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, because setuptools writes into the folder it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "src"):
        shutil.copytree(
            ROOT / name,
            source / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".tmp-*"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # -I: a folder called `build` in the working directory must not hide the package of that name.
    command = [
        sys.executable,
        "-I",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    wanted = {
        f"edgekd/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    wanted |= {
        "edgekd/" + path.relative_to(ROOT / "src/edgekd").as_posix()
        for path in (ROOT / "src/edgekd").rglob("*.py")
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == wanted


def test_wheel_holds_the_package_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "edgekd/py.typed" in names
    templates = "edgekd/benchmark/report/templates"
    assert {f"{templates}/page.html", f"{templates}/style.css"} <= names
    assert "edgekd/targets/profiles/raspberry-pi-5.toml" in names
    teacher = {name for name in names if name.startswith("edgekd/data/toy/teacher/")}
    assert "edgekd/data/toy/teacher/open_clip_config.json" in teacher
    assert any(name.endswith(".safetensors") for name in teacher)


def test_wheel_says_its_licence_and_its_command(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    metadata = Parser().parsestr(
        wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    )
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    licence = wheel.read(
        next(name for name in names if name.endswith("/licenses/LICENSE"))
    ).decode()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    entry_points = wheel.read(
        next(name for name in names if name.endswith("/entry_points.txt"))
    ).decode()
    assert "edgekd = edgekd.cli:main" in entry_points


def test_the_checkout_is_the_package() -> None:
    """Editors, type checkers and editable installs find every room below src/edgekd."""
    for room in ROOMS:
        link = ROOT / "src/edgekd" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room


# In pieces, so that this file does not contain what it looks for.
MACHINE_FOLDERS = ("wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers")

REGISTRIES = (
    "py" + "pi.org",
    "python" + "hosted",
    "download." + "pytorch",
    "ana" + "conda.org",
    "conda-" + "forge",
)

FORBIDDEN = re.compile(
    rf"(?<![\w.\-/])/(?:{'|'.join(MACHINE_FOLDERS)})/|{'|'.join(map(re.escape, REGISTRIES))}|index"
    + r"[-_]url"
)


def test_no_file_names_a_machine_or_a_registry() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the project's own files cannot be told from others")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    assert len(paths) > 50
    hits = []
    for path in paths:
        text = path.read_bytes().decode("utf-8", "replace")
        hits += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert not hits


def test_ci_runs_the_readme_command() -> None:
    """`.ci/run` takes the one line from README.md that ends in pytest; this is the same search."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m 1 -E '([^']+)'", script)
    assert pattern is not None
    lines = re.findall(
        pattern.group(1) + r".*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(lines) == 1
    assert lines[0].count(" && ") == 2
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def constraints(name: str = "tested") -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_tested_versions_are_allowed_and_complete(project: dict[str, Any]) -> None:
    tested = {canonicalize_name(name): version for name, version in constraints().items()}
    extras = project["project"]["optional-dependencies"]
    wanted = list(project["project"]["dependencies"])
    wanted += [one for extra in EXTRAS for one in extras[extra]]
    for requirement in map(Requirement, wanted):
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier
    assert all(re.fullmatch(r"[\w.!]+", version) for version in tested.values())


def test_the_lower_bounds_are_those_that_pip_resolved(project: dict[str, Any]) -> None:
    """Whoever changes a bound runs `scripts/refresh_constraints.py --lowest`, which fails where two contradict."""
    lowest = constraints("lowest")
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    requirements = {one.name: one.specifier for one in map(Requirement, wanted)}
    assert set(lowest) == set(requirements)
    for name, specifier in requirements.items():
        assert lowest[name] in {one.version for one in specifier if one.operator in (">=", "==")}
        assert lowest[name] in specifier
    assert "-c constraints/lowest.txt" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_install_page_names_the_tested_versions(project: dict[str, Any]) -> None:
    tested = {canonicalize_name(name): version for name, version in constraints().items()}
    bounds = {
        canonicalize_name(one.name): one.specifier
        for one in map(Requirement, project["project"]["dependencies"])
    }
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| `([^`]+)` \|", page, re.MULTILINE)
    assert len(rows) > 10
    for name, version, allowed in rows:
        assert tested[canonicalize_name(name)] == version
        assert SpecifierSet(allowed) == bounds[canonicalize_name(name)]


def test_the_tests_of_the_second_environment_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    words = script.rpartition(".ci-lowest/bin/pytest")[2].replace("\\\n", " ").split()
    patterns = " ".join(word for word in words if word.startswith("tests/"))
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\n' {patterns}"], capture_output=True, text=True, check=True
    )
    paths = shown.stdout.split()
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).is_file()] == []
