"""One field of a config class: what its flag or key may be, and what --help says of it."""

import dataclasses
import datetime
import difflib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import ConfigError

SET: Final = object()
"""Stands in `read_when` for every value but None, False, 0 and an empty one."""

# In the order in which text is tried: the strictest first.
SCALARS: dict[type, str] = {
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
    choices: Collection[str] = ()
    """The names that text may be, where a table of them is open and no Literal can list them."""
    show_default: str | None = None
    """Shown in --help for a default that means little as it stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field of a config class as an option: what it may be, how it is read, what help says."""

    name: str
    option: Option
    heading: str
    default: Any
    types: tuple[type, ...]  # of one item where repeated, in the order of SCALARS
    choices: Collection[Any]  # the values of a Literal, or the names of a table
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
        """Whether it is of one type, which typer knows how to convert a flag's text to."""
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
        words = [SCALARS[kind] + (bounds if kind in (int, float) else "") for kind in self.types]
        if self.choices:
            names = ", ".join(map(str, self.choices))
            words.append(f"one of {names}" if len(self.choices) > 1 else names)
        return " or ".join(words)

    def from_flag(self, given: Any) -> Any:
        return tuple(map(self._from_text, given)) if self.repeated else self._from_text(given)

    def _from_text(self, given: Any) -> Any:
        if isinstance(given, str):
            given = at_home(given)
        elif isinstance(given, Path):
            given = Path(at_home(str(given)))
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
        if type(value) is str and value not in self.choices:
            value = at_home(value)
            return Path(value) if Path in self.types else value
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

    def help(self, fields: "Mapping[str, Field]") -> str:
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


def plain(value: Any) -> Any:
    """A value as a file holds it: paths are text, tuples are lists."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def at_home(given: str) -> str:
    """A leading ~/ becomes the home folder, as a shell has it where nothing is quoted.

    Many an option takes a Hub id or a folder as text, so this cannot go by the type of a field.
    """
    return os.path.expanduser(given) if given.startswith("~/") else given
