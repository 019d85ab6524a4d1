"""A frozen config dataclass is a command: name, type, default, bound and help are written once.

    @group("What is kept")
    @dataclass(frozen=True, kw_only=True)
    class TargetOptions:
        top_k: Annotated[int, Option(help="Entries kept per position.", min=1)] = 32

    @dataclass(frozen=True, kw_only=True)
    class CaptureConfig(JobOptions, TargetOptions):
        def __post_init__(self) -> None:
            check_bounds(self)

    @command(app, "run", CaptureConfig)
    def run(config: CaptureConfig) -> None: ...

A config may inherit its fields from dataclasses that each hold one concern. `group` names the
heading in --help that the fields of one such class stand under; headings come in the order of the
bases, after the config's own fields. (Bases with slots cannot be inherited side by side.)

A flag beats the --config file, which beats the default. A field may be str, int, float, bool, Path,
a Literal, a union of these (`int | Literal["auto"]`, `str | None`) or a tuple[X, ...] of these,
whose flag is repeatable. A field without a default is required.
"""

import dataclasses
import datetime
import difflib
import inspect
import json
import math
import os
import re
import shutil
import sys
import textwrap
import tomllib
import traceback
import types
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn, TypeVar

import typer
import yaml
from typer.core import TyperCommand
from typer.main import get_command

from shared.errors import ConfigError, TeacherCacheError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

SET: Final = object()
"""Stands in `read_when` for every value but None, False, 0 and an empty one."""

# In the order in which text is tried: the strictest first.
_SCALARS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    str: "text",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What a field's type and default do not say about its option."""

    help: str
    min: float | None = None
    max: float | None = None
    flag: str | None = None
    """Overrides the flag, or the name in capitals of a positional argument."""
    argument: bool = False
    read_when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Other field -> its values for which this option is read; all must hold, see also SET."""
    show_default: str | None = None
    """Shown in --help for a default that means little as it stands."""


_HEADINGS: dict[type, str] = {}


def group(heading: str) -> Callable[[type[ConfigT]], type[ConfigT]]:
    """Puts the options that a dataclass declares itself under one heading of --help."""

    def register(config_class: type[ConfigT]) -> type[ConfigT]:
        _HEADINGS[config_class] = heading
        return config_class

    return register


def command(
    app: typer.Typer, name: str, config_class: type[ConfigT]
) -> Callable[[Callable[[ConfigT], None]], Callable[[ConfigT], None]]:
    """Registers a function of a config as a subcommand; its docstring is the command's help."""

    def register(function: Callable[[ConfigT], None]) -> Callable[[ConfigT], None]:
        fields = _fields(config_class)

        # Every parameter defaults to None: a flag equal to its option's default is still "given".
        def run(config: Path | None, traceback: bool | None, **flags: Any) -> None:
            given = {
                name: fields[name].from_flag(value)
                for name, value in flags.items()
                if value not in (None, [], ())
            }
            function(load(config_class, given, config))

        parameters = [_parameter(each, fields, app) for each in fields.values()]
        run.__signature__ = inspect.Signature(parameters + _common_parameters())  # type: ignore[attr-defined]
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        # An indented paragraph is an example, whose lines stay as they are.
        unwrapped = "\n\n".join(
            paragraph if paragraph.startswith("    ") else " ".join(paragraph.split())
            for paragraph in paragraphs
        )
        app.command(name, cls=_Command, help=_unmarked(unwrapped, app))(run)
        return function

    return register


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the app and exits: an error is one paragraph on stderr, a traceback with --traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Exits by itself: 0, 2 for a usage error, 130 for Ctrl-C. Not app(), which would also put
        # its own excepthook in place.
        sys.exit(get_command(app).main(list(arguments)))
    except (TeacherCacheError, OSError) as error:  # transformers says "no such model" by OSError
        if "--traceback" in arguments:
            traceback.print_exception(error)
        else:
            sys.stderr.write(_error_text(str(error)))
        sys.exit(error.exit_code if isinstance(error, TeacherCacheError) else 1)


def load(
    config_class: type[ConfigT], given: Mapping[str, Any], config_file: Path | None
) -> ConfigT:
    """Builds the config from what was given by flag, then by file, then from the defaults."""
    fields = _fields(config_class)
    from_file = {} if config_file is None else _read(config_file, fields)
    values = from_file | dict(given)
    missing = [each.flag for each in fields.values() if each.required and each.name not in values]
    if missing:
        where = "on the command line or in a file given by --config"
        raise ConfigError(f"missing option {', '.join(missing)}: give it {where}")
    every_value = {each.name: each.default for each in fields.values()} | values
    for name in values:
        reason = _why_unread(fields[name], every_value, fields)
        if reason:
            raise ConfigError(reason if name in given else f"{config_file}: {reason}")
    return config_class(**values)


def check_bounds(config: "DataclassInstance") -> None:
    """Refuses a value that no flag could give, or that this config never reads.

    Every config calls it in its `__post_init__`, so that no other code checks again.
    """
    fields, values = _fields(type(config)), _values(config)
    for each in fields.values():
        value = values[each.name]
        problem = each.problem(value)
        if problem:
            raise ConfigError(f"{each.flag} {problem}")
        reason = _why_unread(each, values, fields)
        if reason and value != each.default:
            raise ConfigError(reason)


def resolved(config: "DataclassInstance") -> dict[str, Any]:
    """The options this config reads, as plain values: a file of them loads to an equal config."""
    fields, values = _fields(type(config)), _values(config)
    read = [each for each in fields.values() if _why_unread(each, values, fields) is None]
    return {each.name: _plain(values[each.name]) for each in read}


def write_resolved(config: "DataclassInstance", path: Path) -> None:
    """Writes `resolved` as a YAML file, which appears whole or not at all."""
    text = yaml.dump(resolved(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".tmp.{os.getpid()}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---- One field of a config class


@dataclass(frozen=True, kw_only=True, slots=True)
class _Field:
    name: str
    option: Option
    heading: str
    default: Any
    types: tuple[type, ...]  # of one item where repeated, in the order of _SCALARS
    choices: tuple[Any, ...]  # the values of a Literal
    optional: bool  # None is a value
    repeated: bool  # the value is a tuple

    @property
    def flag(self) -> str:
        """As the user writes it; `CACHE` for a positional argument."""
        dashed = self.name.upper() if self.option.argument else f"--{self.name.replace('_', '-')}"
        return (self.option.flag or dashed).split("/")[0]

    @property
    def opposite(self) -> str:
        """The flag that turns a switch off."""
        return f"--no-{self.flag.removeprefix('--')}"

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_switch(self) -> bool:
        return self.types == (bool,)

    @property
    def is_plain(self) -> bool:
        """Of one type, which typer knows how to convert a flag's text to."""
        return len(self.types) == 1 and not self.choices

    @property
    def typer_scalar(self) -> type:
        return self.types[0] if self.is_plain else str

    @property
    def metavar(self) -> str | None:
        """What --help calls the value, where typer does not know."""
        if self.is_plain:
            return "" if self.is_switch else None
        names = [kind.__name__.lower() for kind in self.types]
        return f"<{'|'.join([*names, *map(str, self.choices)] if names else ['choice'])}>"

    @property
    def bounds(self) -> str:
        low, high = self.option.min, self.option.max
        if low is not None and high is not None:
            return f"from {low} to {high}"
        if low is not None:
            return f"at least {low}"
        return "" if high is None else f"at most {high}"

    @property
    def expected(self) -> str:
        """What one item may be, in words."""
        bounds = f" ({self.bounds})" if self.bounds else ""
        words = [_SCALARS[kind] + (bounds if kind in (int, float) else "") for kind in self.types]
        if self.choices:
            names = ", ".join(map(str, self.choices))
            words.append(f"one of {names}" if len(self.choices) > 1 else names)
        return " or ".join(words)

    def from_flag(self, given: Any) -> Any:
        return tuple(map(self._from_text, given)) if self.repeated else self._from_text(given)

    def _from_text(self, given: Any) -> Any:
        if self.is_plain:
            return given
        for choice in self.choices:
            if given == str(choice):
                return choice
        for kind in self.types:
            try:
                return kind(given)
            except ValueError:
                continue
        raise ConfigError(f"{self.flag} {self._unfit(given)}")

    def from_file(self, value: Any) -> Any:
        """The value of a key; what does not fit is returned as it is, for `problem` to name.

        A repeatable option takes a list, or one item as it is.
        """
        if not self.repeated:
            return self._from_file_item(value)
        items = value if isinstance(value, list) else [value]
        return tuple(map(self._from_file_item, items))

    def _from_file_item(self, value: Any) -> Any:
        if Path in self.types and type(value) is str and value not in self.choices:
            return Path(value)
        if float in self.types and int not in self.types and type(value) is int:
            return float(value)
        return value

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow the flag's or key's name; None where it fits."""
        if not self.repeated:
            return None if self._fits(value) else self._unfit(value)
        if not isinstance(value, tuple):
            return f"is {value!r}, but must be a list, each item {self.expected}"
        return next((self._unfit(item) for item in value if not self._fits(item)), None)

    def _fits(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if any(value == choice and type(value) is type(choice) for choice in self.choices):
            return True
        kind = Path if isinstance(value, Path) else type(value)
        if kind is int and int not in self.types:
            kind = float
        if kind not in self.types:
            return False
        low = -math.inf if self.option.min is None else self.option.min
        high = math.inf if self.option.max is None else self.option.max
        return kind not in (int, float) or (low <= value <= high and abs(value) != math.inf)

    def _unfit(self, value: Any) -> str:
        text = f"is {value!r}, but must be {self.expected}"
        if isinstance(value, str):
            close = difflib.get_close_matches(value, map(str, self.choices), n=1)
            return f"{text}; did you mean {close[0]}?" if close else text
        unquoted = {str, Path} & set(self.types) and isinstance(value, int | float | datetime.date)
        return f"{text}; write it in quotes" if unquoted else text

    def condition(self, values: tuple[Any, ...], between: str = "|") -> str:
        """This option with the values for which another one is read, as a user would write it."""
        if self.is_switch or SET in values:
            return self.flag if SET in values or values[0] else self.opposite
        if values == (None,):
            return f"no {self.flag}"
        return f"{self.flag} {between.join(map(str, values))}"

    def help(self, fields: "Mapping[str, _Field]") -> str:
        """The option's help with choices, bounds, when it is read, and its default."""
        allowed = self.bounds if self.is_plain else self.expected
        conditions = self.option.read_when.items()
        # Long names joined by a bar could not be wrapped.
        reads = [fields[name].condition(values, " or ") for name, values in conditions]
        parts = [
            self.option.help,
            f"{allowed[0].upper()}{allowed[1:]}." if allowed else "",
            f"Read with {' and '.join(reads)}." if reads else "",
            self._shown_default(),
        ]
        return " ".join(part for part in parts if part)

    def _shown_default(self) -> str:
        shown = self.option.show_default
        if shown is None and self.required:
            return "[required]"
        if shown is None and self.is_switch and self.default is not None and not self.option.flag:
            shown = (self.flag if self.default else self.opposite).removeprefix("--")
        elif shown is None and not self.is_switch and self.default not in (None, (), ""):
            shown = ", ".join(map(str, self.default if self.repeated else (self.default,)))
        return f"[default: {shown}]" if shown else ""


@cache
def _fields(config_class: type) -> dict[str, _Field]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    declared = {each.name: each for each in dataclasses.fields(config_class)}
    fields = {
        name: _field(declared[name], hints[name], heading)
        for name, heading in _names_and_headings(config_class).items()
    }
    for each in fields.values():
        unknown = each.option.read_when.keys() - fields.keys()
        if (
            unknown
            or each.name in ("config", "traceback")
            or (each.required and each.option.read_when)
        ):
            raise TypeError(f"{config_class.__name__}.{each.name}: no such option can be")
    return fields


def _names_and_headings(config_class: type) -> dict[str, str]:
    """The heading of each field: those of the class itself first, then those of its bases."""
    names = {each.name for each in dataclasses.fields(config_class)}
    headings: dict[str, str] = {}
    for each in config_class.__mro__:
        heading = _HEADINGS.get(each, "Options")
        own = (name for name in inspect.get_annotations(each) if name in names)
        headings |= {name: heading for name in own if name not in headings}
    return headings


def _field(declared: "dataclasses.Field[Any]", hint: Any, heading: str) -> _Field:
    kind, option = typing.get_args(hint)  # Annotated[kind, Option(...)]
    repeated = typing.get_origin(kind) is tuple
    if repeated:
        kind, _ = typing.get_args(kind)  # tuple[kind, ...]
    kinds = (kind,)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = typing.get_args(kind)
    literals = [each for each in kinds if typing.get_origin(each) is Literal]
    choices = tuple(value for each in literals for value in typing.get_args(each))
    scalars = tuple(each for each in _SCALARS if each in kinds)
    optional = types.NoneType in kinds
    if len(scalars) + len(literals) + optional != len(kinds) or (
        bool in scalars and (repeated or len(scalars) > 1 or choices)
    ):
        raise TypeError(f"{declared.name}: no option can be made of the type {hint}")
    made = declared.default_factory
    return _Field(
        name=declared.name,
        option=option,
        heading=heading,
        default=declared.default if made is MISSING else made(),
        types=scalars,
        choices=choices,
        optional=optional,
        repeated=repeated,
    )


def _values(config: "DataclassInstance") -> dict[str, Any]:
    return {name: getattr(config, name) for name in _fields(type(config))}


def _why_unread(
    field: _Field, values: Mapping[str, Any], fields: Mapping[str, _Field]
) -> str | None:
    """Why an option is not read; one is read only if those it hangs on are read themselves."""
    for name, wanted in field.option.read_when.items():
        other, found = fields[name], values[name]
        only = f"{field.flag} is only read with {other.condition(wanted)}"
        if found not in wanted and not (SET in wanted and found):
            return f"{only}, but {other.flag} is {_plain(found)!r}: change it or leave this one out"
        reason = _why_unread(other, values, fields)
        if reason:
            return f"{only}, and {reason}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- The command line

_COMMON = "Every command"


class _Command(TyperCommand):
    """A command whose --help shows what every command has last, and a switch in one column.

    The name that turns a switch off is its default; a column of these names leaves the rest of the
    table too narrow to read.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy(self)
        shown.params = [copy(each) for each in self.params]
        for each in shown.params:
            each.secondary_opts = []
        TyperCommand.format_help(shown, ctx, formatter)

    def get_help_option(self, ctx: Any) -> Any:
        option: Any = super().get_help_option(ctx)
        option.rich_help_panel, option.metavar = _COMMON, ""
        return option


def _parameter(field: _Field, fields: Mapping[str, _Field], app: typer.Typer) -> inspect.Parameter:
    shown: dict[str, Any] = {"help": _unmarked(field.help(fields), app), "show_default": False}
    kind: Any = field.typer_scalar
    if field.repeated:
        kind = types.GenericAlias(list, (kind,))
    if field.option.argument:
        return _optional(field.name, kind, typer.Argument(metavar=field.flag, **shown))
    flags = field.option.flag or field.flag
    if field.is_switch and not field.option.flag:
        flags = f"{field.flag}/{field.opposite}"
    shown |= {"rich_help_panel": field.heading, "metavar": field.metavar}
    return _optional(field.name, kind, typer.Option(flags, **shown))


def _common_parameters() -> list[inspect.Parameter]:
    file = (
        "Options from a .yaml, .toml or .json file; a flag beats the file (--no-... turns a switch "
        "off)."
    )
    trace = "Show where in the code an error arose."
    shown: dict[str, Any] = {"rich_help_panel": _COMMON}
    return [
        _optional("config", Path, typer.Option("--config", metavar="FILE", help=file, **shown)),
        _optional("traceback", bool, typer.Option("--traceback", metavar="", help=trace, **shown)),
    ]


def _optional(name: str, kind: Any, info: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _unmarked(text: str, app: typer.Typer) -> str:
    """Text whose square brackets typer shows as they are, whether or not it reads rich markup."""
    return text.replace("[", r"\[") if app.rich_markup_mode == "rich" else text


def _error_text(message: str) -> str:
    """Wrapped on a terminal; otherwise one line, which a log keeps together and grep finds."""
    lines = [line.strip() for line in f"Error: {message}".splitlines() if line.strip()]
    if not sys.stderr.isatty():
        return " ".join(lines) + "\n"
    width = min(100, shutil.get_terminal_size().columns)
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in lines) + "\n"


# ---- The config file


def _read(path: Path, fields: Mapping[str, _Field]) -> dict[str, Any]:
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"--config {path}: expected a file named {', '.join(_PARSERS)}")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:]}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping from options to values, found {content!r}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        field = _named(str(key), fields, path)
        if field.name in values:
            raise ConfigError(f"{path}: {field.name} is given twice")
        values[field.name] = field.from_file(value)
        problem = field.problem(values[field.name])
        if problem:
            raise ConfigError(f"{path}: {key} {problem}")
    return values


def _named(key: str, fields: Mapping[str, _Field], path: Path) -> _Field:
    known = {each.flag.strip("-").replace("-", "_").lower(): each for each in fields.values()}
    known |= fields
    name = key.replace("-", "_")
    if name not in known:
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(fields)}"
        raise ConfigError(f"{path}: unknown option {key}; {hint}")
    return known[name]


def _pairs(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return content


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _pairs([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that _Loader reads back as it was."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unquoted, PyYAML writes U+0085 and its like as line breaks.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


# PyYAML follows YAML 1.1, where a number with an exponent needs a dot, and 1e-4 is text.
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _yaml(text: str) -> Any:
    return _Loader(text).get_single_data()


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_pairs)


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _yaml,
    ".yml": _yaml,
    ".toml": tomllib.loads,
    ".json": _json,
}
