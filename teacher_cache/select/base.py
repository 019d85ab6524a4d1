"""What stage one does with one kind of targets: `Selector`, and what most kinds answer.

`kinds.py` lists them all. What a kind is in a cache, spec and codec, is in `shared/targets`.

P or N positions, V logit width, C classes, K entries of each position or E of all of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from shared.arrays import ranges
from shared.format.blocks import Block
from shared.targets.base import TargetKind
from shared.targets.ragged import MAX_ENTRIES
from shared.targets.record import Floats, Target
from shared.targets.spec import TargetSpec

if TYPE_CHECKING:
    from teacher_cache.config import CaptureConfig
    from teacher_cache.tasks.rows import TrainingRow


@dataclass(slots=True)
class Selected:
    """Targets of N positions at T = 1; of a row marked in `bad_N` only the ids are valid."""

    ids: Tensor  # int64 [N, K], best first; of a ragged kind [E], by position and class
    logprobs: Tensor  # float32, the same shape, over all C classes; of a drawn entry its weight's
    counts: Tensor | None  # int64 [N], entries of each position of a ragged kind
    log_tail: Tensor  # float32 [N], ln of the mass of all other classes, -inf where it is 0
    entropy: Tensor  # float32 [N], nats, over all C classes
    log_partition: Tensor  # float32 [N], logsumexp of the logits
    bad_N: Tensor  # bool [N]: NaN or +inf among the logits, or no finite class
    label_logprob: Tensor | None  # float32 [N], NaN where the label is negative: no label
    log_partition_ratio: dict[float, Tensor]  # T -> float32 [N], logsumexp(logprobs of all C / T)


class Buffer(Protocol):
    """Entries of positions, by their numbers in the window."""

    def store(self, at: Tensor, selected: Selected) -> None:
        """Keeps what was selected at the positions `at`, i64 [N of a batch]."""

    def target(self, at: Tensor, log_tail: np.ndarray) -> Target:
        """The targets of the positions `at`, in that order."""


@dataclass(frozen=True, slots=True)
class PositionTargets:
    """What a block is given of the P positions of its rows."""

    target: Target
    label_logprob: Floats
    entropy: Floats
    log_partition_ratio: Mapping[float, Floats]


class Selector(ABC):
    """How targets of one kind are made of a teacher's logits, buffered, learnt from, made fewer."""

    has_targets = True
    distributions = True  # what is kept are probabilities of classes
    learns_classes = True  # calibration learns in which order classes are often kept
    # Bytes of all target columns of a position by its entries, at 7 bits and 151,936 classes:
    # benchmarks/README.md. Empty where they go with the number of classes, or were not measured.
    bytes_by_entries: ClassVar[Mapping[float, float]] = {}

    # Options

    def spec(
        self, kind: TargetKind, num_classes: int, top_k: int, config: "CaptureConfig"
    ) -> TargetSpec:
        """What a job with these options keeps."""
        return TargetSpec(
            kind=kind,
            num_classes=num_classes,
            top_k=1,
            mean_entries=0.0,
            value_bits=config.value_bits,
            temperatures=asked_temperatures(config),
        )

    def options_like(self, targets: TargetSpec) -> dict[str, Any]:
        """The options of a job that is to keep what a cache keeps; others stay as they are."""
        return {"targets": targets.kind, "top_k": None}

    def compared(
        self, kind: TargetKind, asked: TargetSpec, config: "CaptureConfig"
    ) -> list[TargetSpec]:
        """The sizes of this kind that `plan` compares; the one that is asked for is among them."""
        return [asked] if asked.kind == kind and asked.distributions else []

    # From a teacher's logits

    @abstractmethod
    def select(
        self,
        logits_NV: Tensor,
        spec: TargetSpec,
        labels_N: Tensor | None = None,
        offset_N: Tensor | None = None,
    ) -> Selected:
        """What is kept of each position; see `targets.select`."""

    def random_bits(self, seed: int, rows: "Sequence[TrainingRow]") -> np.ndarray | None:
        """64 bits for each position, where something is drawn."""
        return None

    def buffer(self, positions: int, spec: TargetSpec) -> Buffer:
        """Room for the entries of so many positions, which come in any order."""
        return EqualEntries(positions, spec.num_entries)

    @abstractmethod
    def fill(self, block: Block, kept: PositionTargets) -> None:
        """Gives a block its targets."""

    # Calibration

    def most_entries_of(self, spec: TargetSpec) -> int:
        """Entries that a position has at most."""
        return MAX_ENTRIES

    def find_threshold(self, logprobs_NK: Tensor, spec: TargetSpec) -> float:
        """The threshold that gives `spec.mean_entries`; 0 where a kind has none."""
        return 0.0

    def most_entries(self, logprobs_NK: Tensor) -> float:
        """The largest mean that any threshold gives."""
        return math.inf

    def kept_share(
        self, ids_NK: Tensor, logprobs_NK: Tensor, spec: TargetSpec
    ) -> tuple[Tensor, Tensor]:
        """The ids of the largest classes that may be kept, and with which probability each is."""
        return ids_NK, torch.ones_like(logprobs_NK)

    # From targets that a cache has

    def fewer(self, target: Target, spec: TargetSpec) -> Target:
        """The entries that `spec` keeps of these; a sample needs `random_bits`."""
        return target

    def kept_mass(self, target: Target, spec: TargetSpec) -> Floats:
        """Probability of the classes that are kept as they are, [P]."""
        return -np.expm1(target.log_tail)


def asked_temperatures(config: "CaptureConfig") -> tuple[float, ...]:
    """The temperatures to be made exact, ascending; 1 always is."""
    return tuple(sorted({t for t in config.temperature if t != 1.0}))


def sums_of_positions(values: Floats, target: Target) -> Floats:
    """Sums over the entries of each position, [P]."""
    if target.counts is None:
        return values.sum(axis=1)
    return np.add.reduceat(values, np.cumsum(target.counts) - target.counts)


class EqualEntries:
    """Entries of a kind that keeps the same number of them at every position."""

    def __init__(self, positions: int, entries: int) -> None:
        self._ids = torch.empty(positions, entries, dtype=torch.int32)
        self._logprobs = torch.empty(positions, entries)

    def store(self, at: Tensor, selected: Selected) -> None:
        self._ids[at] = selected.ids.to("cpu", torch.int32)
        self._logprobs[at] = selected.logprobs.cpu()

    def target(self, at: Tensor, log_tail: np.ndarray) -> Target:
        return Target(self._ids[at].numpy(), self._logprobs[at].numpy(), log_tail)


class RaggedEntries:
    """Entries as they came, one position after another, and where those of each begin."""

    def __init__(self, positions: int) -> None:
        self._ids: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._starts = np.zeros(positions, np.int64)
        self._counts = np.zeros(positions, np.int32)
        self._stored = 0

    def store(self, at: Tensor, selected: Selected) -> None:
        assert selected.counts is not None  # a ragged kind has them
        counts = selected.counts.cpu().numpy()
        self._counts[at.numpy()] = counts
        self._starts[at.numpy()] = self._stored + np.cumsum(counts) - counts
        self._ids.append(selected.ids.to("cpu", torch.int32).numpy())
        self._logprobs.append(selected.logprobs.cpu().numpy())
        self._stored += len(selected.ids)

    def target(self, at: Tensor, log_tail: np.ndarray) -> Target:
        if len(self._ids) > 1:
            self._ids, self._logprobs = [
                [np.concatenate(parts)] for parts in (self._ids, self._logprobs)
            ]
        counts = self._counts[at.numpy()]
        entries = ranges(self._starts[at.numpy()], counts)
        return Target(self._ids[0][entries], self._logprobs[0][entries], log_tail, counts)
