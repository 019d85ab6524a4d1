"""The teacher: loaded once, then logits and hidden states for one batch after another.

B rows, T tokens, N positions (flat in B * T), n positions of one chunk, V logit width, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError, Refused
from shared.models.limits import most_tokens
from shared.tasks import DEFAULT_TASK, Pooling, ProblemType, TaskName
from teacher_cache.engines import probes, streamed_head
from teacher_cache.engines.heads import HEADS, Fitted, Head, LogitsOf
from teacher_cache.engines.hidden_states import FINAL, keeping
from teacher_cache.engines.loading import (
    DTYPES,
    load_model,
    load_tokenizer,
    model_source,
    placement,
)
from teacher_cache.engines.streamed_head import model_inputs, same_values
from teacher_cache.tasks.inputs import TeacherBatch
from teacher_cache.tasks.table import task_for

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of logits, counted as float32
CHUNK_MULTIPLE = 16  # matrix products like whole tiles


@dataclass(slots=True)
class TeacherOutput:
    """All hidden states of one batch, and logits that are computed as the chunks are asked for."""

    hidden: dict[int, Tensor]  # layer -> [N, D] in the teacher's dtype, on that layer's device
    chunks: Iterator[tuple[slice, Tensor]]  # places in `position_index`, their logits [n, V]


@dataclass(slots=True)
class Teacher:
    """A model in evaluation mode, without a cache and without gradients, and how it is read."""

    model: Any  # PreTrainedModel
    tokenizer: Any  # PreTrainedTokenizerBase
    head: Head
    fitted: Fitted

    @classmethod
    def load(
        cls,
        teacher: str,
        *,
        task: TaskName = DEFAULT_TASK,
        problem_type: ProblemType = "single_label",
        max_length: int = 0,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Teacher":
        """From a folder or a Hub id. `device` is auto, a torch device, or balanced: all GPUs.

        `tokenizer` names another folder or id; None: the teacher's own, in the same revision.
        `max_length`: the tokens of the longest row, where these are the classes.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}.")
        device_map = placement(device)
        _ = model_source(teacher)  # a folder without a model has no tokenizer to speak of
        loaded_tokenizer = load_tokenizer(
            tokenizer or teacher,
            revision=None if tokenizer else revision,
            trust_remote_code=trust_remote_code,
        )
        model = load_model(
            teacher,
            task_for(task),
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        return cls.wrap(model, loaded_tokenizer, task, problem_type, max_length=max_length)

    @classmethod
    def wrap(
        cls,
        model: Any,
        tokenizer: Any,
        task: TaskName = DEFAULT_TASK,
        problem_type: ProblemType = "single_label",
        *,
        max_length: int = 0,
    ) -> "Teacher":
        """A model already in memory, which is put into evaluation mode and tried out."""
        its_task = task_for(task, problem_type)
        head = HEADS[its_task.head](its_task)
        model.eval().requires_grad_(False)
        model.config.return_dict = True
        teacher = cls(model, tokenizer, head, head.fit(model, tokenizer, max_length))
        head.refuse_other_models(model, teacher.logits, teacher.num_classes)
        return teacher

    @property
    def num_classes(self) -> int:
        """C; of a language model the smaller of V and the highest token id + 1."""
        return self.fitted.num_classes

    @property
    def device(self) -> torch.device:
        """Where batches go; with several devices, that of the embedding."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_layers(self) -> int:
        return len(self.fitted.blocks)

    @property
    def hidden_width(self) -> int:
        """D of every layer that `check_layers` lets pass."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def attn_implementation(self) -> str | None:
        return self.model.config._attn_implementation

    @property
    def revision(self) -> str | None:
        """The commit a Hub id was resolved to; None for a folder."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def chunk_positions(self) -> int:
        """Positions whose logits exist at once; part of the plan, for it changes the rounding."""
        budget = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cpu"])
        tiles = budget // (4 * self.fitted.logit_width * CHUNK_MULTIPLE)
        return max(1, tiles) * CHUNK_MULTIPLE

    def forward(
        self,
        batch: TeacherBatch,
        layers: Sequence[int] = (),
        *,
        chunk_positions: int | None = None,
        pooling: Pooling = "none",
    ) -> TeacherOutput:
        """One forward of the trunk now; the head runs as the caller takes the chunks.

        With `pooling` each row has one position, whose state is made of those of all its tokens.
        """
        batch = batch.to(self.device)
        hidden: dict[int, Tensor] = {}
        with torch.no_grad(), ExitStack() as hooks:
            for layer in layers:
                module = self._module(layer)
                hooks.enter_context(keeping(module, layer, batch, pooling, hidden))
            logits_of = self.head.logits_of(self.model, batch, self.fitted)
        if logits_of is None:
            return TeacherOutput(hidden, iter(()))
        chunk = chunk_positions or self.chunk_positions
        return TeacherOutput(hidden, _chunks(logits_of, batch.position_index, chunk))

    def logits(self, batch: TeacherBatch) -> Tensor:
        """[N, V] at once, for probes and checks."""
        return torch.cat([logits_nV for _, logits_nV in self.forward(batch).chunks])

    def allows_packing(self) -> bool:
        """Whether packed rows give what their documents give alone, found by trying it."""
        return streamed_head.accepts(self.model, "position_ids") and probes.packed_equals_alone(
            self.logits, self.num_classes
        )

    def check_length(self, max_length: int) -> None:
        """Refuses rows that are longer than the model's table of positions."""
        most = most_tokens(self.model)
        if most is not None and max_length > most:
            raise Refused(
                f"--max-length {max_length}: {type(self.model).__name__} takes rows of at most "
                f"{most} tokens. Use --max-length {most}: longer texts are cut into several rows."
            )

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuses a layer that does not exist, is of another width, or is reported otherwise."""
        batch = probes.padded_batch(self.num_classes, self.head.task.inputs).to(self.device)
        hidden = self.forward(batch, layers).hidden
        with torch.no_grad():
            inputs = model_inputs(self.model, batch)
            output = self.model(**inputs, output_hidden_states=True)
        reported = self.head.reported_states(output)

        def at_positions(state_BTD: Tensor) -> Tensor:
            return state_BTD.flatten(0, 1)[batch.position_index.to(state_BTD.device)]

        for layer, states_ND in hidden.items():
            if states_ND.shape[1] != self.hidden_width:
                raise Refused(
                    f"hidden_layers={layer}: {states_ND.shape[1]} channels, where "
                    f"{type(self.model).__name__} has {self.hidden_width}. Leave this layer out."
                )
            if layer == self.num_layers - 1:
                continue  # the model reports it after the norm only, which is layer -1
            if not states_ND.any() or not any(
                same_values(states_ND, at_positions(state_BTD), probes.SAME_SHAPE[self.dtype])
                for state_BTD in reported  # Mamba's list begins after block 0, others before it
            ):
                raise Refused(
                    f"hidden_layers={layer}: what {type(self.model).__name__} hands on there is "
                    "none of the hidden states it reports. Leave this layer out."
                )

    def _module(self, layer: int) -> nn.Module:
        if layer == FINAL and self.fitted.trunk is not None:
            return self.fitted.trunk
        if not 0 <= layer < self.num_layers:
            raise ConfigError(
                f"hidden_layers={layer}: expected {FINAL} (after the last norm) or a block of "
                f"{type(self.model).__name__}, 0 to {self.num_layers - 1}."
            )
        return self.fitted.blocks[layer]


def _chunks(logits_of: LogitsOf, index_N: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(index_N), chunk):
        here = slice(start, min(start + chunk, len(index_N)))
        with torch.no_grad():
            logits_nV = logits_of(index_N[here])
        yield here, logits_nV
