"""An engine without a model: what it says of the next token depends on the token before alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoTokenizer

from shared.format.manifest import HiddenSpec, Manifest, Preprocessing, TeacherInfo
from shared.targets.spec import TargetSpec
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.batches import ForwardBatch, forward_batches
from teacher_cache.engines.windows import capture_window
from teacher_cache.select.largest import Largest, LargestSoFar
from teacher_cache.select.targets import select
from teacher_cache.select.window import ForwardTargets, WindowTargets
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.inputs import TeacherBatch
from teacher_cache.tasks.rows import TrainingRow

WIDTH = 4


@dataclass
class ToyEngine:
    """Two tables: logits of each token, and its hidden state at every layer."""

    logits_VC: Tensor
    states_VD: Tensor
    room: int = 1 << 30  # tokens of a forward that fit
    poisoned: set[int] = field(default_factory=set)  # tokens of which it knows nothing

    @classmethod
    def load(cls, config: CaptureConfig, task: TeacherTask) -> "ToyEngine":
        assert config.tokenizer is not None
        count = len(AutoTokenizer.from_pretrained(config.tokenizer))
        chance = torch.Generator().manual_seed(5)
        logits_VC = torch.randn(count, count, generator=chance) * 3
        return cls(logits_VC, torch.randn(count, WIDTH, generator=chance))

    def info(self) -> TeacherInfo:
        return TeacherInfo(
            id="toy",
            revision="local",
            config_hash="0" * 32,
            weights_digest="1" * 32,
            dtype="float32",
            attn_implementation="none",
            parameters=self.logits_VC.numel(),
        )

    num_classes = property(lambda self: self.logits_VC.shape[1])
    labels = property(lambda self: ())
    hidden_width = property(lambda self: WIDTH)
    default_forward_tokens = property(lambda self: 512)
    chunk_positions = property(lambda self: 64)

    def fits(
        self,
        rows: Sequence[TrainingRow],
        targets: TargetSpec,
        hidden: HiddenSpec,
        *,
        forward_tokens: int,
        packed: bool,
    ) -> bool:
        batches = forward_batches(rows, forward_tokens, packed=packed)
        return all(batch.inputs.input_ids.numel() <= self.room for batch in batches)

    def largest(
        self,
        rows: Sequence[TrainingRow],
        targets: TargetSpec,
        hidden: HiddenSpec,
        *,
        forward_tokens: int,
        packed: bool,
    ) -> Largest:
        found = LargestSoFar(targets)
        for batch in forward_batches(rows, forward_tokens, packed=packed):
            found.add(select(self._logits(batch.inputs), found.spec))
            found.add_states(self._states(batch.inputs, hidden))
        return found.largest()

    def capture(
        self, rows: Sequence[TrainingRow], manifest: Manifest, check_stop: Callable[[], None]
    ) -> WindowTargets:
        def forward(batch: ForwardBatch, window: WindowTargets) -> ForwardTargets:
            if batch.inputs.input_ids.numel() > self.room:
                raise torch.OutOfMemoryError("the toy is full")
            logits, at = self._logits(batch.inputs), batch.window_index
            chunks = [(slice(0, len(at)), window.select(logits, batch.labels, at))]
            return ForwardTargets(at, chunks, self._states(batch.inputs, manifest.hidden))

        return capture_window(forward, rows, manifest, check_stop)

    def writer_hash(self) -> str:
        return "2" * 32

    def ends(self) -> list[int]:
        return [0]

    def write(
        self, sources: Sequence[list[int]], first_document: int, options: Preprocessing
    ) -> list[list[int]]:
        return [[source[-1], 0] for source in sources]

    def _tokens(self, batch: TeacherBatch) -> Tensor:
        return batch.input_ids.flatten()[batch.position_index]

    def _logits(self, batch: TeacherBatch) -> Tensor:
        tokens_N = self._tokens(batch)
        logits_NC = self.logits_VC[tokens_N].clone()
        logits_NC[torch.isin(tokens_N, torch.tensor([*self.poisoned]))] = torch.nan
        return logits_NC

    def _states(self, batch: TeacherBatch, hidden: HiddenSpec) -> dict[int, Tensor]:
        return {layer: self.states_VD[self._tokens(batch)] for layer in hidden.layers}
