"""Configuration files, and single settings written as `a.b=value`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import parse_toml, read_toml, read_yaml

_CHECK = "Check --config; docs/train.md has an example."


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file (`.yaml`, `.yml`) or a TOML file (any other name) as a table.

    Raises:
        EdgekdError: no such file, or not of its format.
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        return read_toml(path, "configuration file", _CHECK)
    found = read_yaml(path, "configuration file", _CHECK)
    if not isinstance(found, dict):
        raise EdgekdError(f"The configuration file at {path} holds no settings.", _CHECK)
    return {str(name): value for name, value in found.items()}


def put(target: dict[str, Any], setting: str) -> None:
    """Set `a.b=value` in nested tables; the value is TOML, or else a string.

    Raises:
        EdgekdError: no such form, or `a` is a value.
    """
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise EdgekdError(
            f'"{setting}" is not a setting.', "Write --set name=value or --set a.b=value."
        )
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    *parents, last = path.strip().split(".")
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise EdgekdError(
                f'"{setting}" cannot be set: {parent} is a value, not a table.', "Check the name."
            )
        target = inner
    target[last] = value
