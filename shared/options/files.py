"""Options in a file: YAML, TOML and JSON that refuse what is unknown, ill-typed or given twice."""

import difflib
import json
import os
import re
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.errors import ConfigError
from shared.options.fields import Field


def read_values(path: Path, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The value of each field that a file names."""
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


def write_values(values: Mapping[str, Any], path: Path) -> None:
    """Writes plain values as a YAML file, which appears whole or not at all."""
    text = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".tmp.{os.getpid()}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _named(key: str, fields: Mapping[str, Field], path: Path) -> Field:
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
