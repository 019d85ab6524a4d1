"""Is a checkpoint whole? Asked before anything of it is used, without running or believing it.

A state file is opened with `weights_only=True`, which builds tensors and plain containers and runs
nothing, and with `mmap=True`, which reads the structure and leaves the numbers on the disk: for the
optimizer state of a large student that is milliseconds. It finds what is cut, replaced, emptied or
missing. It does not find a changed number: nothing that is written holds a checksum of one.
"""

import struct
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from shared.errors import CorruptRun
from shared.storage.local import LocalStorage
from shared.strict import build, parse_json

_STATE = "trainer_state.json"  # written last
_INDEX = "model.safetensors.index.json"
_MAX_STATE_BYTES = 256 << 20  # its log has one reading for every --log-every steps
# What torch raises on bytes that are no state; seen by changing bytes of states at random.
_UNREADABLE = (
    UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class _State:
    """The fields of trainer_state.json that a resumed run works with."""

    global_step: int
    max_steps: int
    log_history: tuple[dict[str, Any], ...]
    stateful_callbacks: dict[str, Any]
    best_metric: float | None
    best_model_checkpoint: str | None


@dataclass(frozen=True, slots=True)
class _Index:
    weight_map: dict[str, str]


def check(checkpoint: Path) -> None:
    """Raises an error that names the first file a run cannot go on from."""
    _check_trainer_state(checkpoint)
    check_weights(checkpoint)
    _check_state(checkpoint / "optimizer.pt", "state", "param_groups")
    _check_state(checkpoint / "scheduler.pt", "last_epoch")
    # Of any number of processes: a run may go on with another number than it stopped with.
    random_states = sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    for path in random_states:
        _check_state(path, "python", "numpy", "cpu")
    if (checkpoint / "scaler.pt").exists():
        _check_state(checkpoint / "scaler.pt")


def check_weights(checkpoint: Path) -> None:
    """A safetensors file says how long it is, so that a cut one is found without reading it all."""
    for pattern in ("pytorch_model*", "**/.metadata"):
        for path in checkpoint.glob(pattern):
            raise CorruptRun(f"{path}: may hold a pickle, expected weights in safetensors files")
    storage = LocalStorage(checkpoint)
    names = {path.name for path in checkpoint.glob("*.safetensors")}
    if storage.exists(_INDEX):
        where = storage.where(_INDEX)
        names |= set(
            build(_Index, parse_json(storage.read(_INDEX), where), where).weight_map.values()
        )
    if not names:
        raise CorruptRun(f"{checkpoint}: found no weights, expected model.safetensors")
    for name in sorted(names):
        path = storage.local(name)
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CorruptRun(f"{path}: found no readable safetensors file: {error}") from None


def _check_trainer_state(checkpoint: Path) -> None:
    path, step = checkpoint / _STATE, int(checkpoint.name.rpartition("-")[2])
    data = LocalStorage(checkpoint).read(_STATE, max_bytes=_MAX_STATE_BYTES)
    raw = parse_json(data, str(path), max_values=len(data), max_containers=len(data))
    state = build(_State, raw, str(path))
    if state.global_step != step:
        raise CorruptRun(f"{path}: found global_step {state.global_step}, expected {step}")
    unknown = raw.keys() - {field.name for field in fields(TrainerState)}
    if unknown:
        raise CorruptRun(f"{path}: found the field {min(unknown)[:80]!r}, which no Trainer writes")
    if state.best_model_checkpoint is not None:  # loaded at the end of the run
        check_weights(checkpoint.parent / Path(state.best_model_checkpoint).name)


def _check_state(path: Path, *keys: str) -> None:
    if not path.is_file():
        raise CorruptRun(f"{path}: this file is missing")
    try:
        with safe_globals():
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _UNREADABLE as error:
        raise CorruptRun(
            f"{path}: found {path.stat().st_size:,} bytes that are not only tensors and plain "
            f"values ({type(error).__name__}), expected what torch.save writes of a state"
        ) from None
    if not isinstance(state, dict) or not set(keys) <= state.keys():
        raise CorruptRun(
            f"{path}: found a {type(state).__name__}, expected a dict with {', '.join(keys)}"
        )
