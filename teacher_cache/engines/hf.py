"""The reference engine: a model of `transformers` that runs in this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shared.errors import Refused
from shared.format.manifest import HiddenSpec, Manifest, Preprocessing, TeacherInfo
from shared.targets.spec import TargetSpec
from teacher_cache.config import CaptureConfig
from teacher_cache.engines import generation
from teacher_cache.engines.base import Engine
from teacher_cache.engines.batches import ForwardBatch, forward_batches
from teacher_cache.engines.loading import config_hash, teacher_id, weights_digest
from teacher_cache.engines.memory import is_out_of_memory
from teacher_cache.engines.teacher import Teacher
from teacher_cache.engines.windows import capture_window
from teacher_cache.select.largest import Largest, LargestSoFar
from teacher_cache.select.targets import select
from teacher_cache.select.window import ForwardTargets, WindowTargets
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.rows import TrainingRow

_FORWARD_TOKENS = {"cpu": 4096, "cuda": 32768}  # tried first; halved until it fits the memory


@dataclass(frozen=True, slots=True)
class TransformersEngine:
    """A loaded teacher under the name that the manifest is to know it by."""

    name: str
    teacher: Teacher

    @classmethod
    def load(cls, config: CaptureConfig, task: TeacherTask) -> "TransformersEngine":
        """Loads the teacher, and refuses rows and layers that it does not have."""
        assert config.teacher is not None  # CaptureConfig refuses targets without a teacher
        attention = config.attn_implementation
        teacher = Teacher.load(
            config.teacher,
            task=task.name,
            problem_type=task.problem_type,
            max_length=config.max_length,
            tokenizer=config.tokenizer,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=config.trust_remote_code,
        )
        if task.fills_rows:  # other tasks have rows of their documents' length
            teacher.check_length(config.max_length)
        if config.layers:
            teacher.check_layers(config.layers)
        if config.pack and not teacher.allows_packing():
            raise Refused(
                f"--pack: packed and alone, {config.teacher} gives different outputs (its "
                "documents see each other), so packing would be wrong. Use --no-pack: rows of "
                "similar length are batched together anyway."
            )
        return cls(config.teacher, teacher)

    def info(self) -> TeacherInfo:
        return teacher_info(self.name, self.teacher)

    @property
    def num_classes(self) -> int:
        return self.teacher.num_classes

    @property
    def labels(self) -> tuple[str, ...]:
        return self.teacher.fitted.labels

    @property
    def hidden_width(self) -> int:
        return self.teacher.hidden_width

    @property
    def default_forward_tokens(self) -> int:
        return _FORWARD_TOKENS.get(self.teacher.device.type, _FORWARD_TOKENS["cpu"])

    @property
    def chunk_positions(self) -> int:
        return self.teacher.chunk_positions

    def fits(
        self,
        rows: Sequence[TrainingRow],
        targets: TargetSpec,
        hidden: HiddenSpec,
        *,
        forward_tokens: int,
        packed: bool,
    ) -> bool:
        try:
            self.largest(rows, targets, hidden, forward_tokens=forward_tokens, packed=packed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        torch.cuda.empty_cache()  # outside the `except`, whose error holds what did not fit
        return False

    def largest(
        self,
        rows: Sequence[TrainingRow],
        targets: TargetSpec,
        hidden: HiddenSpec,
        *,
        forward_tokens: int,
        packed: bool,
    ) -> Largest:
        found, inputs = LargestSoFar(targets), self.teacher.head.task.inputs
        for batch in forward_batches(rows, forward_tokens, packed=packed, inputs=inputs):
            output = self.teacher.forward(batch.inputs, hidden.layers, pooling=hidden.pooling)
            for _, logits in output.chunks:
                found.add(select(logits, found.spec))
            found.add_states(output.hidden)
        return found.largest()

    def capture(
        self, rows: Sequence[TrainingRow], manifest: Manifest, check_stop: Callable[[], None]
    ) -> WindowTargets:
        def forward(batch: ForwardBatch, window: WindowTargets) -> ForwardTargets:
            output = self.teacher.forward(
                batch.inputs,
                manifest.hidden.layers,
                chunk_positions=manifest.plan.chunk_positions,
                pooling=manifest.hidden.pooling,
            )
            labels = batch.labels.to(self.teacher.device)
            chosen = [
                (part, window.select(logits, labels[part], batch.window_index[part]))
                for part, logits in output.chunks
            ]
            return ForwardTargets(batch.window_index, chosen, output.hidden)

        return capture_window(forward, rows, manifest, check_stop)

    def writer_hash(self) -> str:
        return generation.writer_hash(self.teacher)

    def ends(self) -> list[int]:
        return generation.ends(self.teacher)

    def write(
        self, sources: Sequence[list[int]], first_document: int, options: Preprocessing
    ) -> list[list[int]]:
        return generation.write(self.teacher, sources, first_document, options)


def teacher_of(engine: Engine) -> Teacher:
    """The model behind an engine, for tools that look at whole distributions or at weights."""
    if not isinstance(engine, TransformersEngine):
        raise Refused(
            "whole distributions are compared here, which only the engine transformers gives. "
            "Leave --calibrate out."
        )
    return engine.teacher


def teacher_info(name: str, teacher: Teacher) -> TeacherInfo:
    """What the manifest says of a teacher loaded as `name`."""
    return TeacherInfo(
        id=teacher_id(name),
        revision=teacher.revision or "local",
        config_hash=config_hash(teacher.model),
        weights_digest=weights_digest(teacher.model),
        dtype=str(teacher.dtype).removeprefix("torch."),
        attn_implementation=teacher.attn_implementation or "unknown",
        parameters=sum(parameter.numel() for parameter in teacher.model.parameters()),
    )
