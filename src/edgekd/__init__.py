"""edgekd: distil a compact student from a CLIP teacher, export it, and measure the exported file in and out of domain.

The functions have the names and options of the commands of the command line and return value objects (see
`edgekd.api`): `train`, `evaluate`, `export`, `verify`, `benchmark`, `report`, `predict`, `demo`, `push`, `pull` and
`study`. `load` returns a model for predictions. `add_class` and `remove_class` are `edgekd classes add` and `remove`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.version import __version__

if TYPE_CHECKING:
    from edgekd.api import (
        add_class,
        benchmark,
        demo,
        evaluate,
        export,
        load,
        predict,
        pull,
        push,
        remove_class,
        report,
        study,
        train,
        verify,
    )

__all__ = [
    "EdgekdError",
    "GateFailed",
    "__version__",
    "add_class",
    "benchmark",
    "demo",
    "evaluate",
    "export",
    "load",
    "predict",
    "pull",
    "push",
    "remove_class",
    "report",
    "study",
    "train",
    "verify",
]


class _Verb(ModuleType):
    """A callable package: calling it calls the function of the same name in `edgekd.api`."""

    @property
    def _verb(self) -> Any:
        return getattr(importlib.import_module("edgekd.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        return self._verb.__signature__

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._verb(*args, **options)


def make_callable(name: str) -> None:
    """Make the package `name`, `edgekd.export` or `edgekd.benchmark`, callable."""
    sys.modules[name].__class__ = _Verb


def __getattr__(name: str) -> Any:
    # Heavy modules are imported on first use.
    if name in ("export", "benchmark"):
        return importlib.import_module(f"edgekd.{name}")
    if name in __all__:
        return getattr(importlib.import_module("edgekd.api"), name)
    raise AttributeError(f"module 'edgekd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
