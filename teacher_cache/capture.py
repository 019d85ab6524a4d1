"""The teacher over a window of rows: every target on the host, in row order.

Rows of similar length run together; the results are put back where their rows stand, so that the
order on disk is the order of the corpus. N positions of the window, S of them with
hidden states, K entries, D channels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.blocks import Block
from shared.codec import Target
from shared.hidden import num_states, state_positions
from shared.manifest import Manifest
from teacher_cache.batches import ForwardBatch, forward_batches
from teacher_cache.rows import Row
from teacher_cache.targets import Selected, select
from teacher_cache.teacher import Teacher


class WindowTargets:
    """Targets of a window of rows, filled batch by batch."""

    def __init__(self, manifest: Manifest, window: Sequence[Row]) -> None:
        spec, hidden = manifest.targets, manifest.hidden
        self.starts = np.cumsum([0, *(row.num_positions for row in window)])
        n, k = int(self.starts[-1]), spec.num_entries
        self.ids = torch.empty(n, k, dtype=torch.int32)
        self.logprobs = torch.empty(n, k)
        self.log_tail, self.entropy, self.label_logprob = (torch.empty(n) for _ in range(3))
        self.ratios = {temperature: torch.empty(n) for temperature in spec.temperatures}
        self.bad = torch.zeros(n, dtype=torch.bool)
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
            self.ids[at] = selected.ids.to("cpu", torch.int32)
            self.logprobs[at] = selected.logprobs.cpu()
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

    def bad_rows(self) -> dict[int, int]:
        """Index of each row with a NaN or infinity -> its first such position."""
        found: dict[int, int] = {}
        for place in torch.nonzero(self.bad).flatten().tolist():
            row = int(np.searchsorted(self.starts, place, "right")) - 1
            found.setdefault(row, place - int(self.starts[row]))
        return found

    def fill(self, block: Block, rows: Sequence[int]) -> None:
        """Gives a block the targets of the rows it consists of."""
        places = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        at = torch.from_numpy(np.concatenate(places))
        block.target = Target(
            ids=self.ids[at].numpy(),
            logprobs=self.logprobs[at].numpy(),
            log_tail=self.log_tail[at].numpy(),
        )
        block.label_logprob = self.label_logprob[at].numpy()
        block.entropy = self.entropy[at].numpy()
        block.log_partition_ratio = {t: ratio[at].numpy() for t, ratio in self.ratios.items()}
        at = self._states(rows)
        block.hidden = {
            layer: states[at].view(torch.uint16).numpy() for layer, states in self.hidden.items()
        }

    def roundings(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """By layer: the squared error that bfloat16 made in each state of these rows, f32 [S]."""
        at = self._states(rows)
        return {layer: errors[at].numpy() for layer, errors in self.rounding.items()}

    def _states(self, rows: Sequence[int]) -> Tensor:
        starts = self.state_starts
        places = [np.arange(starts[row], starts[row + 1]) for row in rows]
        return torch.from_numpy(np.concatenate(places))


def capture_window(
    teacher: Teacher, manifest: Manifest, window: Sequence[Row], check_stop: Callable[[], None]
) -> WindowTargets:
    """Runs every batch of the window; the copy of one overlaps the forward of the next."""
    targets = WindowTargets(manifest, window)
    waiting: tuple[ForwardBatch, list[tuple[slice, Selected]], dict[int, Tensor]] | None = None
    tokens, packed = manifest.plan.forward_tokens, manifest.preprocessing.pack
    for batch in forward_batches(window, tokens, packed=packed):
        check_stop()
        output = teacher.forward(
            batch.inputs, manifest.hidden.layers, chunk_positions=manifest.plan.chunk_positions
        )
        labels = batch.labels.to(teacher.device)
        chosen = [
            (part, select(logits, manifest.targets, labels[part])) for part, logits in output.chunks
        ]
        if waiting is not None:
            targets.store(*waiting)
        waiting = batch, chosen, output.hidden
    if waiting is not None:
        targets.store(*waiting)
    return targets
