"""The teacher over a window of rows: every target on the host, in row order.

Rows of similar length run together; the results are put back where their rows stand, so that the
order on disk is the order of the corpus. N positions of the window, S of them with hidden states, K
entries of each or E of all, D channels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.arrays import mixed_bits, ranges
from shared.errors import TeacherCacheError
from shared.format.blocks import Block
from shared.format.manifest import Manifest
from shared.format.schema import ROW_CHUNK_BITS
from shared.targets.hidden import num_states, state_positions
from shared.targets.record import Target
from teacher_cache.engines.batches import ForwardBatch, batch_of, forward_batches
from teacher_cache.engines.memory import is_out_of_memory
from teacher_cache.engines.teacher import Teacher
from teacher_cache.select.targets import Selected, select, values_of
from teacher_cache.tasks.rows import Row


class WindowTargets:
    """Targets of a window of rows, filled batch by batch."""

    def __init__(self, manifest: Manifest, window: Sequence[Row]) -> None:
        spec, hidden = manifest.targets, manifest.hidden
        self.starts = np.cumsum([0, *(row.num_positions for row in window)])
        n = int(self.starts[-1])
        self.kind, self.has_targets = spec.kind, spec.kind != "none"
        self.entries = _RaggedEntries(n) if spec.ragged else _EqualEntries(n, spec.num_entries)
        self.random_bits = random_bits(manifest.seed, window) if spec.kind == "sample" else None
        self.log_tail, self.entropy, self.label_logprob = (torch.empty(n) for _ in range(3))
        self.ratios = {temperature: torch.empty(n) for temperature in spec.temperatures}
        self.bad = torch.zeros(n, dtype=torch.bool)
        self.forwards_halved = 0  # forwards that did not fit into memory as the plan has them
        counts = np.diff(self.starts)
        self.state_starts = np.cumsum([0, *num_states(counts, hidden.every)])
        s = int(self.state_starts[-1])
        self.state_of_position = torch.full((n,), -1)
        self.state_of_position[state_positions(counts, hidden.every)] = torch.arange(s)
        self.hidden = {
            layer: torch.empty(s, width, dtype=torch.bfloat16)
            for layer, width in zip(hidden.layers, hidden.widths, strict=True)
        }
        self.rounding = {layer: torch.zeros(s) for layer in hidden.layers}

    def store(
        self,
        batch: ForwardBatch,
        chosen: Sequence[tuple[slice, Selected]],
        hidden: dict[int, Tensor],
    ) -> None:
        """Copies one forward's results to the host."""
        for part, selected in chosen:
            at = batch.window_index[part]
            self.entries.store(at, selected)
            self.log_tail[at] = selected.log_tail.cpu()
            self.entropy[at] = selected.entropy.cpu()
            self.bad[at] |= selected.bad_N.cpu()
            if selected.label_logprob is not None:
                self.label_logprob[at] = selected.label_logprob.cpu()
            for temperature, ratio in selected.log_partition_ratio.items():
                self.ratios[temperature][at] = ratio.cpu()
        if hidden:
            self._store_hidden(batch.window_index, hidden)

    def _store_hidden(self, window_index: Tensor, hidden: dict[int, Tensor]) -> None:
        """The states of those positions that have them, and what bfloat16 costs them."""
        state = self.state_of_position[window_index]
        kept = torch.nonzero(state >= 0)[:, 0]
        into, position = state[kept], window_index[kept]
        for layer, states_ND in hidden.items():
            every_one = len(kept) == len(states_ND)
            states_SD = states_ND if every_one else states_ND[kept.to(states_ND.device)]
            rounded_SD = states_SD.to(torch.bfloat16)
            self.hidden[layer][into] = rounded_SD.cpu()
            self.bad[position] |= ~rounded_SD.isfinite().all(dim=-1).cpu()
            if states_SD.dtype != torch.bfloat16:
                error_SD = rounded_SD.float() - states_SD.float()
                self.rounding[layer][into] = error_SD.square().sum(dim=-1).cpu()

    def offsets(self, at: Tensor) -> Tensor | None:
        """Where the grids of these positions begin, for a sample; float64 in [0, 1)."""
        if self.random_bits is None:
            return None
        return grid_offsets(self.random_bits[at.numpy()])

    def bad_rows(self) -> dict[int, int]:
        """Index of each row with a NaN or infinity -> its first such position."""
        found: dict[int, int] = {}
        for place in torch.nonzero(self.bad).flatten().tolist():
            row = int(np.searchsorted(self.starts, place, "right")) - 1
            found.setdefault(row, place - int(self.starts[row]))
        return found

    def fill(self, block: Block, rows: Sequence[int]) -> None:
        """Gives a block the targets of the rows it consists of."""
        if self.has_targets:
            self._fill_targets(block, rows)
        at = self._states(rows)
        block.hidden = {
            layer: states[at].view(torch.uint16).numpy() for layer, states in self.hidden.items()
        }

    def _fill_targets(self, block: Block, rows: Sequence[int]) -> None:
        places = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        at = torch.from_numpy(np.concatenate(places))
        target = self.entries.target(at, self.log_tail[at].numpy())
        if self.kind == "values":
            block.target_values = target.logprobs[:, 0]
            return
        block.target = target
        if self.random_bits is not None:
            block.target.random_bits = self.random_bits[at.numpy()]
        block.label_logprob = self.label_logprob[at].numpy()
        block.entropy = self.entropy[at].numpy()
        block.log_partition_ratio = {t: ratio[at].numpy() for t, ratio in self.ratios.items()}

    def roundings(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """By layer: the squared error that bfloat16 made in each state of these rows, f32 [S]."""
        at = self._states(rows)
        return {layer: errors[at].numpy() for layer, errors in self.rounding.items()}

    def _states(self, rows: Sequence[int]) -> Tensor:
        starts = self.state_starts
        places = [np.arange(starts[row], starts[row + 1]) for row in rows]
        return torch.from_numpy(np.concatenate(places))


class _EqualEntries:
    """Entries of a kind that keeps the same number of them at every position."""

    def __init__(self, positions: int, entries: int) -> None:
        self._ids = torch.empty(positions, entries, dtype=torch.int32)
        self._logprobs = torch.empty(positions, entries)

    def store(self, at: Tensor, selected: Selected) -> None:
        self._ids[at] = selected.ids.to("cpu", torch.int32)
        self._logprobs[at] = selected.logprobs.cpu()

    def target(self, at: Tensor, log_tail: np.ndarray) -> Target:
        return Target(self._ids[at].numpy(), self._logprobs[at].numpy(), log_tail)


class _RaggedEntries:
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


def grid_offsets(bits_N: np.ndarray) -> Tensor:
    """Where grids begin, float64 [N] in [0, 1), by the bits of their positions."""
    return torch.from_numpy((bits_N >> np.uint64(11)) * 2.0**-53)


def random_bits(seed: int, window: Sequence[Row]) -> np.ndarray:
    """64 bits for each position, a function of seed, row and position; u64 [N]."""
    sizes = [row.num_positions for row in window]
    row_ids = np.repeat(np.array([row.row_id for row in window], np.uint64), sizes)
    return mixed_bits(seed, row_ids, ranges(np.zeros(len(sizes), np.int64), np.array(sizes)))


_Forwarded = tuple[ForwardBatch, list[tuple[slice, Selected]], dict[int, Tensor]]


def capture_window(
    teacher: Teacher, manifest: Manifest, window: Sequence[Row], check_stop: Callable[[], None]
) -> WindowTargets:
    """Runs every batch of the window; the copy of one overlaps the forward of the next.

    A batch that no longer fits into the device's memory is run in halves; the plan stays as it is.
    """
    targets = WindowTargets(manifest, window)
    waiting: _Forwarded | None = None
    tokens, packed = manifest.plan.forward_tokens, manifest.preprocessing.pack
    layout = manifest.layout.name
    for batch in forward_batches(window, tokens, packed=packed, layout=layout):
        check_stop()
        forwarded = _forward(teacher, manifest, batch, targets)
        if waiting is not None:
            targets.store(*waiting)
        waiting = forwarded
        if forwarded is None:
            _capture_halves(teacher, manifest, window, batch.rows, targets, check_stop)
    if waiting is not None:
        targets.store(*waiting)
    return targets


def _forward(
    teacher: Teacher, manifest: Manifest, batch: ForwardBatch, targets: WindowTargets
) -> _Forwarded | None:
    """One forward and its targets, on the device; None where they do not fit into its memory."""
    try:
        output = teacher.forward(
            batch.inputs,
            manifest.hidden.layers,
            chunk_positions=manifest.plan.chunk_positions,
            pooling=manifest.hidden.pooling,
        )
        labels = batch.labels.to(teacher.device)
        chosen = [
            (part, _selected(targets, manifest, logits, labels[part], batch.window_index[part]))
            for part, logits in output.chunks
        ]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return batch, chosen, output.hidden


def _capture_halves(
    teacher: Teacher,
    manifest: Manifest,
    window: Sequence[Row],
    rows: Sequence[int],
    targets: WindowTargets,
    check_stop: Callable[[], None],
) -> None:
    """Runs rows that did not fit together in two halves, and each of these so again."""
    if len(rows) == 1:
        raise _too_long(window[rows[0]])
    targets.forwards_halved += 1
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        check_stop()
        torch.cuda.empty_cache()  # outside the `except`, whose error holds what did not fit
        packed, layout = manifest.preprocessing.pack, manifest.layout.name
        batch = batch_of(window, half, targets.starts, packed=packed, layout=layout)
        forwarded = _forward(teacher, manifest, batch, targets)
        if forwarded is None:
            _capture_halves(teacher, manifest, window, half, targets, check_stop)
        else:
            targets.store(*forwarded)


def _too_long(row: Row) -> TeacherCacheError:
    return TeacherCacheError(
        f"out of memory: the row of document {row.row_id >> ROW_CHUNK_BITS}, "
        f"{len(row.input_ids):,} tokens, does not fit into the device's memory even alone. "
        "Finished shards are kept: run the same command again where more memory is free, or start "
        "another cache with a smaller --max-length or --dtype."
    )


def _selected(
    targets: WindowTargets, manifest: Manifest, logits: Tensor, labels: Tensor, at: Tensor
) -> Selected:
    if manifest.targets.kind == "values":
        return values_of(logits)
    offset = targets.offsets(at)
    return select(
        logits, manifest.targets, labels, None if offset is None else offset.to(logits.device)
    )
