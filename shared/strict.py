"""Strict reading of JSON: bounded in size, and every value of the type that its field declares.

For files that come from elsewhere. An error names the file, the field, what was found and what was
expected; unknown fields are ignored, and one marked `added` may be missing.
"""

import functools
import json
import types
import typing
from dataclasses import Field, fields, is_dataclass
from typing import Any, TypeVar

from shared.errors import ConfigError, CorruptCache

_MAX_VALUES = 1 << 17  # a commit has one for each block: half a billion positions
_MAX_CONTAINERS = 256

T = TypeVar("T")


def parse_json(
    data: bytes,
    where: str,
    *,
    max_values: int = _MAX_VALUES,
    max_containers: int = _MAX_CONTAINERS,
) -> Any:
    """Parsed JSON; anything else, or far more values or nesting than we write, is an error."""
    containers = data.count(b"[") + data.count(b"{")
    values = containers + data.count(b",")
    if containers > max_containers or values > max_values:
        raise CorruptCache(
            f"{where}: {values:,} values in {containers:,} lists and objects, expected at most "
            f"{max_values:,} in {max_containers}. Restore it from a copy."
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCache(f"{where}: not valid JSON: {error}") from None


def build(kind: type[T], value: Any, where: str) -> T:
    """A dataclass from parsed JSON, every field checked against its declared type."""
    return typing.cast(T, _build(kind, value, where))


def _build(kind: Any, value: Any, where: str) -> Any:
    if type(value) is kind and kind in (str, int, float, bool):  # most fields: 7 times as fast
        return _in_range(value, where)
    origin, arguments = _parts_of(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        exact = [argument for argument in arguments if type(value) is argument]
        return _build((exact or arguments)[0], value, where)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        make: Any = kind
        hints = _types_of(make)
        added = {field.name for field in fields(kind) if field.metadata.get("added")}
        missing = {field.name for field in fields(kind)} - value.keys() - added
        if missing:
            raise CorruptCache(f"{where}: the field {min(missing)!r} is missing")
        values = {
            f.name: _build_field(f, hints[f.name], value[f.name], f"{where}: {f.name}")
            for f in fields(kind)
            if f.name in value
        }
        try:
            return make(**values)
        except ConfigError as error:
            raise CorruptCache(f"{where}: {error}") from None
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return _items(arguments[0], value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {_text(key, where): _build(arguments[1], item, where) for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _wrong(where, value, "a number") from None
    raise _wrong(where, value, f"a value of type {kind.__name__}")


def _in_range(value: str | float | bool, where: str) -> str | float | bool:
    """Text that can be written somewhere, a whole number that fits 64 bits."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        raise _wrong(where, value, "a number of at most 64 bits")
    return _text(value, where) if isinstance(value, str) else value


def _items(kind: Any, values: list[Any], where: str) -> tuple[Any, ...]:
    """The items of a list, each checked.

    Lists of lengths may be long, so that whole numbers are looked at together: 60 times as fast.
    """
    plain = kind is int and set(map(type, values)) == {int}
    if plain and min(values) >= -(2**63) and max(values) < 2**64:
        return tuple(values)
    return tuple(_build(kind, item, where) for item in values)


@functools.cache
def _parts_of(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a declared type is made from, and its arguments."""
    return typing.get_origin(kind), typing.get_args(kind)


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    """The declared type of each field of a dataclass."""
    return typing.get_type_hints(kind)


def _build_field(description: Field[Any], kind: Any, value: Any, where: str) -> Any:
    """The value of one field; `one_of` in its metadata is the table whose names it may have."""
    table = description.metadata.get("one_of")
    if table is not None and not (isinstance(value, str) and value in table):
        raise _wrong(where, value, f"one of {', '.join(table)}")
    return _build(kind, value, where)


def _text(value: str, where: str) -> str:
    """Half a surrogate pair is legal in JSON but can be written nowhere."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(where, value, "Unicode text") from None
    return value


def _wrong(where: str, value: Any, expected: str) -> CorruptCache:
    return CorruptCache(f"{where}: found {short(value)}, expected {expected}")


def short(value: Any) -> str:
    """A value as an error shows it, cut off where it is long."""
    return repr(str(value)[:80])
