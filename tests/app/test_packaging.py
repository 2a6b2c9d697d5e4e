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


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """Built from a copy, because setuptools writes into the folder it builds."""
    source, out = tmp_path / "source", tmp_path / "wheel"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".tmp-*")
    for name in (*ROOMS, "src"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # -I: a folder called `build` in the working directory must not hide the package of that name.
    command = [sys.executable, "-I", "-m", "build", "--wheel", "--no-isolation"]
    command += ["--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    wheel = zipfile.ZipFile(path)
    names = set(wheel.namelist())
    folders = [(ROOT / room, f"edgekd/{room}") for room in ROOMS]
    folders.append((ROOT / "src/edgekd", "edgekd"))
    wanted = {
        f"{place}/{path.relative_to(folder).as_posix()}"
        for folder, place in folders
        for path in folder.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == wanted
    assert names >= {f"edgekd/{name}" for name in (
        "py.typed", "benchmark/report/templates/page.html", "benchmark/report/templates/style.css",
        "targets/profiles/raspberry-pi-5.toml", "data/toy/teacher/open_clip_config.json",
        "data/toy/teacher/open_clip_model.safetensors",
    )}  # fmt: skip

    def read(end: str) -> str:
        return wheel.read(next(name for name in names if name.endswith(end))).decode()

    metadata = Parser().parsestr(read("/METADATA"))
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "END OF TERMS AND CONDITIONS" in read("/licenses/LICENSE")
    assert "edgekd = edgekd.cli:main" in read("/entry_points.txt")


# In pieces, so that this file does not contain what it looks for.
MACHINE_FOLDERS = ("wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers")

REGISTRIES = (
    "py" + "pi\\.org|python" + "hosted|download\\.py" + "torch|ana" + "conda\\.org|conda-" + "forge"
)

FORBIDDEN = re.compile(
    rf"(?<![\w.\-/])/(?:{'|'.join(MACHINE_FOLDERS)})/|{REGISTRIES}|index" + r"[-_]url"
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


def test_the_tested_versions_are_allowed_and_named(project: dict[str, Any]) -> None:
    tested = {canonicalize_name(name): version for name, version in constraints().items()}
    about = project["project"]
    dependencies, extras = about["dependencies"], about["optional-dependencies"]
    for requirement in map(
        Requirement, (*dependencies, *(one for extra in EXTRAS for one in extras[extra]))
    ):
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier
    assert all(re.fullmatch(r"[\w.!]+", version) for version in tested.values())
    bounds = {canonicalize_name(one.name): one.specifier for one in map(Requirement, dependencies)}
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| `([^`]+)` \|", page, re.MULTILINE)
    assert len(rows) > 10
    for name, version, allowed in rows:
        assert tested[canonicalize_name(name)] == version
        assert SpecifierSet(allowed) == bounds[canonicalize_name(name)]


def test_the_lower_bounds_are_those_that_pip_resolved(project: dict[str, Any]) -> None:
    """Whoever changes a bound runs `scripts/refresh_constraints.py --lowest`, which fails where two contradict."""
    lowest = constraints("lowest")
    about = project["project"]
    wanted = [*about["dependencies"], *about["optional-dependencies"]["dev"]]
    requirements = {one.name: one.specifier for one in map(Requirement, wanted)}
    assert set(lowest) == set(requirements)
    for name, specifier in requirements.items():
        assert lowest[name] in {one.version for one in specifier if one.operator in (">=", "==")}
        assert lowest[name] in specifier
    assert "-c constraints/lowest.txt" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


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
