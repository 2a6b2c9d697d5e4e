"""What docs/architecture.md states about imports: rooms import in one direction, and no module imports in a circle."""

from __future__ import annotations

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "edgekd"
MAY_IMPORT = {
    "core": {"core"},
    "targets": {"core", "targets"},
    "configs": {"core", "targets", "configs"},
    "distill": {"core", "configs", "distill"},
    "export": {"core", "targets", "configs", "export"},
    "benchmark": {"core", "targets", "configs", "benchmark"},
}
"""What a room may import. Every other module is part of the application: it may import any room, and no room it."""
CORE = {"core", "data"}
# Known exceptions, by module. This list only gets shorter.
KNOWN = {
    # The verb `export` reads the run that it exports.
    "edgekd.export.run": {"app", "distill"}
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name; `edgekd/distill` and the like are links to the top-level folders."""
    found = {}
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_symlink())):
        for path in folder.resolve().rglob("*.py"):
            inner = path.relative_to(folder.resolve()).with_suffix("").parts
            own = () if folder == PACKAGE else (folder.name,)
            parts = ("edgekd", *own, *inner)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@functools.cache
def imported(name: str, *, at_load: bool = False) -> frozenset[str]:
    """Everything that a module imports, in functions too unless `at_load`."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(MODULES[name].read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            todo += ast.iter_child_nodes(node)
    return frozenset(found)


def imports(name: str, *, at_load: bool = False) -> set[str]:
    """The edgekd modules among them."""
    return {one for one in imported(name, at_load=at_load) if one in MODULES and one != name}


def room(name: str) -> str:
    """The folder of a module; `core` or `app` for the modules of `src/edgekd` itself."""
    first = (*name.split("."), "")[1]
    if first in MAY_IMPORT and first != "core":
        return first
    return "core" if first in CORE or not first else "app"


PAGE = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_states_what_is_checked() -> None:
    table = dict(re.findall(r"^\| (.+?) \| ((?:core|`)[^|]*) \|$", PAGE, re.MULTILINE))
    stated = {
        row.split()[0].strip("`"): set(re.findall(r"\w+", cell)) for row, cell in table.items()
    }
    for one, allowed in MAY_IMPORT.items():
        assert stated[one] == (allowed - {one} or {one})
    tree = re.search(r"```\n(.*?)```", PAGE, re.DOTALL)
    assert tree is not None
    for folder in re.findall(r"(?:^ *|[ ;])((?:[\w]+/)+)", tree[1], re.MULTILINE):
        assert (PACKAGE.parents[1] / folder).is_dir(), folder
    for names, module in re.findall(r"^\| (`.*?) \| `(edgekd\.[\w.]+)` \|", PAGE, re.MULTILINE):
        text = MODULES[module].read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(class )?{name}\b", text, re.MULTILINE), name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rooms_import_in_one_direction(name: str) -> None:
    allowed = MAY_IMPORT.get(room(name))
    if allowed is not None:
        used = {room(other) for other in imports(name)} - allowed - KNOWN.get(name, set())
        assert not used, sorted(other for other in imports(name) if room(other) in used)


@pytest.mark.parametrize("at_load", [True, False])
def test_no_module_imports_in_a_circle(at_load: bool) -> None:
    TopologicalSorter({name: imports(name, at_load=at_load) for name in MODULES}).prepare()


def test_measuring_never_imports_torch() -> None:
    for name in MODULES:
        if room(name) in ("benchmark", "targets"):
            packages = {one.split(".")[0] for one in imported(name)}
            assert not packages & {"torch", "timm", "open_clip"}, name
