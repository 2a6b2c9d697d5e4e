from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import edgekd.targets
from edgekd.core.errors import EdgekdError
from edgekd.targets.registry import TARGETS, get_target, target_of


def test_names_are_their_keys() -> None:
    assert all(get_target(name).name == name for name in TARGETS)


def test_typo_gets_a_suggestion() -> None:
    with pytest.raises(EdgekdError, match='There is no target "onnxruntme"') as caught:
        get_target("onnxruntme")
    assert caught.value.hint == 'Did you mean "onnxruntime"?'


def test_no_other_module_names_a_target() -> None:
    """A target is its entry in the registry, its writer and its opener, and the modules that belong to these alone."""
    root = Path(edgekd.targets.__file__).parents[1]
    own = re.compile(
        rf"targets/registry\.py|targets/agent/engines\.py|export/mil/\w+\.py|"
        rf"(targets|export|export/quantize)/({'|'.join(TARGETS)}|trt)\w*\.py"
    )
    # Names of packages whose versions are listed, and an example that calls ONNX Runtime.
    packages = re.compile(
        r"(benchmark/measure/environment|src/edgekd/doctor|export/artifact|benchmark/report/modelcard)\.py"
    )
    words = {*TARGETS, *(target.format for target in TARGETS.values())}
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for room in ("distill", "export", "benchmark", "targets", "src/edgekd")
        for path in (root / room).rglob("*.py")
        if not own.fullmatch(place := str(path.relative_to(root))) and not packages.fullmatch(place)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in words
    ]
    assert not found


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_its_two_modules(name: str) -> None:
    """A writer and an opener exist under the names that the entry gives them."""
    target = get_target(name)
    assert target_of(target.format) is target
    for module in (target.writer, target.opener):
        assert importlib.util.find_spec(module) is not None
    opener = Path(edgekd.targets.__file__).parent / f"{name}.py"
    defined = {
        node.name
        for node in ast.parse(opener.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert "open_file" in defined
