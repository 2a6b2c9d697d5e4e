"""Decorators that give a function the fields of its configuration as parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from edgekd.configs.base import Config, options_of

P = ParamSpec("P")
C = TypeVar("C")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
StrPath = str | Path


class OfPaths(Protocol[P, R_co]):
    """A function that takes any number of paths by position, or lists of paths."""

    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> R_co: ...
    @overload
    def __call__(
        self, first: StrPath, second: StrPath, /, *args: P.args, **options: P.kwargs
    ) -> R_co: ...


def verb(model: Callable[P, C]) -> Callable[[Callable[[C], R]], Callable[P, R]]:
    """Give a function of one `Config` the parameters of its constructor, for type checkers and at run time.

    The arguments are validated by `Config.load`: None means not given, and mistakes raise `EdgekdError`.
    """
    kind = cast(type[Config], model)

    def decorate(function: Callable[[C], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> R:
            return function(cast(C, kind.load(**_named(call, args), **options)))

        options = options_of(kind)
        call.config = kind  # type: ignore[attr-defined]
        call.__signature__ = _signature(kind, function)  # type: ignore[attr-defined]
        lines = [
            f"    {name}: {' '.join((field.description or '').split())}"
            for name, (field, *_) in options.items()
        ]
        call.__doc__ = "\n".join(
            [*(inspect.getdoc(function) or "").splitlines(), "", "Options:", *lines]
        )
        call.__annotations__ = {}
        return cast(Callable[P, R], call)

    return decorate


def verb_of_paths(model: Callable[P, C]) -> Callable[[Callable[[C], R]], OfPaths[P, R]]:
    """Return `verb(model)` for a model whose `paths` are positional arguments."""
    return cast(Callable[[Callable[[C], R]], OfPaths[P, R]], verb(model))


def _signature(model: type[Config], function: Callable[..., Any]) -> inspect.Signature:
    parameters = []
    for name, (field, _, extra) in options_of(model).items():
        kind: Any = inspect.Parameter.KEYWORD_ONLY
        default = (
            inspect.Parameter.empty
            if field.is_required()
            else field.get_default(call_default_factory=True)
        )
        if extra.get("positional"):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            if name == "paths":
                kind, default = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(name, kind, default=default, annotation=field.annotation)
        )
    return inspect.Signature(
        parameters, return_annotation=inspect.signature(function).return_annotation
    )


def _named(call: Callable[..., Any], args: Sequence[Any]) -> dict[str, Any]:
    """Return positional arguments by their names."""
    found = inspect.signature(call).bind_partial(*args).arguments
    if "paths" not in found:
        return found
    places: list[Any] = []
    for given in found["paths"]:
        places += [given] if isinstance(given, StrPath) else given
    return {"paths": places}
