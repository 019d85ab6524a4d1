"""What a model predicts with, and how its logits are read at positions: one class for each head.

A task names its head (`TeacherTask.head`), and `HEADS` has the class of each.

B rows, T tokens, n positions of a chunk (flat in B * T), V logit width, L outputs of a row.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import Refused
from shared.tasks import ProblemType
from shared.windows import context_bounds, window_logits
from teacher_cache.engines import probes, streamed_head
from teacher_cache.engines.hidden_states import find_blocks
from teacher_cache.engines.streamed_head import StreamedHead, last_state, model_inputs
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.class_labels import PROBLEMS
from teacher_cache.tasks.inputs import TeacherBatch

log = logging.getLogger(__name__)

LogitsOf = Callable[[Tensor], Tensor]  # flat positions [n] -> logits [n, V]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a head says of a model: its classes, and where its hidden states are."""

    num_classes: int
    logit_width: int
    trunk: nn.Module | None  # ends in the final hidden state; None: not found
    blocks: nn.ModuleList
    streamed: StreamedHead | None = None  # None: full logits
    labels: tuple[str, ...] = ()  # names of the classes of a label space


class Head(ABC):
    """How one kind of head is found in a model and read."""

    def __init__(self, task: TeacherTask) -> None:
        self.task = task

    @abstractmethod
    def fit(self, model: Any, tokenizer: Any, max_length: int) -> Fitted:
        """Looks at a model in evaluation mode; `max_length` is that of the longest row."""

    @abstractmethod
    def logits_of(self, model: Any, batch: TeacherBatch, fitted: Fitted) -> LogitsOf | None:
        """Runs the trunk, or all of the model; returns how to get logits, if there are any."""

    def refuse_other_models(self, model: Any, logits: probes.LogitsFn, num_classes: int) -> None:
        """Tries whether the model predicts what this head is for; most need no trial."""
        return

    def reported_states(self, output: Any) -> tuple[Tensor, ...]:
        """The hidden states that the model itself hands out when asked for them."""
        return output.hidden_states


class NextToken(Head):
    """The logits of a language model over its vocabulary, streamed where that is the same."""

    def fit(self, model: Any, tokenizer: Any, max_length: int) -> Fitted:
        num_ids = max(tokenizer.get_vocab().values()) + 1
        embedded_ids = model.get_input_embeddings().weight.shape[0]
        batch = probes.padded_batch(min(num_ids, embedded_ids), self.task.inputs)
        batch = batch.to(model.device)
        inputs = model_inputs(model, batch)
        with torch.no_grad():
            found = streamed_head.find(model, inputs)
            streams = found is not None and streamed_head.agrees(
                found, inputs, batch.position_index
            )
            logit_width = model(**inputs).logits.shape[-1]
        if not streams:
            log.warning(
                "%s: logits of some positions alone differ from the model's own, so all logits of "
                "a batch will be computed at once, which takes much more memory",
                type(model).__name__,
            )
        trunk = None if found is None else found.trunk
        return Fitted(
            num_classes=min(logit_width, num_ids),
            logit_width=logit_width,
            trunk=trunk,
            blocks=self.blocks(model, trunk),
            streamed=found if streams else None,
        )

    def blocks(self, model: Any, trunk: nn.Module | None) -> nn.ModuleList:
        return find_blocks(trunk or model)

    def logits_of(self, model: Any, batch: TeacherBatch, fitted: Fitted) -> LogitsOf | None:
        inputs, streamed = model_inputs(model, batch), fitted.streamed
        if streamed is None:
            full_MV = model(**inputs).logits.flatten(0, 1)
            return lambda index_n: full_MV[index_n]
        outputs = streamed.run_trunk(inputs)
        states_MD = last_state(outputs[-1]).flatten(0, 1)
        return lambda index_n: streamed.logits(
            inputs, outputs, states_MD[index_n.to(states_MD.device)]
        )

    def refuse_other_models(self, model: Any, logits: probes.LogitsFn, num_classes: int) -> None:
        if probes.sees_later_tokens(logits, num_classes, self.task.inputs):
            raise Refused(
                f"{type(model).__name__}: its prediction of a token depends on later tokens, so it "
                "is no causal language model. Name a decoder (a BERT: saved with is_decoder)."
            )


class MaskedToken(NextToken):
    """Logits over the vocabulary too, of a model that reads a row from both sides."""

    def refuse_other_models(self, model: Any, logits: probes.LogitsFn, num_classes: int) -> None:
        if probes.ignores_later_tokens(logits, num_classes):
            raise Refused(
                f"{type(model).__name__}: its prediction of a token does not depend on later "
                "tokens, so it is no masked language model. Name an encoder (a BERT: saved "
                "without is_decoder), or use --task causal-lm."
            )


class NextOfPair(NextToken):
    """The logits of the decoder of an encoder-decoder; its layers are those of the decoder."""

    def blocks(self, model: Any, trunk: nn.Module | None) -> nn.ModuleList:
        return find_blocks(model.get_decoder())

    def reported_states(self, output: Any) -> tuple[Tensor, ...]:
        return output.decoder_hidden_states


class TokenLabels(Head):
    """Logits over labels at each token."""

    def fit(self, model: Any, tokenizer: Any, max_length: int) -> Fitted:
        return _fit_labels(model, tokenizer, "single_label", trunk=model.base_model)

    def logits_of(self, model: Any, batch: TeacherBatch, fitted: Fitted) -> LogitsOf | None:
        full_MV = model(**model_inputs(model, batch)).logits.flatten(0, 1)
        return lambda index_n: full_MV[index_n]


class RowLabels(Head):
    """Outputs of a row as a whole: logits over labels, yes or no for each of them, or numbers."""

    def fit(self, model: Any, tokenizer: Any, max_length: int) -> Fitted:
        return _fit_labels(model, tokenizer, self.task.problem_type, trunk=None)

    def logits_of(self, model: Any, batch: TeacherBatch, fitted: Fitted) -> LogitsOf | None:
        inputs = model_inputs(model, batch)
        width = inputs["input_ids"].shape[1]
        return ROW_OUTPUTS[self.task.problem_type](model(**inputs).logits, width)


class Span(Head):
    """Logits of start and end of an answer, over the tokens of a row that may be one."""

    def fit(self, model: Any, tokenizer: Any, max_length: int) -> Fitted:
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if places is not None and max_length > places:
            raise Refused(
                f"--max-length {max_length}: {type(model).__name__} takes {places:,} positions. "
                f"Use at most --max-length {places}: longer texts are cut into windows."
            )
        return Fitted(max_length, max_length, trunk=None, blocks=find_blocks(model))

    def logits_of(self, model: Any, batch: TeacherBatch, fitted: Fitted) -> LogitsOf | None:
        assert batch.segments is not None  # rows of this head have several parts
        output = model(**model_inputs(model, batch))
        context_B2 = context_bounds(batch.segments)
        logits = output.start_logits, output.end_logits
        return lambda index_n: window_logits(*logits, context_B2, index_n, fitted.num_classes)


class NoHead(Head):
    """A model without a head: its hidden states are all there is."""

    def fit(self, model: Any, tokenizer: Any, max_length: int) -> Fitted:
        num_ids = max(tokenizer.get_vocab().values()) + 1
        return Fitted(num_ids, 1, trunk=model, blocks=find_blocks(model))

    def logits_of(self, model: Any, batch: TeacherBatch, fitted: Fitted) -> LogitsOf | None:
        model(**model_inputs(model, batch))
        return None


def _fit_labels(
    model: Any, tokenizer: Any, problem_type: ProblemType, trunk: nn.Module | None
) -> Fitted:
    if model.config.pad_token_id is None:  # causal trunks look for the last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    names, count = model.config.id2label, int(model.config.num_labels)
    classes = PROBLEMS[problem_type].classes(count)
    return Fitted(
        num_classes=classes,
        logit_width=classes,
        trunk=trunk,
        blocks=find_blocks(model),
        labels=tuple(str(names[number]) for number in range(count)),
    )


def _one_of_the_labels(logits_BL: Tensor, width: int) -> LogitsOf:
    """Positions are tokens of [B, width], of which a row has one position."""
    return lambda index_n: logits_BL[index_n // width]


def _each_yes_or_no(logits_BL: Tensor, width: int) -> LogitsOf:
    """Positions are outputs; each is yes with probability sigmoid(z), the softmax of (0, z)."""
    flat_M1 = logits_BL.reshape(-1, 1)
    flat_M2 = torch.cat([torch.zeros_like(flat_M1), flat_M1], dim=1)
    return lambda index_n: flat_M2[index_n]


def _each_a_number(logits_BL: Tensor, width: int) -> LogitsOf:
    """Positions are outputs, which are the numbers themselves."""
    flat_M1 = logits_BL.reshape(-1, 1)
    return lambda index_n: flat_M1[index_n]


# Outputs [B, L] and the tokens of the longest row -> logits at flat positions.
ROW_OUTPUTS: dict[ProblemType, Callable[[Tensor, int], LogitsOf]] = {
    "single_label": _one_of_the_labels,
    "multi_label": _each_yes_or_no,
    "regression": _each_a_number,
}

HEADS: dict[str, type[Head]] = {
    "next-token": NextToken,
    "masked-token": MaskedToken,
    "next-of-pair": NextOfPair,
    "token-labels": TokenLabels,
    "row-labels": RowLabels,
    "span": Span,
    "none": NoHead,
}
