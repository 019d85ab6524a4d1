"""What became of a student in an artefact: the same rows through both, and the clock beside it.

B rows, T tokens, N decisions (a token, a row, or the end of a span), C classes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache
from student_train.export.onnx_files import Arrays, Runner
from student_train.metrics.scores import Scores
from student_train.tasks.base import HardLabels, StudentTask
from student_train.tasks.samples import Reading, Sample
from student_train.tasks.table import task_of

_MAX_LOGITS = 1 << 25  # of one batch, 128 MiB as float32
_MAX_BATCH = 8
_RANDOM_TOKENS = (5, 17, 32)  # lengths of random rows, in turn
_WARM_UP, _REPEATS = 3, 20


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
    """Sums over the decisions so far, and the answers of student and artefact on labelled ones."""

    largest: float = 0.0
    total: float = 0.0
    values: int = 0
    decisions: int = 0
    agreed: int = 0
    answers: list[tuple[Sample, np.ndarray, np.ndarray]] = field(default_factory=list)


def samples_of(cache: Cache, count: int, reading: Reading) -> list[Sample]:
    """Rows of a cache, evenly spread over it; packed documents apart, as students are fed."""
    task = task_of(cache.manifest)
    numbers = np.unique(np.linspace(0, cache.num_rows - 1, min(count, cache.num_rows)).astype(int))
    return [
        sample
        for number in numbers.tolist()
        for sample in task.samples(cache[number], number, reading)
    ]


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
    labels: HardLabels | None,
    task: StudentTask,
) -> Check:
    """Both on the same padded batches; then one row at a time, in turn with `clock`.

    That is the student in float32 torch with its adapters merged: unmerged ones cost time, which
    would make any artefact look fast.
    """
    sums = _Sums()
    for batch in _batches(samples, classes):
        inputs = padded(batch, pad_token)
        _add(sums, batch, (student(inputs), artefact(inputs)), labels, task)
    by_length = sorted(samples, key=lambda sample: sample.length)
    one_row = padded([by_length[len(by_length) // 2]], pad_token)
    torch_ms, artefact_ms = _timed([clock, artefact], one_row)
    ours = task.scores([(sample, logits) for sample, logits, _ in sums.answers], labels)
    theirs = task.scores([(sample, logits) for sample, _, logits in sums.answers], labels)
    return Check(
        max_difference=sums.largest,
        mean_difference=sums.total / max(1, sums.values),
        agreement=sums.agreed / max(1, sums.decisions) if task.chooses else None,
        decisions=sums.decisions,
        torch_ms=round(torch_ms, 3),
        artefact_ms=round(artefact_ms, 3),
        time_ratio=round(artefact_ms / torch_ms, 3),
        student=ours,
        artefact=theirs,
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
    labels: HardLabels | None,
    task: StudentTask,
) -> None:
    for name in both[0]:
        for index, sample in enumerate(batch):
            one_NC, other_NC = (_decisions(name, each[name][index], sample) for each in both)
            difference_NC = np.abs(one_NC - other_NC)
            sums.largest = max(sums.largest, float(difference_NC.max()))
            sums.total += float(difference_NC.sum(dtype=np.float64))
            sums.values += difference_NC.size
            same = task.choices(one_NC) == task.choices(other_NC)
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
