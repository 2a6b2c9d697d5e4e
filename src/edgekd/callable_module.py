"""`edgekd.export` is a room and a verb: a package one can import from and also call."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from edgekd import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(name: str) -> None:
    """Let calling the package `name` call the function of that name in `edgekd.api`."""
    sys.modules[name].__class__ = _Verb
