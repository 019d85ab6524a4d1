"""What became of a student in an artefact: the same rows through both, and the clock beside it.

B rows, T tokens, N decisions (a token, a row, or the end of a span), C classes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from shared.cache import Cache, Row
from shared.tasks import TASKS, Layout, ProblemType
from student_train.export.onnx_files import Arrays, Runner
from student_train.metrics.labels import LabelPredictions, task_numbers
from student_train.metrics.names import MetricName
from student_train.metrics.rows import (
    mean_squared_error,
    multi_label_numbers,
    regression_numbers,
)

_MAX_LOGITS = 1 << 25  # of one batch, 128 MiB as float32
_MAX_BATCH = 8
_RANDOM_TOKENS = (5, 17, 32)  # lengths of random rows, in turn
_WARM_UP, _REPEATS = 3, 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence: tokens [T], and the tokens with hard labels where a cache has them."""

    row: int
    tokens: Mapping[str, np.ndarray]  # by name of the input; all but the mask
    positions: np.ndarray
    labels: np.ndarray

    @property
    def length(self) -> int:
        return len(self.tokens["input_ids"])


@dataclass(frozen=True, slots=True)
class Labels:
    """What the hard labels of a cache mean for logits; `names` only on a label space."""

    one_per_row: bool
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one model on the labels: mean cross-entropy in nats, of numbers the mean squared error;
    the main metric of the task."""

    loss: float | None = None
    metric: MetricName | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """An artefact against the student; `time_ratio` below 1 is faster than float32 in torch.

    `agreement`: the share of decisions that are the same; None where numbers are said.
    """

    max_difference: float
    mean_difference: float
    agreement: float | None
    decisions: int
    torch_ms: float
    artefact_ms: float
    time_ratio: float
    student: Scores
    artefact: Scores


@dataclass(slots=True)
class _Sums:
    """Over the decisions so far, and the answers on labelled ones, of student and artefact."""

    largest: float = 0.0
    total: float = 0.0
    values: int = 0
    decisions: int = 0
    agreed: int = 0
    answers: list[tuple[Sample, np.ndarray, np.ndarray]] = field(default_factory=list)


def samples_of(cache: Cache, count: int, inputs: Sequence[str], start_token: int) -> list[Sample]:
    """Rows of a cache, evenly spread over it; packed documents apart, as students are fed.

    An encoder-decoder reads the first segment of a row, and its decoder the second; of a cache that
    has no pairs it reads the row and is asked for its labels, behind `start_token`.
    """
    layout = cache.manifest.layout
    numbers = np.unique(np.linspace(0, cache.num_rows - 1, min(count, cache.num_rows)).astype(int))
    return [
        sample
        for number in numbers.tolist()
        for sample in _samples(cache[number], number, inputs, start_token, layout)
    ]


def _samples(
    row: Row, number: int, inputs: Sequence[str], start_token: int, layout: Layout
) -> Iterator[Sample]:
    if layout == "pair":
        size, ids = row.segments[0], row.input_ids.numpy()
        tokens = {"input_ids": ids[:size], "decoder_input_ids": ids[size:-1]}
        yield Sample(number, tokens, row.positions.numpy() - size, row.labels.numpy())
        return
    start = 0
    for length in (len(row.input_ids),) if layout == "window" else row.segments:
        here = slice(start, start + length)
        tokens = {"input_ids": row.input_ids[here].numpy()}
        if "token_type_ids" in inputs:
            types = row.token_type_ids
            tokens["token_type_ids"] = (
                np.zeros(length, np.int64) if types is None else types.numpy()
            )
        if "decoder_input_ids" in inputs:
            tokens["decoder_input_ids"] = np.append(start_token, row.labels[:-1].numpy())
        inside = ((row.positions >= start) & (row.positions < start + length)).numpy()
        if layout == "outputs":
            inside[:] = True  # of the row as a whole, and no tokens
        yield Sample(
            number, tokens, row.positions.numpy()[inside] - start, row.labels.numpy()[inside]
        )
        start += length


def random_samples(count: int, classes: int, inputs: Sequence[str]) -> list[Sample]:
    """Rows of random tokens, where there is no cache to take any from."""
    rng, none = np.random.default_rng(0), np.zeros(0, np.int64)
    samples = []
    for number in range(count):
        length = _RANDOM_TOKENS[number % len(_RANDOM_TOKENS)]
        tokens = {"input_ids": rng.integers(0, classes, length)}
        if "token_type_ids" in inputs:
            tokens["token_type_ids"] = (np.arange(length) >= length // 2).astype(np.int64)
        if "decoder_input_ids" in inputs:
            tokens["decoder_input_ids"] = rng.integers(0, classes, length - 2)
        samples.append(Sample(number, tokens, none, none))
    return samples


def labels_of(cache: Cache, config: PretrainedConfig) -> Labels | None:
    """None where the labels say nothing about the logits one token, or one row, at a time."""
    manifest = cache.manifest
    task = TASKS[manifest.task]
    of_tokens = task.target_space in ("tokens", "states")
    if of_tokens or not manifest.labelled or (config.is_encoder_decoder and task.layout != "pair"):
        return None
    return Labels(manifest.layout in ("row", "outputs"), manifest.labels)


def padded(samples: Sequence[Sample], pad_token: int) -> dict[str, Tensor]:
    """A batch of sequences, padded on the right."""
    batch: dict[str, Tensor] = {}
    for name in samples[0].tokens:
        arrays = [torch.from_numpy(np.asarray(s.tokens[name], np.int64)) for s in samples]
        fill = 0 if name == "token_type_ids" else pad_token
        batch[name] = torch.nn.utils.rnn.pad_sequence(arrays, batch_first=True, padding_value=fill)
        if name == "input_ids":
            ones = [torch.ones_like(array) for array in arrays]
            batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return batch


def check(
    student: Runner,
    artefact: Runner,
    samples: Sequence[Sample],
    *,
    clock: Runner,
    classes: int,
    pad_token: int,
    labels: Labels | None,
    problem_type: ProblemType = "single_label",
) -> Check:
    """Both on the same padded batches; then one row at a time, in turn with `clock`.

    That is the student in float32 torch with its adapters merged: unmerged ones cost time, which
    would make any artefact look fast.
    """
    sums = _Sums()
    for batch in _batches(samples, classes):
        inputs = padded(batch, pad_token)
        _add(sums, batch, (student(inputs), artefact(inputs)), labels, problem_type)
    by_length = sorted(samples, key=lambda sample: sample.length)
    one_row = padded([by_length[len(by_length) // 2]], pad_token)
    torch_ms, artefact_ms = _timed([clock, artefact], one_row)
    if problem_type == "single_label":
        scores = [_scores(sums.answers, which, labels) for which in (0, 1)]
    else:
        scores = [_output_scores(sums.answers, which, problem_type) for which in (0, 1)]
    return Check(
        max_difference=sums.largest,
        mean_difference=sums.total / max(1, sums.values),
        agreement=None if problem_type == "regression" else sums.agreed / max(1, sums.decisions),
        decisions=sums.decisions,
        torch_ms=round(torch_ms, 3),
        artefact_ms=round(artefact_ms, 3),
        time_ratio=round(artefact_ms / torch_ms, 3),
        student=scores[0],
        artefact=scores[1],
    )


def _batches(samples: Sequence[Sample], classes: int) -> Iterator[Sequence[Sample]]:
    longest = max(sample.length for sample in samples)
    size = max(1, min(_MAX_BATCH, _MAX_LOGITS // (longest * classes)))
    for first in range(0, len(samples), size):
        yield samples[first : first + size]


def _add(
    sums: _Sums,
    batch: Sequence[Sample],
    both: tuple[Arrays, Arrays],
    labels: Labels | None,
    problem_type: ProblemType,
) -> None:
    for name in both[0]:
        for index, sample in enumerate(batch):
            one_NC, other_NC = (_decisions(name, each[name][index], sample) for each in both)
            difference_NC = np.abs(one_NC - other_NC)
            sums.largest = max(sums.largest, float(difference_NC.max()))
            sums.total += float(difference_NC.sum(dtype=np.float64))
            sums.values += difference_NC.size
            same = _choices(one_NC, problem_type) == _choices(other_NC, problem_type)
            sums.decisions += same.size
            sums.agreed += int(same.sum())
            if labels is not None and name == "logits" and len(sample.labels):
                at = [0] if labels.one_per_row else sample.positions
                sums.answers.append((sample, one_NC[at], other_NC[at]))


def _decisions(name: str, logits: np.ndarray, sample: Sample) -> np.ndarray:
    """The logits of one row without its padding, [N, C]: C are tokens where a span is asked for."""
    if name == "last_hidden_state":
        return logits[: sample.length]
    if name != "logits":
        return logits[None, : sample.length]
    if logits.ndim == 1:
        return logits[None]
    asked = sample.tokens.get("decoder_input_ids", sample.tokens["input_ids"])
    return logits[: len(asked)]


def _choices(logits_NC: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """The most probable class [N]; of several labels yes or no of each, [N, C]."""
    return logits_NC > 0 if problem_type == "multi_label" else logits_NC.argmax(-1)


def _scores(
    answers: Sequence[tuple[Sample, np.ndarray, np.ndarray]], which: int, labels: Labels | None
) -> Scores:
    if labels is None or not answers:
        return Scores()
    logprobs_PC = torch.cat(
        [torch.from_numpy(each[1 + which]).double().log_softmax(-1) for each in answers]
    )
    labels_P = torch.from_numpy(np.concatenate([sample.labels for sample, *_ in answers]))
    loss = -float(logprobs_PC.gather(1, labels_P[:, None]).mean())
    if not labels.names:
        return Scores(loss)
    best_P = logprobs_PC.max(dim=1)
    rows = [np.full(len(sample.labels), sample.row) for sample, *_ in answers]
    numbers: dict[str, Any] = task_numbers(
        LabelPredictions(
            np.concatenate(rows),
            labels_P.numpy(),
            best_P.indices.numpy(),
            best_P.values.exp().numpy(),
        ),
        labels.names,
    )
    return Scores(loss, numbers["metric"], numbers[numbers["metric"]])


def _output_scores(
    answers: Sequence[tuple[Sample, np.ndarray, np.ndarray]],
    which: int,
    problem_type: ProblemType,
) -> Scores:
    """Where each output of a row is yes or no, or a number; R rows."""
    if not answers:
        return Scores()
    said_RC = np.concatenate([each[1 + which] for each in answers]).astype(np.float64)
    labels_RC = np.stack([sample.labels for sample, *_ in answers]).astype(np.float64)
    if problem_type == "regression":
        loss = mean_squared_error(labels_RC, said_RC)
        numbers = regression_numbers(labels_RC, said_RC, None)
    else:
        loss = float((np.logaddexp(0, said_RC) - said_RC * labels_RC).mean())
        numbers = multi_label_numbers(labels_RC, torch.from_numpy(said_RC).sigmoid().numpy(), None)
    return Scores(loss, numbers["metric"], numbers[numbers["metric"]])


def _timed(runners: Sequence[Runner], inputs: Mapping[str, Tensor]) -> list[float]:
    """Median milliseconds of each, taken in turn so that a busy machine slows both alike."""
    taken: list[list[float]] = [[] for _ in runners]
    for repeat in range(_WARM_UP + _REPEATS):
        for times, runner in zip(taken, runners, strict=True):
            start = time.perf_counter()
            runner(inputs)
            if repeat >= _WARM_UP:
                times.append(1e3 * (time.perf_counter() - start))
    return [median(times) for times in taken]
