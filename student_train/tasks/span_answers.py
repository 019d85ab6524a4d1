"""What metrics of answers in a text are computed from: the likeliest span of every window.

N positions of a batch, R rows, C classes (tokens of the longest window), T tokens, K entries.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache
from shared.format.layouts import PLACES, bounds_of
from shared.format.schema import ROW_CHUNK_BITS
from shared.rows import references
from shared.windows import Spans, WindowReference, best_spans, reference_of
from student_train.data.collate import MicroBatch
from student_train.loss.rows import SoftTarget
from student_train.metrics.spans import WindowAnswer, span_numbers
from student_train.processes import of_all_processes


class SpanAnswers:
    """Answers in windows: of each row the likeliest span of student and teacher, and its score.

    Scores are log-probabilities over what may be chosen in a window, not logits as in the scripts
    that go with SQuAD: a loss on probabilities leaves it open how high the logits of a window are,
    and of the teacher nothing else was cached.
    """

    def __init__(self, cache: Cache, max_answer_tokens: int) -> None:
        self._cache, self._max_tokens = cache, max_answer_tokens
        self._answers: list[Tensor] = []

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps i64 [R, 9]: row, then first and last token, score and null score of either.

        The scores by their bits as float64: one tensor is what travels between processes.
        """
        row_N = batch["row_ids"][batch["position_index"] // batch["input_ids"].shape[1]]
        student = self._spans(output["logits"].cpu().double().log_softmax(dim=-1), batch)
        teacher = self._spans(_teacher_logp(batch, self._cache), batch)
        columns = [row_N[:: len(PLACES)], *_as_columns(student), *_as_columns(teacher)]
        self._answers.append(torch.stack(columns, dim=1))

    def _spans(self, logp_NC: Tensor, batch: MicroBatch) -> Spans:
        logp_B2T = logp_NC[:, : batch["input_ids"].shape[1]].unflatten(0, (-1, len(PLACES)))
        return best_spans(logp_B2T, batch["context"][: len(logp_B2T)], self._max_tokens)

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics of spans.py, over documents: one question on one text."""
        of_rows = torch.cat([torch.zeros(0, 9, dtype=torch.int64), *self._answers])
        of_rows = of_all_processes(of_rows, device)
        row_R = of_rows[:, 0].numpy()
        student, teacher = (_as_spans(of_rows[:, 1:5]), _as_spans(of_rows[:, 5:9]))
        there = dict(zip(row_R.tolist(), range(len(row_R)), strict=True))
        windows: dict[int, list[WindowAnswer]] = {}
        teachers: dict[int, list[WindowAnswer]] = {}
        for row_id, reference in _references(self._cache):
            if row_id not in there:
                continue
            document, index = row_id >> ROW_CHUNK_BITS, there[row_id]
            windows.setdefault(document, []).append(_window(reference, student, index))
            teachers.setdefault(document, []).append(_window(reference, teacher, index))
        has_teacher = self._cache.has_targets
        return span_numbers(
            list(windows.values()), list(teachers.values()) if has_teacher else None
        )


def _teacher_logp(batch: MicroBatch, cache: Cache) -> Tensor:
    """The teacher's log-probabilities [N, C], float64; -inf where nothing was cached."""
    shape = len(batch["labels"]), cache.manifest.targets.num_classes
    logp_NC = torch.full(shape, -torch.inf, dtype=torch.float64)
    if "target_ids" not in batch:
        return logp_NC
    target = SoftTarget(
        ids=batch["target_ids"],
        logprobs=batch["target_logprobs"],
        log_tail=batch["target_log_tail"],
        counts=batch.get("target_counts"),
    )
    entries = target.at(slice(None))
    values_NK = entries.logprobs.double()
    return logp_NC.scatter_reduce(1, entries.ids.long(), values_NK, "amax")


def _as_columns(spans: Spans) -> list[Tensor]:
    scores = [score_B.contiguous().view(torch.int64) for score_B in (spans.score_B, spans.null_B)]
    return [spans.first_B, spans.last_B, *scores]


def _as_spans(columns_R4: Tensor) -> Spans:
    first_R, last_R, score_R, null_R = (column.contiguous() for column in columns_R4.unbind(dim=1))
    return Spans(first_R, last_R, score_R.view(torch.float64), null_R.view(torch.float64))


def _references(cache: Cache) -> Iterator[tuple[int, WindowReference]]:
    """Row id and reference of every row, in the order of the rows."""
    for number in range(cache.num_blocks):
        block = cache.read_block(number, targets=False)
        sizes = np.diff(bounds_of(block), axis=1)[:, 0].tolist()
        rows = zip(block.row_ids.tolist(), references(block), sizes, strict=True)
        for row_id, value, size in rows:
            yield row_id, reference_of(value, size, f"{cache.path}: reference of row {row_id}")


def _window(reference: WindowReference, spans: Spans, index: int) -> WindowAnswer:
    score = float(spans.score_B[index])
    text = ""
    if score > -math.inf:
        text = reference.between(int(spans.first_B[index]), int(spans.last_B[index]))
    return WindowAnswer(reference.answers, text, score, float(spans.null_B[index]))
