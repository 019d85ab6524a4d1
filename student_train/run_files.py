"""The files of a run folder, read strictly: bytes that no run wrote end in an error of our own.

Each reader names the file, what was found, what was expected, and how to go on.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from shared.errors import ConfigError, CorruptCache, CorruptRun
from shared.format.limits import MAX_SHARDS
from shared.options import load, resolved
from shared.storage.base import Storage
from shared.strict import build, parse_json
from shared.targets.base import Kind
from shared.targets.kinds import KINDS
from student_train.config import TrainConfig
from student_train.metrics.names import MetricName

log = logging.getLogger(__name__)

CONFIG, SNAPSHOT, RESULT, METRICS = "run.yaml", "snapshot.json", "result.json", "metrics.jsonl"
STATUS = "status.json"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_RESULT_BYTES = 1 << 20
_MAX_STATUS_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16
_ANOTHER_RUN = "Restore it from a copy, or start a new run with another --out."
# The number that each kind of line is read for.
_NUMBERS = {"train": "loss", "speed": "seconds", "eval": "loss"}


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """One cache as a run was started on it: the hash of every shard, by its number as text."""

    cache_id: str
    shards: dict[str, str]
    weight: float | None = field(default=None, metadata={"added": True})


@dataclass(frozen=True, slots=True)
class _Snapshot:
    caches: tuple[CacheSnapshot, ...]


_ALWAYS = ("loss", "positions")
_OPTIONAL = ("teacher_parameters", "validation_cache_id", "validation", "before", "student")
_RUN_AGAIN = "Delete it and run the same train-student run command again: its checkpoints are kept."


@dataclass(frozen=True, slots=True)
class _Validation:
    """What `compare` needs of the numbers on a held-out cache; only `_ALWAYS` are always there."""

    loss: float
    positions: int
    kl_bucketed: float | None
    agreement: float | None
    teacher_loss: float | None
    targets: str | None
    metric: MetricName | None
    accuracy: float | None
    entity_f1: float | None
    chrf: float | None
    teacher_accuracy: float | None
    teacher_entity_f1: float | None
    ece: float | None
    teacher_chrf: float | None


@dataclass(frozen=True, slots=True)
class _Result:
    max_steps: int
    parameters: int
    seconds: float
    weights: dict[str, float]
    teacher_parameters: int | None
    validation_cache_id: str | None
    validation: _Validation | None
    before: _Validation | None
    student: str | None


@dataclass(frozen=True, slots=True)
class StatusRecord:
    """What an unfinished run last wrote of itself."""

    state: Literal["started", "stopped", "failed"]
    max_steps: int
    message: str | None


def read_status(storage: Storage) -> StatusRecord:
    """How the last start of an unfinished run ended, as far as it could still say so."""
    where = storage.where(STATUS)
    with _explained(_RUN_AGAIN):
        raw = parse_json(storage.read(STATUS, max_bytes=_MAX_STATUS_BYTES), where)
        return build(StatusRecord, raw, where)


def read_snapshot(storage: Storage) -> tuple[CacheSnapshot, ...]:
    """The caches that this run was started on."""
    path = storage.where(SNAPSHOT)
    with _explained(f"It says which shards this run trains on. {_ANOTHER_RUN}"):
        raw = parse_json(storage.read(SNAPSHOT), path, max_values=8 * MAX_SHARDS)
        return build(_Snapshot, raw, path).caches


def read_options(storage: Storage) -> dict[str, Any]:
    """The options that this run was started with, as `resolved` gives them."""
    path = storage.local(CONFIG)
    with _explained(f"It says how this run was started. {_ANOTHER_RUN}"):
        storage.read(CONFIG, max_bytes=_MAX_CONFIG_BYTES)  # there, a file, and not enormous
        try:
            return resolved(load(TrainConfig, {}, path))
        except ConfigError as error:
            said = str(error).removeprefix(f"{path}: ")
            raise CorruptCache(f"{path}: {said[:500]}") from None
        except RecursionError:
            raise CorruptCache(f"{path}: found lists in lists without end") from None


def read_result(storage: Storage) -> dict[str, Any]:
    """The numbers of a finished run; those that `compare` shows are of their type."""
    path = storage.where(RESULT)
    with _explained(_RUN_AGAIN):
        raw = parse_json(storage.read(RESULT, max_bytes=_MAX_RESULT_BYTES), path)
        build(_Result, _with_absent(raw), path)
    result: dict[str, Any] = raw
    for name in ("validation", "before"):
        _check_intervals(result.get(name), f"{path}: {name}")
    return result


def _with_absent(raw: Any) -> Any:
    """The numbers with None for each that a run may not have."""
    if not isinstance(raw, dict):
        return raw
    filled: dict[str, Any] = dict.fromkeys(_OPTIONAL) | raw
    absent = dict.fromkeys(field.name for field in fields(_Validation) if field.name not in _ALWAYS)
    for name in ("validation", "before"):
        if isinstance(filled[name], dict):
            filled[name] = absent | filled[name]
    return filled


def _check_intervals(numbers: Any, where: str) -> None:
    """The ends of an interval are named after a metric, of which there are more with every task."""
    for name, value in (numbers or {}).items():
        if name.endswith(("_low", "_high")) and type(value) not in (int, float):
            raise CorruptRun(
                f"{where}: {name[:80]}: found {_short(value)}, expected a number. {_RUN_AGAIN}"
            )


def kl_of(numbers: Mapping[str, Any]) -> float | None:
    """The KL to the teacher, whole or over the kept classes; None without targets."""
    return numbers.get("kl", numbers.get("kl_bucketed"))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, data in enumerate(_lines(file), start=1):
            line, problem = _parse_line(data)
            if problem is None:
                yield line
            elif not data.endswith(b"\n") and len(data) < _MAX_LINE_BYTES:
                log.warning("%s: line %d was cut short by a crash and is left out", path, number)
            else:
                raise CorruptRun(
                    f"{path}: line {number}: {problem}. Restore the file from a copy, or "
                    "delete the line: nothing is trained from it, it is only missing in the log."
                )


def _lines(file: Any) -> Iterator[bytes]:
    """Lines, or pieces of one that is longer than any we write."""
    yield from iter(lambda: file.readline(_MAX_LINE_BYTES), b"")


def _parse_line(data: bytes) -> tuple[dict[str, Any], str | None]:
    """The line, and what is wrong with it."""
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return {}, f"found {data[:40]!r}, expected a JSON object"
    if not isinstance(line, dict):
        return {}, f"found {type(line).__name__}, expected a JSON object"
    if type(line.get("step")) is not int:
        return {}, f"step: found {_short(line.get('step'))}, expected a whole number"
    name = _NUMBERS.get(str(line.get("kind")))
    if name is None:
        return {}, f"kind: found {_short(line.get('kind'))}, expected {', '.join(_NUMBERS)}"
    for key in (name, "hard"):
        value = line.get(key, 0 if key == "hard" else None)
        if type(value) not in (int, float):
            return {}, f"{key}: found {_short(value)}, expected a number"
    return line, None


def _short(value: Any) -> str:
    return repr(value)[:80]


@contextmanager
def _explained(advice: str) -> Iterator[None]:
    """Errors of the readers that both stages share, as those of a run with a way to go on."""
    try:
        yield
    except CorruptCache as error:
        said = str(error).removesuffix(" Restore it from a copy.").rstrip(".")
        raise CorruptRun(f"{said}. {advice}") from None


def kind_of_text(targets: str) -> Kind[Any] | None:
    """The kind that the text of targets in a result begins with; None where it names no kind."""
    return KINDS.get(targets.partition(" ")[0])
