"""Typer commands whose parameters are created from a configuration on first use.

So `edgekd --help` imports neither pydantic nor rich's tables. The help of a command has a heading per option group.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from edgekd.core.errors import EdgekdError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Show = Callable[[Any, Any], None]
"""Print the result of a function of a configuration."""


def command(
    app: typer.Typer, verb: str, name: str | None = None, pick: Callable[[Any], str] | None = None
) -> Callable[[Show], Show]:
    """Register a command that calls a function; the decorated function prints its result.

    Args:
        verb: `module:function` decorated with `edgekd.configs.verbs.verb`, imported on first use.
        name: name of the command; None is the function's name.
        pick: configuration → name of the function in that module to call; None: always the verb.
    """

    def register(show: Show) -> Show:
        @functools.cache
        def made() -> Any:
            return _command(verb, show, pick)

        class Lazy(TyperCommand):
            """Delegate to the command created from the configuration."""

            @property
            def params(self) -> Any:
                return made().params

            @params.setter
            def params(self, _: Any) -> None:
                pass

            def format_help(self, ctx: Any, formatter: Any) -> None:
                made().format_help(ctx, formatter)

            def parse_args(self, ctx: Any, args: list[str]) -> Any:
                for word, before in zip(args, ["", *args], strict=False):
                    name, equals, value = word.partition("=")
                    if not word or (equals and not value and re.fullmatch("--[a-z-]+", name)):
                        what = name or (before if before.startswith("--") else "An argument")
                        raise EdgekdError(f"{what} is empty.", "Give it a value, or leave it out.")
                return super().parse_args(ctx, args)

            def invoke(self, ctx: Any) -> Any:
                return made().invoke(ctx)

        app.command(name or show.__name__, cls=Lazy, help=inspect.getdoc(show))(lambda: None)
        return show

    return register


def _command(verb: str, show: Show, pick: Callable[[Any], str] | None) -> Any:
    from edgekd.configs.base import COMMAS, options_of

    name_of_module, _, function = verb.partition(":")
    module = importlib.import_module(name_of_module)
    model = getattr(module, function).config
    options = options_of(model)
    parameters, switches = [], {}
    for name, (field, panel, extra) in options.items():
        kind = _kind(field.annotation)
        if kind is None or extra.get("flag") == "":
            continue
        parameters.append(_parameter(name, field, kind, panel, extra))
        for number, (flag, (value, help_)) in enumerate((extra.get("switches") or {}).items()):
            switch = f"{name}_{number}"
            switches[switch] = (name, flag, value)
            parameters.append(_switch(switch, flag, value, help_, panel))

    def callback(**values: Any) -> None:
        given: dict[str, Any] = {}
        for name, value in values.items():
            if value is None or value == []:
                continue
            name, value = _switched(switches[name], value) if name in switches else (name, value)
            if name in given:
                flags = ", ".join(options[name][2]["switches"])
                raise EdgekdError(
                    f"More than one {name} was given.",
                    f"Give one of {flags}, and repeat the command for another.",
                )
            given[name] = ",".join(value) if COMMAS in options[name][0].metadata else value
        config = model.load(**given)
        called = inspect.unwrap(getattr(module, pick(config) if pick else function))
        show(called(config), config)

    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(help=_escaped(inspect.getdoc(show) or ""))(callback)
    return typer.main.get_command(app)


def _kind(annotation: Any) -> Any:
    """Return the type that typer parses for a field; None for tables, which have no flag."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, types.UnionType):
        kinds = [_kind(kind) for kind in inner if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else None
    if origin is Literal:
        return str
    if origin is tuple:
        return list[Path] if inner[0] is Path else list[str]
    return annotation if annotation in (str, int, float, bool, Path) else None


def _parameter(name: str, field: FieldInfo, kind: Any, panel: str, extra: Any) -> inspect.Parameter:
    settings: dict[str, Any] = {
        "help": _help(field),
        "show_default": False,
        "rich_help_panel": panel,
    }
    if choices := list(_choices(field.annotation)):
        settings["autocompletion"] = lambda incomplete: [
            c for c in choices if c.startswith(incomplete)
        ]
        settings["metavar"] = "|".join(choices) if len(choices) < 4 else None
    flag = extra.get("flag")
    if extra.get("positional") and flag is None:
        default = inspect.Parameter.empty if field.is_required() else None
        del settings["rich_help_panel"]  # arguments have a heading of their own
        annotated: Any = Annotated[
            kind if field.is_required() else kind | None, typer.Argument(**settings)
        ]
        return _make(name, annotated, default)
    flag = flag or "--" + name.replace("_", "-")
    if kind is bool and "/" not in flag and field.default is not False:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    return _make(name, Annotated[kind | None, typer.Option(flag, **settings)])


def _switch(name: str, flag: str, value: Any, help_: str, panel: str) -> inspect.Parameter:
    metavar = "|".join(value) if isinstance(value, dict) else None
    settings = typer.Option(
        flag, help=_escaped(help_), show_default=False, rich_help_panel=panel, metavar=metavar
    )
    return _make(name, Annotated[(str if metavar else bool) | None, settings])


def _make(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _switched(switch: tuple[str, str, Any], given: Any) -> tuple[str, Any]:
    """Return the field that a switch sets, and its value."""
    name, flag, value = switch
    if isinstance(value, dict) and given not in value:
        raise EdgekdError(f'{flag} takes no "{given}".', f"Give {flag} {' or '.join(value)}.")
    return name, value[given] if isinstance(value, dict) else value


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) in (Union, types.UnionType):
        for kind in get_args(annotation):
            yield from _choices(kind)


def _help(field: FieldInfo) -> str:
    """Return a field's docstring with the default in brackets, from its final `Default: …` or the default value."""
    text, _, default = " ".join((field.description or "").replace("`", "").split()).partition(
        " Default: "
    )
    if not default and not field.is_required():
        value = field.get_default(call_default_factory=True)
        if value is not None and not isinstance(value, bool | dict) and value not in ((), ""):
            default = ",".join(value) if isinstance(value, tuple) else str(value)
    return _escaped(f"{text} [default: {default.rstrip('.')}]" if default else text)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
