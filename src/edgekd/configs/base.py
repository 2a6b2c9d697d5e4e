"""The base of every configuration: a pydantic model whose fields are the options of one command.

A field defines an option completely: type, default, validation, and help (its docstring). Flags, files, `--set` and
Python arguments are all loaded by `Config.load`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Self,
    TypeVar,
    dataclass_transform,
)

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.readers import parse_toml, printable, read_toml, read_yaml

Read = TypeVar("Read")
Write = TypeVar("Write")
Method = TypeVar("Method", bound=Callable[..., None])


def _words(value: Any) -> Any:
    """Split a string at its commas; leave any other sequence as it is."""
    if not isinstance(value, str):
        return value
    words = tuple(filter(None, map(str.strip, value.split(","))))
    if value and not words:
        raise EdgekdError(f'"{value}" has no words.', "Write words separated by commas.")
    return words


def _items(value: Any) -> Any:
    """Wrap a single value, which may be a string with commas, in a tuple."""
    return (value,) if isinstance(value, str | Path) else value


def _numbers(kind: type, what: str, example: str) -> BeforeValidator:
    def parse(value: Any) -> Any:
        try:
            return tuple(kind(number) for number in _words(value))
        except (TypeError, ValueError) as error:
            raise EdgekdError(
                f'"{value}" is not a list of {what}.', f"Separate them by commas: {example}."
            ) from error

    return BeforeValidator(parse)


_MOST_PROBLEMS = 6
"""Maximum number of problems in one message."""
_CHECK = "Check --config; docs/train.md has an example."
SETTINGS = "Settings"
"""Heading of `--config` and `--set` in `--help`."""
COMMAS = BeforeValidator(_words)
"""Validator of a field that takes a string with commas or a sequence."""

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    class Converted(Generic[Read, Write]):
        """Static type of a field that is set as `Write` and read as `Read`."""

        def __get__(self, instance: object, owner: Any = None) -> Read: ...
        def __set__(self, instance: object, value: Write) -> None: ...

    AnyPath = Converted[Path, str | Path]
    OptionalPath = Converted[Path | None, str | Path | None]
    Paths = Converted[tuple[Path, ...], str | Path | Sequence[str | Path]]
    Spec = Converted[str, str | Path]
    OptionalSpec = Converted[str | None, str | Path | None]
    Words = Converted[tuple[str, ...], str | Sequence[str]]
    Items = Converted[tuple[str, ...], str | Sequence[str]]
    Counts = Converted[tuple[int, ...], str | Sequence[int]]
    Numbers = Converted[tuple[float, ...], str | Sequence[float]]
else:
    ModelMetaclass = type(BaseModel)
    AnyPath = Path
    OptionalPath = Path | None
    Paths = Annotated[tuple[Path, ...], BeforeValidator(_items)]
    Spec = Annotated[
        str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
    ]
    OptionalSpec = Spec | None
    Words = Annotated[tuple[str, ...], COMMAS]
    Items = Annotated[tuple[str, ...], BeforeValidator(_items)]
    Counts = Annotated[tuple[int, ...], _numbers(int, "whole numbers", "1,8,32"), COMMAS]
    Numbers = Annotated[tuple[float, ...], _numbers(float, "numbers", "0.01,0.1,1"), COMMAS]


def option(
    *,
    default: Any = ...,
    default_factory: Callable[[], Any] | None = None,
    kw_only: bool = True,
    group: str | None = None,
    flag: str | None = None,
    switches: Mapping[str, tuple[str | dict[str, str], str]] | None = None,
    **rules: Any,
) -> Any:
    """Declare an option. An option with only a default needs just `name: type = default`.

    Args:
        kw_only: False for a positional argument of the command line and of the Python function.
        group: heading in `--help`; None takes the name of the class.
        flag: flag of the command line; None is `--name`, and an empty string is no flag.
        switches: additional flags that set this field: flag → (value, help), or ({argument: value}, help).
        **rules: further arguments of `pydantic.Field`, such as `ge=1`.
    """
    extra: Any = {
        "positional": not kw_only,
        "group": group,
        "flag": flag,
        "switches": switches or {},
    }
    if default_factory is not None:
        return Field(default_factory=default_factory, json_schema_extra=extra, **rules)
    return Field(default, json_schema_extra=extra, **rules)


def check(method: Method) -> Method:
    """Mark a method of a `Config` as a validator, which raises `EdgekdError` if fields contradict each other."""
    method.is_check = True  # type: ignore[attr-defined]
    return method


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class _Meta(ModelMetaclass):
    """Metaclass that shows `option` and `Converted` to type checkers and editors."""


class Config(BaseModel, metaclass=_Meta):
    """The options of one command. Options that are None are chosen from the others when the command runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    whole_file: ClassVar[bool] = False
    """Whether a file without a table for the command holds only its settings."""

    config: OptionalPath = option(default=None, group=SETTINGS, exclude=True)
    """TOML or YAML file with any of these settings."""
    settings: Items = option(default=(), group=SETTINGS, flag="--set", exclude=True)
    """Any setting as name=value or a.b=value; may be repeated."""

    @classmethod
    def verb(cls) -> str:
        """Return the command, which is also the name of its table in a file: `vl train` for `VlTrainConfig`."""
        return " ".join(re.findall("[A-Z][a-z]+", cls.__name__.removesuffix("Config"))).lower()

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Merge the file `config`, the given options (None: not given), and `settings`, in increasing priority.

        Every problem of the three sources is in one `EdgekdError`.
        """
        given = {name: copy.deepcopy(value) for name, value in given.items() if value is not None}
        file, settings = given.pop("config", None), _items(given.pop("settings", ()))
        values = cls.from_file(_read_settings(Path(file)), Path(file)) if file is not None else {}
        refuse_command(values, file)
        values |= given
        for setting in settings:
            put(values, setting)
        _refuse(values)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_problem(cls, one) for one in error.errors()]
            wrong = {str(one["loc"][0]) for one in error.errors() if one["loc"]}
        try:  # what is left may contradict itself
            right = {name: value for name, value in values.items() if name not in wrong}
            cls.model_validate(right, context={"wrong": wrong})
        except EdgekdError as error:
            problems.append(error)
        except ValidationError:
            pass
        raise _together(problems, cls.verb())

    @classmethod
    def restore(cls, values: Any, path: Path) -> Self:
        """Validate the settings of a run from its file `path`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise EdgekdError(
                f"The run configuration at {path} is damaged ({printable(error.errors()[0]['msg'].lower())}).",
                "Restore it, or train again with --overwrite.",
            ) from error

    @classmethod
    def from_file(cls, values: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return this command's settings from the tables of a file."""
        table = values.get(cls.verb())
        if table is None and cls.whole_file:
            return {name: value for name, value in values.items() if name != "gates"}
        if not isinstance(table, dict):
            raise EdgekdError(
                f"{path} has no table [{cls.verb()}].", f"Write the settings under [{cls.verb()}]."
            )
        return dict(table)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        for name in (info.context or {}).get("wrong", ()):
            self.__dict__.pop(name, None)
        if problems := list(self._contradictions()):
            raise _together(problems, self.verb())
        return self

    def _contradictions(self) -> Iterator[EdgekdError]:
        methods = {
            name: method
            for kind in reversed(type(self).__mro__)
            for name, method in vars(kind).items()
        }
        for name, method in methods.items():
            if getattr(method, "is_check", False):
                try:
                    getattr(self, name)()
                except EdgekdError as error:
                    yield error
                except AttributeError:
                    if set(type(self).model_fields) <= set(self.__dict__):
                        raise  # else it reads a field that is invalid itself


def _refuse(values: Mapping[str, Any]) -> None:
    """Refuse empty text, which would be the current folder as a path, and settings named config or settings."""
    for name, value in values.items():
        if name in ("config", "settings"):
            raise EdgekdError(
                f"{name} cannot be set in a file or with --set.",
                "Remove it; put all settings into one file.",
            )
        if "" in (value if isinstance(value, list | tuple) else (value,)):
            raise EdgekdError(f"{name} is empty.", "Give it a value, or leave it out.")


def refuse_command(values: Mapping[str, Any], file: object) -> None:
    """Raise an `EdgekdError` if the settings of a file name a program for descriptions."""
    if str(values.get("descriptions", "")).startswith("command:"):
        raise EdgekdError(
            f"{file} has a command for descriptions, which is only allowed on the command line.",
            "Give it there: --descriptions command:PROGRAM.",
        )


def _read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file (`.yaml`, `.yml`) or a TOML file (any other name) as a table."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return read_toml(path, "configuration file", _CHECK)
    found = read_yaml(path, "configuration file", _CHECK)
    if not isinstance(found, dict):
        raise EdgekdError(f"The configuration file at {path} has no settings.", _CHECK)
    return {str(name): value for name, value in found.items()}


def put(target: dict[str, Any], setting: str) -> None:
    """Set `a.b=value` in nested tables; the value is TOML, or else a string."""
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


def options_of(model: type[Config]) -> dict[str, tuple[FieldInfo, str, Mapping[str, Any]]]:
    """Return name → field, heading in `--help`, and the arguments of `option`.

    The heading is the name of the class that declares the field, `Data` for `DataOptions`. Positional options come
    first. Headings are in the order of the fields, which is that of a dataclass: the last base first.
    """
    rows = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        owner = next(
            kind for kind in model.__mro__[::-1] if name in vars(kind).get("__annotations__", {})
        )
        words = re.findall("[A-Z][a-z]+", owner.__name__)
        heading = extra.get("group") or (words[-2] if words[-1] == "Options" else "Options")
        rows[name] = (field, str(heading), extra)
    headings = [*dict.fromkeys(row[1] for row in rows.values() if row[1] != SETTINGS), SETTINGS]
    return dict(
        sorted(
            rows.items(),
            key=lambda row: (not row[1][2].get("positional"), headings.index(row[1][1])),
        )
    )


def _problem(model: type[BaseModel], error: Any) -> EdgekdError:
    name, value = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "extra_forbidden":
        return EdgekdError(
            f'There is an unknown setting "{name}".', did_you_mean(name, model.model_fields)
        )
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return EdgekdError(f'There is no {name} "{value}".', did_you_mean(str(value), choices))
    return EdgekdError(f"The setting {name} is invalid: {error['msg'].lower()}.")


def _together(problems: Sequence[EdgekdError], verb: str) -> EdgekdError:
    help_ = f"See: edgekd {verb} --help."
    if len(problems) == 1:
        return EdgekdError(problems[0].message, problems[0].hint or help_)
    shown = [
        one.message.removesuffix(".") + (f" ({one.hint.removesuffix('.')})" if one.hint else "")
        for one in problems[:_MOST_PROBLEMS]
    ]
    if more := len(problems) - len(shown):
        shown.append(f"and {more} more")
    return EdgekdError(f"The settings have {len(problems)} problems: {'; '.join(shown)}.", help_)
