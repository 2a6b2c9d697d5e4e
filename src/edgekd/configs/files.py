"""Configuration files, and single settings written as `a.b=value`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file (`.yaml`, `.yml`) or a TOML file (any other name) as a table.

    Raises:
        EdgekdError: no such file, or not of its format.
    """
    kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EdgekdError(f"There is no configuration file {path}.", "Check --config.") from error
    except OSError as error:
        raise EdgekdError(
            f"{path} cannot be read ({error.strerror}).", "Check --config."
        ) from error
    except UnicodeDecodeError as error:
        raise EdgekdError(f"{path} is not valid {kind}: {error}.", "Save it as UTF-8.") from error
    try:
        found = _parse(kind, text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise EdgekdError(
            f"{path} is not valid {kind}: {reason}.", "See docs/train.md for an example."
        ) from error
    if not isinstance(found, dict):
        raise EdgekdError(f"{path} holds no settings.", "See docs/train.md for an example.")
    return {str(name): value for name, value in found.items()}


def _parse(kind: str, text: str) -> Any:
    if kind == "TOML":
        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


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
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
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
