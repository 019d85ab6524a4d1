"""Every target of a window of rows on the host, in row order, whatever order they come in.

N positions of the window, S of them with hidden states, K entries of each or E of all, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.format.blocks import Block
from shared.format.manifest import Manifest
from shared.targets.hidden import num_states, state_positions
from teacher_cache.select.base import PositionTargets, Selected
from teacher_cache.select.kinds import SELECTORS
from teacher_cache.select.ragged import grid_offsets
from teacher_cache.select.targets import select
from teacher_cache.tasks.rows import TrainingRow


@dataclass(frozen=True, slots=True)
class ForwardTargets:
    """What one forward gave, still on its device: N positions, some of them at a time."""

    window_index: Tensor  # i64 [N], where its positions stand in the window
    chunks: Sequence[tuple[slice, Selected]]  # places in `window_index`, and what was kept there
    hidden: dict[int, Tensor]  # layer -> [N, D]


class WindowTargets:
    """Targets of a window of rows, filled batch by batch."""

    def __init__(self, manifest: Manifest, window: Sequence[TrainingRow]) -> None:
        self.manifest, self.rows = manifest, window
        spec, hidden = manifest.targets, manifest.hidden
        self.starts = np.cumsum([0, *(row.num_positions for row in window)])
        n = int(self.starts[-1])
        self.selector = SELECTORS[spec.kind]
        self.entries = self.selector.buffer(n, spec)
        self.random_bits = self.selector.random_bits(manifest.seed, window)
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

    def store(self, selected: "ForwardTargets") -> None:
        """Copies one forward's results to the host."""
        for part, chosen in selected.chunks:
            at = selected.window_index[part]
            self.entries.store(at, chosen)
            self.log_tail[at] = chosen.log_tail.cpu()
            self.entropy[at] = chosen.entropy.cpu()
            self.bad[at] |= chosen.bad_N.cpu()
            if chosen.label_logprob is not None:
                self.label_logprob[at] = chosen.label_logprob.cpu()
            for temperature, ratio in chosen.log_partition_ratio.items():
                self.ratios[temperature][at] = ratio.cpu()
        if selected.hidden:
            self._store_hidden(selected.window_index, selected.hidden)

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

    def select(self, logits_nV: Tensor, labels_n: Tensor, at_n: Tensor) -> Selected:
        """What is kept of these logits, at these positions of the window."""
        offset_n: Tensor | None = None
        if self.random_bits is not None:
            offset_n = grid_offsets(self.random_bits[at_n.numpy()]).to(logits_nV.device)
        return select(logits_nV, self.manifest.targets, labels_n, offset_n)

    def bad_rows(self) -> dict[int, int]:
        """Index of each row with a NaN or infinity -> its first such position."""
        found: dict[int, int] = {}
        for place in torch.nonzero(self.bad).flatten().tolist():
            row = int(np.searchsorted(self.starts, place, "right")) - 1
            found.setdefault(row, place - int(self.starts[row]))
        return found

    def fill(self, block: Block, rows: Sequence[int]) -> None:
        """Gives a block the targets of the rows it consists of."""
        if self.selector.has_targets:
            self.selector.fill(block, self._at_positions(rows))
        at = self._states(rows)
        block.hidden = {
            layer: states[at].view(torch.uint16).numpy() for layer, states in self.hidden.items()
        }

    def _at_positions(self, rows: Sequence[int]) -> PositionTargets:
        places = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        at = torch.from_numpy(np.concatenate(places))
        target = self.entries.target(at, self.log_tail[at].numpy())
        if self.random_bits is not None:
            target.random_bits = self.random_bits[at.numpy()]
        return PositionTargets(
            target=target,
            label_logprob=self.label_logprob[at].numpy(),
            entropy=self.entropy[at].numpy(),
            log_partition_ratio={t: ratio[at].numpy() for t, ratio in self.ratios.items()},
        )

    def roundings(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """By layer: the squared error that bfloat16 made in each state of these rows, f32 [S]."""
        at = self._states(rows)
        return {layer: errors[at].numpy() for layer, errors in self.rounding.items()}

    def _states(self, rows: Sequence[int]) -> Tensor:
        starts = self.state_starts
        places = [np.arange(starts[row], starts[row + 1]) for row in rows]
        return torch.from_numpy(np.concatenate(places))
