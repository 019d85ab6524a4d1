"""Several teachers on the same rows as one: the student learns from the mixture of what they say.

An `Ensemble` looks to a `BatchStream` like one cache: the rows and blocks are those of the cache
named first, and the targets are mixed while a block is read (mixtures.py). Rows are matched by
their ids; the caches may be cut into other shards and blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shared import compat
from shared.arrays import ranges
from shared.cache import Cache
from shared.errors import CacheMismatch, ConfigError
from shared.fit_rules import Side
from shared.format.blocks import Block
from shared.format.manifest import Manifest
from shared.targets.hidden import Bits, bf16_to_float32, num_states
from shared.targets.record import Floats, Target
from student_train.data.mixtures import Voice, entropy_of, mixture
from student_train.data.order import Part

_SHOWN_ROWS = 5


class Ensemble:
    """Caches of the same rows by different teachers, read as one. Safe in threads.

    Targets are mixed for the loss at one `temperature`. Hidden states are averaged, with the same
    weights. The entropy of a mixture is known for `dense` alone, so other kinds have none.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        weights: Sequence[float] = (),
        *,
        temperature: float = 1.0,
        hidden_layers: Sequence[int] = (),
    ) -> None:
        self.caches, self.temperature = tuple(caches), temperature
        if len(self.caches) < 2:
            raise ConfigError(
                "--ensemble mixes the targets of several teachers: name at least two with --cache"
            )
        given = weights or [1.0] * len(caches)
        self.weights = tuple(weight / sum(given) for weight in given)
        for other in self.caches[1:]:
            _check_same_rows(self.first, other, hidden_layers)
        self.block_rows = self.first.block_rows
        self.row_tokens, self.row_positions = self.first.row_tokens, self.first.row_positions
        self.row_labels = self.first.row_labels  # the others are labelled, or not, as the first is
        self._row_starts = [
            np.concatenate([[0], np.cumsum(cache.block_rows)]) for cache in self.caches
        ]

    @property
    def first(self) -> Cache:
        """The cache named first, whose rows and blocks are those of the ensemble."""
        return self.caches[0]

    @property
    def manifest(self) -> Manifest:
        return self.first.manifest

    @property
    def parts(self) -> list[Part]:
        """Nothing to mix in the order: weights are those of the targets."""
        return []

    @property
    def cache_ids(self) -> list[str]:
        return [cache.cache_id for cache in self.caches]

    def read_block(
        self,
        block: int,
        *,
        hidden_layers: Sequence[int] = (),
        targets: bool = True,
        skip: tuple[str, ...] = (),
    ) -> Block:
        """One block of the first cache with the targets of all; as `Cache.read_block`."""
        options = _Options(tuple(hidden_layers), targets, skip)
        own = options.read(self.first, block)
        first_row = int(self._row_starts[0][block])
        others = [self._said(n, first_row, own, options) for n in range(1, len(self.caches))]
        return self._mixed(own, [self._of_rows(own, slice(None)), *others])

    def empty_block(self, *, hidden_layers: Sequence[int] = (), targets: bool = True) -> Block:
        """A block of no rows, as `Cache.empty_block`."""
        blocks = [
            cache.empty_block(hidden_layers=hidden_layers, targets=targets) for cache in self.caches
        ]
        return self._mixed(blocks[0], [self._of_rows(block, slice(None)) for block in blocks])

    def channel_deviation(self, layer: int) -> torch.Tensor:
        """An upper bound of each channel's standard deviation in the mean state, float32 [D].

        The weighted mean of the teachers' deviations: exact where their states move together.
        """
        deviations = [cache.channel_deviation(layer) for cache in self.caches]
        pairs = zip(self.weights, deviations, strict=True)
        return torch.stack([weight * deviation for weight, deviation in pairs]).sum(dim=0)

    def _said(self, number: int, first_row: int, own: Block, options: "_Options") -> "_Said":
        """What a teacher says on the rows of a block of the first cache."""
        cache, starts = self.caches[number], self._row_starts[number]
        last_row = first_row + len(own.row_ids)
        pieces, row = [], first_row
        while row < last_row:
            block = int(np.searchsorted(starts, row, side="right")) - 1
            begin, end = int(starts[block]), min(int(starts[block + 1]), last_row)
            rows = slice(row - begin, end - begin)
            pieces.append(self._of_rows(options.read(cache, block), rows))
            row = end
        found = _joined(pieces)
        if not np.array_equal(found.row_ids, own.row_ids):
            _refuse_rows(self.first, cache)
        return found

    def _of_rows(self, block: Block, rows: slice) -> "_Said":
        """What the teacher of a block says on some of its rows."""
        ratio = block.log_partition_ratio.get(self.temperature)
        if len(block.row_ids[rows]) == len(block.row_ids):  # the usual case: nothing is copied
            return _Said(block.row_ids, block.target, ratio, block.hidden, block.target_values)
        at = _items_of(rows, block.num_positions)
        states_at = _items_of(rows, num_states(block.num_positions, self.manifest.hidden.every))
        return _Said(
            block.row_ids[rows],
            None if block.target is None else block.target.at(at),
            None if ratio is None else ratio[at],
            {layer: states_SD[states_at] for layer, states_SD in block.hidden.items()},
            None if block.target_values is None else block.target_values[at],
        )

    def _mixed(self, own: Block, said: Sequence["_Said"]) -> Block:
        """The first cache's block with mixed targets and states; no label_logprob."""
        hidden = {layer: self._mean([each.hidden[layer] for each in said]) for layer in own.hidden}
        block = replace(
            own, hidden=hidden, label_logprob=None, entropy=None, log_partition_ratio={}
        )
        if own.target_values is not None:
            block.target_values = self._mean_values([each.target_values for each in said])
        if own.target is None:
            return block
        kind = self.manifest.targets.kind
        voices = []
        for each, weight in zip(said, self.weights, strict=True):
            assert each.target is not None  # all caches have the same kind
            voices.append(Voice(each.target, weight, each.log_partition_ratio))
        block.target = mixture(voices, kind, self.temperature)
        if self.manifest.targets.every_temperature:
            at_one = block.target if self.temperature == 1 else mixture(voices, kind)
            block.entropy = entropy_of(at_one)
        elif self.temperature != 1:
            ratio_P = np.zeros(len(block.target.log_tail), np.float32)
            block.log_partition_ratio = {self.temperature: ratio_P}
        return block

    def _mean_values(self, said: Sequence[Floats | None]) -> Floats:
        """Weighted mean of what the teachers of a regression say, [P]."""
        pairs = zip(self.weights, said, strict=True)
        parts = [
            np.float32(weight) * values_P for weight, values_P in pairs if values_P is not None
        ]
        return np.sum(parts, axis=0, dtype=np.float32)

    def _mean(self, states: Sequence[Bits]) -> Bits:
        """Weighted mean of bfloat16 states [S, D], in float32."""
        mean_SD = np.zeros(states[0].shape, np.float32)
        for weight, each_SD in zip(self.weights, states, strict=True):
            mean_SD += np.float32(weight) * bf16_to_float32(each_SD)
        bits: Bits = torch.from_numpy(mean_SD).to(torch.bfloat16).view(torch.uint16).numpy()
        return bits


@dataclass(frozen=True, slots=True)
class _Options:
    """What is read of each block."""

    hidden_layers: tuple[int, ...]
    targets: bool
    skip: tuple[str, ...]

    def read(self, cache: Cache, block: int) -> Block:
        return cache.read_block(
            block, hidden_layers=self.hidden_layers, targets=self.targets, skip=self.skip
        )


@dataclass(frozen=True, slots=True)
class _Said:
    """What one teacher says on some rows."""

    row_ids: np.ndarray  # u64 [R]
    target: Target | None
    log_partition_ratio: Floats | None  # [P], at the temperature of the ensemble
    hidden: dict[int, Bits]  # [S, D]
    target_values: Floats | None = None  # [P], of a regression


def _items_of(rows: slice, counts_R: np.ndarray) -> np.ndarray:
    """The places of the items of some rows of a block, when each row has so many of them."""
    counts_R = counts_R.astype(np.int64)
    starts_R = np.cumsum(counts_R) - counts_R
    return ranges(starts_R[rows], counts_R[rows])


def _joined(pieces: Sequence[_Said]) -> _Said:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    targets = [piece.target for piece in pieces if piece.target is not None]
    ratios = [p.log_partition_ratio for p in pieces if p.log_partition_ratio is not None]
    values = [piece.target_values for piece in pieces if piece.target_values is not None]
    return _Said(
        np.concatenate([piece.row_ids for piece in pieces]),
        _joined_targets(targets) if targets else None,
        np.concatenate(ratios) if ratios else None,
        {layer: np.concatenate([p.hidden[layer] for p in pieces]) for layer in first.hidden},
        np.concatenate(values) if values else None,
    )


def _joined_targets(targets: Sequence[Target]) -> Target:
    counts = [target.counts for target in targets if target.counts is not None]
    return Target(
        np.concatenate([target.ids for target in targets]),
        np.concatenate([target.logprobs for target in targets]),
        np.concatenate([target.log_tail for target in targets]),
        np.concatenate(counts) if counts else None,
    )


# ---- What belongs together


def _check_same_rows(one: Cache, other: Cache, layers: Sequence[int]) -> None:
    """Equal lengths of all rows are taken for equal rows; their ids are compared block by block."""
    sides = (Side(str(cache.path), cache.manifest, layers) for cache in (one, other))
    compat.check("ensemble", *sides)
    if not one.has_targets:
        raise CacheMismatch(
            f"--ensemble: {one.path} and {other.path} hold hard labels only, and there is nothing "
            "to mix. Cache teachers, or leave --ensemble out."
        )
    if not (
        np.array_equal(one.row_tokens, other.row_tokens)
        and np.array_equal(one.row_positions, other.row_positions)
    ):
        _refuse_rows(one, other)


def _refuse_rows(one: Cache, other: Cache) -> None:
    """Names the rows that only one of the two caches holds."""
    ids, other_ids = _row_ids(one), _row_ids(other)
    rows = len(np.union1d(ids, other_ids))
    for cache, missing in (
        (other, np.setdiff1d(ids, other_ids)),
        (one, np.setdiff1d(other_ids, ids)),
    ):
        if len(missing):
            shown = ", ".join(map(str, missing[:_SHOWN_ROWS].tolist()))
            dots = ", ..." if len(missing) > _SHOWN_ROWS else ""
            raise CacheMismatch(
                f"--ensemble: {cache.path} lacks {len(missing):,} of {rows:,} rows: row ids "
                f"{shown}{dots} (document << 24 | chunk). Every teacher must have seen every row: "
                "finish both with cache-teacher run, or keep the documents that both hold with "
                "cache-teacher repack --documents."
            )
    raise CacheMismatch(
        f"--ensemble: {one.path} and {other.path} hold rows of the same ids, but in another order "
        "or of other lengths. Run cache-teacher verify on both, then capture one of them again."
    )


def _row_ids(cache: Cache) -> np.ndarray:
    return np.concatenate(list(_row_ids_by_block(cache)))


def _row_ids_by_block(cache: Cache) -> Iterator[np.ndarray]:
    for block in range(cache.num_blocks):
        yield cache.read_block(block, targets=False).row_ids
