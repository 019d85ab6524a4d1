"""`cache-teacher plan`: what a job will cost, before any GPU hour.

Counts come from a sample of documents spread over the corpus, whose rows are really encoded. What a
target takes comes from a table measured on a strong teacher's distributions, or, with --calibrate,
from what this teacher says about this corpus: all columns of the asked-for targets as a run makes
them, hours, disk speed, and every other kind and size beside it (`choices`).

What a run itself calibrates before its first shard stands in `job/calibrate.py`.
"""

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import ConfigError, NonFiniteTargets
from shared.format.manifest import BatchPlan, HiddenSpec, Manifest
from shared.format.writer import encode_block
from shared.targets.hidden import NO_SCALES, ChannelScales
from shared.targets.record import ClassRanks
from shared.targets.spec import TargetSpec
from teacher_cache.config import PlanConfig
from teacher_cache.engines.base import Engine
from teacher_cache.engines.hf import teacher_of
from teacher_cache.job import calibrate
from teacher_cache.job.assemble import assemble, cut_blocks
from teacher_cache.job.calibrate import Sample
from teacher_cache.job.draft import Draft, resolve
from teacher_cache.job.statistics import histogram
from teacher_cache.select.kinds import SELECTORS, most_classes, no_targets
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tools import choices
from teacher_cache.tools.choices import Choice, Measured

# A strong teacher's candidates are less driven by frequency than those of the teacher whose bytes
# the table (`bytes_by_entries`) has, so a quarter is added.
_ALLOWANCE = 1.25
_DENSE_BYTES = 1.4  # of a class: fp16, whose upper byte compresses; 1.31 of a teacher of 1,024
_LABEL_AND_ENTROPY_BYTES = 2.7  # fp16 and a byte, compressed
_VALUE_BYTES = 4.0  # float32, whose lower bytes do not compress
_LOG_PARTITION_BYTES = 1.9  # of each stored temperature
# bytes of a channel of a hidden state, compressed: benchmarks/README.md
_CHANNEL_BYTES = {"bf16": 1.4, "fp8": 0.85, "int8": 1.0}
_PROBE_BYTES = 64 << 20
_CALIBRATE_TOKENS = 1 << 15
_ROWS_TOKENS = 1 << 17  # of the rows that are encoded


@dataclass(frozen=True, slots=True)
class _Calibrated:
    tokens_per_s: float
    column_bytes: dict[str, float]  # of a position, by column, of the asked-for job
    measured: Measured


def estimate(config: PlanConfig) -> dict[str, Any]:
    """Documents, rows, tokens, positions, shards; bytes of every choice; hours where calibrated."""
    draft = resolve(config, load_teacher=config.calibrate)
    if config.calibrate and draft.task.numbers:
        raise ConfigError(
            "--calibrate compares what may be kept of a distribution; of a regression the "
            "teacher's numbers are kept as they are. Leave it out."
        )
    sample = calibrate.sample_corpus(draft)
    calibrated = None
    if draft.engine is not None:
        calibrated = _calibrate(draft, draft.engine, sample)
    shown = _from_table(draft, sample) if calibrated is None else calibrated.measured.choices
    each = _bytes_by_part(draft, sample, shown, calibrated)
    total = sample.positions * _scale(draft, sample) * sum(each.values())
    free = shutil.disk_usage(_existing(config.out)).free
    numbers = {
        **_counted(draft, sample),
        "choices": [{"text": choice.text, **asdict(choice)} for choice in shown],
        "bytes_per_position": each,
        "bytes": round(total),
        "free_bytes": free,
        "enough_space": free >= 1.1 * total,
        "calibrated": calibrated is not None,
        "generates": draft.preprocessing.generation is not None,
    }
    return numbers if calibrated is None else numbers | _measured(draft, sample, calibrated)


def _scale(draft: Draft, sample: Sample) -> float:
    """Documents of the corpus for each one of the sample."""
    return len(draft.corpus) / sample.documents


def _counted(draft: Draft, sample: Sample) -> dict[str, Any]:
    """What the sample says of the whole corpus, and what is asked for of it."""
    scale, per_shard = _scale(draft, sample), calibrate.documents_per_shard(draft, sample)
    return {
        "documents": len(draft.corpus),
        "sampled_documents": sample.documents,
        "rows": round(len(sample.rows) * scale),
        "tokens": round(sample.tokens * scale),
        "positions": round(sample.positions * scale),
        "documents_per_shard": per_shard,
        "shards": -(-len(draft.corpus) // per_shard),
        "counters": dict(sample.counters),
        "classes": draft.targets.num_classes,
        "targets": draft.targets.kind,
        "asked": draft.targets.text,
    }


def _measured(draft: Draft, sample: Sample, calibrated: _Calibrated) -> dict[str, Any]:
    """Speed, and what the teacher's distributions look like."""
    measured, tokens = calibrated.measured, sample.tokens * _scale(draft, sample)
    return {
        "tokens_per_s": round(calibrated.tokens_per_s),
        "hours": tokens / calibrated.tokens_per_s / 3600,
        "disk_mb_per_s": round(_disk_speed(_existing(draft.config.out)) / 1e6),
        "measured_positions": measured.positions,
        "kept_mass_by_k": measured.kept_mass_by_k,
        "entropy": float(measured.entropy.mean(dtype=np.float64)),
        "entropy_histogram": histogram(measured.entropy, 0, math.log(draft.targets.num_classes)),
    }


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _bytes_by_part(
    draft: Draft, sample: Sample, shown: Sequence[Choice], calibrated: _Calibrated | None
) -> dict[str, float]:
    """Bytes of a position: tokens and lengths, targets, sums over classes, hidden states."""
    if calibrated is not None:
        parts = {"rows": 0.0, "targets": 0.0, "sums": 0.0, "hidden": 0.0}
        for column, size in calibrated.column_bytes.items():
            parts[_part_of(column)] += size
        return parts
    parts = {"rows": _row_bytes(draft, sample)}
    if draft.targets.numbers:
        parts["targets"] = _VALUE_BYTES
    elif draft.targets.distributions:
        parts["targets"] = next(choice.bytes_per_position for choice in shown if choice.asked)
        stored = len(draft.targets.temperatures)
        parts["sums"] = _LABEL_AND_ENTROPY_BYTES + stored * _LOG_PARTITION_BYTES
    if draft.hidden.layers:
        channel = _CHANNEL_BYTES[draft.hidden.codec]
        parts["hidden"] = sum(draft.hidden.widths) * channel / draft.hidden.every
    return parts


def _part_of(column: str) -> str:
    for prefix, part in (
        ("target_", "targets"),
        ("hidden", "hidden"),
        ("entropy", "sums"),
        ("label_logprob", "sums"),
        ("log_partition_ratio", "sums"),
    ):
        if column.startswith(prefix):
            return part
    return "rows"


def _from_table(draft: Draft, sample: Sample) -> list[Choice]:
    if not draft.targets.distributions:
        return []
    possible = draft.task.possible_classes(sample.rows, draft.targets.num_classes)
    return [
        Choice(
            kind=spec.kind,
            size=choices.size_of(spec),
            asked=choices.is_asked(spec, draft.targets),
            bytes_per_position=round(_tabled(spec, possible), 1),
        )
        for spec in choices.specs(draft)
    ]


def _tabled(spec: TargetSpec, possible_classes: float) -> float:
    """Bytes of a position; between two sizes of the table those of an entry go with the logarithm
    of the size, beyond them they stay what they are at the nearest. Of a kind that was never
    measured all planes are counted, as they are before compression."""
    if spec.every_temperature:
        return _DENSE_BYTES * possible_classes
    table, size = SELECTORS[spec.kind].bytes_by_entries, choices.size_of(spec)
    if not table:
        return sum(p.item_bytes * (size if p.per == "entry" else 1) for p in spec.plane_shapes)
    sizes = np.array(list(table))
    each = np.array(list(table.values())) / sizes
    of_entry = float(np.interp(np.log(size), np.log(sizes), each))
    return size * (of_entry * _ALLOWANCE + (spec.value_bits - 7) / 8)


def _row_bytes(draft: Draft, sample: Sample) -> float:
    """Bytes of tokens and lengths, encoded as a run does it."""
    bare = replace(
        draft,
        engine=None,
        teacher_info=None,
        targets=no_targets(draft.targets.num_classes),
        hidden=HiddenSpec(layers=(), widths=(), codec=draft.hidden.codec),
    )
    manifest = calibrate.manifest_of(bare, _batch_plan(1, 1), {})
    own = np.arange(draft.targets.num_classes, dtype=np.uint32)
    chosen = sorted(_first(sample.rows, _ROWS_TOKENS), key=lambda row: row.row_id)
    return sum(_column_bytes(chosen, manifest, ClassRanks(own, own), NO_SCALES, None).values())


def _batch_plan(forward_tokens: int, chunk_positions: int) -> BatchPlan:
    return BatchPlan(
        documents_per_shard=1,
        num_shards=1,
        estimated_tokens=1,
        forward_tokens=forward_tokens,
        chunk_positions=chunk_positions,
        cpu_threads=torch.get_num_threads(),
        asked_shard_tokens=1,
        asked_forward_tokens="auto",
    )


def _first(rows: Sequence[TrainingRow], tokens: int) -> list[TrainingRow]:
    chosen: list[TrainingRow] = []
    for row in rows:
        chosen.append(row)
        tokens -= len(row.input_ids)
        if tokens <= 0:
            break
    return chosen


def _column_bytes(
    chosen: list[TrainingRow],
    manifest: Manifest,
    ranks: ClassRanks,
    scales: ChannelScales,
    engine: Engine | None,
) -> dict[str, float]:
    """Bytes of a position by column, of rows cut into blocks and encoded as a run does it."""
    targets, kept = None, list(range(len(chosen)))
    if engine is not None:
        targets = engine.capture(chosen, manifest, lambda: None)
        bad = targets.bad_rows()
        kept = [index for index in kept if index not in bad]
    sizes: Counter[str] = Counter()
    positions, start = 0, 0
    for number, block in enumerate(cut_blocks(iter([chosen[index] for index in kept]))):
        part = kept[start : start + len(block)]
        start += len(block)
        built = assemble(chosen, part, targets, manifest.columns)
        for name, frame in encode_block(built, number, manifest, ranks, scales).frames.items():
            sizes[name.rpartition(".")[0]] += len(frame)
        positions += int(built.num_positions.sum())
    return {column: size / max(1, positions) for column, size in sizes.items()}


def _calibrate(draft: Draft, engine: Engine, sample: Sample) -> _Calibrated:
    """Learns as a run does, runs a part of the job against the clock, then tries every choice."""
    asked = draft.config.forward_tokens
    forward_tokens = engine.default_forward_tokens if asked == "auto" else asked
    largest = engine.largest(
        calibrate.learning_rows(sample),
        most_classes(draft.targets.num_classes),
        draft.hidden,
        forward_tokens=forward_tokens,
        packed=draft.preprocessing.pack,
    )
    if not len(largest.ids_NK):
        raise NonFiniteTargets(
            f"{draft.config.teacher}: NaN or infinity at every position of the sample, so there is "
            "nothing to measure. Try --dtype float32 or bfloat16."
        )
    targets, ranks = calibrate.learn_targets(draft.targets, largest, sample)
    manifest = calibrate.manifest_of(
        replace(draft, targets=targets), _batch_plan(forward_tokens, engine.chunk_positions), {}
    )
    chosen = sorted(_first(sample.rows, _CALIBRATE_TOKENS), key=lambda row: row.row_id)
    started = time.perf_counter()
    scales = largest.scales(draft.hidden)
    column_bytes = _column_bytes(chosen, manifest, ranks, scales, engine)
    seconds = time.perf_counter() - started
    return _Calibrated(
        tokens_per_s=sum(len(row.input_ids) for row in chosen) / seconds,
        column_bytes=column_bytes,
        measured=choices.measure(draft, teacher_of(engine), sample, largest, forward_tokens),
    )


def _disk_speed(folder: Path) -> float:
    """Bytes per second of writing and flushing 64 MiB beside the cache."""
    probe = folder / f".tmp.probe.{os.getpid()}"
    data = os.urandom(_PROBE_BYTES)
    try:
        started = time.perf_counter()
        with open(probe, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)
