"""What an evaluation report shows beside its numbers: calibration, classes, the worst rows.

Of most rows nothing is kept but sums; of the worst ones so far what was answered at their
positions. Their tokens are read from the cache at the end.

Shapes: N positions of a batch, R rows of a batch, P positions of one row, T its tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shared.cache import Cache
from shared.format.schema import planes_of
from shared.models.tokenizer import load_cached_tokenizer
from shared.rows import Row
from student_train.config import WorstBy
from student_train.data.collate import MicroBatch
from student_train.loss.positions import PREFIX
from student_train.metrics.reliability import Reliability
from student_train.tasks.base import NameOf
from student_train.tasks.table import task_of

_CHUNK_BITS = 24  # of a row id: document << 24 | chunk
_CONTEXT_TOKENS = 6  # that decide how a token is written


@dataclass(frozen=True, slots=True)
class _Kept:
    """One row; `answers` [P] each by name, as positions.py gives them."""

    score: float
    row_id: int
    answers: dict[str, np.ndarray]


class Details:
    """What one evaluation shows, in one process."""

    def __init__(self, cache: Cache, *, worst: int, by: WorstBy) -> None:
        self.cache, self.worst, self.by = cache, worst, by
        self.student, self.teacher = Reliability(), Reliability()
        self.confusion = task_of(cache.manifest).confusion(cache.manifest)
        self._rows: list[_Kept] = []

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps what is needed of a batch and of what an attached student returned for it."""
        answers = {
            name.removeprefix(PREFIX): values.cpu().numpy()
            for name, values in output.items()
            if name.startswith(PREFIX)
        }
        for name in ("probability", "teacher_probability"):  # not a number: sure of nothing
            if name in answers:
                answers[name] = np.nan_to_num(answers[name].astype(np.float64))
        labels_N = batch["labels"].numpy()
        there_N = labels_N >= 0
        self.student.add(answers["probability"][there_N], (answers["student"] == labels_N)[there_N])
        if "teacher" in answers:
            self.teacher.add(
                answers["teacher_probability"][there_N], (answers["teacher"] == labels_N)[there_N]
            )
        if self.confusion is not None:
            self.confusion.add(labels_N[there_N], answers["student"][there_N])
        sequences = batch.get("decoder_input_ids", batch["input_ids"])
        per_row = self.cache.manifest.num_outputs or sequences.shape[1]
        row_N = batch["row_ids"][batch["position_index"] // per_row].numpy()
        if self.worst and len(row_N):
            self._keep_worst(row_N, answers)

    def _keep_worst(self, row_N: np.ndarray, answers: dict[str, np.ndarray]) -> None:
        """Positions of a row stand together. A row's score is the mean over its positions."""
        first_R = np.concatenate([[0], np.flatnonzero(np.diff(row_N)) + 1])
        end_R = np.append(first_R[1:], len(row_N))
        sums_R = np.add.reduceat(answers[self.by].astype(np.float64), first_R)
        score_R = np.nan_to_num(sums_R / (end_R - first_R), nan=np.inf)  # not a number: the worst
        for r in np.argsort(-score_R, kind="stable")[: self.worst].tolist():
            of_row = {n: values[first_R[r] : end_R[r]].copy() for n, values in answers.items()}
            self._rows.append(_Kept(float(score_R[r]), int(row_N[first_R[r]]), of_row))
        self._rows.sort(key=lambda kept: (-kept.score, kept.row_id))
        del self._rows[self.worst :]

    def numbers(self) -> dict[str, Any]:
        """All of it; the worst rows with their tokens, as text."""
        found: dict[str, Any] = {
            "ece": self.student.error,
            "reliability": self.student.bins(),
        }
        if self.teacher.count_B.any():
            found["teacher_ece"] = self.teacher.error
            found["teacher_reliability"] = self.teacher.bins()
        if self.confusion is not None:
            found["classes"] = self.confusion.classes()
            found["confusions"] = self.confusion.confusions()
        found["worst_by"] = self.by
        found["worst"] = self._worst_rows() if self._rows else []
        return found

    def _worst_rows(self) -> list[dict[str, Any]]:
        tokenizer = load_cached_tokenizer(self.cache.storage)
        index = row_numbers(self.cache, [kept.row_id for kept in self._rows])
        return [
            _shown(kept, self.cache[index[kept.row_id]], self.cache, tokenizer)
            for kept in self._rows
        ]


def row_numbers(cache: Cache, row_ids: Sequence[int]) -> dict[int, int]:
    """The places of rows of these ids in a cache; reads the ids of blocks until all are found."""
    planes = [plane for plane in planes_of(cache.manifest) if plane.column == "row_ids"]
    wanted, found, first = np.array(row_ids, np.int64), {}, 0
    for block, rows in enumerate(cache.block_rows.tolist()):
        ids_R = cache.read_planes(block, planes)["row_ids.0"].view(np.int64)
        for place in np.flatnonzero(np.isin(ids_R, wanted)).tolist():
            found[int(ids_R[place])] = first + place
        first += rows
        if len(found) == len(wanted):
            break
    return found


def _shown(
    kept: _Kept, row: Row, cache: Cache, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One row as text: all tokens, and what was answered at its positions.

    Which positions those are, and what they are about, is the task's to say.
    """
    task, loss_P = task_of(cache.manifest), kept.answers["loss"]
    texts = token_texts(tokenizer, row.input_ids.tolist())
    name_of = task.name_of(cache.manifest, texts, tokenizer)
    answers = []
    for place in task.shown_places(kept.answers, row).tolist():
        answer = _answer(kept, place, int(row.labels[place]), name_of)
        first, end = task.tokens_about(row, place, texts, tokenizer) or (None, None)
        answers.append(answer | {"token": first, "token_end": end})
    shown: dict[str, Any] = {
        "row_id": kept.row_id,
        "document": kept.row_id >> _CHUNK_BITS,
        "chunk": kept.row_id & ((1 << _CHUNK_BITS) - 1),
        "positions": len(loss_P),
        "loss": float(loss_P.mean()),
    }
    if "kl" in kept.answers:
        shown["kl"] = float(kept.answers["kl"].mean())
    return shown | {"tokens": texts, "answers": answers}


def _answer(kept: _Kept, place: int, label: int, name_of: NameOf) -> dict[str, Any]:
    """What hard label, student and, where known, teacher say at one position."""
    numbers = {name: values[place].item() for name, values in kept.answers.items()}
    answer = {
        "label": name_of(place, label) if label >= 0 else None,
        "loss": numbers["loss"],
        "student": name_of(place, numbers["student"]),
        "probability": numbers["probability"],
    }
    if "teacher" in numbers:
        answer["teacher"] = name_of(place, numbers["teacher"])
        answer["teacher_probability"] = numbers["teacher_probability"]
        answer["kl"] = numbers["kl"]
    return answer


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as it is written behind those before it, special ones shown; joined: the text.

    A token that is only a part of a character is written on its own.
    """
    texts = []
    for place in range(len(ids)):
        before = ids[max(0, place - _CONTEXT_TOKENS) : place]
        head = str(tokenizer.decode(before)) if before else ""
        both = str(tokenizer.decode([*before, ids[place]]))
        alone = not both.startswith(head) or both == head
        texts.append(str(tokenizer.decode([ids[place]])) if alone else both[len(head) :])
    return texts
