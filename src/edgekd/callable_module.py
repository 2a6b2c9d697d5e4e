"""`edgekd.export` and `edgekd.benchmark` are packages and verbs: modules that can also be called."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    @property
    def _verb(self) -> Any:
        from edgekd import api

        return getattr(api, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        return self._verb.__signature__

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._verb(*args, **options)


def make_callable(name: str) -> None:
    """Let calling the package `name` call the function of that name in `edgekd.api`."""
    sys.modules[name].__class__ = _Verb
