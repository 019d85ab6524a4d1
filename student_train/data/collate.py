"""Decoded blocks -> the columns of one window -> micro-batches, with no Python work per row.

R rows, B sequences, T tokens of the longest, P and N positions, S of them with hidden states, K
entries, D hidden. A column is an array whose first axis runs over the rows, the tokens, the
positions, the states or the entries of many rows.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from shared.arrays import ranges
from shared.format.blocks import Block
from shared.targets.hidden import num_states, state_positions
from student_train.data.arrange import SEQUENCES, Arrangement, Columns

MicroBatch = dict[str, torch.Tensor]
Per = Literal["row", "token", "position", "entry", "state"]

_NOT_PER_POSITION: dict[str, Per] = {
    "row_ids": "row",
    "num_tokens": "row",
    "num_positions": "row",
    "context": "row",
    "input_ids": "token",
    "position_ids": "token",
    "token_type_ids": "token",
}
_OF_ENTRIES = ("target_ids", "target_logprobs")  # where positions differ in their entries
_NO_ROW = -1  # row id of the one token in a micro-batch without rows


class ReadWindow:
    """The columns of all rows of some blocks; threads fill it block by block.

    `rows` are global row numbers and ascend; their lengths say where everything goes before
    anything is read, and `no_rows`, columns of length 0, of what type it is. Only entries of ragged
    targets have no length before they are read: they go behind those of the blocks that came
    before. `memory` is that of an earlier window, or empty: pages that are new to the process cost
    as much time as what is copied into them.
    """

    def __init__(
        self,
        rows: np.ndarray,
        row_tokens: np.ndarray,
        row_positions: np.ndarray,
        no_rows: Columns,
        memory: Columns,
        hidden_every: int = 1,
    ) -> None:
        self.rows = rows
        row_states = num_states(row_positions, hidden_every)
        self.starts: dict[Per, np.ndarray] = {
            "row": np.arange(len(rows) + 1),
            "token": np.concatenate([[0], np.cumsum(row_tokens, dtype=np.int64)]),
            "position": np.concatenate([[0], np.cumsum(row_positions, dtype=np.int64)]),
            "state": np.concatenate([[0], np.cumsum(row_states)]),
        }
        self.memory = memory
        self.ragged = "target_counts" in no_rows
        fixed = {n: c for n, c in no_rows.items() if not (self.ragged and n in _OF_ENTRIES)}
        self.columns = {name: self._room(name, column) for name, column in fixed.items()}
        if self.ragged:
            self.columns["entry_starts"] = self._room("entry_starts", np.zeros(0, np.int64))
            for name in _OF_ENTRIES:
                memory.setdefault(name, np.empty(0, no_rows[name].dtype))
        self._num_entries = 0
        self._lock = threading.Lock()

    def fill(self, first_row: int, num_rows: int, columns: Columns) -> None:
        """Copies the columns of the block whose first row is global row `first_row`."""
        begin = int(np.searchsorted(self.rows, first_row))
        if self.ragged:
            counts, entries = columns["target_counts"], [columns[name] for name in _OF_ENTRIES]
            starts = self._add_entries(entries) + np.cumsum(counts, dtype=np.int64) - counts
            columns = columns | {"entry_starts": starts}
        for name, column in self.columns.items():
            starts = self.starts[_per(name)]
            column[starts[begin] : starts[begin + num_rows]] = columns[name]

    def _add_entries(self, entries: Sequence[np.ndarray]) -> int:
        """The place where the entries of a block begin.

        Who took the arrays before they grew may use them on: what was there is in both.
        """
        with self._lock:
            begin, end = self._num_entries, self._num_entries + len(entries[0])
            for name, values in zip(_OF_ENTRIES, entries, strict=True):
                if len(self.memory[name]) < end:
                    grown = np.empty(end + end // 2, values.dtype)
                    grown[:begin] = self.memory[name][:begin]
                    self.memory[name] = grown
                self.memory[name][begin:end] = values
            self._num_entries = end
            return begin

    def _room(self, name: str, like: np.ndarray) -> np.ndarray:
        size = int(self.starts[_per(name)][-1])
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = np.empty((size + size // 8, *like.shape[1:]), like.dtype)
        return self.memory[name][:size]

    def take(self, rows: np.ndarray) -> Columns:
        """The columns of these global rows, in this order. Costs 0.01 to 0.05 us a position."""
        at = np.searchsorted(self.rows, rows)
        index = {
            kind: ranges(starts[at], starts[at + 1] - starts[at])
            for kind, starts in self.starts.items()
        }
        taken = {
            name: np.take(column, index[_per(name)], axis=0)
            for name, column in self.columns.items()
        }
        if self.ragged:
            entries = ranges(taken.pop("entry_starts"), taken["target_counts"])
            taken |= {name: np.take(self.memory[name], entries) for name in _OF_ENTRIES}
        return taken


def columns_of(block: Block, temperature: float, arrangement: Arrangement = SEQUENCES) -> Columns:
    """The columns of a block that micro-batches are made of; hidden states as bfloat16 bits.

    `labels` only where they are not the next tokens, of a regression as float32.
    """
    columns = {
        "row_ids": block.row_ids.view(np.int64),
        "num_tokens": block.num_tokens,
        "num_positions": block.num_positions,
        "input_ids": block.input_ids,
        "positions": block.positions,
    }
    if block.token_type_ids is not None:
        columns["token_type_ids"] = block.token_type_ids
    columns |= arrangement.places_of(block)
    if block.labels is not None:
        columns["labels"] = block.labels
    if block.label_values is not None:
        columns["labels"] = block.label_values
    if block.target_values is not None:
        columns["target_values"] = block.target_values
    if block.target is not None:
        columns["target_ids"] = block.target.ids
        columns["target_logprobs"] = block.target.logprobs
        columns["target_log_tail"] = block.target.log_tail
        if block.target.counts is not None:
            columns["target_counts"] = block.target.counts
        if temperature in block.log_partition_ratio:
            columns["log_partition_ratio"] = block.log_partition_ratio[temperature]
    if block.entropy is not None:
        columns["entropy"] = block.entropy
    return columns | {f"hidden.{layer}": states for layer, states in block.hidden.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the terms of the loss are divided by: counts of a whole step, over all processes."""

    positions: int
    labels: int  # positions with a hard label
    states: int = 0  # positions with hidden states
    rows: int = 0  # rows with a position


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows become sequences.

    Every segment of a row becomes a sequence of its own, padded on the right with token 0. Of pairs
    the first segment goes to the encoder, the second to the decoder. Every `hidden_every`-th
    position of a row has hidden states.
    """

    arrangement: Arrangement = SEQUENCES
    hidden_every: int = 1


def collate(
    parts: Sequence[tuple[ReadWindow, np.ndarray]], shape: Shape, *, counts: Counts
) -> MicroBatch:
    """The micro-batch of these global rows, each part with the window it is in."""
    taken = [window.take(rows) for window, rows in parts]
    if len(taken) == 1:
        return _assemble(taken[0], shape, counts)
    joined = {name: np.concatenate([columns[name] for columns in taken]) for name in taken[0]}
    return _assemble(joined, shape, counts)


def without_rows(no_rows: Columns, shape: Shape, *, counts: Counts) -> MicroBatch:
    """A micro-batch of one token a side and no position; `no_rows` are columns of length 0.

    The token is not masked: in a sequence that is all mask some attention kernels give NaN, and
    NaN times a gradient of 0 would reach every weight.
    """
    segments = shape.arrangement.sides
    one_token = {
        "row_ids": np.array([_NO_ROW]),
        "num_tokens": np.array([segments]),
        "num_positions": np.array([0]),
        "input_ids": np.zeros(segments, np.int64),
    }
    if "position_ids" in no_rows:
        one_token["position_ids"] = np.zeros(segments, np.int64)
    if "token_type_ids" in no_rows:
        one_token["token_type_ids"] = np.array([0])
    if "context" in no_rows:
        one_token["context"] = np.array([[0, 1]])
    nothing = {name: column.copy() for name, column in no_rows.items()}  # some are read-only
    return _assemble(nothing | one_token, replace(shape, hidden_every=1), counts)


def _assemble(columns: Columns, shape: Shape, counts: Counts) -> MicroBatch:
    """Takes the columns that say where things are out of `columns`; the rest stays as it is."""
    row_tokens, input_ids = columns.pop("num_tokens"), columns.pop("input_ids")
    row_starts, row_positions = np.cumsum(row_tokens) - row_tokens, columns.pop("num_positions")
    token_of_position = np.repeat(row_starts, row_positions)
    token_of_position += columns.pop("positions")
    arrange = shape.arrangement.arrange
    arrays, places, row_of_sequence = arrange(columns, input_ids, row_starts)
    arrays["position_index"] = shape.arrangement.position_index(token_of_position, places)
    labels = columns.pop("labels") if "labels" in columns else input_ids[token_of_position + 1]
    arrays["labels"] = labels if labels.dtype == np.float32 else labels.astype(np.int64)
    arrays["row_ids"] = columns.pop("row_ids")[row_of_sequence]
    arrays["num_positions"] = np.array(counts.positions)
    arrays["num_labels"] = np.array(counts.labels)
    if any(name.startswith("hidden.") for name in columns):
        at = state_positions(row_positions, shape.hidden_every)
        arrays["hidden_index"] = arrays["position_index"][at]
        row_states = num_states(row_positions, shape.hidden_every)
        arrays["hidden_row"] = np.repeat(np.arange(len(row_states)), row_states)
        arrays["num_states"], arrays["num_rows"] = np.array(counts.states), np.array(counts.rows)
    batch = {name: torch.from_numpy(array) for name, array in (arrays | columns).items()}
    hidden = {n: batch[n].view(torch.bfloat16) for n in batch if n.startswith("hidden.")}
    return batch | hidden


def _per(name: str) -> Per:
    if name.startswith("hidden."):
        return "state"
    return _NOT_PER_POSITION.get(name, "position")
