"""One row of a cache as tensors: what `cache[i]` gives, and a decoded block cut into such rows.

T tokens of a row, P of them positions, C classes, K entries of each position or E of all of them
together, S positions with hidden states, D channels.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from shared import strict
from shared.errors import ConfigError
from shared.format.blocks import Block
from shared.format.manifest import Manifest
from shared.targets.hidden import num_states


@dataclass(frozen=True, slots=True)
class RowTargets:
    """The teacher's distributions of one row. `ids` are int64 [P, K], the rest float32.

    `logprobs` [P, K] are in nats, `tail_mass` [P] is the probability of all classes without an
    entry. With `counts`, int64 [P], positions differ in their number of entries, and `ids` and
    `logprobs` are [E]: the entries of all positions in turn.

    `log_partition_ratio` [P] is there for each temperature T that the cache stores besides 1:
    ln of the sum over all C classes of p^(1/T), in nats. So p_T = p^(1/T) / exp(it) is the
    teacher's probability at T, which `at_temperature` computes. With `complete` every class is an
    entry, and every temperature can be had.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    tail_mass: torch.Tensor
    counts: torch.Tensor | None = None
    log_partition_ratio: dict[float, torch.Tensor] = field(default_factory=dict)
    complete: bool = False

    def entries(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and logprobs of one position."""
        if self.counts is None:
            return self.ids[place], self.logprobs[place]
        start, count = int(self.counts[:place].sum()), int(self.counts[place])
        return self.ids[start : start + count], self.logprobs[start : start + count]

    def at_temperature(self, temperature: float) -> "RowTargets":
        """These targets with the logprobs and the tail mass of the softmax at a temperature."""
        if temperature == 1:
            return replace(self, log_partition_ratio={})
        ratio_P = self.log_partition_ratio.get(temperature)
        if ratio_P is None and self.complete:
            ratio_P = torch.logsumexp(self.logprobs / temperature, dim=-1)
        if ratio_P is None:
            stored = ", ".join(f"{t:g}" for t in (1.0, *self.log_partition_ratio))
            raise ConfigError(
                f"temperature {temperature:g}: this cache has targets at {stored}. Cache again "
                f"with cache-teacher run --temperature {temperature:g}, or use one of these."
            )
        if self.counts is None:
            logprobs = self.logprobs / temperature - ratio_P[:, None]
            kept_P = logprobs.exp().sum(dim=-1)
        else:
            position_E = torch.repeat_interleave(self.counts)
            logprobs = self.logprobs / temperature - ratio_P[position_E]
            kept_P = torch.zeros_like(ratio_P).index_add(0, position_E, logprobs.exp())
        tail_P = (1 - kept_P).clamp_min(0).masked_fill(self.tail_mass == 0, 0)
        return replace(self, logprobs=logprobs, tail_mass=tail_P, log_partition_ratio={})


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: `input_ids` [T]; `positions`, `labels` [P]; `hidden[layer]` [S, D].

    State s is that of token `hidden_positions[s]`: of all positions, or of every n-th.

    `segments` are the lengths of its parts: one; of a packed row its documents'; of a pair those of
    what the encoder reads and of what the decoder reads.
    `token_type_ids` [T] where a row is a pair of texts; `reference` is what an answer of the
    student is compared with, where the task has more to compare than labels. Of a regression
    `labels` are float32, and `target_values` [P] are what the teacher says.

    `label_logprob` [P] is the teacher's log-probability of the hard label, `entropy` [P] that of
    its distribution over all classes, both float32, in nats, at temperature 1, and None where the
    cache has no targets, or no labels.
    """

    row_id: int
    segments: tuple[int, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    targets: RowTargets | None
    hidden: dict[int, torch.Tensor]
    hidden_positions: torch.Tensor
    token_type_ids: torch.Tensor | None = None
    reference: Any = None
    target_values: torch.Tensor | None = None
    label_logprob: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class BlockRows:
    """A decoded block, from which single rows are copied out."""

    def __init__(self, block: Block, manifest: Manifest) -> None:
        self.block, self.num_bytes = block, _num_bytes(block)
        self._every, self._complete = manifest.hidden.every, manifest.targets.complete
        self._tokens, self._positions = _starts(block.num_tokens), _starts(block.num_positions)
        self._states = _starts(num_states(block.num_positions, self._every))
        if block.num_segments is not None:
            self._segments = _starts(block.num_segments)
        if block.reference_bytes is not None:
            self._references = _starts(block.reference_bytes)
        if block.target is not None and block.target.counts is not None:
            self._entries = _starts(block.target.counts)

    def row(self, index: int) -> Row:
        """Row `index` of the block, which shares no memory with it."""
        block = self.block
        tokens, at = _slice(self._tokens, index), _slice(self._positions, index)
        input_ids = _integers(block.input_ids[tokens])
        positions = _integers(block.positions[at])
        types = block.token_type_ids
        return Row(
            row_id=int(block.row_ids[index]),
            segments=self._segments_of(index),
            input_ids=input_ids,
            labels=self._labels(at, input_ids, positions),
            positions=positions,
            targets=self._targets(at),
            hidden=self._hidden(index),
            hidden_positions=positions[:: self._every],
            token_type_ids=None if types is None else _integers(types[tokens]),
            reference=self._reference(index),
            target_values=_copy(block.target_values, at),
            label_logprob=_copy(block.label_logprob, at),
            entropy=_copy(block.entropy, at),
        )

    def _labels(self, at: slice, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        values = _copy(self.block.label_values, at)
        if values is not None:
            return values
        if self.block.labels is not None:
            return _integers(self.block.labels[at])
        return input_ids[positions + 1]

    def _targets(self, at: slice) -> RowTargets | None:
        target = self.block.target
        if target is None:
            return None
        entries = at
        if target.counts is not None:
            entries = slice(int(self._entries[at.start]), int(self._entries[at.stop]))
        ratios = self.block.log_partition_ratio
        return RowTargets(
            ids=_integers(target.ids[entries]),
            logprobs=torch.from_numpy(target.logprobs[entries].copy()),
            tail_mass=torch.from_numpy(np.exp(target.log_tail[at])),
            counts=None if target.counts is None else _integers(target.counts[at]),
            log_partition_ratio={
                t: torch.from_numpy(ratio[at].copy()) for t, ratio in ratios.items()
            },
            complete=self._complete,
        )

    def _hidden(self, index: int) -> dict[int, torch.Tensor]:
        states = _slice(self._states, index)
        return {
            layer: torch.from_numpy(bits[states].copy()).view(torch.bfloat16)
            for layer, bits in self.block.hidden.items()
        }

    def _segments_of(self, index: int) -> tuple[int, ...]:
        if self.block.segments is None:
            return (int(self.block.num_tokens[index]),)
        return tuple(self.block.segments[_slice(self._segments, index)].tolist())

    def _reference(self, index: int) -> Any:
        if self.block.reference is None:
            return None
        data = self.block.reference[_slice(self._references, index)].tobytes()
        return _parsed(data, int(self.block.row_ids[index]))


def references(block: Block) -> list[Any]:
    """The parsed references of the rows of a block that has them."""
    assert block.reference is not None  # both are there, or neither
    assert block.reference_bytes is not None
    ends = np.cumsum(block.reference_bytes, dtype=np.int64)
    data = block.reference.tobytes()
    rows = zip(block.row_ids.tolist(), ends - block.reference_bytes, ends, strict=True)
    return [_parsed(data[start:end], row_id) for row_id, start, end in rows]


def _parsed(data: bytes, row_id: int) -> Any:
    """A text may hold any number of brackets, so only its own length limits them."""
    where, most = f"reference of row {row_id}", len(data)
    return strict.parse_json(data, where, max_values=2 * most, max_containers=most)


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where the items of each of R rows begin, and where those of the last one end: [R + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _slice(starts: np.ndarray, index: int) -> slice:
    return slice(int(starts[index]), int(starts[index + 1]))


def _integers(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _copy(values: np.ndarray | None, at: slice) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values[at].copy())


def _num_bytes(block: Block) -> int:
    """What the large arrays of a block take; the rest is a few bytes a token."""
    arrays = [block.input_ids, block.positions, *block.hidden.values()]
    arrays += block.log_partition_ratio.values()
    if block.reference is not None:
        arrays.append(block.reference)
    if block.target is not None:
        arrays += [block.target.ids, block.target.logprobs]
    return sum(array.nbytes for array in arrays)
