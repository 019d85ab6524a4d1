"""A config class as a whole: its fields, its checks, and the way from flags and file to it."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from shared.errors import ConfigError
from shared.options.fields import SCALARS, SET, Field, at_home, plain
from shared.options.files import read_values, write_values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
_HEADINGS: dict[type, str] = {}


def group(heading: str) -> Callable[[type[ConfigT]], type[ConfigT]]:
    """Puts the options that a dataclass declares itself under one heading of --help."""

    def register(config_class: type[ConfigT]) -> type[ConfigT]:
        _HEADINGS[config_class] = heading
        return config_class

    return register


def load(
    config_class: type[ConfigT], given: Mapping[str, Any], config_file: Path | None
) -> ConfigT:
    """Builds the config from what was given by flag, then by file, then from the defaults."""
    fields = fields_of(config_class)
    from_file: dict[str, Any] = {}
    if config_file is not None:
        from_file = read_values(Path(at_home(str(config_file))), fields)
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
    fields, values = fields_of(type(config)), _values(config)
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
    fields, values = fields_of(type(config)), _values(config)
    read = [each for each in fields.values() if _why_unread(each, values, fields) is None]
    return {each.name: plain(values[each.name]) for each in read}


def write_resolved(config: "DataclassInstance", path: Path) -> None:
    """Writes `resolved` as a YAML file, which appears whole or not at all."""
    write_values(resolved(config), path)


@cache
def fields_of(config_class: type) -> dict[str, Field]:
    """The fields of a config class by name, in the order in which --help shows them."""
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


def _field(declared: "dataclasses.Field[Any]", hint: Any, heading: str) -> Field:
    kind, option = typing.get_args(hint)  # Annotated[kind, Option(...)]
    repeated = typing.get_origin(kind) is tuple
    if repeated:
        kind, _ = typing.get_args(kind)  # tuple[kind, ...]
    kinds = (kind,)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = typing.get_args(kind)
    literals = [each for each in kinds if typing.get_origin(each) is Literal]
    choices = tuple(value for each in literals for value in typing.get_args(each))
    scalars = tuple(each for each in SCALARS if each in kinds)
    optional = types.NoneType in kinds
    if len(scalars) + len(literals) + optional != len(kinds) or (
        bool in scalars and (repeated or len(scalars) > 1 or choices)
    ):
        raise TypeError(f"{declared.name}: no option can be made of the type {hint}")
    made = declared.default_factory
    return Field(
        name=declared.name,
        option=option,
        heading=heading,
        default=declared.default if made is MISSING else made(),
        types=tuple(each for each in scalars if each is not str or not option.choices),
        choices=option.choices or choices,
        optional=optional,
        repeated=repeated,
    )


def _values(config: "DataclassInstance") -> dict[str, Any]:
    return {name: getattr(config, name) for name in fields_of(type(config))}


def _why_unread(field: Field, values: Mapping[str, Any], fields: Mapping[str, Field]) -> str | None:
    """Why an option is not read; one is read only if those it hangs on are read themselves."""
    for name, wanted in field.option.read_when.items():
        other, found = fields[name], values[name]
        only = f"{field.flag} is only read with {other.condition(wanted)}"
        if found not in wanted and not (SET in wanted and found):
            return f"{only}, but {other.flag} is {plain(found)!r}: change it or leave this one out"
        reason = _why_unread(other, values, fields)
        if reason:
            return f"{only}, and {reason}"
    return None
