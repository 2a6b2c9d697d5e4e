"""edgekd: distil a compact student from a CLIP teacher, export it, and measure the exported file in and out of domain.

`edgekd.train(...)`, `edgekd.export(...)`, `edgekd.verify(...)`, `edgekd.benchmark(...)`, `edgekd.report(...)`,
`edgekd.evaluate(...)`, `edgekd.predict(...)` and `edgekd.study(...)` take the same names as the command line and return
value objects (`edgekd.api`); `edgekd.load(...)` gives a model that predicts; `edgekd.add_class(...)` and
`edgekd.remove_class(...)` are `edgekd classes add` and `remove`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.version import __version__

if TYPE_CHECKING:
    from edgekd.api import (
        add_class,
        benchmark,
        demo,
        evaluate,
        export,
        load,
        predict,
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
    "remove_class",
    "report",
    "study",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    # The heavy parts load when they are first used. `export` and `benchmark` are packages as well as verbs: those two
    # are callable modules (see `edgekd.callable_module`).
    if name in ("export", "benchmark"):
        return importlib.import_module(f"edgekd.{name}")
    if name in __all__:
        return getattr(importlib.import_module("edgekd.api"), name)
    raise AttributeError(f"module 'edgekd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
